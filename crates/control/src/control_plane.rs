//! [`ControlPlane`] for the API.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use hearth_objects::ObjectUri;
use hearth_store::{
    ClientToken, CreateImage as Created, CreateMicrovm, DeleteImage, ImageRow, Keyset, Made, NewImage, NewMicrovm, Scope, StoreError,
};
use uuid::Uuid;

use crate::{
    arn::{ImageArn, MANAGED_IMAGES, check_shell, endpoint_name, managed_connector, managed_image},
    control::{Control, Inner},
    error::ControlError,
    hooks::{Hook, Hooks},
    images::{self, FIRST, Job, ShapeError, Sizes},
    managed,
    microvm::{self, Call, STOPPING},
    plane::ControlPlane,
    quota::Counted,
    records::{self, MicrovmSpec, json, millis, time, version_name, version_number, word},
    token::Claims,
    types::{
        Build, Caller, Connector, ConnectorState, ConnectorVersion, CreateConnector, CreateImage, Image, ImageSpec, ImageState,
        ImageVersion, ManagedImage, ManagedImageVersion, Microvm, MicrovmFilter, MicrovmState, Page, PageRequest, PortSpec, RunMicrovm,
        UpdateConnector, UpdateImage, VersionStatus,
    },
};

/// Records on a page if the caller does not say, and at most in most lists (SPEC 4.2).
pub(crate) const PAGE: u32 = 50;

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        Self::Internal(error.to_string())
    }
}

#[async_trait]
impl ControlPlane for Control {
    async fn create_image(&self, caller: &Caller, request: CreateImage) -> Result<(Image, ImageVersion), ControlError> {
        let caller = caller.clone();
        self.to_the_end(|inner| async move { inner.create_image(&caller, request).await }).await
    }

    async fn update_image(&self, caller: &Caller, image: &str, request: UpdateImage) -> Result<(Image, ImageVersion), ControlError> {
        let (caller, image) = (caller.clone(), image.to_owned());
        self.to_the_end(|inner| async move { inner.update_image(&caller, &image, request).await }).await
    }

    async fn get_image(&self, caller: &Caller, image: &str) -> Result<Image, ControlError> {
        Ok(records::image(self.inner.find_image(caller, image).await?)?)
    }

    async fn list_images(&self, caller: &Caller, name_filter: Option<&str>, page: PageRequest) -> Result<Page<Image>, ControlError> {
        let list = ["images", &caller.account, &caller.region];
        let keys = self.inner.keys(&list, &page, PAGE)?;
        let rows = self.inner.store.list_images(scope(caller), keys).await?;
        let mut page = self.inner.page(&list, keys, rows, |row| row.seq, records::image)?;
        page.items.retain(|image| name_filter.is_none_or(|part| image.name.contains(part)));
        Ok(page)
    }

    async fn delete_image(&self, caller: &Caller, image: &str) -> Result<Image, ControlError> {
        let (caller, image) = (caller.clone(), image.to_owned());
        self.to_the_end(|inner| async move { inner.delete_image(&caller, &image).await }).await
    }

    async fn get_image_version(&self, caller: &Caller, image: &str, version: &str) -> Result<ImageVersion, ControlError> {
        let (image, row) = self.inner.find_version(caller, image, version).await?;
        Ok(records::version(&image, row)?)
    }

    async fn list_image_versions(&self, caller: &Caller, image: &str, page: PageRequest) -> Result<Page<ImageVersion>, ControlError> {
        let image = self.inner.find_image(caller, image).await?;
        let list = ["versions", &image.id];
        let keys = self.inner.keys(&list, &page, PAGE)?;
        let rows = self.inner.store.list_versions(&image.id, keys).await?;
        self.inner.page(&list, keys, rows, |row| row.seq, |row| records::version(&image, row))
    }

    async fn set_version_status(
        &self,
        caller: &Caller,
        image: &str,
        version: &str,
        status: VersionStatus,
    ) -> Result<ImageVersion, ControlError> {
        self.inner.set_version_status(caller, image, version, status).await
    }

    async fn delete_image_version(&self, caller: &Caller, image: &str, version: &str) -> Result<ImageVersion, ControlError> {
        self.inner.delete_image_version(caller, image, version).await
    }

    async fn get_build(&self, caller: &Caller, image: &str, version: &str, build: &str) -> Result<Build, ControlError> {
        let (image, version) = self.inner.find_version(caller, image, version).await?;
        let row = self.inner.store.build(&image.id, version.number, build).await?;
        let unknown = || ControlError::ImageNotFound(format!("{}, Build: {build}", arn_of(&image)));
        Ok(records::build(&image, &version, row.ok_or_else(unknown)?)?)
    }

    async fn list_builds(&self, caller: &Caller, image: &str, version: &str, page: PageRequest) -> Result<Page<Build>, ControlError> {
        let (image, version) = self.inner.find_version(caller, image, version).await?;
        let number = version_name(version.number);
        let list = ["builds", &image.id, &number];
        let keys = self.inner.keys(&list, &page, PAGE)?;
        let rows = self.inner.store.list_builds(&image.id, version.number, keys).await?;
        self.inner.page(&list, keys, rows, |row| row.seq, |row| records::build(&image, &version, row))
    }

    async fn list_managed_images(&self, caller: &Caller, page: PageRequest) -> Result<Page<ManagedImage>, ControlError> {
        self.inner.list_managed_images(caller, &page)
    }

    async fn list_managed_image_versions(
        &self,
        caller: &Caller,
        image: &str,
        page: PageRequest,
    ) -> Result<Page<ManagedImageVersion>, ControlError> {
        self.inner.list_managed_image_versions(caller, image, &page)
    }

    async fn run_microvm(&self, caller: &Caller, request: RunMicrovm) -> Result<Microvm, ControlError> {
        self.inner.throttle.admit(caller, Counted::Run)?;
        let caller = caller.clone();
        self.to_the_end(|inner| async move { inner.run_microvm(&caller, request).await }).await
    }

    async fn get_microvm(&self, caller: &Caller, id: &str) -> Result<Microvm, ControlError> {
        self.inner.throttle.admit(caller, Counted::Get)?;
        Ok(self.inner.find_microvm(caller, id)?.microvm().as_ref().clone())
    }

    async fn list_microvms(&self, caller: &Caller, filter: MicrovmFilter, page: PageRequest) -> Result<Page<Microvm>, ControlError> {
        let image = filter.image.as_deref().map(|image| own_arn(caller, image)).transpose()?;
        let number = match filter.version.as_deref().map(version_number) {
            // No MicroVM has a version that is not one.
            Some(None) => return Ok(Page { items: Vec::new(), next: None }),
            Some(number) => number,
            None => None,
        };
        if image.as_ref().is_some_and(|image| image.region != caller.region) {
            return Ok(Page { items: Vec::new(), next: None });
        }
        let name = image.as_ref().map(|image| image.name.as_str());
        let version = filter.version.unwrap_or_default();
        let list = ["microvms", &caller.account, &caller.region, name.unwrap_or_default(), &version];
        let keys = self.inner.keys(&list, &page, PAGE)?;
        let rows = self.inner.store.list_microvms(scope(caller), name, number, keys).await?;
        self.inner.page(&list, keys, rows, |row| row.seq, |row| records::microvm(row).map(|record| record.vm))
    }

    async fn suspend_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError> {
        self.inner.throttle.admit(caller, Counted::Suspend)?;
        self.inner.find_microvm(caller, id)?.call(Call::Suspend).await
    }

    async fn resume_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError> {
        self.inner.throttle.admit(caller, Counted::Resume)?;
        self.inner.find_microvm(caller, id)?.call(Call::Resume).await
    }

    async fn terminate_microvm(&self, caller: &Caller, id: &str) -> Result<(), ControlError> {
        self.inner.throttle.admit(caller, Counted::Terminate)?;
        self.inner.find_microvm(caller, id)?.call(Call::Terminate).await
    }

    async fn create_auth_token(&self, caller: &Caller, id: &str, lifetime: Duration, ports: Vec<PortSpec>) -> Result<String, ControlError> {
        self.inner.throttle.admit(caller, Counted::AuthToken)?;
        self.inner.find_living(caller, id)?;
        Ok(self.inner.keyring.mint(Claims::http(id, ports, SystemTime::now(), lifetime)))
    }

    async fn create_shell_token(&self, caller: &Caller, id: &str, lifetime: Duration) -> Result<String, ControlError> {
        self.inner.throttle.admit(caller, Counted::ShellToken)?;
        check_shell(&self.inner.find_living(caller, id)?.ingress_network_connectors)?;
        Ok(self.inner.keyring.mint(Claims::shell(id, SystemTime::now(), lifetime)))
    }

    async fn tag_resource(&self, caller: &Caller, arn: &str, tags: BTreeMap<String, String>) -> Result<(), ControlError> {
        self.inner.change_tags(caller, arn, tags.into_iter().map(|(key, value)| (key, Some(value))).collect()).await
    }

    async fn untag_resource(&self, caller: &Caller, arn: &str, keys: Vec<String>) -> Result<(), ControlError> {
        self.inner.change_tags(caller, arn, keys.into_iter().map(|key| (key, None)).collect()).await
    }

    async fn list_tags(&self, caller: &Caller, arn: &str) -> Result<BTreeMap<String, String>, ControlError> {
        self.inner.list_tags(caller, arn).await
    }

    async fn create_connector(&self, caller: &Caller, request: CreateConnector) -> Result<Connector, ControlError> {
        self.inner.create_connector(caller, request).await
    }

    async fn get_connector(&self, caller: &Caller, identifier: &str) -> Result<(Connector, Option<i64>), ControlError> {
        self.inner.get_connector(caller, identifier).await
    }

    async fn list_connectors(
        &self,
        caller: &Caller,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<Connector>, ControlError> {
        self.inner.list_connectors(caller, state, page).await
    }

    async fn list_connector_versions(
        &self,
        caller: &Caller,
        identifier: &str,
        state: Option<ConnectorState>,
        page: PageRequest,
    ) -> Result<Page<ConnectorVersion>, ControlError> {
        self.inner.list_connector_versions(caller, identifier, state, page).await
    }

    async fn update_connector(&self, caller: &Caller, identifier: &str, request: UpdateConnector) -> Result<Connector, ControlError> {
        self.inner.update_connector(caller, identifier, request).await
    }

    async fn delete_connector(&self, caller: &Caller, identifier: &str) -> Result<Connector, ControlError> {
        self.inner.delete_connector(caller, identifier).await
    }
}

impl Control {
    /// Does something to its end even if the caller goes away in the middle: a record without its driver would be worse than either.
    async fn to_the_end<T, F>(&self, call: impl FnOnce(Arc<Inner>) -> F) -> Result<T, ControlError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ControlError>> + Send + 'static,
    {
        if self.inner.stop.is_cancelled() {
            return Err(ControlError::InsufficientCapacity(STOPPING.to_owned()));
        }
        let task = tokio::spawn(call(Arc::clone(&self.inner)));
        task.await.unwrap_or_else(|error| Err(ControlError::Internal(format!("a call panicked: {error}"))))
    }
}

impl Inner {
    async fn create_image(&self, caller: &Caller, request: CreateImage) -> Result<(Image, ImageVersion), ControlError> {
        let CreateImage { name, mut spec, tags, client_token } = request;
        self.check_spec(caller, &spec)?;
        let fingerprint = fingerprint(&serde_json::json!([name, spec, tags]));
        spec.egress_network_connectors = self.image_egress(caller, spec.egress_network_connectors).await?;
        let (id, build_id) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
        let now_ms = millis(SystemTime::now());
        let (spec_json, tags_json) = (json(&spec), json(&tags));
        let limit = self.settings.quotas.images;
        let new =
            NewImage { scope: scope(caller), id: &id, name: &name, spec: &spec_json, tags: &tags_json, build_id: &build_id, limit, now_ms };
        let token = client_token.as_deref().map(|token| ClientToken { operation: "CreateMicrovmImage", token, fingerprint: &fingerprint });
        match self.store.create_image(&new, token).await? {
            Created::Created => {
                let image = images::Identity { id: id.clone(), account: caller.account.clone(), region: caller.region.clone(), name };
                let job = Job { build_id, number: FIRST, spec, created_ms: now_ms };
                let handle = images::Handle::start(&self.images, image, Some(job));
                self.image_handles().insert(id.clone(), Arc::new(handle));
                self.image_with_version(&id, FIRST).await
            }
            Created::Replayed(made) => self.image_with_version(&made.id, made.number).await,
            Created::TokenReused => Err(ControlError::TokenReused),
            Created::NameTaken => Err(ControlError::NameTaken(name)),
            Created::LimitReached => Err(ControlError::QuotaExceeded(format!(
                "The maximum number of MicroVM images ({limit}) has been reached for this account."
            ))),
        }
    }

    /// Refuses what cannot be built here.
    pub fn check_spec(&self, caller: &Caller, spec: &ImageSpec) -> Result<(), ControlError> {
        check_spec(caller, self.images.sizes, spec)?;
        self.settings.architectures.refusal(spec).map_or(Ok(()), |refusal| Err(ControlError::Invalid(refusal)))
    }

    /// Egress connectors of an image: the ones asked for, or the default.
    pub async fn image_egress(&self, caller: &Caller, asked: Vec<String>) -> Result<Vec<String>, ControlError> {
        if asked.is_empty() {
            return Ok(vec![managed_connector(&caller.region, "INTERNET_EGRESS")]);
        }
        Ok(self.check_egress(caller, asked).await?.0)
    }

    async fn delete_image(&self, caller: &Caller, image: &str) -> Result<Image, ControlError> {
        let row = self.find_image(caller, image).await?;
        let mut image = records::image(row)?;
        let unknown = || ControlError::ImageNotFound(image.arn.clone());
        if image.state == ImageState::Deleting {
            return Ok(image);
        }
        let handle = self.image_handles().get(&image.id).cloned().ok_or_else(unknown)?;
        match handle.delete().await {
            Some(Ok(DeleteImage::Started)) => {
                self.image_handles().remove(&image.id);
                image.state = ImageState::Deleting;
                Ok(image)
            }
            Some(Ok(DeleteImage::InUse)) => Err(ControlError::ImageInUse),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(DeleteImage::Gone)) => Err(unknown()),
            // The driver ended meanwhile, with the image or with the server.
            None => {
                let row = self.store.image_by_id(&image.id).await?.ok_or_else(unknown)?;
                match records::image(row)? {
                    image if image.state == ImageState::Deleting => Ok(image),
                    _ => Err(ControlError::InsufficientCapacity(STOPPING.to_owned())),
                }
            }
        }
    }

    async fn run_microvm(&self, caller: &Caller, request: RunMicrovm) -> Result<Microvm, ControlError> {
        if !request.image.starts_with("arn:") {
            return Err(ControlError::Invalid("Malformed ARN - doesn't start with 'arn:'".to_owned()));
        }
        let arn = own_arn(caller, &request.image)?;
        let fingerprint = run_fingerprint(&request);
        let token = request.client_token.as_deref();
        let token = token.map(|token| ClientToken { operation: "RunMicrovm", token, fingerprint: &fingerprint });
        // Before everything that may have changed since: a replay asks for nothing.
        if let Some(token) = token
            && let Some(seen) = self.store.replay_microvm(scope(caller), token).await?
        {
            return self.replayed(seen).await;
        }
        let (image, number, spec) = self.find_active(caller, &arn, request.version.as_deref()).await?;
        let hooks = Hooks::of(&spec);
        if request.run_hook_payload.is_some() && hooks.timeout(Hook::Run).is_none() {
            let text = "The run hook must be enabled in the MicroVM image to pass the run hook payload.";
            return Err(ControlError::Invalid(text.to_owned()));
        }
        // What it was built with; a snapshot that cannot be opened is found to be so by the launch.
        let snapshot = self.microvms.snapshots.get(&image.id, number).await;
        let promised = self.microvms.admit(snapshot.ok().as_deref(), spec.memory_mib, 0).await?;

        let id = format!("microvm-{}", Uuid::new_v4());
        let endpoint = endpoint_name(&caller.region, &self.settings.domain);
        let now_ms = millis(SystemTime::now());
        let ingress = Some(request.ingress_network_connectors).filter(|connectors| !connectors.is_empty());
        let egress = Some(request.egress_network_connectors).filter(|connectors| !connectors.is_empty());
        let (egress, connector) = self.check_egress(caller, egress.unwrap_or(spec.egress_network_connectors)).await?;
        let counted_mib = self.settings.quotas.memory_accounting.count(spec.memory_mib);
        let spec = MicrovmSpec {
            execution_role_arn: request.execution_role_arn,
            idle_policy: request.idle_policy,
            maximum_duration_seconds: request.maximum_duration_seconds,
            ingress_network_connectors: ingress.unwrap_or_else(|| vec![managed_connector(&caller.region, "HTTP_INGRESS")]),
            egress_network_connectors: egress,
            run_hook_payload: request.run_hook_payload,
            logging: request.logging,
            hooks: hooks.sent().cloned(),
            memory_mib: spec.memory_mib,
        };
        let new = NewMicrovm {
            scope: scope(caller),
            id: &id,
            image_id: &image.id,
            image_name: &image.name,
            number,
            endpoint: &endpoint,
            spec: &json(&spec),
            memory_mib: counted_mib,
            connector: connector.as_deref(),
            memory_limit_mib: self.settings.quotas.allocated_memory_mib,
            now_ms,
        };
        match self.store.create_microvm(&new, token).await? {
            CreateMicrovm::Created => {}
            CreateMicrovm::NoActiveVersion => {
                return Err(ControlError::NoActiveVersion { arn: arn.to_string(), version: request.version });
            }
            CreateMicrovm::LimitReached => {
                let text = "The base maximum allocated memory limit has been reached for this account.";
                return Err(ControlError::QuotaExceeded(text.to_owned()));
            }
            CreateMicrovm::NoConnector => {
                let gone = ControlError::ConnectorNotFound(spec.egress_network_connectors.join(", "));
                return Err(ControlError::Invalid(gone.to_string()));
            }
            seen => return self.replayed(seen).await,
        }
        let vm = Microvm {
            id,
            image_arn: arn.to_string(),
            version: version_name(number),
            state: MicrovmState::Pending,
            state_reason: None,
            endpoint,
            execution_role_arn: spec.execution_role_arn,
            idle_policy: spec.idle_policy,
            maximum_duration_seconds: spec.maximum_duration_seconds,
            started_at: time(now_ms),
            terminated_at: None,
            ingress_network_connectors: spec.ingress_network_connectors,
            egress_network_connectors: spec.egress_network_connectors,
        };
        let record = microvm::Record {
            account: caller.account.clone(),
            region: caller.region.clone(),
            image_id: image.id,
            image_name: image.name,
            number,
            vm: vm.clone(),
            logging: spec.logging,
            hooks,
            run_hook_payload: spec.run_hook_payload,
            memory_mib: spec.memory_mib,
            generation: 1,
            suspended_at: None,
            suspended_by: None,
        };
        self.registry.insert(microvm::Handle::start(&self.microvms, record, Some(promised)));
        Ok(vm)
    }

    async fn replayed(&self, seen: CreateMicrovm) -> Result<Microvm, ControlError> {
        let CreateMicrovm::Replayed(Made { id, .. }) = seen else { return Err(ControlError::TokenReused) };
        if let Some(handle) = self.registry.by_id(&id) {
            return Ok(handle.microvm().as_ref().clone());
        }
        // The first call has recorded it and is about to start its driver.
        let row = self.store.microvm(&id).await?.ok_or(ControlError::MicrovmNotFound(id))?;
        Ok(records::microvm(row)?.vm)
    }

    /// The version that is to be launched, and what it was built from.
    async fn find_active(
        &self,
        caller: &Caller,
        arn: &ImageArn,
        version: Option<&str>,
    ) -> Result<(ImageRow, i64, ImageSpec), ControlError> {
        let none = || ControlError::NoActiveVersion { arn: arn.to_string(), version: version.map(str::to_owned) };
        if arn.region != caller.region {
            return Err(none());
        }
        let image = self.store.image_by_name(scope(caller), &arn.name).await?.ok_or_else(none)?;
        let number = match version {
            Some(version) => version_number(version),
            None => image.latest_active,
        };
        let number = number.ok_or_else(none)?;
        let version = self.store.version(&image.id, number).await?.ok_or_else(none)?;
        if version.status != word(VersionStatus::Active) {
            return Err(none());
        }
        let spec = records::version(&image, version)?.spec;
        Ok((image, number, spec))
    }

    fn find_microvm(&self, caller: &Caller, id: &str) -> Result<Arc<microvm::Handle>, ControlError> {
        self.registry
            .by_id(id)
            .filter(|handle| handle.account == caller.account && handle.region == caller.region)
            .ok_or_else(|| ControlError::MicrovmNotFound(id.to_owned()))
    }

    /// A MicroVM that is not over.
    fn find_living(&self, caller: &Caller, id: &str) -> Result<Arc<Microvm>, ControlError> {
        let vm = self.find_microvm(caller, id)?.microvm();
        if matches!(vm.state, MicrovmState::Terminating | MicrovmState::Terminated) {
            return Err(ControlError::Terminated(id.to_owned()));
        }
        Ok(vm)
    }

    pub async fn find_image(&self, caller: &Caller, image: &str) -> Result<ImageRow, ControlError> {
        let arn = own_arn(caller, image)?;
        let unknown = || ControlError::ImageNotFound(image.to_owned());
        if arn.region != caller.region {
            return Err(unknown());
        }
        self.store.image_by_name(scope(caller), &arn.name).await?.ok_or_else(unknown)
    }

    pub async fn find_version(
        &self,
        caller: &Caller,
        image: &str,
        version: &str,
    ) -> Result<(ImageRow, hearth_store::VersionRow), ControlError> {
        let row = self.find_image(caller, image).await?;
        let unknown = || ControlError::VersionNotFound { arn: image.to_owned(), version: version.to_owned() };
        let number = version_number(version).ok_or_else(unknown)?;
        let version = self.store.version(&row.id, number).await?.ok_or_else(unknown)?;
        Ok((row, version))
    }

    /// What to read for a page: one record more than it holds, to know whether there is another.
    pub fn keys(&self, list: &[&str], page: &PageRequest, most: u32) -> Result<Keyset, ControlError> {
        let before = page.token.as_deref().map(|cursor| self.cursors.open(list, cursor)).transpose()?;
        Ok(Keyset { before, limit: page.limit.unwrap_or(PAGE).clamp(1, most) + 1 })
    }

    pub fn page<Row, T>(
        &self,
        list: &[&str],
        keys: Keyset,
        mut rows: Vec<Row>,
        seq: impl Fn(&Row) -> i64,
        convert: impl FnMut(Row) -> Result<T, records::Unreadable>,
    ) -> Result<Page<T>, ControlError> {
        let limit = keys.limit as usize - 1;
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next = rows.last().filter(|_| more).map(|row| self.cursors.seal(list, seq(row)));
        let items = rows.into_iter().map(convert).collect::<Result<_, _>>()?;
        Ok(Page { items, next })
    }
}

pub(crate) fn scope(caller: &Caller) -> Scope<'_> {
    Scope { account: &caller.account, region: &caller.region }
}

pub(crate) fn arn_of(image: &ImageRow) -> ImageArn {
    ImageArn { region: image.region.clone(), account: image.account.clone(), name: image.name.clone() }
}

/// An image's ARN, if it is of the caller's account.
fn own_arn(caller: &Caller, text: &str) -> Result<ImageArn, ControlError> {
    let arn = ImageArn::parse(text)?;
    if arn.account == caller.account {
        return Ok(arn);
    }
    Err(ControlError::Denied { principal: caller.principal.clone(), resource: text.to_owned() })
}

/// What only the domain knows about an image's specification; the API checks the rest.
fn check_spec(caller: &Caller, sizes: Sizes, spec: &ImageSpec) -> Result<(), ControlError> {
    let base = &spec.base_image_arn;
    if !base.starts_with("arn:") {
        return Err(ControlError::Invalid(format!("Invalid ARN format: {base}")));
    }
    let version = spec.base_image_version.as_deref().unwrap_or(managed::VERSIONS[0]);
    let known = MANAGED_IMAGES.iter().any(|name| managed_image(&caller.region, name) == *base);
    if !known || !managed::VERSIONS.contains(&version) {
        return Err(ControlError::Invalid(format!("No managed MicroVM Image with arn {base} and version {version} is available")));
    }
    ObjectUri::parse(&spec.code_artifact_uri).map_err(|error| ControlError::Invalid(error.to_string()))?;
    match sizes.shape(spec.memory_mib) {
        Ok(_) => Ok(()),
        Err(error @ ShapeError::TooLarge { .. }) => Err(ControlError::Invalid(error.to_string())),
        Err(ShapeError::Unknown) => Err(ControlError::Invalid(format!(
            "The requested memory size of {} MiB is not supported by base MicroVM image {base}. Supported memory sizes in MiB are: [512, 1024, 2048, 4096, 8192].",
            spec.memory_mib
        ))),
    }
}

fn run_fingerprint(request: &RunMicrovm) -> String {
    let RunMicrovm {
        image,
        version,
        execution_role_arn,
        idle_policy,
        maximum_duration_seconds,
        ingress_network_connectors,
        egress_network_connectors,
        run_hook_payload,
        logging,
        client_token: _,
    } = request;
    fingerprint(&serde_json::json!([
        image,
        version,
        execution_role_arn,
        idle_policy,
        maximum_duration_seconds,
        ingress_network_connectors,
        egress_network_connectors,
        run_hook_payload,
        logging
    ]))
}

/// SHA-256 of a request, in hexadecimal. Maps are ordered, so the same request has the same text.
pub(crate) fn fingerprint(request: &serde_json::Value) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, request.to_string().as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
