//! The operations: from a checked input to the [`ControlPlane`] and back to the wire.

use std::{collections::BTreeMap, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use hearth_control::{
    arn::managed_connector,
    plane::ControlPlane,
    types::{Caller, CreateImage, IdlePolicy, ImageSpec, MicrovmFilter, Page, PageRequest, RunMicrovm, UpdateImage},
};

use crate::{
    connectors,
    error::ApiError,
    rules,
    wire::{
        AuthTokenInput, BuildDetail, BuildInput, BuildItem, CreateImageInput, CreatedImage, DeletedImage, DeletedVersion, ImageInput,
        ImageItem, ImageSummary, ItemList, ListInput, ManagedImageItem, ManagedVersionItem, MicrovmDetail, MicrovmInput, MicrovmItem,
        RunInput, ShellTokenInput, SpecInput, TagsInput, UpdateImageInput, UpdatedImage, Version, VersionInput, VersionStatusInput,
    },
};

/// Header that carries an endpoint token.
const TOKEN_HEADER: &str = "X-aws-proxy-auth";

/// Performs an operation of the model on input that meets the model's constraints.
pub(crate) async fn perform(plane: &dyn ControlPlane, caller: &Caller, name: &str, input: Map<String, Value>) -> Result<Value, ApiError> {
    let input = Value::Object(input);
    match name {
        "CreateMicrovmImage" => create_image(plane, caller, read(input)?).await,
        "UpdateMicrovmImage" => update_image(plane, caller, read(input)?).await,
        "GetMicrovmImage" => {
            let image = image_identifier(caller, input)?;
            write(ImageSummary::from(plane.get_image(caller, &image).await?))
        }
        "ListMicrovmImages" => {
            let input: ListInput = read(input)?;
            write_page::<_, ImageItem>(plane.list_images(caller, input.name_filter.as_deref(), page(&input)).await?)
        }
        "DeleteMicrovmImage" => {
            let image = image_identifier(caller, input)?;
            write(DeletedImage::from(plane.delete_image(caller, &image).await?))
        }
        "GetMicrovmImageVersion" => {
            let input: VersionInput = read(input)?;
            rules::check_image_identifier(caller, &input.image_identifier)?;
            write(Version::from(plane.get_image_version(caller, &input.image_identifier, &input.image_version).await?))
        }
        "UpdateMicrovmImageVersion" => {
            let input: VersionStatusInput = read(input)?;
            rules::check_image_identifier(caller, &input.image_identifier)?;
            let changed = plane.set_version_status(caller, &input.image_identifier, &input.image_version, input.status).await?;
            write(Version::from(changed))
        }
        "DeleteMicrovmImageVersion" => {
            let input: VersionInput = read(input)?;
            rules::check_image_identifier(caller, &input.image_identifier)?;
            let deleted = plane.delete_image_version(caller, &input.image_identifier, &input.image_version).await?;
            write(DeletedVersion::from(deleted))
        }
        "ListMicrovmImageVersions" => {
            let image = image_identifier(caller, input.clone())?;
            let versions = plane.list_image_versions(caller, &image, page(&read(input)?)).await?;
            write(ItemList { items: versions.items.into_iter().map(Version::listed).collect(), next_token: versions.next })
        }
        "GetMicrovmImageBuild" => {
            let input: BuildInput = read(input)?;
            rules::check_image_identifier(caller, &input.image_identifier)?;
            let build = plane.get_build(caller, &input.image_identifier, &input.image_version, &input.build_id).await?;
            write(BuildDetail::from(build))
        }
        "ListMicrovmImageBuilds" => list_builds(plane, caller, input).await,
        "ListManagedMicrovmImages" => write_page::<_, ManagedImageItem>(plane.list_managed_images(caller, page(&read(input)?)).await?),
        "ListManagedMicrovmImageVersions" => {
            let image = image_identifier(caller, input.clone())?;
            let versions = plane.list_managed_image_versions(caller, &image, page(&read(input)?)).await?;
            write_page::<_, ManagedVersionItem>(versions)
        }
        "RunMicrovm" => run_microvm(plane, caller, read(input)?).await,
        "GetMicrovm" => write(MicrovmDetail::from(plane.get_microvm(caller, &microvm_identifier(input)?).await?)),
        "ListMicrovms" => list_microvms(plane, caller, read(input)?).await,
        "SuspendMicrovm" => done(plane.suspend_microvm(caller, &microvm_identifier(input)?).await?),
        "ResumeMicrovm" => done(plane.resume_microvm(caller, &microvm_identifier(input)?).await?),
        "TerminateMicrovm" => done(plane.terminate_microvm(caller, &microvm_identifier(input)?).await?),
        "CreateMicrovmAuthToken" => create_auth_token(plane, caller, read(input)?).await,
        "CreateMicrovmShellAuthToken" => create_shell_token(plane, caller, read(input)?).await,
        "TagResource" => {
            let TagsInput { resource, tags, .. } = read(input)?;
            done(plane.tag_resource(caller, &resource, tags).await?)
        }
        "UntagResource" => {
            let TagsInput { resource, tag_keys, .. } = read(input)?;
            done(plane.untag_resource(caller, &resource, tag_keys).await?)
        }
        "ListTags" => {
            let TagsInput { resource, .. } = read(input)?;
            Ok(json!({"Tags": plane.list_tags(caller, &resource).await?}))
        }
        _ => connectors::perform(plane, caller, name, input).await,
    }
}

async fn create_image(plane: &dyn ControlPlane, caller: &Caller, input: CreateImageInput) -> Result<Value, ApiError> {
    let spec = spec(caller, input.spec)?;
    let request = CreateImage { name: input.name, spec, tags: input.tags, client_token: input.client_token };
    let (image, version) = plane.create_image(caller, request).await?;
    write(CreatedImage::new(image, version))
}

async fn update_image(plane: &dyn ControlPlane, caller: &Caller, input: UpdateImageInput) -> Result<Value, ApiError> {
    rules::check_image_identifier(caller, &input.image_identifier)?;
    let request = UpdateImage { spec: spec(caller, input.spec)?, client_token: input.client_token };
    let (image, version) = plane.update_image(caller, &input.image_identifier, request).await?;
    write(UpdatedImage::new(image, version))
}

/// What an image version is to be made of. What is not said has its default: nothing is inherited from other versions.
fn spec(caller: &Caller, input: SpecInput) -> Result<ImageSpec, ApiError> {
    let memory_mib = rules::check_image(caller, &input)?;
    let capabilities = input.additional_os_capabilities;
    let all_capabilities = capabilities.as_ref().is_some_and(|list| list.iter().any(|capability| capability == "ALL"));
    let echoed = [
        ("additionalOsCapabilities", capabilities.map(Value::from)),
        ("cpuConfigurations", input.cpu_configurations),
        ("hooks", input.hooks),
        ("logging", input.logging),
    ];
    Ok(ImageSpec {
        base_image_arn: input.base_image_arn,
        base_image_version: input.base_image_version,
        build_role_arn: input.build_role_arn,
        description: input.description,
        code_artifact_uri: input.code_artifact.uri,
        memory_mib,
        egress_network_connectors: or_managed(caller, input.egress_network_connectors, "INTERNET_EGRESS"),
        environment: input.environment_variables,
        all_capabilities,
        echoed: echoed.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect::<BTreeMap<_, _>>(),
    })
}

async fn list_builds(plane: &dyn ControlPlane, caller: &Caller, input: Value) -> Result<Value, ApiError> {
    let of: VersionInput = read(input.clone())?;
    rules::check_image_identifier(caller, &of.image_identifier)?;
    let input: ListInput = read(input)?;
    let builds = plane.list_builds(caller, &of.image_identifier, &of.image_version, page(&input)).await?;
    let items = builds.items.into_iter().filter_map(|build| BuildItem::matching(build, &input)).collect();
    write(ItemList { items, next_token: builds.next })
}

async fn run_microvm(plane: &dyn ControlPlane, caller: &Caller, input: RunInput) -> Result<Value, ApiError> {
    rules::check_run(caller, &input)?;
    let request = RunMicrovm {
        image: input.image_identifier,
        version: input.image_version,
        execution_role_arn: input.execution_role_arn,
        idle_policy: input.idle_policy.map(|policy| IdlePolicy {
            max_idle_seconds: policy.max_idle_duration_seconds,
            suspended_seconds: policy.suspended_duration_seconds,
            auto_resume: policy.auto_resume_enabled,
        }),
        maximum_duration_seconds: input.maximum_duration_in_seconds.unwrap_or(rules::DEFAULT_DURATION_SECONDS),
        ingress_network_connectors: or_managed(caller, input.ingress_network_connectors, "HTTP_INGRESS"),
        egress_network_connectors: input.egress_network_connectors,
        run_hook_payload: input.run_hook_payload,
        logging: input.logging.filter(|logging| !logging.is_null()),
        client_token: input.client_token,
    };
    write(MicrovmDetail::from(plane.run_microvm(caller, request).await?))
}

async fn list_microvms(plane: &dyn ControlPlane, caller: &Caller, input: ListInput) -> Result<Value, ApiError> {
    if let Some(image) = &input.image_identifier {
        rules::check_image_identifier(caller, image)?;
    }
    let page = page(&input);
    let filter = MicrovmFilter { image: input.image_identifier, version: input.image_version };
    write_page::<_, MicrovmItem>(plane.list_microvms(caller, filter, page).await?)
}

async fn create_auth_token(plane: &dyn ControlPlane, caller: &Caller, input: AuthTokenInput) -> Result<Value, ApiError> {
    rules::check_expiration(input.expiration_in_minutes)?;
    let lifetime = Duration::from_secs(u64::from(input.expiration_in_minutes) * 60);
    let ports = rules::ports(input.allowed_ports)?;
    let token = plane.create_auth_token(caller, &input.microvm_identifier, lifetime, ports).await?;
    Ok(json!({"authToken": {TOKEN_HEADER: token}}))
}

async fn create_shell_token(plane: &dyn ControlPlane, caller: &Caller, input: ShellTokenInput) -> Result<Value, ApiError> {
    rules::check_expiration(input.expiration_in_minutes)?;
    let lifetime = Duration::from_secs(u64::from(input.expiration_in_minutes) * 60);
    let token = plane.create_shell_token(caller, &input.microvm_identifier, lifetime).await?;
    Ok(json!({"authToken": {TOKEN_HEADER: token}}))
}

fn image_identifier(caller: &Caller, input: Value) -> Result<String, ApiError> {
    let input: ImageInput = read(input)?;
    rules::check_image_identifier(caller, &input.image_identifier)?;
    Ok(input.image_identifier)
}

fn microvm_identifier(input: Value) -> Result<String, ApiError> {
    read::<MicrovmInput>(input).map(|input| input.microvm_identifier)
}

fn page(input: &ListInput) -> PageRequest {
    PageRequest { limit: input.max_results, token: input.next_token.clone() }
}

fn or_managed(caller: &Caller, connectors: Vec<String>, managed: &str) -> Vec<String> {
    if connectors.is_empty() { vec![managed_connector(&caller.region, managed)] } else { connectors }
}

/// The model has been checked, so that a failure here is a difference between the model and our types.
pub(crate) fn read<T: DeserializeOwned>(input: Value) -> Result<T, ApiError> {
    serde_json::from_value(input).map_err(|e| ApiError::internal(format!("input passed the model but not the operation: {e}")))
}

pub(crate) fn write(output: impl Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(output).map_err(|e| ApiError::internal(format!("output cannot be written: {e}")))
}

fn write_page<T, Item: From<T> + Serialize>(page: Page<T>) -> Result<Value, ApiError> {
    write(ItemList { items: page.items.into_iter().map(Item::from).collect(), next_token: page.next })
}

#[expect(clippy::unnecessary_wraps, reason = "it stands beside the other answers")]
fn done((): ()) -> Result<Value, ApiError> {
    Ok(json!({}))
}
