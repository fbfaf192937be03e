//! The operations of `lambda-core`'s network connectors. Their members are in PascalCase, and unset ones are left out (SPEC 5.5).

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use hearth_control::{
    plane::ControlPlane,
    types::{Caller, Connector, ConnectorSpec, ConnectorState, ConnectorVersion, CreateConnector, PageRequest, UpdateConnector},
};

use crate::{
    error::ApiError,
    operations::{read, write},
};

/// The one type of connectors that users make.
const TYPE: &str = "VPC_EGRESS";
/// Reason of the state of every connector.
const STATE_REASON: &str = "Initial creation";
/// Longest name; the model lets ARNs be names too, which are longer.
const MAX_NAME: usize = 64;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateInput {
    name: String,
    configuration: Value,
    operator_role: Option<String>,
    client_token: Option<String>,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UpdateInput {
    identifier: String,
    configuration: Option<Value>,
    operator_role: Option<String>,
    client_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct IdentifierInput {
    identifier: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListInput {
    state: Option<ConnectorState>,
    marker: Option<String>,
    max_items: Option<u32>,
}

/// What every answer about one connector has.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Detail {
    arn: String,
    configuration: Value,
    id: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    operator_role: Option<String>,
    state: ConnectorState,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Described {
    #[serde(flatten)]
    detail: Detail,
    last_modified: Option<String>,
    state_reason: &'static str,
    #[serde(flatten)]
    update: Update,
    /// Only for those who ask for a version.
    #[serde(flatten)]
    version: Option<Version>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Updated {
    #[serde(flatten)]
    detail: Detail,
    last_modified: Option<String>,
    #[serde(flatten)]
    update: Update,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Update {
    #[serde(skip_serializing_if = "Option::is_none")]
    last_update_status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_update_status_reason: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Version {
    version: i64,
    version_arn: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    arn: String,
    id: String,
    last_modified: Option<String>,
    name: String,
    state: ConnectorState,
    #[serde(rename = "Type")]
    kind: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct VersionItem {
    arn: String,
    id: String,
    last_modified: Option<String>,
    name: String,
    state: ConnectorState,
    state_reason: &'static str,
    #[serde(flatten)]
    version: Version,
}

/// Performs an operation of the model on input that meets the model's constraints.
pub(crate) async fn perform(plane: &dyn ControlPlane, caller: &Caller, name: &str, input: Value) -> Result<Value, ApiError> {
    match name {
        "CreateNetworkConnector" => {
            let request = check_create(read(input)?)?;
            write(Detail::from(plane.create_connector(caller, request).await?))
        }
        "GetNetworkConnector" => {
            let input: IdentifierInput = read(input)?;
            let (connector, version) = plane.get_connector(caller, &input.identifier).await?;
            write(Described::new(connector, version))
        }
        "UpdateNetworkConnector" => {
            let input: UpdateInput = read(input)?;
            input.configuration.as_ref().map_or(Ok(()), check_configuration)?;
            let UpdateInput { identifier, configuration, operator_role, client_token } = input;
            let request = UpdateConnector { configuration, operator_role, client_token };
            write(Updated::from(plane.update_connector(caller, &identifier, request).await?))
        }
        "DeleteNetworkConnector" => {
            let input: IdentifierInput = read(input)?;
            write(Detail::from(plane.delete_connector(caller, &input.identifier).await?))
        }
        "ListNetworkConnectors" => {
            let input: ListInput = read(input)?;
            let page = plane.list_connectors(caller, input.state, input.page()).await?;
            list("NetworkConnectors", page.items.into_iter().map(Item::from), page.next)
        }
        "ListNetworkConnectorVersions" => {
            let of: IdentifierInput = read(input.clone())?;
            let input: ListInput = read(input)?;
            let page = plane.list_connector_versions(caller, &of.identifier, input.state, input.page()).await?;
            list("NetworkConnectorVersions", page.items.into_iter().map(VersionItem::from), page.next)
        }
        name => Err(ApiError::internal(format!("{name} is in the model and is performed by nothing"))),
    }
}

/// The service wants more than its model says.
fn check_create(input: CreateInput) -> Result<CreateConnector, ApiError> {
    let client_token = input.client_token.ok_or_else(|| ApiError::invalid_parameter("ClientToken is a required field"))?;
    if input.name.contains(':') || input.name.len() > MAX_NAME {
        return Err(ApiError::invalid_parameter(format!("Invalid network connector name: {}", input.name)));
    }
    if input.operator_role.as_deref().is_none_or(str::is_empty) {
        return Err(ApiError::invalid_parameter("NetworkConnectorOperatorRole is required for VPC_EGRESS connector type"));
    }
    check_configuration(&input.configuration)?;
    let spec = ConnectorSpec { configuration: input.configuration, operator_role: input.operator_role };
    Ok(CreateConnector { name: input.name, spec, tags: input.tags, client_token })
}

fn check_configuration(configuration: &Value) -> Result<(), ApiError> {
    let vpc = &configuration["VpcEgressConfiguration"];
    if vpc["NetworkProtocol"].is_null() {
        return Err(ApiError::invalid_parameter("NetworkProtocol cannot be null or empty for VPC_EGRESS connector type"));
    }
    if vpc["AssociatedComputeResourceTypes"].is_null() {
        return Err(ApiError::invalid_parameter("AssociatedComputeResourceTypes is required for VPC_EGRESS connector type"));
    }
    Ok(())
}

/// `NextMarker` is left out on the last page (SPEC 4.2).
fn list<T: Serialize>(member: &str, items: impl Iterator<Item = T>, next: Option<String>) -> Result<Value, ApiError> {
    let mut page = json!({member: write(items.collect::<Vec<_>>())?});
    if let Some(next) = next {
        page["NextMarker"] = Value::String(next);
    }
    Ok(page)
}

impl ListInput {
    fn page(&self) -> PageRequest {
        PageRequest { limit: self.max_items, token: self.marker.clone() }
    }
}

impl From<Connector> for Detail {
    fn from(connector: Connector) -> Self {
        Self {
            arn: connector.arn,
            configuration: connector.spec.configuration,
            id: connector.id,
            name: connector.name,
            operator_role: connector.spec.operator_role,
            state: connector.state,
        }
    }
}

impl Described {
    fn new(connector: Connector, version: Option<i64>) -> Self {
        Self {
            last_modified: timestamp(connector.modified_at),
            state_reason: STATE_REASON,
            update: Update::of(&connector),
            version: version.map(|number| Version::of(&connector, number)),
            detail: connector.into(),
        }
    }
}

impl From<Connector> for Updated {
    fn from(connector: Connector) -> Self {
        Self { last_modified: timestamp(connector.modified_at), update: Update::of(&connector), detail: connector.into() }
    }
}

impl Update {
    fn of(connector: &Connector) -> Self {
        let (status, reason) = connector.last_update.clone().unzip();
        Self { last_update_status: status, last_update_status_reason: reason.flatten() }
    }
}

impl Version {
    fn of(connector: &Connector, version: i64) -> Self {
        Self { version, version_arn: format!("{}:{version}", connector.arn) }
    }
}

impl From<Connector> for Item {
    fn from(connector: Connector) -> Self {
        Self {
            last_modified: timestamp(connector.modified_at),
            arn: connector.arn,
            id: connector.id,
            name: connector.name,
            state: connector.state,
            kind: TYPE,
        }
    }
}

impl From<ConnectorVersion> for VersionItem {
    fn from(version: ConnectorVersion) -> Self {
        let ConnectorVersion { connector, version, created_at } = version;
        Self {
            version: Version::of(&connector, version),
            last_modified: timestamp(created_at),
            state_reason: STATE_REASON,
            arn: connector.arn,
            id: connector.id,
            name: connector.name,
            state: connector.state,
        }
    }
}

/// This service writes times as text (ISO 8601), unlike `lambda-microvms`.
fn timestamp(at: SystemTime) -> Option<String> {
    OffsetDateTime::from(at).format(&Rfc3339).ok()
}
