//! The two faces of the domain: what the API calls and what the endpoint proxy calls.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;

use hearth_machine::{GuestStream, Target};

use crate::{
    error::ControlError,
    token::TokenKind,
    types::{
        Build, Caller, Connector, ConnectorState, ConnectorVersion, CreateConnector, CreateImage, Image, ImageVersion, ManagedImage,
        ManagedImageVersion, Microvm, MicrovmFilter, Page, PageRequest, PortSpec, RunMicrovm, UpdateConnector, UpdateImage, VersionStatus,
    },
};

/// What the API calls. Identifiers arrive as the caller wrote them.
#[async_trait]
pub trait ControlPlane: Send + Sync + 'static {
    async fn create_image(&self, caller: &Caller, request: CreateImage) -> Result<(Image, ImageVersion), ControlError>;
    /// Makes the next version of an image; the present one can be launched until that is built.
    async fn update_image(&self, caller: &Caller, image: &str, request: UpdateImage) -> Result<(Image, ImageVersion), ControlError>;
    async fn get_image(&self, caller: &Caller, image: &str) -> Result<Image, ControlError>;
    /// `name_filter` is a substring, applied after the limit.
    async fn list_images(&self, caller: &Caller, name_filter: Option<&str>, page: PageRequest) -> Result<Page<Image>, ControlError>;
    /// Returns the image in state `DELETING`.
    async fn delete_image(&self, caller: &Caller, image: &str) -> Result<Image, ControlError>;
    async fn get_image_version(&self, caller: &Caller, image: &str, version: &str) -> Result<ImageVersion, ControlError>;
    async fn list_image_versions(&self, caller: &Caller, image: &str, page: PageRequest) -> Result<Page<ImageVersion>, ControlError>;
    async fn set_version_status(
        &self,
        caller: &Caller,
        image: &str,
        version: &str,
        status: VersionStatus,
    ) -> Result<ImageVersion, ControlError>;
    /// Returns the version in state `DELETING`. Its MicroVMs live on.
    async fn delete_image_version(&self, caller: &Caller, image: &str, version: &str) -> Result<ImageVersion, ControlError>;
    async fn get_build(&self, caller: &Caller, image: &str, version: &str, build: &str) -> Result<Build, ControlError>;
    async fn list_builds(&self, caller: &Caller, image: &str, version: &str, page: PageRequest) -> Result<Page<Build>, ControlError>;
    async fn list_managed_images(&self, caller: &Caller, page: PageRequest) -> Result<Page<ManagedImage>, ControlError>;
    async fn list_managed_image_versions(
        &self,
        caller: &Caller,
        image: &str,
        page: PageRequest,
    ) -> Result<Page<ManagedImageVersion>, ControlError>;

    async fn run_microvm(&self, caller: &Caller, request: RunMicrovm) -> Result<Microvm, ControlError>;
    async fn get_microvm(&self, caller: &Caller, id: &str) -> Result<Microvm, ControlError>;
    async fn list_microvms(&self, caller: &Caller, filter: MicrovmFilter, page: PageRequest) -> Result<Page<Microvm>, ControlError>;
    async fn suspend_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError>;
    async fn resume_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError>;
    async fn terminate_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError>;
    /// Returns the token for the header `X-aws-proxy-auth`.
    async fn create_auth_token(&self, caller: &Caller, id: &str, lifetime: Duration, ports: Vec<PortSpec>) -> Result<String, ControlError>;
    /// Returns the token for a shell.
    async fn create_shell_token(&self, caller: &Caller, id: &str, lifetime: Duration) -> Result<String, ControlError>;

    /// Adds tags to an image or a connector, or gives them other values.
    async fn tag_resource(&self, caller: &Caller, arn: &str, tags: BTreeMap<String, String>) -> Result<(), ControlError>;
    async fn untag_resource(&self, caller: &Caller, arn: &str, keys: Vec<String>) -> Result<(), ControlError>;
    async fn list_tags(&self, caller: &Caller, arn: &str) -> Result<BTreeMap<String, String>, ControlError>;

    async fn create_connector(&self, caller: &Caller, request: CreateConnector) -> Result<Connector, ControlError>;
    /// `identifier` is a name, an id or an ARN. Returns the number of the version as well, if it is a version's ARN.
    async fn get_connector(&self, caller: &Caller, identifier: &str) -> Result<(Connector, Option<i64>), ControlError>;
    /// `state` is applied after the limit.
    async fn list_connectors(
        &self,
        caller: &Caller,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<Connector>, ControlError>;
    async fn list_connector_versions(
        &self,
        caller: &Caller,
        identifier: &str,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<ConnectorVersion>, ControlError>;
    async fn update_connector(&self, caller: &Caller, identifier: &str, request: UpdateConnector) -> Result<Connector, ControlError>;
    /// Returns the connector in state `DELETING`.
    async fn delete_connector(&self, caller: &Caller, identifier: &str) -> Result<Connector, ControlError>;
}

/// What the endpoint proxy calls.
#[async_trait]
pub trait DataPlane: Send + Sync + 'static {
    /// Checks a request before anything is done for it. Takes the same time for an unknown host as for a wrong token.
    fn admit(&self, host: &str, token: &str, port: u16) -> Result<Admission, Refusal>;

    /// Opens a stream to something in an admitted MicroVM. Holds the caller while the MicroVM is launched or resumed, up to a limit.
    async fn open(&self, admission: &Admission, target: &Target) -> Result<Box<dyn GuestStream>, ConnectError>;

    /// Connects to the port that the admission is for.
    async fn connect(&self, admission: &Admission) -> Result<Box<dyn GuestStream>, ConnectError> {
        self.open(admission, &Target::Port(admission.port)).await
    }
}

/// Leave to talk to one port of one MicroVM, or to have a shell in it.
#[derive(Debug, Clone)]
pub struct Admission {
    /// The MicroVM's id.
    pub microvm_id: String,
    /// What the token is for. A shell's opens processes and files, and no port.
    pub kind: TokenKind,
    /// The port that was asked for.
    pub port: u16,
    /// Memory that the MicroVM's image asks for, in MiB: limits grow with it (SPEC 6.3).
    pub memory_mib: u32,
    /// Where the traffic's bytes are reported.
    pub activity: Arc<Activity>,
}

/// When the last byte crossed a MicroVM's endpoint. One atomic store per read or write; the idle timer looks when it is due.
#[derive(Debug)]
pub struct Activity {
    /// tokio's clock, which tests can stop; it is the monotonic clock otherwise.
    origin: tokio::time::Instant,
    last_ms: std::sync::atomic::AtomicU64,
    open: std::sync::atomic::AtomicUsize,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            origin: tokio::time::Instant::now(),
            last_ms: std::sync::atomic::AtomicU64::new(0),
            open: std::sync::atomic::AtomicUsize::new(0),
        }
    }
}

impl Activity {
    /// Bytes moved now.
    pub fn touch(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.fetch_max(now, std::sync::atomic::Ordering::Relaxed);
    }

    /// Counts a stream as open until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> OpenStream {
        self.open.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        OpenStream(Arc::clone(self))
    }

    /// Streams that are open, of those that are counted.
    pub(crate) fn open(&self) -> usize {
        self.open.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// When bytes last moved, or when the meter was made.
    pub fn last(&self) -> std::time::Instant {
        self.origin.into_std() + Duration::from_millis(self.last_ms.load(std::sync::atomic::Ordering::Relaxed))
    }
}

/// A stream that is open. Its end is activity.
#[derive(Debug)]
pub(crate) struct OpenStream(Arc<Activity>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.touch();
        self.0.open.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Why a request is refused before it reaches a MicroVM (SPEC 10.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// no token, or none that parses: 403
    #[error("Request missing authentication")]
    MissingAuthentication,
    /// another MicroVM's token, an expired one, or an unknown host: 403
    #[error("Token authentication failed")]
    AuthenticationFailed,
    /// a port outside the token's scope: 403
    #[error("Access to port denied")]
    PortDenied,
}

/// Why an admitted request cannot reach its port.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// nothing listens there, the app is gone, the MicroVM is terminated or sleeps and must not be woken: 502
    #[error("{0}")]
    Unreachable(String),
    /// the MicroVM sleeps on, because its host could not resume it: 503 with `Retry-After`. The reason is the operator's.
    #[error("the MicroVM could not be woken")]
    NotWoken(String),
    /// the MicroVM did not wake in time: 503 with `Retry-After`
    #[error("the MicroVM did not wake within {} s", .0.as_secs())]
    TooSlow(Duration),
}
