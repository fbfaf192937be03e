//! Who may do what: one table of operations with the resource that each is decided on and what is passed along with it (SPEC 4.4).
//!
//! The action of an operation is its name in the namespace `lambda`. What another account has is refused before anything is looked up, so that
//! nobody learns what exists there.

use std::{net::IpAddr, time::SystemTime};

use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use hearth_control::{
    ControlError,
    arn::{ImageArn, managed_connector},
    plane::ControlPlane,
    types::Caller,
};
use hearth_identity::{Context, Denied, Directory, Request, RoleRefused};

use crate::{auth::Identified, error::ApiError};

/// What is decided before an operation is performed.
#[derive(Debug)]
pub(crate) struct Rule {
    pub operation: &'static str,
    pub resource: Resource,
    pub passes: &'static [Pass],
}

/// The resource that an operation is decided on. Members of the input are named as the model names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// `*`
    Any,
    /// `*`, and what the member names must be of the caller's account.
    AnyOf(&'static str),
    /// The image that the member names.
    Image(&'static str),
    /// The image of the MicroVM that the member names.
    ImageOfMicrovm(&'static str),
    /// The connector that the member names, by ARN, id or name.
    Connector(&'static str),
    /// The ARN that the member is.
    Tagged(&'static str),
}

/// What the caller hands over, and must have leave to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// `iam:PassRole` on the role that the member names, if it does.
    Role(&'static str),
    /// `lambda:PassNetworkConnector` on each connector of the member, or on the managed one that takes its place.
    Connectors { member: &'static str, default: Option<&'static str> },
    /// [`KEY_ACTIONS`] on the key that the member names, if it does.
    Key(&'static str),
}

/// What a caller who has something encrypted with a key must be allowed to do with it. AWS's model says "use the key" and no more.
const KEY_ACTIONS: [&str; 2] = ["kms:GenerateDataKey", "kms:Decrypt"];

const fn rule(operation: &'static str, resource: Resource, passes: &'static [Pass]) -> Rule {
    Rule { operation, resource, passes }
}

const IMAGE: &str = "imageIdentifier";
const KEY: &str = "kmsKeyIdentifier";
const MICROVM: &str = "microvmIdentifier";

/// What goes into an image: a role to build with, the connectors and the key that are named.
const BUILD: &[Pass] = &[Pass::Role("buildRoleArn"), Pass::Connectors { member: "egressNetworkConnectors", default: None }, Pass::Key(KEY)];

/// What goes into a MicroVM: the managed connectors that are there when none is named are passed as well.
const RUN: &[Pass] = &[
    Pass::Role("executionRoleArn"),
    Pass::Connectors { member: "ingressNetworkConnectors", default: Some("HTTP_INGRESS") },
    Pass::Connectors { member: "egressNetworkConnectors", default: Some("INTERNET_EGRESS") },
    Pass::Key(KEY),
];

/// Every operation of the model. A test sees to it that none is forgotten, and an operation without a row is refused.
pub(crate) const RULES: &[Rule] = &[
    rule("CreateMicrovmAuthToken", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("CreateMicrovmImage", Resource::Any, BUILD),
    rule("CreateMicrovmShellAuthToken", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("CreateNetworkConnector", Resource::Any, &[Pass::Role("OperatorRole")]),
    rule("DeleteMicrovmImage", Resource::Image(IMAGE), &[]),
    rule("DeleteMicrovmImageVersion", Resource::Image(IMAGE), &[]),
    rule("DeleteNetworkConnector", Resource::Connector("Identifier"), &[]),
    rule("GetMicrovm", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("GetMicrovmImage", Resource::Image(IMAGE), &[]),
    rule("GetMicrovmImageBuild", Resource::Image(IMAGE), &[]),
    rule("GetMicrovmImageVersion", Resource::Image(IMAGE), &[]),
    rule("GetNetworkConnector", Resource::Connector("Identifier"), &[]),
    rule("ListManagedMicrovmImageVersions", Resource::Any, &[]),
    rule("ListManagedMicrovmImages", Resource::Any, &[]),
    rule("ListMicrovmImageBuilds", Resource::AnyOf(IMAGE), &[]),
    rule("ListMicrovmImageVersions", Resource::AnyOf(IMAGE), &[]),
    rule("ListMicrovmImages", Resource::Any, &[]),
    rule("ListMicrovms", Resource::AnyOf(IMAGE), &[]),
    rule("ListNetworkConnectorVersions", Resource::AnyOf("Identifier"), &[]),
    rule("ListNetworkConnectors", Resource::Any, &[]),
    rule("ListTags", Resource::Tagged("Resource"), &[]),
    rule("ResumeMicrovm", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("RunMicrovm", Resource::Image(IMAGE), RUN),
    rule("SuspendMicrovm", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("TagResource", Resource::Tagged("Resource"), &[]),
    rule("TerminateMicrovm", Resource::ImageOfMicrovm(MICROVM), &[]),
    rule("UntagResource", Resource::Tagged("Resource"), &[]),
    rule("UpdateMicrovmImage", Resource::Image(IMAGE), BUILD),
    rule("UpdateMicrovmImageVersion", Resource::Image(IMAGE), &[]),
    rule("UpdateNetworkConnector", Resource::Connector("Identifier"), &[Pass::Role("OperatorRole")]),
];

/// Decides one request.
pub(crate) struct Decider<'r> {
    pub plane: &'r dyn ControlPlane,
    pub directory: &'r Directory,
    pub who: &'r Identified,
    /// Where the request came from, if it came over the network.
    pub source: Option<IpAddr>,
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self::access_denied(Some(denied.to_string()))
    }
}

impl From<RoleRefused> for ApiError {
    fn from(refused: RoleRefused) -> Self {
        match refused {
            RoleRefused::CrossAccount => Self::access_denied(Some(refused.to_string())),
            RoleRefused::CannotBeAssumed => Self::validation(refused.to_string()),
        }
    }
}

impl Decider<'_> {
    /// Gives leave to an operation of the model with an input that meets the model's constraints.
    pub async fn decide(&self, operation: &str, input: &Map<String, Value>) -> Result<(), ApiError> {
        let rule = RULES.iter().find(|rule| rule.operation == operation);
        let rule = rule.ok_or_else(|| ApiError::internal(format!("{operation} has no rule of authorisation")))?;
        let action = format!("lambda:{operation}");
        let context = self.context(input);
        let resource = self.resource(&action, rule.resource, input).await?;
        self.allow(&action, &resource, &context)?;
        for pass in rule.passes {
            self.pass(*pass, input, &context).await?;
        }
        Ok(())
    }

    /// Gives leave to an action of any service on a resource.
    pub fn allow(&self, action: &str, resource: &str, context: &Context) -> Result<(), Denied> {
        self.who.principal.authorize(Request { action, resource, context })
    }

    async fn resource(&self, action: &str, resource: Resource, input: &Map<String, Value>) -> Result<String, ApiError> {
        let member = |name: &str| input.get(name).and_then(Value::as_str);
        let caller = &self.who.caller;
        Ok(match resource {
            Resource::Any => "*".to_owned(),
            Resource::AnyOf(name) => {
                if let Some(named) = member(name) {
                    self.own(action, named)?;
                }
                "*".to_owned()
            }
            Resource::Image(name) => {
                let image = member(name).unwrap_or_default();
                self.own(action, image)?;
                if image.starts_with("arn:") { image.to_owned() } else { ImageArn::of(caller, image).to_string() }
            }
            Resource::ImageOfMicrovm(name) => self.image_of(member(name).unwrap_or_default()).await?,
            Resource::Connector(name) => {
                let connector = member(name).unwrap_or_default();
                self.own(action, connector)?;
                self.connector(connector).await?
            }
            Resource::Tagged(name) => {
                let arn = member(name).unwrap_or_default();
                self.own(action, arn)?;
                arn.to_owned()
            }
        })
    }

    /// The image that a MicroVM runs. Whoever may do nothing with any image is not told whether there is such a MicroVM.
    async fn image_of(&self, microvm: &str) -> Result<String, ApiError> {
        let caller = &self.who.caller;
        if self.who.principal.is_administrator() {
            return Ok("*".to_owned());
        }
        match self.plane.get_microvm(caller, microvm).await {
            Ok(microvm) => Ok(microvm.image_arn),
            Err(ControlError::MicrovmNotFound(_)) => Ok(ImageArn::of(caller, "*").to_string()),
            Err(error) => Err(error.into()),
        }
    }

    /// The ARN of the connector that a name, an id, or the ARN of one of its versions stands for: policies name connectors in one way only.
    async fn connector(&self, connector: &str) -> Result<String, ApiError> {
        let caller = &self.who.caller;
        if self.who.principal.is_administrator() || account_of(connector) == Some("aws") {
            return Ok(connector.to_owned());
        }
        match self.plane.get_connector(caller, connector).await {
            Ok((found, _)) => Ok(found.arn),
            Err(ControlError::ConnectorNotFound(_)) if connector.starts_with("arn:") => Ok(connector.to_owned()),
            Err(ControlError::ConnectorNotFound(_)) => {
                Ok(format!("arn:aws:lambda:{}:{}:network-connector:{connector}", caller.region, caller.account))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn pass(&self, pass: Pass, input: &Map<String, Value>, context: &Context) -> Result<(), ApiError> {
        let caller = &self.who.caller;
        match pass {
            Pass::Role(member) => {
                let Some(role) = input.get(member).and_then(Value::as_str) else { return Ok(()) };
                let context = context.clone().with("iam:PassedToService", "lambda.amazonaws.com");
                self.allow("iam:PassRole", role, &context)?;
                Ok(self.directory.check_passed_role(&caller.account, role)?)
            }
            Pass::Connectors { member, default } => {
                let named = input.get(member).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                let mut connectors: Vec<String> = named.iter().filter_map(Value::as_str).map(str::to_owned).collect();
                if let (true, Some(name)) = (connectors.is_empty(), default) {
                    connectors.push(managed_connector(&caller.region, name));
                }
                for connector in connectors {
                    let action = "lambda:PassNetworkConnector";
                    if account_of(&connector) != Some("aws") {
                        self.own(action, &connector)?;
                    }
                    self.allow(action, &self.connector(&connector).await?, context)?;
                }
                Ok(())
            }
            Pass::Key(member) => {
                let Some(key) = input.get(member).and_then(Value::as_str) else { return Ok(()) };
                let key = key_arn(caller, key);
                KEY_ACTIONS.iter().try_for_each(|action| self.allow(action, &key, context)).map_err(ApiError::from)
            }
        }
    }

    /// Refuses what another account has. What is no ARN names something of the caller's own, or nothing.
    fn own(&self, action: &str, resource: &str) -> Result<(), Denied> {
        match account_of(resource) {
            Some(account) if account != self.who.caller.account => Err(self.who.principal.denied_elsewhere(action, resource)),
            _ => Ok(()),
        }
    }

    /// What conditions may ask about.
    pub fn context(&self, input: &Map<String, Value>) -> Context {
        if self.who.principal.is_administrator() {
            return Context::default();
        }
        let now = OffsetDateTime::from(SystemTime::now());
        let mut context = self
            .who
            .principal
            .context()
            .with("aws:RequestedRegion", &self.who.caller.region)
            .with("aws:SecureTransport", "false")
            .with("aws:EpochTime", now.unix_timestamp().to_string())
            .with("aws:CurrentTime", now.format(&Rfc3339).unwrap_or_default());
        if let Some(source) = self.source {
            context = context.with("aws:SourceIp", source.to_canonical().to_string());
        }
        if let Some(tags) = input.get("tags").or_else(|| input.get("Tags")).and_then(Value::as_object) {
            for (key, value) in tags {
                context = context.with(&format!("aws:RequestTag/{key}"), value.as_str().unwrap_or_default());
            }
            context = context.with_all("aws:TagKeys", tags.keys().cloned());
        }
        context
    }
}

/// The ARN that a key's ARN, an alias or a key's id stands for.
pub(crate) fn key_arn(caller: &Caller, key: &str) -> String {
    let Caller { account, region, .. } = caller;
    match key {
        arn if arn.starts_with("arn:") => arn.to_owned(),
        alias if alias.starts_with("alias/") => format!("arn:aws:kms:{region}:{account}:{alias}"),
        id => format!("arn:aws:kms:{region}:{account}:key/{id}"),
    }
}

/// The account in an ARN.
fn account_of(resource: &str) -> Option<&str> {
    resource.starts_with("arn:").then(|| resource.split(':').nth(4)).flatten().filter(|account| !account.is_empty())
}
