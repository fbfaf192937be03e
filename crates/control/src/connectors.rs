//! Network connectors of users, and what machines may reach through connectors.
//!
//! On AWS a user's connector leads into a VPC. Here it means a policy: that of the configuration for connectors of its name, else that of its
//! tags `hearth:allow` and `hearth:deny` (rules separated by spaces, see [`hearth_machine::network`]), else the internet. What it means is
//! found out at every launch and resume. There is nothing to provision, so a connector is active as soon as it is recorded.

use std::{collections::BTreeMap, time::SystemTime};

use hearth_machine::{Egress, network::EgressPolicy};
use hearth_store::{
    ClientToken, ConnectorRow, CreateConnector as Created, DeleteConnector, NewConnector, Scope, Store, UpdateConnector as Updated,
};
use uuid::Uuid;

use crate::{
    arn::{self, ConnectorArn, MANAGED_EGRESS, NO_EGRESS},
    control::Inner,
    control_plane::{fingerprint, scope},
    error::ControlError,
    records::{self, json, millis},
    types::{Caller, Connector, ConnectorSpec, ConnectorState, ConnectorVersion, CreateConnector, Page, PageRequest, UpdateConnector},
};

/// Tag with what may be reached; everything if there is only the other one.
const ALLOW: &str = "hearth:allow";
/// Tag with what may not be reached, whatever is allowed.
const DENY: &str = "hearth:deny";
/// Reason of an update that changed nothing, in the service's words.
const UNCHANGED: &str = "No configuration changes detected";
const TOKEN_REUSED: &str = "The client token has already been used with different parameters.";
/// Connectors on a page at most.
const PAGE: u32 = 100;

/// What connectors mean.
pub(crate) struct Policies {
    store: Store,
    /// By the connectors' names.
    configured: BTreeMap<String, EgressPolicy>,
}

impl Policies {
    pub fn new(store: Store, configured: BTreeMap<String, EgressPolicy>) -> Self {
        Self { store, configured }
    }

    /// What a machine of an account may reach with these egress connectors, of which there is one at most.
    pub async fn resolve(&self, account: &str, region: &str, connectors: &[String]) -> Result<Egress, ControlError> {
        let Some(text) = connectors.first() else { return Ok(Egress::Internet) };
        let unknown = || ControlError::ConnectorNotFound(text.clone());
        match ConnectorArn::parse(text) {
            Some(ConnectorArn::Managed { name, .. }) if name == NO_EGRESS => Ok(Egress::None),
            Some(ConnectorArn::Managed { name, .. }) if MANAGED_EGRESS.contains(&name.as_str()) => Ok(Egress::Internet),
            Some(ConnectorArn::User { connector, .. }) => {
                let row = self.store.connector(Scope { account, region }, &connector).await?.ok_or_else(unknown)?;
                if let Some(policy) = self.configured.get(&row.name) {
                    return Ok(Egress::Policy(policy.clone()));
                }
                Ok(policy_of(&records::tags(&row.id, &row.tags)?)?.map_or(Egress::Internet, Egress::Policy))
            }
            _ => Err(unknown()),
        }
    }
}

/// The policy that a connector's tags say, if they say one.
pub(crate) fn policy_of(tags: &BTreeMap<String, String>) -> Result<Option<EgressPolicy>, ControlError> {
    let (allow, deny) = (tags.get(ALLOW), tags.get(DENY));
    if allow.is_none() && deny.is_none() {
        return Ok(None);
    }
    let policy = EgressPolicy::parse(allow.map_or("*", String::as_str), deny.map_or("", String::as_str));
    policy.map(Some).map_err(|error| ControlError::InvalidTags(format!("The tags {ALLOW} and {DENY} are no egress policy: {error}.")))
}

impl Inner {
    pub async fn create_connector(&self, caller: &Caller, request: CreateConnector) -> Result<Connector, ControlError> {
        let CreateConnector { name, spec, tags, client_token } = request;
        policy_of(&tags)?;
        let fingerprint = fingerprint(&serde_json::json!([name, spec, tags]));
        let id = format!("nc-{}", Uuid::new_v4());
        let new = NewConnector {
            scope: scope(caller),
            id: &id,
            name: &name,
            spec: &json(&spec),
            tags: &json(&tags),
            limit: self.settings.quotas.connectors,
            now_ms: millis(SystemTime::now()),
        };
        let token = ClientToken { operation: "CreateNetworkConnector", token: &client_token, fingerprint: &fingerprint };
        match self.store.create_connector(&new, Some(token)).await? {
            Created::Created => {
                let row = self.connector_row(caller, &id, &id).await?;
                Ok(Connector { state: ConnectorState::Pending, ..records::connector(row)? })
            }
            Created::Replayed(made) => Ok(records::connector(self.connector_row(caller, &made.id, &made.id).await?)?),
            Created::TokenReused => Err(ControlError::ConnectorConflict(TOKEN_REUSED.to_owned())),
            Created::NameTaken => {
                Err(ControlError::ConnectorConflict(format!("A network connector with the name '{name}' already exists in this account")))
            }
            Created::LimitReached => Err(ControlError::ConnectorLimit(self.settings.quotas.connectors)),
        }
    }

    /// The connector, as the version that the identifier names has it, and that version's number if it names one.
    pub async fn get_connector(&self, caller: &Caller, identifier: &str) -> Result<(Connector, Option<i64>), ControlError> {
        let (row, version) = self.find_connector(caller, identifier).await?;
        let connector = records::connector(row)?;
        let Some(number) = version else { return Ok((connector, None)) };
        let row = self.store.connector_version(&connector.id, number).await?;
        let row = row.ok_or_else(|| ControlError::ConnectorNotFound(identifier.to_owned()))?;
        Ok((records::connector_version(&connector, row)?.connector, version))
    }

    pub async fn list_connectors(
        &self,
        caller: &Caller,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<Connector>, ControlError> {
        let list = ["connectors", &caller.account, &caller.region];
        let keys = self.keys(&list, &page, PAGE)?;
        let rows = self.store.list_connectors(scope(caller), keys).await?;
        let mut page = self.page(&list, keys, rows, |row| row.seq, records::connector)?;
        page.items.retain(|connector| state.is_none_or(|state| connector.state == state));
        Ok(page)
    }

    pub async fn list_connector_versions(
        &self,
        caller: &Caller,
        identifier: &str,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<ConnectorVersion>, ControlError> {
        let (row, _) = self.find_connector(caller, identifier).await?;
        let connector = records::connector(row)?;
        let list = ["connector-versions", &connector.id];
        let keys = self.keys(&list, &page, PAGE)?;
        let rows = self.store.list_connector_versions(&connector.id, keys).await?;
        let mut page = self.page(&list, keys, rows, |row| row.seq, |row| records::connector_version(&connector, row))?;
        page.items.retain(|version| state.is_none_or(|state| version.connector.state == state));
        Ok(page)
    }

    pub async fn update_connector(&self, caller: &Caller, identifier: &str, request: UpdateConnector) -> Result<Connector, ControlError> {
        let UpdateConnector { configuration, operator_role, client_token } = request;
        let (row, _) = self.find_connector(caller, identifier).await?;
        let fingerprint = fingerprint(&serde_json::json!([row.id, configuration, operator_role]));
        let connector = records::connector(row)?;
        let spec = ConnectorSpec {
            configuration: configuration.unwrap_or(connector.spec.configuration),
            operator_role: operator_role.or(connector.spec.operator_role),
        };
        let token = client_token.as_deref();
        let token = token.map(|token| ClientToken { operation: "UpdateNetworkConnector", token, fingerprint: &fingerprint });
        match self.store.update_connector(&connector.id, &json(&spec), UNCHANGED, millis(SystemTime::now()), token).await? {
            Updated::Updated | Updated::Replayed(_) => {
                Ok(records::connector(self.connector_row(caller, &connector.id, identifier).await?)?)
            }
            Updated::TokenReused => Err(ControlError::ConnectorConflict(TOKEN_REUSED.to_owned())),
            Updated::InUse => Err(in_use(&connector.arn)),
            Updated::Gone => Err(ControlError::ConnectorNotFound(identifier.to_owned())),
        }
    }

    pub async fn delete_connector(&self, caller: &Caller, identifier: &str) -> Result<Connector, ControlError> {
        let (row, _) = self.find_connector(caller, identifier).await?;
        let connector = records::connector(row)?;
        match self.store.delete_connector(&connector.id).await? {
            DeleteConnector::Deleted => Ok(Connector { state: ConnectorState::Deleting, ..connector }),
            DeleteConnector::InUse => Err(in_use(&connector.arn)),
            DeleteConnector::Gone => Err(ControlError::ConnectorNotFound(identifier.to_owned())),
        }
    }

    /// The connector that a name, an id or an ARN with or without a version stands for, and the version.
    pub async fn find_connector(&self, caller: &Caller, identifier: &str) -> Result<(ConnectorRow, Option<i64>), ControlError> {
        if !identifier.starts_with("arn:") {
            return Ok((self.connector_row(caller, identifier, identifier).await?, None));
        }
        match ConnectorArn::parse(identifier) {
            Some(ConnectorArn::User { account, .. }) if account != caller.account => {
                Err(ControlError::Denied { principal: caller.principal.clone(), resource: identifier.to_owned() })
            }
            Some(ConnectorArn::User { region, connector, version, .. }) if region == caller.region => {
                Ok((self.connector_row(caller, &connector, identifier).await?, version))
            }
            _ => Err(ControlError::ConnectorNotFound(identifier.to_owned())),
        }
    }

    async fn connector_row(&self, caller: &Caller, id_or_name: &str, asked: &str) -> Result<ConnectorRow, ControlError> {
        let row = self.store.connector(scope(caller), id_or_name).await?;
        row.ok_or_else(|| ControlError::ConnectorNotFound(asked.to_owned()))
    }

    /// Egress connectors of an image or a MicroVM as they are kept, with the id of the user's among them. All of them must exist.
    pub async fn check_egress(&self, caller: &Caller, connectors: Vec<String>) -> Result<(Vec<String>, Option<String>), ControlError> {
        let (mut kept, mut id) = (Vec::new(), None);
        for text in connectors {
            if !matches!(ConnectorArn::parse(&text), Some(ConnectorArn::User { .. })) {
                // A managed one, which the API has checked.
                kept.push(text);
                continue;
            }
            let found = self.get_connector(caller, &text).await;
            let (connector, version) = found.map_err(|error| match error {
                ControlError::ConnectorNotFound(_) => ControlError::Invalid(error.to_string()),
                error => error,
            })?;
            let arn = arn::connector(&caller.account, &caller.region, &connector.id);
            kept.push(version.map_or(arn.clone(), |version| format!("{arn}:{version}")));
            id = Some(connector.id);
        }
        Ok((kept, id))
    }
}

fn in_use(arn: &str) -> ControlError {
    ControlError::ConnectorConflict(format!(
        "The network connector {arn} is used by MicroVMs. Terminate them before it is updated or deleted."
    ))
}

#[cfg(test)]
mod tests;
