//! Settings of what guests get from the server: credentials of their roles, its API, and what AWS does not have.

use std::time::Duration;

use serde::Deserialize;

/// Credentials of execution roles and build roles.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RolesConfig {
    /// How long credentials are good for, in seconds, 2 to 43200. They are renewed when half of it is over. 3300.
    pub session_seconds: u32,
    /// Images' environment tells SDKs to find this server's services at the metadata address. `true`.
    pub endpoint_variables: bool,
    /// An AWS account whose roles are assumed instead of this server's. None.
    pub aws: Option<AwsConfig>,
}

/// How roles of an AWS account are assumed: whose keys sign, and where. Keys are the ones that are written here, else the profile's, else those of
/// the server's environment, else those of the profile `default`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AwsConfig {
    /// Region of the Security Token Service. `us-east-1`.
    pub region: Option<String>,
    /// URL of the Security Token Service. The region's.
    pub endpoint: Option<String>,
    /// Profile in `$AWS_SHARED_CREDENTIALS_FILE`, else `~/.aws/credentials`.
    pub profile: Option<String>,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<String>,
    /// Of temporary credentials.
    pub session_token: Option<String>,
    /// URL of the Elastic Container Registry's API. That of each registry's region.
    pub ecr_endpoint: Option<String>,
    /// Registries (`host:port`) that take its logins, beside `<account>.dkr.ecr.<region>.amazonaws.com`. None.
    pub ecr_registries: Vec<String>,
}

/// Neither the secret nor the token gets into logs.
impl std::fmt::Debug for AwsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { region, endpoint, profile, access_key_id, .. } = self;
        f.debug_struct("AwsConfig")
            .field("region", region)
            .field("endpoint", endpoint)
            .field("profile", profile)
            .field("access_key_id", access_key_id)
            .finish_non_exhaustive()
    }
}

impl Default for RolesConfig {
    fn default() -> Self {
        Self { session_seconds: 3300, endpoint_variables: true, aws: None }
    }
}

impl RolesConfig {
    /// How long credentials are good for.
    pub fn lifetime(&self) -> Duration {
        Duration::from_secs(self.session_seconds.into())
    }

    /// A setting that makes no sense: its key, its value, and what would do.
    pub fn unusable(&self) -> Option<(&'static str, String, &'static str)> {
        let seconds = self.session_seconds;
        let Some(aws) = &self.aws else {
            let fits = (2..=43_200).contains(&seconds);
            return (!fits).then(|| ("roles.session_seconds", seconds.to_string(), "a number of seconds from 2 to 43200"));
        };
        if !(900..=43_200).contains(&seconds) {
            return Some(("roles.session_seconds", seconds.to_string(), "a number of seconds from 900 to 43200, as AWS has it,"));
        }
        if aws.access_key_id.is_some() != aws.secret_access_key.is_some() {
            let found = aws.access_key_id.clone().unwrap_or_default();
            return Some(("roles.aws.access_key_id", found, "an access key id together with its secret_access_key"));
        }
        let endpoint = aws.endpoint.as_deref().filter(|endpoint| !endpoint.starts_with("http://") && !endpoint.starts_with("https://"));
        endpoint.map(|endpoint| ("roles.aws.endpoint", endpoint.to_owned(), "a URL such as \"https://sts.eu-west-1.amazonaws.com\""))
    }
}

/// What AWS does not have. Everything is off unless it is switched on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExtensionsConfig {
    /// A MicroVM may suspend itself: `PUT /latest/hearth/suspend` at the metadata address. `false`.
    pub self_suspend: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_with_its_key() {
        for (text, key) in [
            ("session_seconds = 1", "roles.session_seconds"),
            ("session_seconds = 60\n[aws]", "roles.session_seconds"),
            ("[aws]\naccess_key_id = \"AKIA\"", "roles.aws.access_key_id"),
            ("[aws]\nendpoint = \"sts.amazonaws.com\"", "roles.aws.endpoint"),
        ] {
            let config: RolesConfig = toml::from_str(text).unwrap();
            assert_eq!(config.unusable().map(|(key, ..)| key), Some(key), "{text}");
        }
        for text in ["", "session_seconds = 16", "[aws]\nprofile = \"hearth\"", "session_seconds = 900\n[aws]"] {
            assert_eq!(toml::from_str::<RolesConfig>(text).unwrap().unusable(), None, "{text}");
        }
    }
}
