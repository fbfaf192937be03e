//! The operator's own keys for AWS, looked for where AWS's tools look.

use std::{env, fs, io, path::PathBuf};

use crate::config::AwsConfig;

/// What requests to AWS are signed with.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
}

/// There are none.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// the file cannot be read
    #[error("reading the AWS profile {profile} in {path}: {source}")]
    Read {
        /// Name of the profile.
        profile: String,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// the profile has no keys
    #[error("{path} has no profile {profile} with aws_access_key_id and aws_secret_access_key: add one, or set keys in [roles.aws]")]
    Profile {
        /// Name of the profile.
        profile: String,
        /// The file.
        path: PathBuf,
    },
}

/// Finds the keys. Each time anew: other programs renew what is in the file.
pub fn find(config: &AwsConfig) -> Result<Keys, KeysError> {
    if let (Some(id), Some(secret)) = (&config.access_key_id, &config.secret_access_key) {
        return Ok(Keys { access_key_id: id.clone(), secret_access_key: secret.clone(), session_token: config.session_token.clone() });
    }
    let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
    if config.profile.is_none()
        && let (Some(access_key_id), Some(secret_access_key)) = (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"))
    {
        return Ok(Keys { access_key_id, secret_access_key, session_token: variable("AWS_SESSION_TOKEN") });
    }
    let path = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
    let path = path.unwrap_or_else(|| PathBuf::from(variable("HOME").unwrap_or_default()).join(".aws/credentials"));
    let profile = config.profile.as_deref().unwrap_or("default").to_owned();
    match fs::read_to_string(&path) {
        Ok(text) => of_profile(&text, &profile).ok_or(KeysError::Profile { profile, path }),
        Err(source) => Err(KeysError::Read { profile, path, source }),
    }
}

/// The keys of a profile: a section of `name = value` lines (AWS SDKs and Tools reference guide, "Shared config and credentials files").
fn of_profile(text: &str, profile: &str) -> Option<Keys> {
    let lines = text.lines().map(str::trim);
    let section = lines.skip_while(|line| section_name(line) != Some(profile)).skip(1).take_while(|line| section_name(line).is_none());
    let pairs: Vec<(&str, &str)> =
        section.filter_map(|line| line.split_once('=')).map(|(name, value)| (name.trim(), value.trim())).collect();
    let value = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Some(Keys {
        access_key_id: value("aws_access_key_id")?,
        secret_access_key: value("aws_secret_access_key")?,
        session_token: value("aws_session_token"),
    })
}

fn section_name(line: &str) -> Option<&str> {
    Some(line.strip_prefix('[')?.split_once(']')?.0.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_s_keys_are_its_section_s() {
        let text = "# mine\n[default]\naws_access_key_id=A\naws_secret_access_key = s=1\n\n[ other ]\n aws_access_key_id = B\n\
                    aws_secret_access_key = t\naws_session_token = u\n[empty]\n[half]\naws_access_key_id = C\n";
        let found = |profile| of_profile(text, profile).map(|keys| (keys.access_key_id, keys.secret_access_key, keys.session_token));
        assert_eq!(found("default"), Some(("A".to_owned(), "s=1".to_owned(), None)));
        assert_eq!(found("other"), Some(("B".to_owned(), "t".to_owned(), Some("u".to_owned()))));
        for none in ["empty", "half", "nobody"] {
            assert_eq!(found(none), None, "{none}");
        }
    }
}
