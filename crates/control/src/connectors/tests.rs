//! Connectors of users, against a real store; what the engine is told of them, with a fake.

use std::collections::BTreeMap;

use hearth_machine::{Egress, network::EgressPolicy};
use serde_json::json;

use crate::{
    ControlError,
    arn::managed_connector,
    plane::ControlPlane,
    quota::{MemoryAccounting, Quotas, Rate},
    testing::{World, caller, create, image_arn, run},
    types::{Connector, ConnectorSpec, ConnectorState, CreateConnector, MicrovmState, PageRequest, RunMicrovm, UpdateConnector},
};

fn request(name: &str, tags: &[(&str, &str)]) -> CreateConnector {
    CreateConnector {
        name: name.to_owned(),
        spec: ConnectorSpec {
            configuration: json!({"VpcEgressConfiguration": {"SubnetIds": ["subnet-1"]}}),
            operator_role: Some("arn:aws:iam::000000000000:role/operator".to_owned()),
        },
        tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        client_token: format!("token of {name}"),
    }
}

impl World {
    async fn connector(&self, name: &str, tags: &[(&str, &str)]) -> Connector {
        self.control.create_connector(&caller(), request(name, tags)).await.unwrap()
    }

    /// What the engine was told when a MicroVM with this connector was launched.
    async fn egress(&self, arn: &str) -> Egress {
        let request = RunMicrovm { egress_network_connectors: vec![arn.to_owned()], ..run("demo", None) };
        let vm = self.control.run_microvm(&caller(), request).await.unwrap();
        self.reaches(&vm.id, MicrovmState::Running).await;
        self.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
        self.reaches(&vm.id, MicrovmState::Terminated).await;
        self.engine.egress.lock().unwrap().clone().unwrap()
    }
}

fn policy(allow: &str, deny: &str) -> Egress {
    Egress::Policy(EgressPolicy::parse(allow, deny).unwrap())
}

#[tokio::test]
async fn a_connector_is_found_by_name_id_and_arns() {
    let world = World::new().await;
    let made = world.connector("out", &[]).await;
    assert_eq!((made.state, made.version), (ConnectorState::Pending, 1));
    assert_eq!(made.arn, format!("arn:aws:lambda:us-east-1:000000000000:network-connector:{}", made.id));
    for identifier in ["out", &made.id, &made.arn, &format!("{}:1", made.arn)] {
        let (found, _) = world.control.get_connector(&caller(), identifier).await.unwrap();
        assert_eq!((found.id.as_str(), found.state), (made.id.as_str(), ConnectorState::Active), "{identifier}");
    }
    for identifier in ["other", "nc-0", &format!("{}:2", made.arn), &made.arn.replace("us-east-1", "eu-west-1")] {
        let error = world.control.get_connector(&caller(), identifier).await.unwrap_err();
        assert_eq!(error.to_string(), format!("Network connector not found for: {identifier}"));
    }
    let foreign = made.arn.replace("000000000000", "111111111111");
    assert!(matches!(world.control.get_connector(&caller(), &foreign).await, Err(ControlError::Denied { .. })));
}

#[tokio::test]
async fn tokens_names_and_the_limit() {
    let world = World::with(|settings| settings.quotas = Quotas { connectors: 1, ..Quotas::default() }).await;
    let made = world.connector("out", &[]).await;
    let again = world.connector("out", &[]).await;
    assert_eq!((again.id, again.state), (made.id, ConnectorState::Active), "the same, as it is now");
    let other = CreateConnector { client_token: "token of out".to_owned(), ..request("else", &[]) };
    assert!(matches!(world.control.create_connector(&caller(), other).await, Err(ControlError::ConnectorConflict(_))));
    let taken = CreateConnector { client_token: "another".to_owned(), ..request("out", &[]) };
    assert!(matches!(world.control.create_connector(&caller(), taken).await, Err(ControlError::ConnectorConflict(_))));
    assert!(matches!(world.control.create_connector(&caller(), request("two", &[])).await, Err(ControlError::ConnectorLimit(1))));
    assert_eq!(world.control.delete_connector(&caller(), "out").await.unwrap().state, ConnectorState::Deleting);
    assert!(world.control.get_connector(&caller(), "out").await.is_err());
    world.connector("out", &[]).await;
}

#[tokio::test]
async fn an_update_is_a_version_unless_it_changes_nothing() {
    let world = World::new().await;
    let made = world.connector("out", &[]).await;
    let none = UpdateConnector { configuration: None, operator_role: None, client_token: None };
    let same = world.control.update_connector(&caller(), "out", none.clone()).await.unwrap();
    let reason = Some("No configuration changes detected".to_owned());
    assert_eq!((same.version, same.last_update), (1, Some(("Successful".to_owned(), reason))));
    let changed = UpdateConnector { configuration: Some(json!({"VpcEgressConfiguration": {}})), ..none };
    let second = world.control.update_connector(&caller(), "out", changed).await.unwrap();
    assert_eq!((second.version, second.last_update), (2, Some(("Successful".to_owned(), None))));
    assert_eq!(second.spec.operator_role, made.spec.operator_role, "what is absent stays");
    let (first, version) = world.control.get_connector(&caller(), &format!("{}:1", made.arn)).await.unwrap();
    assert_eq!((first.spec, version), (made.spec, Some(1)));
    let page = |token| PageRequest { limit: Some(1), token };
    let newest = world.control.list_connector_versions(&caller(), "out", None, page(None)).await.unwrap();
    let oldest = world.control.list_connector_versions(&caller(), "out", None, page(newest.next)).await.unwrap();
    assert_eq!((newest.items[0].version, oldest.items[0].version, oldest.next), (2, 1, None));
    let all = world.control.list_connectors(&caller(), Some(ConnectorState::Failed), PageRequest::default()).await.unwrap();
    assert!(all.items.is_empty());
}

#[tokio::test]
async fn a_connector_in_use_is_neither_updated_nor_deleted() {
    let world = World::with_image().await;
    let made = world.connector("out", &[]).await;
    let request = RunMicrovm { egress_network_connectors: vec![made.arn.clone()], ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), request.clone()).await.unwrap();
    assert_eq!(vm.egress_network_connectors, std::slice::from_ref(&made.arn));
    let update = UpdateConnector { configuration: Some(json!({})), operator_role: None, client_token: None };
    assert!(matches!(world.control.update_connector(&caller(), "out", update).await, Err(ControlError::ConnectorConflict(_))));
    assert!(matches!(world.control.delete_connector(&caller(), "out").await, Err(ControlError::ConnectorConflict(_))));
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Terminated).await;
    world.control.delete_connector(&caller(), "out").await.unwrap();
    let error = world.control.run_microvm(&caller(), request).await.unwrap_err();
    assert_eq!(error.to_string(), format!("Network connector not found for: {}", made.arn));
}

#[tokio::test]
async fn what_connectors_mean() {
    let configured = EgressPolicy::parse("192.0.2.0/24", "").unwrap();
    let world = World::with(|settings| settings.connectors = BTreeMap::from([("set".to_owned(), configured.clone())])).await;
    world.build("demo").await;
    let managed = |name| managed_connector("us-east-1", name);
    assert_eq!(world.egress(&managed("INTERNET_EGRESS")).await, Egress::Internet);
    assert_eq!(world.egress(&managed("NO_EGRESS")).await, Egress::None);
    let plain = world.connector("plain", &[]).await;
    assert_eq!(world.egress(&plain.arn).await, Egress::Internet);
    let tagged = world.connector("tagged", &[("hearth:allow", "example.com:443 10.0.0.0/8"), ("hearth:deny", "10.1.0.0/16")]).await;
    assert_eq!(world.egress(&tagged.arn).await, policy("example.com:443 10.0.0.0/8", "10.1.0.0/16"));
    let denying = world.connector("denying", &[("hearth:deny", "example.com")]).await;
    assert_eq!(world.egress(&denying.arn).await, policy("*", "example.com"));
    let set = world.connector("set", &[("hearth:allow", "example.org")]).await;
    assert_eq!(world.egress(&set.arn).await, Egress::Policy(configured), "the operator's word counts");

    world.control.tag_resource(&caller(), &plain.arn, BTreeMap::from([("hearth:allow".to_owned(), String::new())])).await.unwrap();
    assert_eq!(world.egress(&format!("{}:1", plain.arn)).await, policy("", ""), "tags count at the next launch");
}

#[tokio::test]
async fn an_image_s_connector_is_used_by_its_build_and_its_microvms() {
    let world = World::new().await;
    let made = world.connector("out", &[("hearth:allow", "example.com")]).await;
    let mut image = create("demo");
    image.spec.egress_network_connectors = vec![made.arn.clone()];
    world.control.create_image(&caller(), image.clone()).await.unwrap();
    world.settled("demo").await;
    assert_eq!(world.engine.egress.lock().unwrap().take(), Some(policy("example.com", "")));
    assert_eq!(world.run(None).await.egress_network_connectors, [made.arn]);
    assert_eq!(world.engine.egress.lock().unwrap().take(), Some(policy("example.com", "")));
    image.name = "other".to_owned();
    image.spec.egress_network_connectors = vec!["arn:aws:lambda:us-east-1:000000000000:network-connector:nc-0".to_owned()];
    let error = world.control.create_image(&caller(), image).await.unwrap_err();
    assert!(matches!(&error, ControlError::Invalid(text) if text.starts_with("Network connector not found for")), "{error}");
}

#[tokio::test]
async fn tags_that_are_no_policy_are_refused() {
    let world = World::new().await;
    let error = world.control.create_connector(&caller(), request("out", &[("hearth:allow", "a..b")])).await.unwrap_err();
    assert!(matches!(&error, ControlError::InvalidTags(text) if text.contains("\"a..b\"")), "{error}");
    let made = world.connector("out", &[("hearth:deny", "*:25")]).await;
    let worse = BTreeMap::from([("hearth:deny".to_owned(), "example.com:25".to_owned())]);
    assert!(matches!(world.control.tag_resource(&caller(), &made.arn, worse).await, Err(ControlError::InvalidTags(_))));
    let tags = world.control.list_tags(&caller(), &made.arn).await.unwrap();
    assert_eq!(tags.get("hearth:deny").map(String::as_str), Some("*:25"));
    world.control.untag_resource(&caller(), &made.arn, vec!["hearth:deny".to_owned()]).await.unwrap();
    assert!(world.control.list_tags(&caller(), &made.arn).await.unwrap().is_empty());
}

#[tokio::test]
async fn memory_and_calls_are_limited() {
    let quotas = Quotas {
        allocated_memory_mib: 2048,
        memory_accounting: MemoryAccounting::Peak,
        suspend: Rate { per_second: 0.1, burst: 1 },
        ..Quotas::default()
    };
    let world = World::with(|settings| settings.quotas = quotas).await;
    world.build("demo").await;
    let vm = world.run(None).await;
    let error = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap_err();
    assert!(matches!(error, ControlError::QuotaExceeded(_)));
    assert_eq!(error.to_string(), "The base maximum allocated memory limit has been reached for this account.");
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    let error = world.control.suspend_microvm(&caller(), &vm.id).await.unwrap_err();
    assert!(matches!(error, ControlError::Throttled { retry_after_seconds: 10 }), "{error:?}");
    world.reaches(&vm.id, MicrovmState::Suspended).await;
    assert!(matches!(world.control.run_microvm(&caller(), run("demo", None)).await, Err(ControlError::QuotaExceeded(_))), "it counts");
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Terminated).await;
    assert_eq!(world.control.run_microvm(&caller(), run("demo", None)).await.unwrap().image_arn, image_arn("demo"));
}

#[tokio::test]
async fn a_shell_token_takes_a_connector_and_a_living_microvm() {
    use std::time::Duration;
    let world = World::with_image().await;
    let lifetime = Duration::from_secs(60);
    let vm = world.run(None).await;
    let error = world.control.create_shell_token(&caller(), &vm.id, lifetime).await.unwrap_err();
    assert_eq!(error.to_string(), "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.");
    let request = RunMicrovm { ingress_network_connectors: vec![managed_connector("us-east-1", "ALL_INGRESS")], ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), request).await.unwrap();
    world.control.create_shell_token(&caller(), &vm.id, lifetime).await.unwrap();
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    let error = world.control.create_shell_token(&caller(), &vm.id, lifetime).await.unwrap_err();
    assert!(matches!(error, ControlError::Terminated(_)), "{error}");
}
