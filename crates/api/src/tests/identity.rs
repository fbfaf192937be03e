//! Who may do what, over HTTP with real signatures: each operation's action and resource, what is passed along, other accounts, sessions.

use std::time::SystemTime;

use hearth_identity::{Policy, TrustPolicy};

use super::*;
use crate::{authorize::RULES, model::MODEL, sigv4};

const ACCOUNT: &str = "000000000000";
const OTHER: &str = "111111111111";
const USER: &str = "arn:aws:iam::000000000000:user/ann";
const CONNECTOR: &str = "arn:aws:lambda:us-east-1:000000000000:network-connector:nc-1";

/// A key pair, and the token of a session.
#[derive(Clone)]
struct Keys {
    id: String,
    secret: String,
    token: Option<String>,
}

impl Keys {
    /// The token is in the request already.
    fn signing<'k>(&'k self, region: &'k str, service: &'k str) -> sigv4::Signing<'k> {
        sigv4::Signing { access_key_id: &self.id, secret_access_key: &self.secret, session_token: None, region, service }
    }
}

struct World {
    server: Server,
    directory: Arc<Directory>,
}

impl World {
    fn new() -> Self {
        let directory = directory();
        Self { server: Server::new(Auth::SigV4(Arc::clone(&directory))), directory }
    }

    fn user(&self, account: &str, name: &str, statements: Value) -> Keys {
        let policy = Some(statements).filter(|statements| !statements.is_null()).map(policy);
        let user = self.directory.create_user(account, name, policy, false).unwrap();
        Keys { id: user.keys[0].access_key_id.clone(), secret: user.keys[0].secret_access_key.clone(), token: None }
    }

    async fn call(&self, keys: &Keys, method: &str, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(keys, Request::builder().method(method).uri(path), body, "lambda").await
    }

    async fn send(&self, keys: &Keys, request: http::request::Builder, body: String, service: &str) -> Answer {
        let request = match &keys.token {
            Some(token) => request.header("x-amz-security-token", token),
            None => request,
        };
        let (mut parts, ()) = request.header("host", "hearth.test").body(()).unwrap().into_parts();
        sigv4::sign(&mut parts, body.as_bytes(), keys.signing("us-east-1", service), SystemTime::now()).unwrap();
        self.server.send(Request::from_parts(parts, Body::from(body))).await
    }

    /// Asks STS, and returns status and body.
    async fn sts(&self, keys: &Keys, form: &str) -> (u16, String) {
        let request = Request::post("/").header("content-type", "application/x-www-form-urlencoded; charset=utf-8");
        let token = keys.token.as_ref();
        let request = token.into_iter().fold(request, |request, token| request.header("x-amz-security-token", token));
        let (mut parts, ()) = request.header("host", "hearth.test").body(()).unwrap().into_parts();
        sigv4::sign(&mut parts, form.as_bytes(), keys.signing("eu-central-1", "sts"), SystemTime::now()).unwrap();
        let request = Request::from_parts(parts, Body::from(form.to_owned()));
        let response = self.server.router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

fn root() -> Keys {
    Keys { id: "AKID".to_owned(), secret: "secret".to_owned(), token: None }
}

fn policy(statements: Value) -> Policy {
    json!({"Version": "2012-10-17", "Statement": statements}).try_into().unwrap()
}

fn allow(actions: Value, resources: Value) -> Value {
    json!({"Effect": "Allow", "Action": actions, "Resource": resources})
}

fn denied(answer: &Answer) -> Option<&str> {
    (answer.status == StatusCode::FORBIDDEN).then(|| answer.body["Message"].as_str().unwrap())
}

/// A request that each operation understands, with the resource that it is decided on (SPEC 4.4).
fn example(operation: &str) -> (String, Value, &'static str) {
    let operation = MODEL.operations.iter().find(|known| known.name == operation).unwrap();
    let member = |name: &str| match name {
        "imageIdentifier" if operation.name.starts_with("ListManaged") => "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
        "imageIdentifier" | "Resource" => IMAGE,
        "imageVersion" => "1.0",
        "microvmIdentifier" => "microvm-0d2b",
        "Identifier" => CONNECTOR,
        _ => "b1",
    };
    let segments = operation.uri.split('/').map(|part| match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
        Some(name) => member(name).replace(':', "%3A"),
        None => part.to_owned(),
    });
    let path = segments.collect::<Vec<_>>().join("/");
    let image = json!({"baseImageArn": "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1", "buildRoleArn": ROLE,
                       "codeArtifact": {"uri": "s3://art/demo.zip"}});
    let (path, body) = match operation.name.as_str() {
        "CreateMicrovmImage" => (path, create("name", json!("demo"))),
        "UpdateMicrovmImage" => (path, image),
        "UpdateMicrovmImageVersion" => (path, json!({"status": "INACTIVE"})),
        "RunMicrovm" => (path, json!({"imageIdentifier": IMAGE})),
        "CreateMicrovmAuthToken" => (path, json!({"expirationInMinutes": 1, "allowedPorts": [{"port": 80}]})),
        "CreateMicrovmShellAuthToken" => (path, json!({"expirationInMinutes": 1})),
        "CreateNetworkConnector" => (path, json!({"Name": "n", "Configuration": {"VpcEgressConfiguration": {"SubnetIds": ["subnet-1"]}}})),
        "TagResource" => (path, json!({"Tags": {"a": "b"}})),
        "UntagResource" => (format!("{path}?tagKeys=a"), Value::Null),
        _ => (path, Value::Null),
    };
    let resource = match operation.name.as_str() {
        "ListTags" | "TagResource" | "UntagResource" => IMAGE,
        "CreateMicrovmImage" | "CreateNetworkConnector" => "*",
        name if name.starts_with("List") => "*",
        name if name.contains("NetworkConnector") => CONNECTOR,
        _ => IMAGE,
    };
    (path, body, resource)
}

#[test]
fn every_operation_has_one_rule() {
    let mut operations: Vec<&str> = MODEL.operations.iter().map(|operation| operation.name.as_str()).collect();
    operations.sort_unstable();
    let rules: Vec<&str> = RULES.iter().map(|rule| rule.operation).collect();
    assert_eq!(rules, operations);
}

#[tokio::test]
async fn every_operation_is_decided_on_its_action_and_resource() {
    let world = World::new();
    let nothing = world.user(ACCOUNT, "ann", Value::Null);
    for (number, operation) in MODEL.operations.iter().enumerate() {
        let (path, body, resource) = example(&operation.name);
        let answer = world.call(&nothing, &operation.method, &path, body.clone()).await;
        let action = format!("lambda:{}", operation.name);
        let message = format!(
            "User: {USER} is not authorized to perform: {action} on resource: {resource} because no identity-based policy allows the {action} action"
        );
        assert_eq!(answer.error(), (403, "AccessDeniedException", &json!({"Message": message})), "{}", operation.name);

        let passes = allow(json!(["iam:PassRole", "lambda:PassNetworkConnector"]), json!("*"));
        let user = world.user(ACCOUNT, &format!("may-{number}"), json!([allow(json!(action), json!(resource)), passes]));
        let answer = world.call(&user, &operation.method, &path, body.clone()).await;
        assert_eq!(denied(&answer), None, "{}", operation.name);

        let elsewhere = "arn:aws:lambda:us-east-1:000000000000:microvm-image:other";
        let user = world.user(ACCOUNT, &format!("other-{number}"), json!([allow(json!("*"), json!(elsewhere))]));
        let answer = world.call(&user, &operation.method, &path, body).await;
        assert!(denied(&answer).is_some(), "{}", operation.name);
    }
}

#[tokio::test]
async fn an_explicit_deny_is_told_and_wins() {
    let world = World::new();
    let deny = json!({"Effect": "Deny", "Action": "lambda:Terminate*", "Resource": IMAGE});
    let user = world.user(ACCOUNT, "ann", json!([allow(json!("*"), json!("*")), deny]));
    let path = "/2025-09-09/microvms/microvm-0d2b";
    let answer = world.call(&user, "DELETE", path, Value::Null).await;
    assert_eq!(
        denied(&answer),
        Some(
            format!(
                "User: {USER} is not authorized to perform: lambda:TerminateMicrovm on resource: {IMAGE} with an explicit deny in an \
                 identity-based policy"
            )
            .as_str()
        )
    );
    assert_eq!(world.call(&user, "GET", path, Value::Null).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_microvm_that_is_not_there_is_told_only_to_whom_may_ask() {
    let world = World::new();
    let some = world.user(ACCOUNT, "ann", allow(json!("lambda:*"), json!(IMAGE)));
    let all = world.user(ACCOUNT, "bob", allow(json!("lambda:*"), json!("*")));
    let path = "/2025-09-09/microvms/microvm-9";
    for (keys, status) in [(some, 403), (all, 404)] {
        *world.server.plane.error.lock().unwrap() = Some(ControlError::MicrovmNotFound("microvm-9".to_owned()));
        let answer = world.call(&keys, "GET", path, Value::Null).await;
        if status == 403 {
            assert_eq!(answer.status, StatusCode::FORBIDDEN);
        } else {
            assert_eq!(denied(&answer), None);
        }
        world.server.plane.error.lock().unwrap().take();
    }
}

#[tokio::test]
async fn roles_and_connectors_are_passed_with_leave_also_the_managed_ones() {
    let world = World::new();
    let run = allow(json!("lambda:RunMicrovm"), json!(IMAGE));
    let connectors = allow(json!("lambda:PassNetworkConnector"), json!("arn:aws:lambda:*:aws:network-connector:*"));
    let role = json!({"Effect": "Allow", "Action": "iam:PassRole", "Resource": ROLE,
                      "Condition": {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}}});
    let path = "/2025-09-09/microvms";
    let ask = async |user: &Keys, role: Value, egress: &[&str]| {
        let body = json!({"imageIdentifier": IMAGE, "executionRoleArn": role, "egressNetworkConnectors": egress});
        let answer = world.call(user, "POST", path, body).await;
        denied(&answer).map(str::to_owned)
    };
    let bare = world.user(ACCOUNT, "bare", json!([run]));
    let refused = ask(&bare, Value::Null, &[]).await.unwrap();
    assert!(refused.contains(&format!("perform: lambda:PassNetworkConnector on resource: {HTTP_INGRESS} because")), "{refused}");
    let refused = ask(&bare, json!(ROLE), &[]).await.unwrap();
    assert!(refused.contains(&format!("perform: iam:PassRole on resource: {ROLE} because")), "{refused}");
    let ingress = world.user(ACCOUNT, "ingress", json!([run, allow(json!("lambda:PassNetworkConnector"), json!(HTTP_INGRESS))]));
    let refused = ask(&ingress, Value::Null, &[]).await.unwrap();
    assert!(refused.contains(&format!("resource: {INTERNET_EGRESS}")), "{refused}");
    let full = world.user(ACCOUNT, "full", json!([run, connectors, role]));
    assert_eq!(ask(&full, json!(ROLE), &[]).await, None);
    let refused = ask(&full, json!(ROLE), &[CONNECTOR]).await.unwrap();
    assert!(refused.contains(&format!("perform: lambda:PassNetworkConnector on resource: {CONNECTOR}")), "{refused}");
    let foreign = CONNECTOR.replace(ACCOUNT, OTHER);
    assert!(ask(&root(), Value::Null, &[&foreign]).await.unwrap().contains("no resource-based policy"));
}

#[tokio::test]
async fn run_and_create_with_a_key_need_leave_to_use_the_key() {
    let world = World::new();
    let everything = allow(json!(["lambda:*", "iam:PassRole"]), json!("*"));
    let key = "arn:aws:kms:us-east-1:000000000000:alias/mine";
    let generate = world.user(ACCOUNT, "generate", json!([everything, allow(json!("kms:GenerateDataKey"), json!("*"))]));
    let other = world.user(ACCOUNT, "other", json!([everything, allow(json!("kms:*"), json!(key.replace("mine", "yours")))]));
    let full = world.user(ACCOUNT, "full", json!([everything, allow(json!("kms:*"), json!(key))]));
    for (path, body) in [
        ("/2025-09-09/microvms", json!({"imageIdentifier": IMAGE, "kmsKeyIdentifier": "alias/mine"})),
        ("/2025-09-09/microvm-images", create("kmsKeyIdentifier", json!(key))),
    ] {
        for (user, action) in [(&other, "kms:GenerateDataKey"), (&generate, "kms:Decrypt")] {
            let answer = world.call(user, "POST", path, body.clone()).await;
            let refused = denied(&answer).unwrap();
            assert!(refused.contains(&format!("perform: {action} on resource: {key} because")), "{refused}");
        }
        let answer = world.call(&full, "POST", path, body).await;
        assert!(answer.body["message"].as_str().is_some_and(|message| message.contains("cannot be used")), "{}", answer.body);
    }
}

#[test]
fn key_arn_every_form_names_one_key() {
    let caller = Caller { account: ACCOUNT.to_owned(), region: "us-east-1".to_owned(), principal: USER.to_owned() };
    let arn = |key| crate::authorize::key_arn(&caller, key);
    assert_eq!(arn("alias/mine"), "arn:aws:kms:us-east-1:000000000000:alias/mine");
    assert_eq!(arn("1234-abcd"), "arn:aws:kms:us-east-1:000000000000:key/1234-abcd");
    let foreign = "arn:aws:kms:eu-west-1:111111111111:key/1234-abcd";
    assert_eq!(arn(foreign), foreign);
}

#[tokio::test]
async fn a_connector_is_the_same_by_name_id_version_and_arn() {
    let world = World::new();
    let deny = json!({"Effect": "Deny", "Action": "*", "Resource": CONNECTOR});
    let user = world.user(ACCOUNT, "ann", json!([allow(json!("*"), json!("*")), deny]));
    for name in ["out".to_owned(), "nc-1".to_owned(), CONNECTOR.replace(':', "%3A"), format!("{CONNECTOR}:1").replace(':', "%3A")] {
        let answer = world.call(&user, "GET", &format!("/2026-04-04/network-connectors/{name}"), Value::Null).await;
        assert!(denied(&answer).is_some_and(|message| message.contains("explicit deny")), "{name}: {}", answer.body);
    }
    let body = json!({"imageIdentifier": IMAGE, "egressNetworkConnectors": [format!("{CONNECTOR}:1")]});
    let answer = world.call(&user, "POST", "/2025-09-09/microvms", body).await;
    assert!(denied(&answer).is_some_and(|message| message.contains("lambda:PassNetworkConnector")), "{}", answer.body);
}

#[tokio::test]
async fn passed_roles_are_any_until_the_account_has_its_own() {
    let world = World::new();
    let example = "arn:aws:iam::123456789012:role/MicroVMRole";
    let run = async |role: &str| world.call(&root(), "POST", "/2025-09-09/microvms", super::run("executionRoleArn", json!(role))).await;
    assert_eq!(run(example).await.status, StatusCode::OK);
    let trust = |principal: Value| -> TrustPolicy {
        json!({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}})
            .try_into()
            .unwrap()
    };
    let anything = || policy(allow(json!("*"), json!("*")));
    world.directory.create_role(ACCOUNT, "build", trust(json!({"Service": "lambda.amazonaws.com"})), anything()).unwrap();
    world.directory.create_role(ACCOUNT, "people", trust(json!({"AWS": ACCOUNT})), anything()).unwrap();
    assert_eq!(run(ROLE).await.status, StatusCode::OK);
    let cannot = json!({"message": "The role defined for the function cannot be assumed by Lambda."});
    for role in ["none", "people"] {
        assert_eq!(run(&format!("arn:aws:iam::{ACCOUNT}:role/{role}")).await.error(), (400, "ValidationException", &cannot));
    }
    let across = json!({"Message": "Cross-account pass role is not allowed."});
    assert_eq!(run(example).await.error(), (403, "AccessDeniedException", &across));
}

#[tokio::test]
async fn another_account_s_arn_is_refused_before_anything_is_looked_up() {
    let world = World::new();
    let admin = world.user(OTHER, "eve", allow(json!("*"), json!("*")));
    for operation in &MODEL.operations {
        let (path, body, resource) = example(&operation.name);
        let names = path.contains("000000000000") || body["imageIdentifier"] == IMAGE;
        if !names {
            continue;
        }
        let answer = world.call(&admin, &operation.method, &path, body).await;
        let message = denied(&answer).unwrap_or_else(|| panic!("{}: {}", operation.name, answer.body));
        assert!(message.starts_with("User: arn:aws:iam::111111111111:user/eve is not authorized to perform: lambda:"), "{message}");
        assert!(message.contains("because no resource-based policy allows"), "{message} {resource}");
    }
    assert_eq!(world.server.plane.last(), "");
}

fn field<'a>(body: &'a str, name: &str) -> &'a str {
    body.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once("</")).map(|(value, _)| value).unwrap_or_default()
}

#[tokio::test]
async fn callers_learn_who_they_are_whatever_they_may() {
    let world = World::new();
    let user = world.user(OTHER, "ann", Value::Null);
    let (status, body) = world.sts(&user, "Action=GetCallerIdentity&Version=2011-06-15").await;
    assert_eq!((status, field(&body, "Arn"), field(&body, "Account")), (200, "arn:aws:iam::111111111111:user/ann", OTHER));
    assert!(field(&body, "UserId").starts_with("AIDA"));
    let (_, body) = world.sts(&root(), "Action=GetCallerIdentity&Version=2011-06-15").await;
    assert_eq!((field(&body, "Arn"), field(&body, "UserId")), ("arn:aws:iam::000000000000:root", ACCOUNT));
}

#[tokio::test]
async fn an_assumed_role_s_credentials_work_with_its_policy_and_its_session_s() {
    let world = World::new();
    let trust = TrustPolicy::parse(
        r#"{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": {"AWS": "000000000000"}, "Action": "sts:AssumeRole"}}"#,
    );
    world.directory.create_role(ACCOUNT, "reader", trust.unwrap(), policy(allow(json!("lambda:*"), json!("*")))).unwrap();
    let form = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A000000000000%3Arole%2Freader&RoleSessionName=one";
    let session = |body: &str| Keys {
        id: field(body, "AccessKeyId").to_owned(),
        secret: field(body, "SecretAccessKey").to_owned(),
        token: Some(field(body, "SessionToken").to_owned()),
    };
    let (status, body) = world.sts(&root(), form).await;
    assert_eq!((status, field(&body, "Arn")), (200, "arn:aws:sts::000000000000:assumed-role/reader/one"), "{body}");
    let keys = session(&body);
    assert_eq!(world.call(&keys, "DELETE", "/2025-09-09/microvms/microvm-0d2b", Value::Null).await.status, StatusCode::OK);
    let wrong = Keys { token: Some("x".to_owned()), ..keys.clone() };
    let answer = world.call(&wrong, "GET", "/2025-09-09/microvms", Value::Null).await;
    assert_eq!(answer.error().1, "UnrecognizedClientException");
    let (_, who) = world.sts(&keys, "Action=GetCallerIdentity&Version=2011-06-15").await;
    assert_eq!(field(&who, "Arn"), "arn:aws:sts::000000000000:assumed-role/reader/one");

    let narrow = policy(allow(json!("lambda:Get*"), json!("*"))).to_string();
    let narrow = percent_encoding::utf8_percent_encode(&narrow, percent_encoding::NON_ALPHANUMERIC);
    let (_, body) = world.sts(&root(), &format!("{form}&Policy={narrow}")).await;
    let keys = session(&body);
    assert_eq!(world.call(&keys, "GET", "/2025-09-09/microvms/microvm-0d2b", Value::Null).await.status, StatusCode::OK);
    let answer = world.call(&keys, "DELETE", "/2025-09-09/microvms/microvm-0d2b", Value::Null).await;
    assert!(denied(&answer).unwrap().contains("assumed-role/reader/one is not authorized to perform: lambda:TerminateMicrovm"));
}

#[tokio::test]
async fn sts_refuses_in_xml_with_its_own_codes() {
    let world = World::new();
    let ann = world.user(ACCOUNT, "ann", Value::Null);
    let role = "RoleArn=arn%3Aaws%3Aiam%3A%3A000000000000%3Arole%2Fnone";
    for (keys, form, status, code, part) in [
        (
            &ann,
            format!("Action=AssumeRole&{role}&RoleSessionName=one"),
            403,
            "AccessDenied",
            "is not authorized to perform: sts:AssumeRole",
        ),
        (&ann, format!("Action=AssumeRole&{role}"), 400, "ValidationError", "Value null at 'roleSessionName'"),
        (&ann, format!("Action=AssumeRole&{role}&RoleSessionName=x"), 400, "ValidationError", "session name"),
        (&ann, format!("Action=AssumeRole&{role}&RoleSessionName=one&DurationSeconds=1"), 400, "ValidationError", "between 900 and 43200"),
        (&ann, format!("Action=AssumeRole&{role}&RoleSessionName=one&Tags.member.1.Key=a"), 400, "ValidationError", "not supported"),
        (&ann, format!("Action=AssumeRole&{role}&RoleSessionName=one&Policy=x"), 400, "MalformedPolicyDocument", "not JSON"),
        (&ann, "Action=GetSessionToken&Version=2011-06-15".to_owned(), 400, "InvalidAction", "GetSessionToken"),
        (
            &Keys { id: "AKIANOBODY".to_owned(), ..ann.clone() },
            "Action=GetCallerIdentity".to_owned(),
            403,
            "InvalidClientTokenId",
            "invalid",
        ),
        (&Keys { secret: "x".to_owned(), ..ann.clone() }, "Action=GetCallerIdentity".to_owned(), 403, "SignatureDoesNotMatch", "signature"),
    ] {
        let (found, body) = world.sts(keys, &form).await;
        assert_eq!((found, field(&body, "Code")), (status, code), "{form}: {body}");
        assert!(field(&body, "Message").contains(part), "{body}");
    }
}
