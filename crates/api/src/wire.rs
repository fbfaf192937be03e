//! The members of requests and responses of `lambda-microvms`. Responses have every member that AWS sends, unset ones as null, and the few that
//! AWS sends without having them in its model (SPEC 5).

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::{OffsetDateTime, macros::format_description};

use hearth_control::{
    Architecture,
    types::{
        Build, BuildState, Image, ImageSpec, ImageState, ImageVersion, ManagedImage, ManagedImageVersion, Microvm, MicrovmState,
        VersionState, VersionStatus,
    },
};

/// There is one build per version here, so there is one generation.
const CHIPSET_GENERATION: &str = "1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CreateImageInput {
    pub name: String,
    #[serde(flatten)]
    pub spec: SpecInput,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    pub client_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UpdateImageInput {
    pub image_identifier: String,
    #[serde(flatten)]
    pub spec: SpecInput,
    pub client_token: Option<String>,
}

/// What an image version is made of.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SpecInput {
    pub base_image_arn: String,
    pub base_image_version: Option<String>,
    pub build_role_arn: String,
    pub description: Option<String>,
    pub code_artifact: CodeArtifact,
    pub logging: Option<Value>,
    #[serde(default)]
    pub egress_network_connectors: Vec<String>,
    pub cpu_configurations: Option<Value>,
    #[serde(default)]
    pub resources: Vec<Resources>,
    pub additional_os_capabilities: Option<Vec<String>>,
    pub hooks: Option<Value>,
    pub environment_variables: Option<BTreeMap<String, String>>,
    pub kms_key_identifier: Option<String>,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct CodeArtifact {
    pub uri: String,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct Resources {
    #[serde(rename = "minimumMemoryInMiB")]
    pub minimum_memory_in_mib: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RunInput {
    pub image_identifier: String,
    pub image_version: Option<String>,
    pub execution_role_arn: Option<String>,
    pub idle_policy: Option<IdlePolicy>,
    pub maximum_duration_in_seconds: Option<u32>,
    #[serde(default)]
    pub ingress_network_connectors: Vec<String>,
    #[serde(default)]
    pub egress_network_connectors: Vec<String>,
    pub logging: Option<Value>,
    pub kms_key_identifier: Option<String>,
    pub run_hook_payload: Option<String>,
    pub client_token: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct IdlePolicy {
    pub max_idle_duration_seconds: u32,
    pub suspended_duration_seconds: u32,
    pub auto_resume_enabled: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageInput {
    pub image_identifier: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VersionInput {
    pub image_identifier: String,
    pub image_version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VersionStatusInput {
    pub image_identifier: String,
    pub image_version: String,
    pub status: VersionStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildInput {
    pub image_identifier: String,
    pub image_version: String,
    pub build_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MicrovmInput {
    pub microvm_identifier: String,
}

/// Members of all lists; each operation uses those that its model has.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ListInput {
    pub max_results: Option<u32>,
    pub next_token: Option<String>,
    pub name_filter: Option<String>,
    pub image_identifier: Option<String>,
    pub image_version: Option<String>,
    pub architecture: Option<String>,
    pub chipset: Option<String>,
    pub chipset_generation: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AuthTokenInput {
    pub microvm_identifier: String,
    pub expiration_in_minutes: u32,
    pub allowed_ports: Vec<PortSpecification>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ShellTokenInput {
    pub microvm_identifier: String,
    pub expiration_in_minutes: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct TagsInput {
    pub resource: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub tag_keys: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum PortSpecification {
    Port(u16),
    #[serde(rename_all = "camelCase")]
    Range {
        start_port: u16,
        end_port: u16,
    },
    AllPorts {},
}

/// What an image version was made from, as every answer about one shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Inputs {
    base_image_arn: String,
    base_image_version: String,
    build_role_arn: String,
    description: Option<String>,
    code_artifact: CodeArtifact,
    logging: Option<Value>,
    egress_network_connectors: Vec<String>,
    cpu_configurations: Option<Value>,
    resources: Vec<Resources>,
    additional_os_capabilities: Option<Value>,
    hooks: Option<Value>,
    environment_variables: Option<BTreeMap<String, String>>,
    /// Null: a request that names a key is refused.
    kms_key_identifier: Option<String>,
    build_phase_overrides: Option<Value>,
    role_configuration: Option<Value>,
}

impl From<ImageSpec> for Inputs {
    fn from(mut spec: ImageSpec) -> Self {
        Self {
            base_image_version: format!("{}.0", spec.base_image_version.as_deref().unwrap_or("1")),
            base_image_arn: spec.base_image_arn,
            build_role_arn: spec.build_role_arn,
            description: spec.description,
            code_artifact: CodeArtifact { uri: spec.code_artifact_uri },
            logging: spec.echoed.remove("logging"),
            egress_network_connectors: spec.egress_network_connectors,
            cpu_configurations: spec.echoed.remove("cpuConfigurations"),
            resources: vec![Resources { minimum_memory_in_mib: i32::try_from(spec.memory_mib).unwrap_or(i32::MAX) }],
            additional_os_capabilities: spec.echoed.remove("additionalOsCapabilities"),
            hooks: spec.echoed.remove("hooks"),
            environment_variables: spec.environment,
            kms_key_identifier: None,
            build_phase_overrides: None,
            role_configuration: None,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CreatedImage {
    #[serde(flatten)]
    image: ImageItem,
    #[serde(flatten)]
    inputs: Inputs,
    image_version: String,
    tags: Option<BTreeMap<String, String>>,
    updated_at: Option<f64>,
}

impl CreatedImage {
    pub fn new(image: Image, version: ImageVersion) -> Self {
        let tags = Some(image.tags.clone()).filter(|tags| !tags.is_empty());
        let updated_at = epoch(image.updated_at);
        Self { image: image.into(), inputs: version.spec.into(), image_version: version.version, tags, updated_at }
    }
}

/// What is told of a created image, but for its tags.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UpdatedImage {
    #[serde(flatten)]
    image: ImageItem,
    #[serde(flatten)]
    inputs: Inputs,
    image_version: String,
    updated_at: Option<f64>,
}

impl UpdatedImage {
    pub fn new(image: Image, version: ImageVersion) -> Self {
        let updated_at = epoch(image.updated_at);
        Self { image: image.into(), inputs: version.spec.into(), image_version: version.version, updated_at }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageItem {
    id: String,
    image_arn: String,
    name: String,
    state: ImageState,
    latest_active_image_version: Option<String>,
    latest_failed_image_version: Option<String>,
    created_at: Option<f64>,
}

impl From<Image> for ImageItem {
    fn from(image: Image) -> Self {
        Self {
            id: image.id,
            image_arn: image.arn,
            name: image.name,
            state: image.state,
            latest_active_image_version: image.latest_active_version,
            latest_failed_image_version: image.latest_failed_version,
            created_at: epoch(image.created_at),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageSummary {
    #[serde(flatten)]
    image: ImageItem,
    tags: BTreeMap<String, String>,
    updated_at: Option<f64>,
}

impl From<Image> for ImageSummary {
    fn from(image: Image) -> Self {
        let (tags, updated_at) = (image.tags.clone(), epoch(image.updated_at));
        Self { image: image.into(), tags, updated_at }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeletedImage {
    image_identifier: String,
    state: ImageState,
}

impl From<Image> for DeletedImage {
    fn from(image: Image) -> Self {
        Self { image_identifier: image.arn, state: image.state }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeletedVersion {
    image_identifier: String,
    image_version: String,
    state: VersionState,
}

impl From<ImageVersion> for DeletedVersion {
    fn from(version: ImageVersion) -> Self {
        Self { image_identifier: version.image_arn, image_version: version.version, state: version.state }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ManagedImageItem {
    created_at: Option<f64>,
    image_arn: String,
    updated_at: Option<f64>,
}

impl From<ManagedImage> for ManagedImageItem {
    fn from(image: ManagedImage) -> Self {
        Self { created_at: epoch(image.created_at), image_arn: image.arn, updated_at: epoch(image.created_at) }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ManagedVersionItem {
    #[serde(flatten)]
    image: ManagedImageItem,
    image_version: String,
    status: &'static str,
    supported_cpu_configurations: Vec<CpuConfiguration>,
}

#[derive(Serialize)]
struct CpuConfiguration {
    architecture: Architecture,
}

impl From<ManagedImageVersion> for ManagedVersionItem {
    fn from(version: ManagedImageVersion) -> Self {
        Self {
            image: version.image.into(),
            image_version: version.version,
            status: "AVAILABLE",
            supported_cpu_configurations: version.architectures.into_iter().map(|architecture| CpuConfiguration { architecture }).collect(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Version {
    #[serde(flatten)]
    inputs: Inputs,
    image_arn: String,
    image_version: String,
    state: VersionState,
    state_reason: Option<String>,
    status: VersionStatus,
    tags: BTreeMap<String, String>,
    created_at: Option<f64>,
    updated_at: Option<f64>,
    version_state_time_bucket: String,
}

impl From<ImageVersion> for Version {
    fn from(version: ImageVersion) -> Self {
        Self {
            version_state_time_bucket: time_bucket(version.state, version.updated_at),
            inputs: version.spec.into(),
            image_arn: version.image_arn,
            image_version: version.version,
            state: version.state,
            state_reason: version.state_reason,
            status: version.status,
            tags: version.tags,
            created_at: epoch(version.created_at),
            updated_at: epoch(version.updated_at),
        }
    }
}

impl Version {
    /// As it is in lists: without its environment.
    pub fn listed(version: ImageVersion) -> Self {
        let mut listed = Self::from(version);
        listed.inputs.environment_variables = None;
        listed
    }
}

/// For example `SUCCESSFUL#26073005`: the state and the hour it is from.
fn time_bucket(state: VersionState, at: SystemTime) -> String {
    let hour = OffsetDateTime::from(at).format(format_description!("[year repr:last_two][month][day][hour]")).unwrap_or_default();
    let state = serde_json::to_value(state).ok();
    format!("{}#{hour}", state.as_ref().and_then(Value::as_str).unwrap_or_default())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildItem {
    architecture: Architecture,
    build_id: String,
    build_state: BuildState,
    chipset: &'static str,
    chipset_generation: &'static str,
    created_at: Option<f64>,
    image_arn: String,
    image_version: String,
    state_reason: Option<String>,
    termination_reason_code: Option<String>,
}

impl BuildItem {
    /// A build as one of its targets has it, if that is what is looked for. One build is for every architecture that was asked for; a filter
    /// shows it as the one that it names.
    pub fn matching(build: Build, filter: &ListInput) -> Option<Self> {
        let fits = |wanted: &Option<String>, ours: &str| wanted.as_ref().is_none_or(|wanted| wanted == ours);
        let target = build.architectures.iter().copied().find(|target| {
            fits(&filter.architecture, target.name())
                && fits(&filter.chipset, target.chipset())
                && fits(&filter.chipset_generation, CHIPSET_GENERATION)
        })?;
        Some(Self::of(build, target))
    }

    fn of(mut build: Build, target: Architecture) -> Self {
        if target != Architecture::HOST && build.state_reason.is_none() {
            build.state_reason = Some(format!("{target} was asked for. Built for {}, the architecture of this host.", Architecture::HOST));
        }
        Self {
            architecture: target,
            build_id: build.id,
            build_state: build.state,
            chipset: target.chipset(),
            chipset_generation: CHIPSET_GENERATION,
            created_at: epoch(build.created_at),
            image_arn: build.image_arn,
            image_version: build.version,
            state_reason: build.state_reason,
            termination_reason_code: None,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BuildDetail {
    #[serde(flatten)]
    build: BuildItem,
    /// Absent, not null, while the build has no sizes (SPEC 5.3).
    #[serde(skip_serializing_if = "SnapshotBuild::is_empty")]
    snapshot_build: SnapshotBuild,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SnapshotBuild {
    #[serde(skip_serializing_if = "Option::is_none")]
    code_install_size_in_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_snapshot_size_in_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_snapshot_size_in_bytes: Option<u64>,
}

impl SnapshotBuild {
    fn is_empty(&self) -> bool {
        self.code_install_size_in_bytes.is_none()
            && self.disk_snapshot_size_in_bytes.is_none()
            && self.memory_snapshot_size_in_bytes.is_none()
    }
}

impl From<Build> for BuildDetail {
    fn from(build: Build) -> Self {
        let snapshot_build = SnapshotBuild {
            code_install_size_in_bytes: build.sizes.code_install,
            disk_snapshot_size_in_bytes: build.sizes.disk_snapshot,
            memory_snapshot_size_in_bytes: build.sizes.memory_snapshot,
        };
        let target = build.architectures.first().copied().unwrap_or(Architecture::HOST);
        Self { build: BuildItem::of(build, target), snapshot_build }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MicrovmDetail {
    egress_network_connectors: Vec<String>,
    endpoint: String,
    execution_role_arn: Option<String>,
    idle_policy: Option<IdlePolicy>,
    image_arn: String,
    image_version: String,
    ingress_network_connectors: Vec<String>,
    /// Null: a request that names a key is refused.
    kms_key_identifier: Option<String>,
    maximum_duration_in_seconds: u32,
    microvm_id: String,
    started_at: Option<f64>,
    state: MicrovmState,
    state_reason: Option<String>,
    terminated_at: Option<f64>,
    termination_reason_code: Option<String>,
}

impl From<Microvm> for MicrovmDetail {
    fn from(microvm: Microvm) -> Self {
        Self {
            egress_network_connectors: microvm.egress_network_connectors,
            endpoint: microvm.endpoint,
            execution_role_arn: microvm.execution_role_arn,
            idle_policy: microvm.idle_policy.map(|policy| IdlePolicy {
                max_idle_duration_seconds: policy.max_idle_seconds,
                suspended_duration_seconds: policy.suspended_seconds,
                auto_resume_enabled: policy.auto_resume,
            }),
            image_arn: microvm.image_arn,
            image_version: microvm.version,
            ingress_network_connectors: microvm.ingress_network_connectors,
            kms_key_identifier: None,
            maximum_duration_in_seconds: microvm.maximum_duration_seconds,
            microvm_id: microvm.id,
            started_at: epoch(microvm.started_at),
            state: microvm.state,
            state_reason: microvm.state_reason,
            terminated_at: microvm.terminated_at.and_then(epoch),
            termination_reason_code: None,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MicrovmItem {
    image_arn: String,
    image_version: String,
    microvm_id: String,
    started_at: Option<f64>,
    state: MicrovmState,
}

impl From<Microvm> for MicrovmItem {
    fn from(microvm: Microvm) -> Self {
        Self {
            image_arn: microvm.image_arn,
            image_version: microvm.version,
            microvm_id: microvm.id,
            started_at: epoch(microvm.started_at),
            state: microvm.state,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ItemList<T> {
    pub items: Vec<T>,
    pub next_token: Option<String>,
}

/// Seconds since 1970 with a fraction of milliseconds. `None` (null on the wire) for times before.
fn epoch(at: SystemTime) -> Option<f64> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    // Exact: milliseconds of this age have far fewer than 53 bits.
    #[expect(clippy::cast_precision_loss)]
    let milliseconds = since.as_millis() as f64;
    Some(milliseconds / 1000.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_seconds_with_milliseconds() {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms) + Duration::from_nanos(999);
        assert_eq!(serde_json::to_string(&epoch(at(1_781_833_144_754))).unwrap(), "1781833144.754");
        assert_eq!(serde_json::to_string(&epoch(at(1_793_500_200_000))).unwrap(), "1793500200.0");
    }

    const OTHER: Architecture = if cfg!(target_arch = "aarch64") { Architecture::X86_64 } else { Architecture::Arm64 };

    fn found(asked: &[Architecture], filter: Value) -> Option<Value> {
        let build = Build {
            id: "b1".to_owned(),
            image_arn: "arn".to_owned(),
            version: "1.0".to_owned(),
            state: BuildState::Successful,
            state_reason: None,
            architectures: asked.to_vec(),
            created_at: SystemTime::UNIX_EPOCH,
            sizes: hearth_control::types::BuildSizes::default(),
        };
        BuildItem::matching(build, &serde_json::from_value(filter).unwrap()).map(|item| serde_json::to_value(item).unwrap())
    }

    #[test]
    fn list_builds_of_another_architecture_are_found_by_what_was_asked_for() {
        let (host, other) = (Architecture::HOST.name(), OTHER.name());
        for filter in [json!({}), json!({"architecture": other}), json!({"chipset": OTHER.chipset(), "chipsetGeneration": "1"})] {
            let item = found(&[OTHER], filter).unwrap();
            assert_eq!((&item["architecture"], &item["chipset"]), (&json!(other), &json!(OTHER.chipset())));
            assert_eq!(item["stateReason"], format!("{other} was asked for. Built for {host}, the architecture of this host."));
        }
        for filter in [
            json!({"architecture": host}),
            json!({"architecture": other, "chipset": Architecture::HOST.chipset()}),
            json!({"chipsetGeneration": "4"}),
        ] {
            assert_eq!(found(&[OTHER], filter), None);
        }
    }

    #[test]
    fn list_builds_of_several_architectures_are_shown_as_the_one_that_is_looked_for() {
        let asked = [Architecture::HOST, OTHER];
        assert_eq!(found(&asked, json!({})).unwrap()["architecture"], Architecture::HOST.name());
        for target in asked {
            let item = found(&asked, json!({"architecture": target})).unwrap();
            assert_eq!((&item["architecture"], item["stateReason"].is_null()), (&json!(target), target == Architecture::HOST));
        }
    }

    #[test]
    fn a_time_bucket_is_state_and_hour() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_785_387_000);
        assert_eq!(time_bucket(VersionState::Successful, at), "SUCCESSFUL#26073004");
    }

    #[test]
    fn port_specifications_are_unions() {
        let read = |text| serde_json::from_str::<PortSpecification>(text);
        assert!(matches!(read(r#"{"port": 80}"#), Ok(PortSpecification::Port(80))));
        assert!(matches!(
            read(r#"{"range": {"startPort": 1, "endPort": 2}}"#),
            Ok(PortSpecification::Range { start_port: 1, end_port: 2 })
        ));
        assert!(matches!(read(r#"{"allPorts": {}}"#), Ok(PortSpecification::AllPorts {})));
    }
}
