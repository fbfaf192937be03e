//! Between the store's rows and the domain's nouns.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use hearth_store::{BuildBytes, BuildRow, ConnectorRow, ConnectorVersionRow, ImageRow, MicrovmChange, MicrovmRow, VersionRow};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    arn::{self, ImageArn},
    error::ControlError,
    hooks::Hooks,
    microvm::Record,
    types::{Build, BuildSizes, Connector, ConnectorState, ConnectorVersion, IdlePolicy, Image, ImageSpec, ImageVersion, Microvm},
};

/// A row that this server cannot read.
#[derive(Debug, thiserror::Error)]
#[error("the {column} of {row} cannot be read: {reason}")]
pub(crate) struct Unreadable {
    column: &'static str,
    row: String,
    reason: String,
}

impl From<Unreadable> for ControlError {
    fn from(error: Unreadable) -> Self {
        Self::Internal(error.to_string())
    }
}

/// What a MicroVM was run with, as it is kept in the column `spec`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MicrovmSpec {
    pub execution_role_arn: Option<String>,
    pub idle_policy: Option<IdlePolicy>,
    pub maximum_duration_seconds: u32,
    pub ingress_network_connectors: Vec<String>,
    pub egress_network_connectors: Vec<String>,
    pub run_hook_payload: Option<String>,
    /// The union `logging` as it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logging: Option<serde_json::Value>,
    /// Of the image's version: the structure as it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hooks: Option<serde_json::Value>,
    /// What its image asks for.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
}

/// What the API has where an image does not say; records of earlier versions of this server do not either.
fn default_memory_mib() -> u32 {
    2048
}

/// A state in the service's words.
pub(crate) fn word<T: Serialize>(state: T) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        _ => unreachable!("states are enums without fields, which serialize as their name"),
    }
}

pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("maps with string keys, strings and numbers have a JSON form")
}

/// Milliseconds since the Unix epoch.
pub(crate) fn millis(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

pub(crate) fn time(millis: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

/// `"<n>.0"`.
pub(crate) fn version_name(number: i64) -> String {
    format!("{number}.0")
}

/// `n` of `"<n>.0"`.
pub(crate) fn version_number(name: &str) -> Option<i64> {
    let number = name.strip_suffix(".0")?;
    let canonical = !number.is_empty() && !number.starts_with('0') && number.bytes().all(|byte| byte.is_ascii_digit());
    number.parse().ok().filter(|_| canonical)
}

pub(crate) fn image(row: ImageRow) -> Result<Image, Unreadable> {
    Ok(Image {
        arn: image_arn(&row.account, &row.region, &row.name),
        state: state("state", &row.id, &row.state)?,
        latest_active_version: row.latest_active.map(version_name),
        latest_failed_version: row.latest_failed.map(version_name),
        created_at: time(row.created_ms),
        updated_at: time(row.updated_ms),
        tags: tags(&row.id, &row.tags)?,
        id: row.id,
        name: row.name,
    })
}

pub(crate) fn tags(row: &str, text: &str) -> Result<BTreeMap<String, String>, Unreadable> {
    parse("tags", row, text)
}

pub(crate) fn connector(row: ConnectorRow) -> Result<Connector, Unreadable> {
    Ok(Connector {
        arn: arn::connector(&row.account, &row.region, &row.id),
        name: row.name,
        version: row.number,
        state: ConnectorState::Active,
        spec: parse("spec", &row.id, &row.spec)?,
        last_update: row.update_status.map(|status| (status, row.update_reason)),
        modified_at: time(row.modified_ms),
        id: row.id,
    })
}

/// A connector as a version of it has it.
pub(crate) fn connector_version(newest: &Connector, row: ConnectorVersionRow) -> Result<ConnectorVersion, Unreadable> {
    let spec = parse("spec", &newest.id, &row.spec)?;
    let connector = Connector { spec, ..newest.clone() };
    Ok(ConnectorVersion { connector, version: row.number, created_at: time(row.created_ms) })
}

pub(crate) fn version(image: &ImageRow, row: VersionRow) -> Result<ImageVersion, Unreadable> {
    Ok(ImageVersion {
        image_arn: image_arn(&image.account, &image.region, &image.name),
        version: version_name(row.number),
        state: state("state", &row.image_id, &row.state)?,
        status: state("status", &row.image_id, &row.status)?,
        state_reason: row.state_reason,
        spec: parse::<ImageSpec>("spec", &row.image_id, &row.spec)?,
        created_at: time(row.created_ms),
        updated_at: time(row.updated_ms),
        tags: tags(&image.id, &image.tags)?,
    })
}

pub(crate) fn build(image: &ImageRow, version: &VersionRow, row: BuildRow) -> Result<Build, Unreadable> {
    let size = |bytes: Option<i64>| bytes.and_then(|bytes| u64::try_from(bytes).ok());
    Ok(Build {
        image_arn: image_arn(&image.account, &image.region, &image.name),
        version: version_name(row.number),
        state: state("state", &row.id, &row.state)?,
        state_reason: row.state_reason,
        architectures: parse::<ImageSpec>("spec", &version.image_id, &version.spec)?.architectures(),
        created_at: time(row.created_ms),
        sizes: BuildSizes {
            code_install: size(row.bytes.code_install),
            disk_snapshot: size(row.bytes.disk_snapshot),
            memory_snapshot: size(row.bytes.memory_snapshot),
        },
        id: row.id,
    })
}

pub(crate) fn build_bytes(sizes: BuildSizes) -> BuildBytes {
    let size = |bytes: Option<u64>| bytes.and_then(|bytes| i64::try_from(bytes).ok());
    BuildBytes {
        code_install: size(sizes.code_install),
        disk_snapshot: size(sizes.disk_snapshot),
        memory_snapshot: size(sizes.memory_snapshot),
    }
}

pub(crate) fn microvm(row: MicrovmRow) -> Result<Record, Unreadable> {
    let spec: MicrovmSpec = parse("spec", &row.id, &row.spec)?;
    Ok(Record {
        vm: Microvm {
            image_arn: image_arn(&row.account, &row.region, &row.image_name),
            version: version_name(row.number),
            state: state("state", &row.id, &row.state)?,
            state_reason: row.state_reason,
            endpoint: row.endpoint,
            execution_role_arn: spec.execution_role_arn,
            idle_policy: spec.idle_policy,
            maximum_duration_seconds: spec.maximum_duration_seconds,
            started_at: time(row.started_ms),
            terminated_at: row.terminated_ms.map(time),
            ingress_network_connectors: spec.ingress_network_connectors,
            egress_network_connectors: spec.egress_network_connectors,
            id: row.id.clone(),
        },
        logging: spec.logging,
        hooks: Hooks::new(spec.hooks),
        run_hook_payload: spec.run_hook_payload,
        memory_mib: spec.memory_mib,
        generation: u64::try_from(row.generation).unwrap_or(1),
        suspended_at: row.suspended_ms.map(time),
        suspended_by: row.suspended_by.map(|by| state("suspended_by", &row.id, &by)).transpose()?,
        account: row.account,
        region: row.region,
        image_id: row.image_id,
        image_name: row.image_name,
        number: row.number,
    })
}

/// What of a MicroVM is written at each transition.
pub(crate) fn change(record: &Record) -> MicrovmChange {
    MicrovmChange {
        state: word(record.vm.state),
        state_reason: record.vm.state_reason.clone(),
        generation: i64::try_from(record.generation).unwrap_or(i64::MAX),
        suspended_ms: record.suspended_at.map(millis),
        suspended_by: record.suspended_by.map(word),
        terminated_ms: record.vm.terminated_at.map(millis),
    }
}

fn image_arn(account: &str, region: &str, name: &str) -> String {
    ImageArn { region: region.to_owned(), account: account.to_owned(), name: name.to_owned() }.to_string()
}

fn state<T: DeserializeOwned>(column: &'static str, row: &str, word: &str) -> Result<T, Unreadable> {
    serde_json::from_value(serde_json::Value::String(word.to_owned())).map_err(|error| unreadable(column, row, &error))
}

fn parse<T: DeserializeOwned>(column: &'static str, row: &str, text: &str) -> Result<T, Unreadable> {
    serde_json::from_str(text).map_err(|error| unreadable(column, row, &error))
}

fn unreadable(column: &'static str, row: &str, error: &serde_json::Error) -> Unreadable {
    Unreadable { column, row: row.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ImageState, MicrovmState};

    #[test]
    fn states_have_the_service_s_names() {
        assert_eq!(word(ImageState::CreateFailed), "CREATE_FAILED");
        assert_eq!(word(MicrovmState::Pending), "PENDING");
    }

    #[test]
    fn versions_are_whole_numbers_with_a_zero() {
        assert_eq!(version_number("12.0"), Some(12));
        for name in ["1", "1.1", "0.0", "01.0", "-1.0", "+1.0", ".0", "1.0.0", "99999999999999999999.0"] {
            assert_eq!(version_number(name), None, "{name}");
        }
    }

    #[test]
    fn times_keep_their_milliseconds() {
        assert_eq!(millis(time(1_700_000_000_123)), 1_700_000_000_123);
    }
}
