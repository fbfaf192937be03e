//! The log calls against real logs in a scratch directory.

use std::{convert::Infallible, sync::Arc};

use axum::{Router, body::Body};
use http::{Request, Response};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use hearth_control::logs::{LogGroup, LogLine, LogOrigin, LogStore, Retention, Route};

use crate::{
    Auth, Settings, service,
    tests::{Fake, caller, directory},
};

const GROUP: &str = "/aws/lambda-microvms/demo";
const NO_GROUP: &str = "The specified log group does not exist.";

struct Server {
    _dir: tempfile::TempDir,
    logs: Arc<LogStore>,
    router: Router,
}

impl Server {
    fn new() -> Self {
        Self::with(Auth::Trusted(caller("us-east-1"), directory()))
    }

    fn with(auth: Auth) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogStore::new(dir.path().join("logs"), Retention::default());
        let objects = tower::service_fn(|_| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
        let settings = Settings { regions: Vec::new(), min_idle_seconds: 60 };
        let router = service(Arc::new(Fake::default()), Arc::clone(&logs), objects, auth, settings);
        Self { _dir: dir, logs, router }
    }

    /// With lines in streams: name, times.
    async fn filled(streams: &[(&str, &[u64])]) -> Self {
        let server = Self::new();
        for (stream, times) in streams {
            server.write("us-east-1", stream, times).await;
        }
        server.logs.close().await;
        server
    }

    async fn write(&self, region: &str, stream: &str, times: &[u64]) {
        let group = LogGroup::of_image("000000000000", region, "demo");
        let writer = self.logs.writer(&Route::new(group, (*stream).to_owned(), None));
        for time_ms in times {
            writer.append(LogLine { time_ms: *time_ms, ..LogLine::now(LogOrigin::Stdout, format!("{stream} at {time_ms}")) }).await;
        }
    }

    async fn send(&self, request: Request<Body>) -> (u16, Value) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/x-amz-json-1.1");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn call(&self, operation: &str, body: Value) -> (u16, Value) {
        let request = Request::post("/").header("x-amz-target", format!("Logs_20140328.{operation}"));
        self.send(request.body(Body::from(body.to_string())).unwrap()).await
    }

    async fn ok(&self, operation: &str, body: Value) -> Value {
        let (status, body) = self.call(operation, body).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    /// Exception and message.
    async fn refused(&self, operation: &str, body: Value) -> (String, String) {
        let (status, body) = self.call(operation, body).await;
        assert_eq!(status, 400, "{body}");
        let text = |member: &str| body[member].as_str().unwrap_or_default().to_owned();
        (text("__type"), text("message"))
    }
}

fn texts(page: &Value) -> Vec<&str> {
    page["events"].as_array().unwrap().iter().map(|event| event["message"].as_str().unwrap()).collect()
}

fn names<'p>(page: &'p Value, list: &str, member: &str) -> Vec<&'p str> {
    page[list].as_array().unwrap().iter().map(|item| item[member].as_str().unwrap()).collect()
}

#[tokio::test]
async fn groups_are_described_page_by_page() {
    let server = Server::new();
    for image in ["a", "b", "c-b"] {
        let group = LogGroup::of_image("000000000000", "us-east-1", image);
        server.logs.writer(&Route::new(group, "s".to_owned(), None)).append(LogLine::now(LogOrigin::Build, "x")).await;
    }
    server.logs.close().await;
    let page = server.ok("DescribeLogGroups", json!({})).await;
    let group = &page["logGroups"][0];
    assert_eq!(page["logGroups"].as_array().unwrap().len(), 3);
    assert_eq!(page.get("nextToken"), None);
    assert_eq!(group["logGroupArn"], "arn:aws:logs:us-east-1:000000000000:log-group:/aws/lambda-microvms/a");
    assert_eq!(group["arn"], "arn:aws:logs:us-east-1:000000000000:log-group:/aws/lambda-microvms/a:*");
    assert_eq!((&group["retentionInDays"], &group["logGroupClass"]), (&json!(14), &json!("STANDARD")));
    assert!(group["storedBytes"].as_u64().unwrap() > 0 && group["creationTime"].as_u64().unwrap() > 1_700_000_000_000);
    let first = server.ok("DescribeLogGroups", json!({"limit": 2})).await;
    let second = server.ok("DescribeLogGroups", json!({"limit": 2, "nextToken": first["nextToken"]})).await;
    assert_eq!(names(&first, "logGroups", "logGroupName"), ["/aws/lambda-microvms/a", "/aws/lambda-microvms/b"]);
    assert_eq!(names(&second, "logGroups", "logGroupName"), ["/aws/lambda-microvms/c-b"]);
    assert_eq!(second.get("nextToken"), None);
    for (filter, count) in [
        (json!({"logGroupNamePrefix": "/aws/lambda-microvms/c"}), 1),
        (json!({"logGroupNamePrefix": "/other"}), 0),
        (json!({"logGroupNamePattern": "b"}), 3),
        (json!({"logGroupNamePattern": "s/b"}), 1),
        (json!({"logGroupClass": "INFREQUENT_ACCESS"}), 0),
    ] {
        let page = server.ok("DescribeLogGroups", filter.clone()).await;
        assert_eq!(page["logGroups"].as_array().unwrap().len(), count, "{filter}");
    }
}

#[tokio::test]
async fn streams_are_described_by_name_or_time_by_name_or_arn() {
    let server = Server::filled(&[("b", &[5, 6]), ("a1", &[7]), ("a2", &[1, 2])]).await;
    let list = async |extra: Value| {
        let mut input = json!({"logGroupName": GROUP});
        input.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok("DescribeLogStreams", input).await
    };
    let all = list(json!({})).await;
    assert_eq!(names(&all, "logStreams", "logStreamName"), ["a1", "a2", "b"]);
    let stream = &all["logStreams"][2];
    assert_eq!((&stream["firstEventTimestamp"], &stream["lastEventTimestamp"]), (&json!(5), &json!(6)));
    assert_eq!(stream["arn"], format!("arn:aws:logs:us-east-1:000000000000:log-group:{GROUP}:log-stream:b"));
    let arn = format!("arn:aws:logs:us-east-1:000000000000:log-group:{GROUP}");
    assert_eq!(server.ok("DescribeLogStreams", json!({"logGroupIdentifier": arn})).await, all);
    assert_eq!(server.ok("DescribeLogStreams", json!({"logGroupIdentifier": GROUP})).await, all);
    assert_eq!(names(&list(json!({"logStreamNamePrefix": "a", "descending": true})).await, "logStreams", "logStreamName"), ["a2", "a1"]);

    let by_time = list(json!({"orderBy": "LastEventTime", "descending": true})).await;
    let (mut paged, mut token) = (Vec::new(), Value::Null);
    loop {
        let page = list(json!({"orderBy": "LastEventTime", "descending": true, "limit": 1, "nextToken": token})).await;
        paged.extend(page["logStreams"].as_array().unwrap().clone());
        match page.get("nextToken") {
            Some(next) => token = next.clone(),
            None => break,
        }
    }
    assert_eq!(json!(paged), by_time["logStreams"]);
    assert_eq!(paged.len(), 3);
}

#[tokio::test]
async fn a_stream_is_read_both_ways_until_the_token_repeats() {
    let server = Server::filled(&[("s", &[1, 2, 3, 4, 5])]).await;
    let read = async |extra: Value| {
        let mut input = json!({"logGroupName": GROUP, "logStreamName": "s", "limit": 2});
        input.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok("GetLogEvents", input).await
    };
    let newest = read(json!({})).await;
    assert_eq!(texts(&newest), ["s at 4", "s at 5"]);
    let event = newest["events"][0].as_object().unwrap();
    assert_eq!(event.len(), 3);
    assert!(event["timestamp"] == 4 && event["ingestionTime"].as_u64().unwrap() > 1_700_000_000_000);
    let older = read(json!({"nextToken": newest["nextBackwardToken"]})).await;
    assert_eq!(texts(&older), ["s at 2", "s at 3"]);
    let oldest = read(json!({"nextToken": older["nextBackwardToken"]})).await;
    assert_eq!(texts(&oldest), ["s at 1"]);
    let none = read(json!({"nextToken": oldest["nextBackwardToken"]})).await;
    assert_eq!((texts(&none).len(), &none["nextBackwardToken"]), (0, &oldest["nextBackwardToken"]));

    let head = read(json!({"startFromHead": true})).await;
    assert_eq!(texts(&head), ["s at 1", "s at 2"]);
    let next = read(json!({"startFromHead": true, "nextToken": head["nextForwardToken"]})).await;
    assert_eq!(texts(&next), ["s at 3", "s at 4"]);
    let end = read(json!({"nextToken": next["nextForwardToken"]})).await;
    assert_eq!(texts(&end), ["s at 5"]);
    let none = read(json!({"nextToken": end["nextForwardToken"]})).await;
    assert_eq!((texts(&none).len(), &none["nextForwardToken"]), (0, &end["nextForwardToken"]));
    assert_eq!(none["nextForwardToken"], newest["nextForwardToken"]);
    assert_eq!(texts(&read(json!({"startTime": 2, "endTime": 3})).await), ["s at 2"], "the end is not part of it");
}

#[tokio::test]
async fn events_of_many_streams_are_filtered_and_interleaved() {
    let server = Server::filled(&[("a", &[1, 4, 4]), ("b", &[2, 3]), ("c", &[4])]).await;
    let filter = async |extra: Value| {
        let mut input = json!({"logGroupName": GROUP, "interleaved": true});
        input.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok("FilterLogEvents", input).await
    };
    let all = filter(json!({})).await;
    assert_eq!(texts(&all), ["a at 1", "b at 2", "b at 3", "a at 4", "a at 4", "c at 4"]);
    assert_eq!((all.get("nextToken"), &all["searchedLogStreams"], all["events"][1].as_object().unwrap().len()), (None, &json!([]), 5));
    let mut ids = names(&all, "events", "eventId");
    assert_eq!(ids, names(&filter(json!({"startTime": 1})).await, "events", "eventId"), "ids stay");
    ids.dedup();
    assert_eq!(ids.len(), 6);
    let (mut paged, mut token) = (Vec::new(), Value::Null);
    loop {
        let page = filter(json!({"limit": 4, "nextToken": token})).await;
        paged.extend(page["events"].as_array().unwrap().clone());
        match page.get("nextToken") {
            Some(next) => token = next.clone(),
            None => break,
        }
    }
    assert_eq!(json!(paged), all["events"]);
    assert_eq!(texts(&filter(json!({"startTime": 2, "endTime": 3})).await), ["b at 2", "b at 3"], "the end is part of it");
    assert_eq!(texts(&filter(json!({"logStreamNames": ["c", "b"], "filterPattern": "at -3"})).await), ["b at 2", "c at 4"]);
    assert_eq!(texts(&filter(json!({"logStreamNamePrefix": "a", "filterPattern": "\"at 1\""})).await), ["a at 1"]);
}

#[tokio::test]
async fn requests_that_break_a_rule_are_refused() {
    let server = Server::filled(&[("s", &[1])]).await;
    let one = |value: &str, member: &str, rule: &str| {
        format!("1 validation error detected: Value '{value}' at '{member}' failed to satisfy constraint: Member must {rule}")
    };
    let unsupported =
        "Invalid filter pattern: JSON patterns are not supported by Hearth; use terms such as \"a phrase\" -without ?either ?or";
    let invalid_token = "The specified nextToken is invalid.";
    for (operation, input, message) in [
        ("DescribeLogGroups", json!({"limit": 51}), one("51", "limit", "have value less than or equal to 50")),
        ("DescribeLogGroups", json!({"nextToken": "?"}), invalid_token.to_owned()),
        ("DescribeLogStreams", json!({"logGroupName": GROUP, "limit": 0}), one("0", "limit", "have value greater than or equal to 1")),
        (
            "DescribeLogStreams",
            json!({"logGroupName": "a b"}),
            one("a b", "logGroupName", r"satisfy regular expression pattern: [\.\-_/#A-Za-z0-9]+"),
        ),
        (
            "DescribeLogStreams",
            json!({"logGroupName": GROUP, "orderBy": "Size"}),
            one("Size", "orderBy", "satisfy enum value set: [LogStreamName, LastEventTime]"),
        ),
        (
            "DescribeLogStreams",
            json!({"logGroupName": GROUP, "orderBy": "LastEventTime", "logStreamNamePrefix": "s"}),
            "Cannot order by LastEventTime with a logStreamNamePrefix.".to_owned(),
        ),
        (
            "GetLogEvents",
            json!({"logGroupName": GROUP}),
            "1 validation error detected: Value null at 'logStreamName' failed to satisfy constraint: Member must not be null".to_owned(),
        ),
        ("GetLogEvents", json!({"logGroupName": GROUP, "logStreamName": "s", "nextToken": "f/1/s"}), invalid_token.to_owned()),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "filterPattern": "{ $.a = 1 }"}), unsupported.to_owned()),
        (
            "FilterLogEvents",
            json!({"logGroupName": GROUP, "startTime": -1, "limit": 10_001}),
            "2 validation errors detected: Value '10001' at 'limit' failed to satisfy constraint: Member must have value less than or equal to \
             10000; Value '-1' at 'startTime' failed to satisfy constraint: Member must have value greater than or equal to 0"
                .to_owned(),
        ),
    ] {
        let refused = server.refused(operation, input.clone()).await;
        assert_eq!(refused, ("InvalidParameterException".to_owned(), message), "{input}");
    }
    for input in [json!({"limit": "many"}), json!([])] {
        assert_eq!(server.refused("DescribeLogGroups", input).await.0, "SerializationException");
    }
    for (operation, input, exception) in [
        ("StartLiveTail", json!({}), "InvalidOperationException"),
        ("PutLogEvents", json!({}), "UnknownOperationException"),
        ("", json!({}), "UnknownOperationException"),
    ] {
        let (refused, message) = server.refused(operation, input).await;
        assert_eq!(refused, exception);
        assert!(message.contains("not supported by Hearth"), "{message}");
    }
}

#[tokio::test]
async fn what_is_not_there_or_somebody_else_s_is_not_found() {
    let server = Server::new();
    server.write("eu-west-1", "s", &[1]).await;
    server.logs.close().await;
    let foreign = [
        "arn:aws:logs:eu-west-1:000000000000:log-group:/aws/lambda-microvms/demo",
        "arn:aws:logs:us-east-1:111111111111:log-group:/aws/lambda-microvms/demo",
        "arn:nonsense",
        GROUP,
    ];
    let not_found = |message: &str| ("ResourceNotFoundException".to_owned(), message.to_owned());
    assert_eq!(server.ok("DescribeLogGroups", json!({})).await["logGroups"], json!([]));
    for group in foreign {
        for operation in ["DescribeLogStreams", "GetLogEvents", "FilterLogEvents"] {
            let input = json!({"logGroupIdentifier": group, "logStreamName": "s"});
            assert_eq!(server.refused(operation, input).await, not_found(NO_GROUP), "{group} {operation}");
        }
    }
    let server = Server::filled(&[("s", &[1])]).await;
    for (operation, input) in [
        ("GetLogEvents", json!({"logGroupName": GROUP, "logStreamName": "t"})),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "logStreamNames": ["s", "t"]})),
    ] {
        assert_eq!(server.refused(operation, input).await, not_found("The specified log stream does not exist."));
    }
}

#[tokio::test]
async fn callers_must_be_known_and_sign_for_logs() {
    let server = Server::with(Auth::SigV4(directory()));
    let request = || Request::post("/").header("x-amz-target", "Logs_20140328.DescribeLogGroups");
    let (status, body) = server.send(request().body(Body::from("{}")).unwrap()).await;
    assert_eq!((status, &body["__type"]), (400, &json!("MissingAuthenticationTokenException")));
    let signed = "AWS4-HMAC-SHA256 Credential=AKID2/20260101/us-east-1/logs/aws4_request, SignedHeaders=host, Signature=00";
    let (status, body) = server.send(request().header("authorization", signed).body(Body::from("{}")).unwrap()).await;
    assert_eq!((status, &body["__type"]), (400, &json!("UnrecognizedClientException")));
}
