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
}

impl Default for RolesConfig {
    fn default() -> Self {
        Self { session_seconds: 3300, endpoint_variables: true }
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
        let fits = (2..=43_200).contains(&seconds);
        (!fits).then(|| ("roles.session_seconds", seconds.to_string(), "a number of seconds from 2 to 43200"))
    }
}

/// What AWS does not have. Everything is off unless it is switched on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExtensionsConfig {
    /// A MicroVM may suspend itself: `PUT /latest/hearth/suspend` at the metadata address. `false`.
    pub self_suspend: bool,
}
