//! Rules that AWS keeps beyond its model and that need nothing but the request, with its messages (SPEC 3.3).

use hearth_control::{
    arn::{ConnectorArn, MANAGED_EGRESS, MANAGED_INGRESS, managed_connector},
    types::{Caller, PortSpec},
};

use crate::{
    error::ApiError,
    wire::{PortSpecification, RunInput, SpecInput},
};

/// Memory of a MicroVM when the caller names none, in MiB.
pub(crate) const DEFAULT_MEMORY_MIB: u32 = 2048;
/// Wall time of a MicroVM when the caller names none, in seconds.
pub(crate) const DEFAULT_DURATION_SECONDS: u32 = 28_800;

const MEMORY_SIZES_MIB: [u32; 5] = [512, 1024, 2048, 4096, 8192];
const MAX_TOKEN_MINUTES: u32 = 60;
const RESERVED_ENVIRONMENT: [&str; 4] =
    ["AWS_REGION", "AWS_LAMBDA_MICROVM_IMAGE_NAME", "AWS_LAMBDA_MICROVM_IMAGE_ARN", "AWS_LAMBDA_MICROVM_IMAGE_VERSION"];

/// Checks what an image version is to be made of; returns its memory in MiB.
pub(crate) fn check_image(caller: &Caller, input: &SpecInput) -> Result<u32, ApiError> {
    let uri = input.code_artifact.uri.strip_prefix("s3://").and_then(|rest| rest.split_once('/'));
    if !uri.is_some_and(|(bucket, key)| !bucket.is_empty() && !key.is_empty()) {
        return Err(ApiError::validation("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"));
    }
    if let Some(version) = &input.base_image_version
        && (version.len() > 9 || !version.bytes().all(|byte| byte.is_ascii_digit()))
    {
        return Err(ApiError::validation(format!("Invalid base image version '{version}': Expected a single major version number")));
    }
    if let Some(key) =
        input.environment_variables.iter().flatten().map(|(key, _)| key).find(|key| RESERVED_ENVIRONMENT.contains(&key.as_str()))
    {
        return Err(ApiError::validation(format!("Environment variable key '{key}' is reserved")));
    }
    check_hooks(input)?;
    check_connectors(caller, &input.egress_network_connectors, Direction::Out)?;
    check_key(input.kms_key_identifier.as_deref())?;
    memory(input)
}

/// There are no customer managed keys here. An encryption that is not done is never accepted.
fn check_key(key: Option<&str>) -> Result<(), ApiError> {
    match key {
        None => Ok(()),
        Some(key) => Err(ApiError::validation(format!(
            "The KMS key {key} cannot be used: this server does not encrypt with customer managed keys. Leave out kmsKeyIdentifier."
        ))),
    }
}

fn memory(input: &SpecInput) -> Result<u32, ApiError> {
    let Some(resources) = input.resources.first() else { return Ok(DEFAULT_MEMORY_MIB) };
    let asked = resources.minimum_memory_in_mib;
    MEMORY_SIZES_MIB.into_iter().find(|size| i64::from(*size) == i64::from(asked)).ok_or_else(|| {
        ApiError::validation(format!(
            "The requested memory size of {asked} MiB is not supported by base MicroVM image {}. Supported memory sizes in MiB are: {MEMORY_SIZES_MIB:?}.",
            input.base_image_arn
        ))
    })
}

fn check_hooks(input: &SpecInput) -> Result<(), ApiError> {
    let enabled = |group: &str, hook: &str| input.hooks.as_ref().is_some_and(|hooks| hooks[group][hook] == "ENABLED");
    let lifecycle = ["run", "resume", "suspend", "terminate"].iter().any(|hook| enabled("microvmHooks", hook));
    let build = ["ready", "validate"].iter().any(|hook| enabled("microvmImageHooks", hook));
    if lifecycle && !enabled("microvmImageHooks", "ready") {
        return Err(ApiError::validation(
            "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook (run, resume, suspend, or terminate) is enabled.",
        ));
    }
    // There is no default (SPEC 8.1), and nobody has recorded what is said without one.
    if (lifecycle || build) && input.hooks.as_ref().is_none_or(|hooks| hooks["port"].is_null()) {
        return Err(ApiError::validation("The hooks port must be specified when any hook is enabled."));
    }
    Ok(())
}

/// Checks a MicroVM to run.
pub(crate) fn check_run(caller: &Caller, input: &RunInput) -> Result<(), ApiError> {
    if !input.image_identifier.starts_with("arn:") {
        return Err(ApiError::validation("Malformed ARN - doesn't start with 'arn:'"));
    }
    check_image_identifier(caller, &input.image_identifier)?;
    let to_cloud_watch = input.logging.as_ref().is_some_and(|logging| !logging["cloudWatch"].is_null());
    if to_cloud_watch && input.execution_role_arn.is_none() {
        return Err(ApiError::validation("Logging cannot be enabled without providing executionRoleArn"));
    }
    if input.egress_network_connectors.len() > 1 {
        return Err(ApiError::validation("Only one egress network connector can be provided"));
    }
    check_connectors(caller, &input.ingress_network_connectors, Direction::In)?;
    check_connectors(caller, &input.egress_network_connectors, Direction::Out)?;
    check_key(input.kms_key_identifier.as_deref())
}

/// The form `microvm-image/<name>` is what AWS refuses as another's resource.
pub(crate) fn check_image_identifier(caller: &Caller, identifier: &str) -> Result<(), ApiError> {
    if identifier.starts_with("arn:") && identifier.contains(":microvm-image/") {
        return Err(ApiError::access_denied(Some(format!(
            "User: {} is not authorized to perform this action on resource: {identifier}",
            caller.principal
        ))));
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// Checks the form of connectors, and that managed ones exist. Users' connectors all lead out; the domain knows which there are.
fn check_connectors(caller: &Caller, connectors: &[String], direction: Direction) -> Result<(), ApiError> {
    let managed = if direction == Direction::In { MANAGED_INGRESS.as_slice() } else { MANAGED_EGRESS.as_slice() };
    for connector in connectors {
        match ConnectorArn::parse(connector) {
            Some(ConnectorArn::User { .. }) if direction == Direction::Out => {}
            Some(ConnectorArn::User { .. }) => {
                return Err(ApiError::validation(format!("Network connector {connector} is not an ingress network connector")));
            }
            Some(ConnectorArn::Managed { .. }) if managed.iter().any(|name| *connector == managed_connector(&caller.region, name)) => {}
            _ if is_managed(connector) => {
                return Err(ApiError::validation(format!("Unrecognized managed network connector ARN: {connector}")));
            }
            _ => return Err(ApiError::validation("Malformed network connector ARN")),
        }
    }
    Ok(())
}

fn is_managed(connector: &str) -> bool {
    matches!(
        connector.split(':').collect::<Vec<_>>().as_slice(),
        ["arn", partition, "lambda", _, "aws", "network-connector", ..] if partition.starts_with("aws")
    )
}

/// Checks the lifetime of a token, in minutes.
pub(crate) fn check_expiration(minutes: u32) -> Result<(), ApiError> {
    if minutes > MAX_TOKEN_MINUTES {
        return Err(ApiError::validation(format!("ExpirationMinutes {minutes} exceeded max allowed of {MAX_TOKEN_MINUTES}.")));
    }
    Ok(())
}

/// Ports that a token opens.
pub(crate) fn ports(specifications: Vec<PortSpecification>) -> Result<Vec<PortSpec>, ApiError> {
    specifications
        .into_iter()
        .map(|specification| match specification {
            PortSpecification::Port(port) => Ok(PortSpec::Port(port)),
            PortSpecification::Range { start_port, end_port } if start_port <= end_port => Ok(PortSpec::Range(start_port, end_port)),
            PortSpecification::Range { start_port, end_port } => {
                Err(ApiError::validation(format!("Invalid port range: startPort {start_port} is greater than endPort {end_port}.")))
            }
            PortSpecification::AllPorts {} => Ok(PortSpec::All),
        })
        .collect()
}
