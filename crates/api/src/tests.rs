//! The whole API against a control plane that only answers what it is told to.

mod identity;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use axum::{Router, body::Body};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use hearth_control::{
    Architecture, ControlError,
    logs::{LogStore, Retention},
    plane::ControlPlane,
    types::{
        Build, BuildSizes, BuildState, Caller, Connector, ConnectorSpec, ConnectorState, ConnectorVersion, CreateConnector, CreateImage,
        IdlePolicy, Image, ImageSpec, ImageState, ImageVersion, ManagedImage, ManagedImageVersion, Microvm, MicrovmFilter, MicrovmState,
        Page, PageRequest, PortSpec, RunMicrovm, UpdateConnector, UpdateImage, VersionState, VersionStatus,
    },
};

use hearth_identity::{Account, Book, Directory, Key, Sealer};

use crate::{Auth, Settings, service};

mod resources;

const IMAGE: &str = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
const ROLE: &str = "arn:aws:iam::000000000000:role/build";
const INTERNET_EGRESS: &str = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS";
const HTTP_INGRESS: &str = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:HTTP_INGRESS";

/// Answers with fixed resources, or with the error it was given, and remembers what it was asked.
#[derive(Default)]
pub(crate) struct Fake {
    asked: Mutex<Vec<String>>,
    error: Mutex<Option<ControlError>>,
}

impl Fake {
    fn note(&self, call: String) -> Result<(), ControlError> {
        self.asked.lock().unwrap().push(call);
        self.error.lock().unwrap().take().map_or(Ok(()), Err)
    }

    fn last(&self) -> String {
        self.asked.lock().unwrap().last().cloned().unwrap_or_default()
    }
}

fn when() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_793_500_000_123)
}

fn image(state: ImageState, tags: BTreeMap<String, String>) -> Image {
    Image {
        id: "3f0e".to_owned(),
        arn: IMAGE.to_owned(),
        name: "demo".to_owned(),
        state,
        latest_active_version: None,
        latest_failed_version: None,
        created_at: when(),
        updated_at: when(),
        tags,
    }
}

fn version(spec: ImageSpec) -> ImageVersion {
    ImageVersion {
        image_arn: IMAGE.to_owned(),
        version: "1.0".to_owned(),
        state: VersionState::Successful,
        status: VersionStatus::Active,
        state_reason: None,
        spec,
        created_at: when(),
        updated_at: when(),
        tags: BTreeMap::new(),
    }
}

fn spec() -> ImageSpec {
    ImageSpec {
        base_image_arn: "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1".to_owned(),
        base_image_version: None,
        build_role_arn: ROLE.to_owned(),
        description: None,
        code_artifact_uri: "s3://art/demo.zip".to_owned(),
        memory_mib: 512,
        egress_network_connectors: vec![INTERNET_EGRESS.to_owned()],
        environment: Some(BTreeMap::from([("A".to_owned(), "1".to_owned())])),
        all_capabilities: false,
        echoed: BTreeMap::from([("hooks".to_owned(), json!({"port": 8080}))]),
    }
}

fn microvm() -> Microvm {
    Microvm {
        id: "microvm-0d2b".to_owned(),
        image_arn: IMAGE.to_owned(),
        version: "1.0".to_owned(),
        state: MicrovmState::Pending,
        state_reason: None,
        endpoint: "6d0a.lambda-microvm.us-east-1.localhost".to_owned(),
        execution_role_arn: None,
        idle_policy: Some(IdlePolicy { max_idle_seconds: 300, suspended_seconds: 3600, auto_resume: true }),
        maximum_duration_seconds: 28_800,
        started_at: when(),
        terminated_at: None,
        ingress_network_connectors: vec![HTTP_INGRESS.to_owned()],
        egress_network_connectors: vec![INTERNET_EGRESS.to_owned()],
    }
}

fn build(sizes: BuildSizes) -> Build {
    Build {
        id: "b1".to_owned(),
        image_arn: IMAGE.to_owned(),
        version: "1.0".to_owned(),
        state: BuildState::Successful,
        state_reason: None,
        architectures: vec![Architecture::HOST],
        created_at: when(),
        sizes,
    }
}

#[async_trait]
impl ControlPlane for Fake {
    async fn create_image(&self, _: &Caller, request: CreateImage) -> Result<(Image, ImageVersion), ControlError> {
        self.note(format!("{request:?}"))?;
        Ok((image(ImageState::Creating, request.tags), version(request.spec)))
    }

    async fn get_image(&self, _: &Caller, id: &str) -> Result<Image, ControlError> {
        self.note(format!("get_image {id}"))?;
        Ok(image(ImageState::Created, BTreeMap::new()))
    }

    async fn list_images(&self, _: &Caller, name_filter: Option<&str>, page: PageRequest) -> Result<Page<Image>, ControlError> {
        self.note(format!("list_images {name_filter:?} {:?} {:?}", page.limit, page.token))?;
        Ok(Page { items: vec![image(ImageState::Created, BTreeMap::new())], next: Some("bmV4dA".to_owned()) })
    }

    async fn delete_image(&self, _: &Caller, id: &str) -> Result<Image, ControlError> {
        self.note(format!("delete_image {id}"))?;
        Ok(image(ImageState::Deleting, BTreeMap::new()))
    }

    async fn get_image_version(&self, _: &Caller, id: &str, of: &str) -> Result<ImageVersion, ControlError> {
        self.note(format!("get_image_version {id} {of}"))?;
        Ok(version(spec()))
    }

    async fn list_image_versions(&self, _: &Caller, id: &str, _: PageRequest) -> Result<Page<ImageVersion>, ControlError> {
        self.note(format!("list_image_versions {id}"))?;
        Ok(Page { items: vec![version(spec())], next: None })
    }

    async fn get_build(&self, _: &Caller, id: &str, of: &str, which: &str) -> Result<Build, ControlError> {
        self.note(format!("get_build {id} {of} {which}"))?;
        Ok(build(BuildSizes { code_install: Some(186_400_768), ..BuildSizes::default() }))
    }

    async fn list_builds(&self, _: &Caller, id: &str, of: &str, _: PageRequest) -> Result<Page<Build>, ControlError> {
        self.note(format!("list_builds {id} {of}"))?;
        Ok(Page { items: vec![build(BuildSizes::default())], next: None })
    }

    async fn run_microvm(&self, _: &Caller, request: RunMicrovm) -> Result<Microvm, ControlError> {
        self.note(format!("{request:?}"))?;
        Ok(microvm())
    }

    async fn get_microvm(&self, _: &Caller, id: &str) -> Result<Microvm, ControlError> {
        self.note(format!("get_microvm {id}"))?;
        Ok(microvm())
    }

    async fn list_microvms(&self, _: &Caller, filter: MicrovmFilter, _: PageRequest) -> Result<Page<Microvm>, ControlError> {
        self.note(format!("{filter:?}"))?;
        Ok(Page { items: vec![microvm()], next: None })
    }

    async fn suspend_microvm(&self, _: &Caller, id: &str) -> Result<(), ControlError> {
        self.note(format!("suspend {id}"))
    }

    async fn resume_microvm(&self, _: &Caller, id: &str) -> Result<(), ControlError> {
        self.note(format!("resume {id}"))
    }

    async fn terminate_microvm(&self, _: &Caller, id: &str) -> Result<(), ControlError> {
        self.note(format!("terminate {id}"))
    }

    async fn create_auth_token(&self, _: &Caller, id: &str, lifetime: Duration, ports: Vec<PortSpec>) -> Result<String, ControlError> {
        self.note(format!("token {id} {lifetime:?} {ports:?}"))?;
        Ok("a.b.c.d.e".to_owned())
    }

    async fn create_shell_token(&self, _: &Caller, id: &str, lifetime: Duration) -> Result<String, ControlError> {
        self.note(format!("shell token {id} {lifetime:?}"))?;
        Ok("a.b.c.d.e".to_owned())
    }

    async fn update_image(&self, _: &Caller, id: &str, request: UpdateImage) -> Result<(Image, ImageVersion), ControlError> {
        self.note(format!("update_image {id} {request:?}"))?;
        Ok((image(ImageState::Updating, BTreeMap::new()), version(request.spec)))
    }

    async fn set_version_status(&self, _: &Caller, id: &str, of: &str, status: VersionStatus) -> Result<ImageVersion, ControlError> {
        self.note(format!("set_version_status {id} {of} {status:?}"))?;
        Ok(ImageVersion { status, ..version(spec()) })
    }

    async fn delete_image_version(&self, _: &Caller, id: &str, of: &str) -> Result<ImageVersion, ControlError> {
        self.note(format!("delete_image_version {id} {of}"))?;
        Ok(ImageVersion { state: VersionState::Deleting, ..version(spec()) })
    }

    async fn list_managed_images(&self, _: &Caller, page: PageRequest) -> Result<Page<ManagedImage>, ControlError> {
        self.note(format!("list_managed_images {page:?}"))?;
        Ok(Page { items: vec![managed()], next: None })
    }

    async fn list_managed_image_versions(&self, _: &Caller, id: &str, _: PageRequest) -> Result<Page<ManagedImageVersion>, ControlError> {
        self.note(format!("list_managed_image_versions {id}"))?;
        Ok(Page {
            items: vec![ManagedImageVersion { image: managed(), version: "1".to_owned(), architectures: vec![Architecture::HOST] }],
            next: None,
        })
    }

    async fn tag_resource(&self, _: &Caller, arn: &str, tags: BTreeMap<String, String>) -> Result<(), ControlError> {
        self.note(format!("tag {arn} {tags:?}"))
    }

    async fn untag_resource(&self, _: &Caller, arn: &str, keys: Vec<String>) -> Result<(), ControlError> {
        self.note(format!("untag {arn} {keys:?}"))
    }

    async fn list_tags(&self, _: &Caller, arn: &str) -> Result<BTreeMap<String, String>, ControlError> {
        self.note(format!("list_tags {arn}"))?;
        Ok(BTreeMap::from([("a".to_owned(), "1".to_owned())]))
    }

    async fn create_connector(&self, _: &Caller, request: CreateConnector) -> Result<Connector, ControlError> {
        self.note(format!("create_connector {} {:?} {}", request.name, request.tags, request.client_token))?;
        Ok(Connector { state: ConnectorState::Pending, ..connector() })
    }

    async fn get_connector(&self, _: &Caller, identifier: &str) -> Result<(Connector, Option<i64>), ControlError> {
        self.note(format!("get_connector {identifier}"))?;
        Ok((connector(), identifier.ends_with(":1").then_some(1)))
    }

    async fn list_connectors(&self, _: &Caller, state: Option<ConnectorState>, page: PageRequest) -> Result<Page<Connector>, ControlError> {
        self.note(format!("list_connectors {state:?} {page:?}"))?;
        Ok(Page { items: vec![connector()], next: page.token.is_none().then(|| "bmV4dA".to_owned()) })
    }

    async fn list_connector_versions(
        &self,
        _: &Caller,
        identifier: &str,
        _: Option<ConnectorState>,
        _: PageRequest,
    ) -> Result<Page<ConnectorVersion>, ControlError> {
        self.note(format!("list_connector_versions {identifier}"))?;
        Ok(Page { items: vec![ConnectorVersion { connector: connector(), version: 1, created_at: when() }], next: None })
    }

    async fn update_connector(&self, _: &Caller, identifier: &str, request: UpdateConnector) -> Result<Connector, ControlError> {
        self.note(format!("update_connector {identifier} {request:?}"))?;
        let reason = Some("No configuration changes detected".to_owned());
        Ok(Connector { last_update: Some(("Successful".to_owned(), reason)), ..connector() })
    }

    async fn delete_connector(&self, _: &Caller, identifier: &str) -> Result<Connector, ControlError> {
        self.note(format!("delete_connector {identifier}"))?;
        Ok(Connector { state: ConnectorState::Deleting, ..connector() })
    }
}

fn managed() -> ManagedImage {
    ManagedImage { arn: "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1".to_owned(), created_at: when() }
}

fn connector() -> Connector {
    Connector {
        id: "nc-1".to_owned(),
        arn: "arn:aws:lambda:us-east-1:000000000000:network-connector:nc-1".to_owned(),
        name: "out".to_owned(),
        version: 1,
        state: ConnectorState::Active,
        spec: ConnectorSpec { configuration: json!({"VpcEgressConfiguration": {}}), operator_role: Some(ROLE.to_owned()) },
        last_update: None,
        modified_at: when(),
    }
}

pub(crate) fn caller(region: &str) -> Caller {
    Caller { account: "000000000000".to_owned(), region: region.to_owned(), principal: "arn:aws:iam::000000000000:root".to_owned() }
}

/// The administrator with the key `AKID`, and nobody else.
pub(crate) fn directory() -> Arc<Directory> {
    let key = Key { access_key_id: "AKID".to_owned(), secret_access_key: "secret".to_owned() };
    let root = Account { id: "000000000000".to_owned(), keys: vec![key] };
    let sealer = Sealer::new(&[7; Sealer::KEY_LENGTH]);
    let directory = Directory::new(vec![root], Book::default(), Book::default(), sealer, Box::new(|_| Ok(())));
    Arc::new(directory.unwrap())
}

struct Server {
    plane: Arc<Fake>,
    router: Router,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn error(&self) -> (u16, &str, &Value) {
        (self.status.as_u16(), self.headers["x-amzn-errortype"].to_str().unwrap(), &self.body)
    }
}

impl Server {
    fn new(auth: Auth) -> Self {
        let plane = Arc::new(Fake::default());
        let objects = tower::service_fn(|_| async { Ok::<_, Infallible>(Response::new(Body::from("\"object\""))) });
        let settings = Settings { regions: vec!["us-east-1".to_owned()], min_idle_seconds: 60 };
        let logs = LogStore::new("/nonexistent".into(), Retention::default());
        Self { router: service(plane.clone(), logs, objects, auth, settings), plane }
    }

    fn trusted() -> Self {
        Self::new(Auth::Trusted(caller("us-east-1"), directory()))
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        assert_eq!(parts.headers["x-amzn-requestid"].len(), 36);
        Answer { status: parts.status, headers: parts.headers, body: serde_json::from_slice(&body).unwrap_or(Value::Null) }
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        self.send(Request::builder().method(method).uri(path).body(body).unwrap()).await
    }

    async fn fail(&self, error: ControlError, path: &str) -> Answer {
        *self.plane.error.lock().unwrap() = Some(error);
        self.call("GET", path, Value::Null).await
    }
}

fn create(member: &str, value: Value) -> Value {
    let mut body = json!({
        "name": "demo",
        "baseImageArn": "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
        "buildRoleArn": ROLE,
        "codeArtifact": {"uri": "s3://art/demo.zip"},
    });
    body[member] = value;
    body
}

fn run(member: &str, value: Value) -> Value {
    let mut body = json!({"imageIdentifier": IMAGE});
    body[member] = value;
    body
}

#[tokio::test]
async fn a_created_image_is_answered_with_all_its_members() {
    let server = Server::trusted();
    let hooks = json!({"port": 8080, "microvmHooks": {"run": "ENABLED"}, "microvmImageHooks": {"ready": "ENABLED"}});
    let answer = server.call("POST", "/2025-09-09/microvm-images", create("hooks", hooks.clone())).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(
        answer.body,
        json!({
            "additionalOsCapabilities": null, "baseImageArn": "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1", "baseImageVersion": "1.0",
            "buildPhaseOverrides": null, "buildRoleArn": ROLE, "codeArtifact": {"uri": "s3://art/demo.zip"}, "cpuConfigurations": null,
            "createdAt": 1_793_500_000.123, "description": null, "egressNetworkConnectors": [INTERNET_EGRESS], "environmentVariables": null,
            "hooks": hooks, "id": "3f0e", "imageArn": IMAGE, "imageVersion": "1.0", "kmsKeyIdentifier": null, "latestActiveImageVersion": null,
            "latestFailedImageVersion": null, "logging": null, "name": "demo", "resources": [{"minimumMemoryInMiB": 2048}],
            "roleConfiguration": null, "state": "CREATING", "tags": null, "updatedAt": 1_793_500_000.123,
        })
    );
}

#[tokio::test]
async fn what_is_asked_for_reaches_the_control_plane() {
    let server = Server::trusted();
    let mut body = create("additionalOsCapabilities", json!(["ALL"]));
    body["resources"] = json!([{"minimumMemoryInMiB": 512}]);
    body["environmentVariables"] = json!({"KEY": "value"});
    body["tags"] = json!({"team": "a"});
    body["clientToken"] = json!("token-1");
    let answer = server.call("POST", "/2025-09-09/microvm-images", body).await;
    assert_eq!(answer.body["tags"], json!({"team": "a"}));
    let asked = server.plane.last();
    for part in ["memory_mib: 512", "all_capabilities: true", r#"{"KEY": "value"}"#, r#"Some("token-1")"#] {
        assert!(asked.contains(part), "{part} in {asked}");
    }
    assert_eq!(answer.body["additionalOsCapabilities"], json!(["ALL"]));
}

#[tokio::test]
async fn images_versions_and_builds_are_read() {
    let server = Server::trusted();
    let path = format!("/2025-09-09/microvm-images/{}", IMAGE.replace(':', "%3A"));

    let summary = json!({
        "createdAt": 1_793_500_000.123, "id": "3f0e", "imageArn": IMAGE, "latestActiveImageVersion": null, "latestFailedImageVersion": null,
        "name": "demo", "state": "CREATED", "tags": {}, "updatedAt": 1_793_500_000.123,
    });
    assert_eq!(server.call("GET", &path, Value::Null).await.body, summary);
    assert_eq!(server.plane.last(), format!("get_image {IMAGE}"));

    let list = server.call("GET", "/2025-09-09/microvm-images?maxResults=5&nextToken=YQ%3D%3D&nameFilter=de", Value::Null).await;
    assert_eq!(server.plane.last(), r#"list_images Some("de") Some(5) Some("YQ==")"#);
    assert_eq!(list.body["nextToken"], "bmV4dA");
    assert_eq!(list.body["items"][0].as_object().unwrap().len(), 7);

    let version = server.call("GET", &format!("{path}/versions/1.0"), Value::Null).await.body;
    assert_eq!(version["environmentVariables"], json!({"A": "1"}));
    assert_eq!(version["hooks"], json!({"port": 8080}));
    assert_eq!(version["versionStateTimeBucket"], "SUCCESSFUL#26110102");
    assert_eq!((&version["state"], &version["status"]), (&json!("SUCCESSFUL"), &json!("ACTIVE")));
    let versions = server.call("GET", &format!("{path}/versions"), Value::Null).await.body;
    assert_eq!(versions["items"][0]["environmentVariables"], Value::Null);
    assert_eq!(versions.as_object().unwrap()["nextToken"], Value::Null);

    let build = server.call("GET", &format!("{path}/versions/1.0/builds/b1"), Value::Null).await.body;
    assert_eq!(build["snapshotBuild"], json!({"codeInstallSizeInBytes": 186_400_768}));
    let builds = server.call("GET", &format!("{path}/versions/1.0/builds"), Value::Null).await.body;
    assert_eq!(builds["items"][0].as_object().unwrap().len(), 10);
    let other = if cfg!(target_arch = "aarch64") { "X86_64" } else { "ARM_64" };
    let builds = server.call("GET", &format!("{path}/versions/1.0/builds?architecture={other}"), Value::Null).await.body;
    assert_eq!(builds["items"], json!([]));

    let deleted = server.call("DELETE", &path, Value::Null).await.body;
    assert_eq!(deleted, json!({"imageIdentifier": IMAGE, "state": "DELETING"}));
}

#[tokio::test]
async fn microvms_are_run_read_and_changed() {
    let server = Server::trusted();
    let detail = json!({
        "egressNetworkConnectors": [INTERNET_EGRESS], "endpoint": "6d0a.lambda-microvm.us-east-1.localhost", "executionRoleArn": null,
        "idlePolicy": {"autoResumeEnabled": true, "maxIdleDurationSeconds": 300, "suspendedDurationSeconds": 3600},
        "imageArn": IMAGE, "imageVersion": "1.0", "ingressNetworkConnectors": [HTTP_INGRESS], "kmsKeyIdentifier": null, "maximumDurationInSeconds": 28_800,
        "microvmId": "microvm-0d2b", "startedAt": 1_793_500_000.123, "state": "PENDING", "stateReason": null, "terminatedAt": null,
        "terminationReasonCode": null,
    });
    let answer = server.call("POST", "/2025-09-09/microvms", run("runHookPayload", json!("hello"))).await;
    assert_eq!((answer.status, &answer.body), (StatusCode::OK, &detail));
    let asked = server.plane.last();
    for part in ["maximum_duration_seconds: 28800", HTTP_INGRESS, "egress_network_connectors: []", r#"Some("hello")"#] {
        assert!(asked.contains(part), "{part} in {asked}");
    }

    assert_eq!(server.call("GET", "/2025-09-09/microvms/microvm-0d2b", Value::Null).await.body, detail);
    let list = server.call("GET", &format!("/2025-09-09/microvms?imageIdentifier={IMAGE}&imageVersion=1.0"), Value::Null).await.body;
    assert_eq!(list["items"][0].as_object().unwrap().len(), 5);
    assert!(server.plane.last().contains(IMAGE));

    for (method, suffix, asked) in [("POST", "/suspend", "suspend"), ("POST", "/resume", "resume"), ("DELETE", "", "terminate")] {
        let answer = server.call(method, &format!("/2025-09-09/microvms/microvm-0d2b{suffix}"), Value::Null).await;
        assert_eq!((answer.status, answer.body), (StatusCode::OK, json!({})));
        assert_eq!(server.plane.last(), format!("{asked} microvm-0d2b"));
    }
}

#[tokio::test]
async fn tokens_have_a_lifetime_and_ports() {
    let server = Server::trusted();
    let path = "/2025-09-09/microvms/microvm-0d2b/auth-token";
    let ports = json!([{"port": 8080}, {"range": {"startPort": 9000, "endPort": 9010}}, {"allPorts": {}}]);
    let answer = server.call("POST", path, json!({"expirationInMinutes": 30, "allowedPorts": ports})).await;
    assert_eq!(answer.body, json!({"authToken": {"X-aws-proxy-auth": "a.b.c.d.e"}}));
    assert_eq!(server.plane.last(), "token microvm-0d2b 1800s [Port(8080), Range(9000, 9010), All]");

    let answer = server.call("POST", path, json!({"expirationInMinutes": 61, "allowedPorts": ports})).await;
    assert_eq!(answer.error(), (400, "ValidationException", &json!({"message": "ExpirationMinutes 61 exceeded max allowed of 60."})));
    let backwards = json!([{"range": {"startPort": 2, "endPort": 1}}]);
    let answer = server.call("POST", path, json!({"expirationInMinutes": 1, "allowedPorts": backwards})).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn requests_that_break_a_rule_are_refused_with_the_service_s_words() {
    let server = Server::trusted();
    let images = "/2025-09-09/microvm-images";
    let lifecycle = "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook \
                     (run, resume, suspend, or terminate) is enabled.";
    let memory = "The requested memory size of 3000 MiB is not supported by base MicroVM image \
                  arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1. Supported memory sizes in MiB are: [512, 1024, 2048, 4096, 8192].";
    let uri = "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>";
    let unknown = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:MOON_EGRESS";
    let no_keys =
        "The KMS key alias/mine cannot be used: this server does not encrypt with customer managed keys. Leave out kmsKeyIdentifier.";
    for (path, body, message) in [
        (images, create("codeArtifact", json!({"uri": "https://example.org/demo.zip"})), uri),
        (images, create("codeArtifact", json!({"uri": "s3://bucket"})), uri),
        (images, create("baseImageVersion", json!("1.0")), "Invalid base image version '1.0': Expected a single major version number"),
        (images, create("environmentVariables", json!({"AWS_REGION": "x"})), "Environment variable key 'AWS_REGION' is reserved"),
        (
            images,
            create("environmentVariables", json!({"AWS_LAMBDA_MICROVM_IMAGE_ARN": "x"})),
            "Environment variable key 'AWS_LAMBDA_MICROVM_IMAGE_ARN' is reserved",
        ),
        (images, create("resources", json!([{"minimumMemoryInMiB": 3000}])), memory),
        (images, create("hooks", json!({"microvmHooks": {"suspend": "ENABLED"}})), lifecycle),
        (
            images,
            create("hooks", json!({"microvmImageHooks": {"validate": "ENABLED"}})),
            "The hooks port must be specified when any hook is enabled.",
        ),
        (images, create("egressNetworkConnectors", json!(["internet"])), "Malformed network connector ARN"),
        (images, create("kmsKeyIdentifier", json!("alias/mine")), no_keys),
        ("/2025-09-09/microvms", run("kmsKeyIdentifier", json!("alias/mine")), no_keys),
        ("/2025-09-09/microvms", json!({"imageIdentifier": "demo"}), "Malformed ARN - doesn't start with 'arn:'"),
        ("/2025-09-09/microvms", run("logging", json!({"cloudWatch": {}})), "Logging cannot be enabled without providing executionRoleArn"),
        (
            "/2025-09-09/microvms",
            run("egressNetworkConnectors", json!([INTERNET_EGRESS, INTERNET_EGRESS])),
            "Only one egress network connector can be provided",
        ),
        (
            "/2025-09-09/microvms",
            run("egressNetworkConnectors", json!([unknown])),
            &format!("Unrecognized managed network connector ARN: {unknown}"),
        ),
    ] {
        let answer = server.call("POST", path, body).await;
        assert_eq!(answer.error(), (400, "ValidationException", &json!({"message": message})));
    }
    assert_eq!(server.plane.last(), "", "nothing reached the control plane");
    for logging in [json!({"disabled": {}}), Value::Null] {
        assert_eq!(server.call("POST", "/2025-09-09/microvms", run("logging", logging)).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn constraints_and_malformed_requests() {
    let server = Server::trusted();
    let answer = server.call("POST", "/2025-09-09/microvm-images", create("name", json!("bad name!"))).await;
    let message = "1 validation error detected: Value 'bad name!' at 'name' failed to satisfy constraint: \
                   Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+";
    assert_eq!(answer.error(), (400, "ValidationException", &json!({"message": message})));

    let broken = Request::post("/2025-09-09/microvms").body(Body::from("{\"imageIdentifier\":")).unwrap();
    assert_eq!(server.send(broken).await.error(), (400, "ValidationException", &json!({"message": null})));
    let answer = server.call("POST", "/2025-09-09/microvms", run("logging", json!(true))).await;
    assert_eq!(answer.error(), (400, "ValidationException", &json!({"Message": "Expected null"})));
    let answer = server.call("GET", "/2025-09-09/microvms/%ff", Value::Null).await;
    assert_eq!(answer.error(), (400, "ValidationException", &json!({"message": null})));

    let large = run("runHookPayload", json!("x".repeat(1 << 20)));
    let answer = server.call("POST", "/2025-09-09/microvms", large).await;
    assert_eq!(answer.error().0, 413);
    assert_eq!(answer.error().1, "RequestEntityTooLargeException");
}

#[tokio::test]
async fn errors_have_their_modelled_members() {
    let server = Server::trusted();
    let path = "/2025-09-09/microvms/microvm-1";
    let nulls = |message: &str| json!({"message": message, "resourceId": null, "resourceType": null});

    let answer = server.fail(ControlError::MicrovmNotFound("microvm-1".to_owned()), path).await;
    assert_eq!(answer.error(), (404, "ResourceNotFoundException", &nulls("MicroVM not found: microvm-1")));
    let answer = server.fail(ControlError::TokenReused, path).await;
    assert_eq!(answer.error(), (409, "ConflictException", &nulls("The client token has already been used with different parameters.")));
    let denied = ControlError::Denied { principal: "arn:p".to_owned(), resource: "arn:r".to_owned() };
    let answer = server.fail(denied, path).await;
    let message = "User: arn:p is not authorized to perform this action on resource: arn:r";
    assert_eq!(answer.error(), (403, "AccessDeniedException", &json!({"Message": message})));
    let answer = server.fail(ControlError::InsufficientCapacity("no memory".to_owned()), path).await;
    assert_eq!(answer.error(), (500, "InsufficientCapacityException", &json!({"message": "no memory"})));
    let answer = server.fail(ControlError::BadCursor, path).await;
    assert_eq!(answer.error(), (400, "ValidationException", &json!({"message": null})));
}

#[tokio::test]
async fn internal_errors_are_not_shown() {
    let server = Server::trusted();
    let answer = server.fail(ControlError::Internal("disk /secret/path is full".to_owned()), "/2025-09-09/microvms/microvm-1").await;
    let (status, exception, body) = answer.error();
    assert_eq!((status, exception), (500, "InternalServerException"));
    assert!(!body.to_string().contains("secret"));
}

#[tokio::test]
async fn image_arns_with_a_slash_are_somebody_else_s() {
    let server = Server::trusted();
    let arn = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Amicrovm-image%2Fdemo";
    for suffix in ["", "/versions", "/versions/1.0", "/versions/1.0/builds", "/versions/1.0/builds/b1"] {
        let answer = server.call("GET", &format!("/2025-09-09/microvm-images/{arn}{suffix}"), Value::Null).await;
        assert_eq!((answer.error().0, answer.error().1), (403, "AccessDeniedException"), "{suffix}");
    }
    let answer = server.call("POST", "/2025-09-09/microvms", json!({"imageIdentifier": IMAGE.replace("image:", "image/")})).await;
    assert_eq!(answer.error().0, 403);
    assert_eq!(server.plane.last(), "");
}

#[tokio::test]
async fn unknown_operations_are_not_found() {
    let server = Server::trusted();
    let answer = server.call("GET", "/2025-09-09/functions", Value::Null).await;
    assert_eq!((answer.error().0, answer.error().1), (404, "UnknownOperationException"));
}

#[tokio::test]
async fn other_services_are_told_apart() {
    let server = Server::trusted();
    let answer = server.call("PUT", "/bucket/key", Value::Null).await;
    assert_eq!((answer.status, answer.body), (StatusCode::OK, json!("object")));
    let signed = "AWS4-HMAC-SHA256 Credential=AKID/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00";
    let request = Request::get("/2025-09-09/microvms").header("authorization", signed).body(Body::empty()).unwrap();
    assert_eq!(server.send(request).await.body, json!("object"), "an object may have any path");
    let request = Request::post("/").header("x-amz-target", "Logs_20140328.FilterLogEvents").body(Body::from("{}")).unwrap();
    assert_eq!(server.send(request).await.error().0, 400);
    let request =
        Request::post("/").header("content-type", "application/x-www-form-urlencoded").body(Body::from("Action=AssumeRole")).unwrap();
    let answer = server.send(request).await;
    assert_eq!((answer.status, &answer.headers["content-type"]), (StatusCode::BAD_REQUEST, &http::HeaderValue::from_static("text/xml")));
}

#[tokio::test]
async fn another_region_is_denied_without_a_message() {
    let server = Server::new(Auth::Trusted(caller("eu-west-1"), directory()));
    let answer = server.call("GET", "/2025-09-09/microvms", Value::Null).await;
    assert_eq!(answer.error(), (403, "AccessDeniedException", &json!({"Message": null})));
}

#[tokio::test]
async fn callers_must_be_known() {
    let server = Server::new(Auth::SigV4(directory()));
    let signed =
        |key: &str| format!("AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/lambda/aws4_request, SignedHeaders=host, Signature=00");
    for (authorization, exception) in [
        (None, "MissingAuthenticationTokenException"),
        (Some("Bearer x".to_owned()), "IncompleteSignatureException"),
        (Some(signed("AKID2")), "UnrecognizedClientException"),
        (Some(signed("AKID")), "IncompleteSignatureException"),
    ] {
        let mut request = Request::get("/2025-09-09/microvms");
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let answer = server.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!((answer.error().0, answer.error().1), (403, exception));
    }
    let request = Request::get("/2025-09-09/microvms").header("authorization", signed("AKID")).header("x-amz-date", "20260101T000000Z");
    assert_eq!(server.send(request.body(Body::empty()).unwrap()).await.error().1, "InvalidSignatureException");
    let request = Request::get("/2025-09-09/microvms").header("authorization", signed("AKID")).header("x-amz-security-token", "left over");
    assert_eq!(server.send(request.body(Body::empty()).unwrap()).await.error().1, "UnrecognizedClientException");
    assert_eq!(server.plane.last(), "");
}
