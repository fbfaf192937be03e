//! Versions, managed images, tags, connectors, and what is refused because of a quota.

use http::StatusCode;
use serde_json::{Value, json};

use hearth_control::ControlError;

use super::{IMAGE, INTERNET_EGRESS, ROLE, Server, create, run};

const CONNECTOR: &str = "arn:aws:lambda:us-east-1:000000000000:network-connector:nc-1";

fn connector(member: &str, value: Value) -> Value {
    let mut body = json!({
        "Name": "out",
        "OperatorRole": ROLE,
        "ClientToken": "t",
        "Configuration": {"VpcEgressConfiguration": {
            "SubnetIds": ["subnet-1"], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"],
        }},
    });
    body[member] = value;
    body
}

#[tokio::test]
async fn an_update_is_answered_like_a_creation_without_tags() {
    let server = Server::trusted();
    let path = format!("/2025-09-09/microvm-images/{IMAGE}");
    let mut body = create("clientToken", json!("t"));
    body["hooks"] = Value::Null;
    let answer = server.call("PUT", &path, body).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!((&answer.body["state"], &answer.body["imageVersion"]), (&json!("UPDATING"), &json!("1.0")));
    assert_eq!((&answer.body["hooks"], &answer.body["egressNetworkConnectors"]), (&Value::Null, &json!([INTERNET_EGRESS])));
    assert!(answer.body.get("tags").is_none() && answer.body.get("updatedAt").is_some());
    assert!(server.plane.last().contains(r#"client_token: Some("t")"#), "{}", server.plane.last());

    let mut body = create("resources", json!([{"minimumMemoryInMiB": 3000}]));
    body.as_object_mut().unwrap().remove("name");
    let answer = server.call("PUT", &path, body).await;
    assert_eq!((answer.error().0, answer.error().1), (400, "ValidationException"), "it keeps the rules of a creation");
}

#[tokio::test]
async fn versions_are_switched_and_deleted() {
    let server = Server::trusted();
    let path = format!("/2025-09-09/microvm-images/{IMAGE}/versions/1.0");
    let answer = server.call("PATCH", &path, json!({"status": "INACTIVE"})).await;
    assert_eq!((answer.status, &answer.body["status"]), (StatusCode::OK, &json!("INACTIVE")));
    assert_eq!(answer.body["environmentVariables"], json!({"A": "1"}));
    assert_eq!(server.plane.last(), format!("set_version_status {IMAGE} 1.0 Inactive"));
    let answer = server.call("PATCH", &path, json!({"status": "BROKEN"})).await;
    assert_eq!(answer.error().0, 400);
    let answer = server.call("DELETE", &path, Value::Null).await;
    assert_eq!(answer.body, json!({"imageIdentifier": IMAGE, "imageVersion": "1.0", "state": "DELETING"}));
    *server.plane.error.lock().unwrap() = Some(ControlError::ImageInTransition("UPDATING".to_owned()));
    let answer = server.call("DELETE", &path, Value::Null).await;
    let body = json!({"message": "MicroVM Image is already in state: UPDATING", "resourceId": null, "resourceType": null});
    assert_eq!(answer.error(), (409, "ConflictException", &body));
}

#[tokio::test]
async fn managed_images_are_listed() {
    let server = Server::trusted();
    let arn = "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1";
    let at = 1_793_500_000.123;
    let answer = server.call("GET", "/2025-09-09/managed-microvm-images?maxResults=7", Value::Null).await;
    assert_eq!(answer.body, json!({"items": [{"createdAt": at, "imageArn": arn, "updatedAt": at}], "nextToken": null}));
    let answer = server.call("GET", &format!("/2025-09-09/managed-microvm-images/{arn}/versions"), Value::Null).await;
    let item = &answer.body["items"][0];
    assert_eq!((&item["imageVersion"], &item["status"], &item["imageArn"]), (&json!("1"), &json!("AVAILABLE"), &json!(arn)));
    assert!(item["supportedCpuConfigurations"][0]["architecture"].is_string());
}

#[tokio::test]
async fn tags_are_set_read_and_removed() {
    let server = Server::trusted();
    let path = format!("/2017-03-31/tags/{}", IMAGE.replace(':', "%3A"));
    let answer = server.call("POST", &path, json!({"Tags": {"a": "1"}})).await;
    assert_eq!((answer.status, &answer.body), (StatusCode::NO_CONTENT, &Value::Null));
    assert_eq!(server.plane.last(), format!("tag {IMAGE} {{\"a\": \"1\"}}"));
    let answer = server.call("DELETE", &format!("{path}?tagKeys=a&tagKeys=b"), Value::Null).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT);
    assert_eq!(server.plane.last(), format!("untag {IMAGE} [\"a\", \"b\"]"));
    let answer = server.call("GET", &path, Value::Null).await;
    assert_eq!(answer.body, json!({"Tags": {"a": "1"}}));
    let answer = server.fail(ControlError::InvalidTags("too many".to_owned()), &path).await;
    assert_eq!(answer.error(), (400, "InvalidParameterValueException", &json!({"Type": "User", "message": "too many"})));
    let microvm = server.call("GET", "/2017-03-31/tags/arn:aws:lambda:us-east-1:000000000000:microvm:microvm-1", Value::Null).await;
    assert_eq!((microvm.error().0, microvm.error().1), (400, "ValidationException"));
}

#[tokio::test]
async fn shell_tokens_are_minted() {
    let server = Server::trusted();
    let path = "/2025-09-09/microvms/microvm-0d2b/shell-auth-token";
    let answer = server.call("POST", path, json!({"expirationInMinutes": 5})).await;
    assert_eq!(answer.body, json!({"authToken": {"X-aws-proxy-auth": "a.b.c.d.e"}}));
    assert_eq!(server.plane.last(), "shell token microvm-0d2b 300s");
    let answer = server.call("POST", path, json!({"expirationInMinutes": 61})).await;
    assert_eq!(answer.error().2, &json!({"message": "ExpirationMinutes 61 exceeded max allowed of 60."}));
}

#[tokio::test]
async fn connectors_have_four_projections() {
    let server = Server::trusted();
    let all = "/2026-04-04/network-connectors";
    let detail =
        json!({"Arn": CONNECTOR, "Configuration": {"VpcEgressConfiguration": {}}, "Id": "nc-1", "Name": "out", "OperatorRole": ROLE});
    let with = |members: Value| {
        let mut all = detail.clone();
        all.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        all
    };
    let answer = server.call("POST", all, connector("Tags", json!({"hearth:allow": "example.com"}))).await;
    assert_eq!((answer.status, answer.body), (StatusCode::ACCEPTED, with(json!({"State": "PENDING"}))));
    assert_eq!(server.plane.last(), r#"create_connector out {"hearth:allow": "example.com"} t"#);
    let modified = "2026-11-01T02:26:40.123Z";
    let answer = server.call("GET", &format!("{all}/out"), Value::Null).await;
    let described = json!({"State": "ACTIVE", "LastModified": modified, "StateReason": "Initial creation"});
    assert_eq!(answer.body, with(described));
    let answer = server.call("GET", &format!("{all}/{CONNECTOR}:1"), Value::Null).await;
    assert_eq!((&answer.body["Version"], &answer.body["VersionArn"]), (&json!(1), &json!(format!("{CONNECTOR}:1"))));
    let answer = server.call("PUT", &format!("{all}/nc-1"), json!({"ClientToken": "t"})).await;
    let reason = "No configuration changes detected";
    let updated = json!({"State": "ACTIVE", "LastModified": modified, "LastUpdateStatus": "Successful", "LastUpdateStatusReason": reason});
    assert_eq!((answer.status, answer.body), (StatusCode::ACCEPTED, with(updated)));
    let answer = server.call("DELETE", &format!("{all}/nc-1"), Value::Null).await;
    assert_eq!((answer.status, answer.body), (StatusCode::ACCEPTED, with(json!({"State": "DELETING"}))));
    let item = json!({"Arn": CONNECTOR, "Id": "nc-1", "LastModified": modified, "Name": "out", "State": "ACTIVE", "Type": "VPC_EGRESS"});
    let answer = server.call("GET", &format!("{all}?State=ACTIVE&MaxItems=100"), Value::Null).await;
    assert_eq!(answer.body, json!({"NetworkConnectors": [item], "NextMarker": "bmV4dA"}));
    let answer = server.call("GET", &format!("{all}?Marker=bmV4dA"), Value::Null).await;
    assert_eq!(answer.body, json!({"NetworkConnectors": [item]}), "no marker on the last page, not even null");
    let answer = server.call("GET", &format!("{all}/nc-1/versions"), Value::Null).await;
    let version = &answer.body["NetworkConnectorVersions"][0];
    assert_eq!((&version["Version"], &version["VersionArn"]), (&json!(1), &json!(format!("{CONNECTOR}:1"))));
}

#[tokio::test]
async fn connectors_need_more_than_their_model_says() {
    let server = Server::trusted();
    let vpc = |member: &str| {
        let mut body = connector("ClientToken", json!("t"));
        body["Configuration"]["VpcEgressConfiguration"][member] = Value::Null;
        body
    };
    for (body, message) in [
        (connector("ClientToken", Value::Null), "ClientToken is a required field"),
        (connector("OperatorRole", Value::Null), "NetworkConnectorOperatorRole is required for VPC_EGRESS connector type"),
        (vpc("NetworkProtocol"), "NetworkProtocol cannot be null or empty for VPC_EGRESS connector type"),
        (vpc("AssociatedComputeResourceTypes"), "AssociatedComputeResourceTypes is required for VPC_EGRESS connector type"),
    ] {
        let answer = server.call("POST", "/2026-04-04/network-connectors", body).await;
        assert_eq!(answer.error(), (400, "InvalidParameterValueException", &json!({"Type": "User", "message": message})));
    }
    let mut body = connector("ClientToken", json!("t"));
    body["Configuration"]["VpcEgressConfiguration"]["SubnetIds"] = (0..17).map(|n| json!(format!("subnet-{n}"))).collect();
    let answer = server.call("POST", "/2026-04-04/network-connectors", body).await;
    assert_eq!((answer.error().0, answer.error().1), (400, "ValidationException"));
    let message = answer.body["message"].as_str().unwrap();
    assert!(message.contains("at 'configuration.vpcEgressConfiguration.subnetIds' failed"), "{message}");
}

#[tokio::test]
async fn connectors_are_refused_with_the_service_s_exceptions() {
    let server = Server::trusted();
    let path = "/2026-04-04/network-connectors/out";
    let answer = server.fail(ControlError::ConnectorNotFound("out".to_owned()), path).await;
    assert_eq!(answer.error(), (404, "ResourceNotFoundException", &json!({"Message": "Network connector not found for: out"})));
    let answer = server.fail(ControlError::ConnectorConflict("used".to_owned()), path).await;
    assert_eq!(answer.error(), (409, "ResourceConflictException", &json!({"Type": "User", "message": "used"})));
    let answer = server.fail(ControlError::ConnectorLimit(3), path).await;
    assert_eq!((answer.error().0, answer.error().1), (400, "NetworkConnectorLimitExceededException"));
}

#[tokio::test]
async fn users_connectors_lead_out_and_managed_ones_must_exist() {
    let server = Server::trusted();
    let managed = |name: &str| format!("arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:{name}");
    for egress in [CONNECTOR.to_owned(), format!("{CONNECTOR}:2"), managed("NO_EGRESS")] {
        let answer = server.call("POST", "/2025-09-09/microvms", run("egressNetworkConnectors", json!([egress]))).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    }
    for (member, value, message) in [
        ("egressNetworkConnectors", managed("ALL_EGRESS"), "Unrecognized managed network connector ARN: "),
        ("egressNetworkConnectors", "nc-1".to_owned(), "Malformed network connector ARN"),
        ("ingressNetworkConnectors", CONNECTOR.to_owned(), "Network connector arn"),
    ] {
        let answer = server.call("POST", "/2025-09-09/microvms", run(member, json!([value]))).await;
        assert_eq!((answer.error().0, answer.error().1), (400, "ValidationException"));
        assert!(answer.body["message"].as_str().unwrap().starts_with(message), "{}", answer.body);
    }
}

#[tokio::test]
async fn quotas_are_refused_with_402_and_429() {
    let server = Server::trusted();
    let text = "The base maximum allocated memory limit has been reached for this account.";
    *server.plane.error.lock().unwrap() = Some(ControlError::QuotaExceeded(text.to_owned()));
    let answer = server.call("POST", "/2025-09-09/microvms", run("imageVersion", json!("1.0"))).await;
    let body = json!({"message": text, "quotaCode": null, "resourceId": null, "resourceType": null, "serviceCode": null});
    assert_eq!(answer.error(), (402, "ServiceQuotaExceededException", &body));
    *server.plane.error.lock().unwrap() = Some(ControlError::Throttled { retry_after_seconds: 3 });
    let answer = server.call("POST", "/2025-09-09/microvms", run("imageVersion", json!("1.0"))).await;
    let body = json!({"message": "Rate exceeded", "quotaCode": null, "serviceCode": null});
    assert_eq!(answer.error(), (429, "ThrottlingException", &body));
    assert_eq!(answer.headers["retry-after"], "3");
}
