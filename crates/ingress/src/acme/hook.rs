//! The operator's program that publishes DNS records.

use std::{process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use super::{AcmeConfig, AcmeError};

/// The program may wait until every name server of the zone has the record, and that can take minutes.
const LIMIT: Duration = Duration::from_secs(5 * 60);

/// What of its words is told when it fails.
const MAX_WORDS: usize = 500;

/// A TXT record that proves a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) value: String,
}

pub(super) async fn add(config: &AcmeConfig, record: &Record) -> Result<(), AcmeError> {
    run(config, "add", record).await
}

pub(super) async fn remove(config: &AcmeConfig, record: &Record) -> Result<(), AcmeError> {
    run(config, "remove", record).await
}

async fn run(config: &AcmeConfig, action: &'static str, record: &Record) -> Result<(), AcmeError> {
    let failed = |reason: String| AcmeError::Hook { hook: config.hook.clone(), action, record: record.name.clone(), reason };
    let mut command = Command::new(&config.hook);
    command.args([action, &record.name, &record.value]).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(LIMIT, command.output()).await.map_err(|_elapsed| failed(format!("not done within {} s", LIMIT.as_secs())))?;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(MAX_WORDS).collect();
    Err(failed(format!("{}: {words}", output.status)))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    use super::*;
    use crate::acme::tests::config;

    fn with_hook(dir: &Path, script: &str) -> AcmeConfig {
        let config = config(dir);
        fs::write(&config.hook, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&config.hook, fs::Permissions::from_mode(0o755)).unwrap();
        config
    }

    fn record() -> Record {
        Record { name: "_acme-challenge.example.com".into(), value: "-v_1".into() }
    }

    #[tokio::test]
    async fn the_program_gets_action_name_and_value() {
        let temp = tempfile::tempdir().unwrap();
        let config = with_hook(temp.path(), r#"echo "$@" >> "$(dirname "$0")/calls""#);
        add(&config, &record()).await.unwrap();
        remove(&config, &record()).await.unwrap();
        let calls = fs::read_to_string(temp.path().join("calls")).unwrap();
        assert_eq!(calls, "add _acme-challenge.example.com -v_1\nremove _acme-challenge.example.com -v_1\n");
    }

    #[tokio::test]
    async fn a_failure_is_told_with_the_program_s_own_words() {
        let temp = tempfile::tempdir().unwrap();
        let config = with_hook(temp.path(), "echo no such zone >&2; exit 3");
        let error = add(&config, &record()).await.unwrap_err().to_string();
        assert!(error.contains("hook add _acme-challenge.example.com") && error.ends_with("exit status: 3: no such zone"), "{error}");
        fs::remove_file(&config.hook).unwrap();
        assert!(add(&config, &record()).await.unwrap_err().to_string().contains("No such file"));
    }
}
