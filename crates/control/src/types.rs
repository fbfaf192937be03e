//! The nouns of the service, with its own names for them (SPEC section 2). Times are wall-clock; durations and sizes carry their unit in the name.

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Serialize};

use crate::architecture::Architecture;

/// Who calls, and where: an account sees only its own resources, in one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Twelve digits.
    pub account: String,
    /// For example `us-east-1`.
    pub region: String,
    /// ARN of the principal that signed.
    pub principal: String,
}

/// State of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ImageState {
    Creating,
    Created,
    CreateFailed,
    Updating,
    Updated,
    UpdateFailed,
    Deleting,
    DeleteFailed,
}

/// State of an image version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum VersionState {
    Pending,
    InProgress,
    Successful,
    Failed,
    Deleting,
    DeleteFailed,
}

/// Whether a version may be launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum VersionStatus {
    Active,
    Inactive,
}

/// State of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum BuildState {
    Pending,
    InProgress,
    Successful,
    Failed,
}

/// State of a MicroVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MicrovmState {
    Pending,
    Running,
    Suspending,
    Suspended,
    Terminating,
    Terminated,
}

/// Everything an image version is built from. Members that this server does not act on yet are kept as they were sent, to be echoed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// ARN of the managed base image.
    pub base_image_arn: String,
    /// Major version of the managed base image, as the caller wrote it.
    pub base_image_version: Option<String>,
    /// Role that the build runs with.
    pub build_role_arn: String,
    /// Free text.
    pub description: Option<String>,
    /// `s3://bucket/key` of the zip with the Dockerfile at its root.
    pub code_artifact_uri: String,
    /// 512, 1024, 2048, 4096 or 8192 MiB.
    pub memory_mib: u32,
    /// Connector ARNs; at most one.
    pub egress_network_connectors: Vec<String>,
    /// Environment baked into the image.
    pub environment: Option<BTreeMap<String, String>>,
    /// `additionalOsCapabilities` is `["ALL"]`.
    pub all_capabilities: bool,
    /// `additionalOsCapabilities`, `cpuConfigurations`, `hooks`, `logging`: echoed as sent.
    pub echoed: BTreeMap<String, serde_json::Value>,
}

/// What CreateMicrovmImage asks for.
#[derive(Debug, Clone)]
pub struct CreateImage {
    /// 1–64 characters of `[a-zA-Z0-9-_]`.
    pub name: String,
    /// What to build.
    pub spec: ImageSpec,
    /// Tags of the image.
    pub tags: BTreeMap<String, String>,
    /// Idempotency token.
    pub client_token: Option<String>,
}

/// What UpdateMicrovmImage asks for: a version that has nothing from the ones before it.
#[derive(Debug, Clone)]
pub struct UpdateImage {
    /// What to build.
    pub spec: ImageSpec,
    /// Idempotency token.
    pub client_token: Option<String>,
}

/// An image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// UUID.
    pub id: String,
    /// `arn:aws:lambda:<region>:<account>:microvm-image:<name>`.
    pub arn: String,
    /// Unique in account and region.
    pub name: String,
    pub state: ImageState,
    /// `"<n>.0"`.
    pub latest_active_version: Option<String>,
    /// `"<n>.0"`.
    pub latest_failed_version: Option<String>,
    pub created_at: SystemTime,
    pub updated_at: SystemTime,
    pub tags: BTreeMap<String, String>,
}

/// A version of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageVersion {
    pub image_arn: String,
    /// `"<n>.0"`.
    pub version: String,
    pub state: VersionState,
    pub status: VersionStatus,
    pub state_reason: Option<String>,
    pub spec: ImageSpec,
    pub created_at: SystemTime,
    pub updated_at: SystemTime,
    pub tags: BTreeMap<String, String>,
}

/// A build of a version.
#[derive(Debug, Clone, PartialEq)]
pub struct Build {
    /// UUID.
    pub id: String,
    pub image_arn: String,
    /// `"<n>.0"`.
    pub version: String,
    pub state: BuildState,
    pub state_reason: Option<String>,
    /// What the version's specification asks for, the host's own first.
    pub architectures: Vec<Architecture>,
    pub created_at: SystemTime,
    /// Sizes, as far as the build got.
    pub sizes: BuildSizes,
}

/// Sizes of what a build made, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSizes {
    /// The root file system's contents.
    pub code_install: Option<u64>,
    /// What booting wrote to the disk.
    pub disk_snapshot: Option<u64>,
    /// Guest memory without holes, plus device state.
    pub memory_snapshot: Option<u64>,
}

/// A base image of the server's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedImage {
    /// `arn:aws:lambda:<region>:aws:microvm-image:<name>`.
    pub arn: String,
    pub created_at: SystemTime,
}

/// A version of a base image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedImageVersion {
    /// The base image.
    pub image: ManagedImage,
    /// A major number: `"1"`.
    pub version: String,
    /// What images of it may ask for, the host's own first.
    pub architectures: Vec<Architecture>,
}

/// State of a network connector. There is nothing to provision here, so that a connector is never seen `PENDING` or `DELETING` after the
/// call that said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ConnectorState {
    Pending,
    Active,
    Inactive,
    Failed,
    Deleting,
    DeleteFailed,
}

/// What a connector version is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectorSpec {
    /// The union `Configuration` as it was sent, to be echoed.
    pub configuration: serde_json::Value,
    /// ARN of the role that makes network interfaces on AWS; echoed.
    pub operator_role: Option<String>,
}

/// What CreateNetworkConnector asks for.
#[derive(Debug, Clone)]
pub struct CreateConnector {
    /// 1–64 characters of `[a-zA-Z0-9_-]`.
    pub name: String,
    pub spec: ConnectorSpec,
    /// Tags; `hearth:allow` and `hearth:deny` say what MicroVMs may reach through it.
    pub tags: BTreeMap<String, String>,
    /// Idempotency token.
    pub client_token: String,
}

/// What UpdateNetworkConnector asks for; what is absent stays.
#[derive(Debug, Clone)]
pub struct UpdateConnector {
    pub configuration: Option<serde_json::Value>,
    pub operator_role: Option<String>,
    /// Idempotency token.
    pub client_token: Option<String>,
}

/// A network connector of a user's, as its newest version has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Connector {
    /// `nc-<uuid>`.
    pub id: String,
    /// `arn:aws:lambda:<region>:<account>:network-connector:nc-<uuid>`.
    pub arn: String,
    /// Unique in account and region.
    pub name: String,
    /// From 1.
    pub version: i64,
    pub state: ConnectorState,
    pub spec: ConnectorSpec,
    /// Status and reason of the last update, if there was one.
    pub last_update: Option<(String, Option<String>)>,
    pub modified_at: SystemTime,
}

/// An immutable version of a connector.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectorVersion {
    /// The connector as it is now.
    pub connector: Connector,
    /// From 1.
    pub version: i64,
    pub created_at: SystemTime,
}

/// When a MicroVM sleeps and whether it wakes by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdlePolicy {
    /// Seconds without a byte on the endpoint until the MicroVM is suspended; at least 60 unless the configuration says less.
    pub max_idle_seconds: u32,
    /// Seconds that it stays suspended until it is terminated; 0 terminates instead of suspending.
    pub suspended_seconds: u32,
    /// A request to the endpoint of a suspended MicroVM resumes it.
    pub auto_resume: bool,
}

/// What RunMicrovm asks for.
#[derive(Debug, Clone)]
pub struct RunMicrovm {
    /// ARN of the image.
    pub image: String,
    /// `"<n>.0"`, or the latest active one.
    pub version: Option<String>,
    pub execution_role_arn: Option<String>,
    pub idle_policy: Option<IdlePolicy>,
    /// 1–28 800 s of wall time, suspended time included.
    pub maximum_duration_seconds: u32,
    /// Connector ARNs.
    pub ingress_network_connectors: Vec<String>,
    /// Connector ARNs; the image's when empty.
    pub egress_network_connectors: Vec<String>,
    /// Passed to the run hook.
    pub run_hook_payload: Option<String>,
    /// The union `logging` as it was sent.
    pub logging: Option<serde_json::Value>,
    /// Idempotency token.
    pub client_token: Option<String>,
}

/// A MicroVM.
#[derive(Debug, Clone, PartialEq)]
pub struct Microvm {
    /// `microvm-<uuid>`.
    pub id: String,
    pub image_arn: String,
    /// `"<n>.0"`.
    pub version: String,
    pub state: MicrovmState,
    pub state_reason: Option<String>,
    /// Host name, without scheme and port.
    pub endpoint: String,
    pub execution_role_arn: Option<String>,
    pub idle_policy: Option<IdlePolicy>,
    pub maximum_duration_seconds: u32,
    pub started_at: SystemTime,
    pub terminated_at: Option<SystemTime>,
    pub ingress_network_connectors: Vec<String>,
    pub egress_network_connectors: Vec<String>,
}

/// Which MicroVMs to list.
#[derive(Debug, Clone, Default)]
pub struct MicrovmFilter {
    /// ARN of the image.
    pub image: Option<String>,
    /// `"<n>.0"`.
    pub version: Option<String>,
}

/// Which part of a list to return.
#[derive(Debug, Clone, Default)]
pub struct PageRequest {
    /// At most this many, from 1 to what the list's operation allows; 50 if absent.
    pub limit: Option<u32>,
    /// Where the previous page ended.
    pub token: Option<String>,
}

/// Part of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Present while there is more.
    pub next: Option<String>,
}

/// Ports of a MicroVM that a token opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortSpec {
    Port(u16),
    /// Both ends included.
    Range(u16, u16),
    All,
}
