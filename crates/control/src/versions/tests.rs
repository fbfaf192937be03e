//! Versions of an image, with fakes of the builder and the engine, and a real store.

use std::sync::atomic::Ordering;

use crate::{
    ControlError,
    plane::ControlPlane,
    quota::Quotas,
    testing::{World, caller, image_arn, run, spec},
    types::{ImageState, MicrovmState, PageRequest, RunMicrovm, UpdateImage, VersionState, VersionStatus},
};

fn update() -> UpdateImage {
    UpdateImage { spec: spec("next.zip"), client_token: None }
}

impl World {
    /// Makes the next version and waits for its build.
    async fn update(&self) -> crate::types::Image {
        self.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap();
        self.updated().await
    }

    async fn updated(&self) -> crate::types::Image {
        self.when("the update to end", || async {
            let image = self.control.get_image(&caller(), &image_arn("demo")).await.unwrap();
            (image.state != ImageState::Updating).then_some(image)
        })
        .await
    }

    async fn version(&self, version: &str) -> Result<crate::types::ImageVersion, ControlError> {
        self.control.get_image_version(&caller(), &image_arn("demo"), version).await
    }

    async fn set_status(&self, version: &str, status: VersionStatus) -> Result<crate::types::ImageVersion, ControlError> {
        let changed = self.control.set_version_status(&caller(), &image_arn("demo"), version, status).await;
        self.updated().await;
        changed
    }
}

fn pinned(version: &str) -> RunMicrovm {
    RunMicrovm { version: Some(version.to_owned()), ..run("demo", None) }
}

#[tokio::test]
async fn the_old_version_is_launched_while_the_new_one_is_built() {
    let world = World::with_image().await;
    world.builder.gate.send_replace(false);
    let (image, version) = world.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap();
    assert_eq!((image.state, image.latest_active_version.as_deref()), (ImageState::Updating, Some("1.0")));
    assert_eq!((version.version.as_str(), version.spec.code_artifact_uri.as_str()), ("2.0", "s3://bucket/next.zip"));
    assert_eq!(world.control.run_microvm(&caller(), run("demo", None)).await.unwrap().version, "1.0");
    let busy = world.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap_err();
    assert_eq!(busy.to_string(), "MicroVM Image is already in state: UPDATING");
    for error in [
        world.control.delete_image_version(&caller(), &image_arn("demo"), "1.0").await.unwrap_err(),
        world.control.set_version_status(&caller(), &image_arn("demo"), "1.0", VersionStatus::Inactive).await.unwrap_err(),
    ] {
        assert!(matches!(error, ControlError::ImageInTransition(_)), "{error}");
    }
    world.builder.gate.send_replace(true);
    let image = world.updated().await;
    assert_eq!((image.state, image.latest_active_version.as_deref()), (ImageState::Updated, Some("2.0")));
    assert_eq!(world.control.run_microvm(&caller(), run("demo", None)).await.unwrap().version, "2.0");
    assert_eq!(world.control.run_microvm(&caller(), pinned("1.0")).await.unwrap().version, "1.0");
}

#[tokio::test]
async fn a_failed_update_leaves_the_old_version_active() {
    let world = World::with_image().await;
    world.builder.fail.store(true, Ordering::SeqCst);
    let image = world.update().await;
    assert_eq!(image.state, ImageState::UpdateFailed);
    assert_eq!((image.latest_active_version.as_deref(), image.latest_failed_version.as_deref()), (Some("1.0"), Some("2.0")));
    let failed = world.version("2.0").await.unwrap();
    assert_eq!((failed.state, failed.status), (VersionState::Failed, VersionStatus::Inactive));
    let error = world.set_status("2.0", VersionStatus::Active).await.unwrap_err();
    assert_eq!(error.to_string(), "Cannot activate MicroVM image version in its current state: FAILED");
    world.builder.fail.store(false, Ordering::SeqCst);
    assert_eq!(world.update().await.latest_active_version.as_deref(), Some("3.0"), "numbers are not reused");
}

#[tokio::test]
async fn nothing_is_inherited() {
    let world = World::with_image().await;
    let mut request = update();
    request.spec.environment = None;
    world.control.update_image(&caller(), &image_arn("demo"), request).await.unwrap();
    world.updated().await;
    assert!(world.version("1.0").await.unwrap().spec.environment.is_some());
    assert_eq!(world.version("2.0").await.unwrap().spec.environment, None);
}

#[tokio::test]
async fn what_is_inactive_is_not_launched() {
    let world = World::with_image().await;
    world.update().await;
    let version = world.set_status("2.0", VersionStatus::Inactive).await.unwrap();
    assert_eq!((version.status, version.state), (VersionStatus::Inactive, VersionState::Successful));
    assert_eq!(world.control.run_microvm(&caller(), run("demo", None)).await.unwrap().version, "1.0");
    let error = world.control.run_microvm(&caller(), pinned("2.0")).await.unwrap_err();
    assert_eq!(error.to_string(), format!("No active version found for MicroVM image {} and version 2.0", image_arn("demo")));
    world.set_status("1.0", VersionStatus::Inactive).await.unwrap();
    let error = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap_err();
    assert_eq!(error.to_string(), format!("No active version found for MicroVM image {}", image_arn("demo")));
    world.set_status("2.0", VersionStatus::Active).await.unwrap();
    assert_eq!(world.control.run_microvm(&caller(), run("demo", None)).await.unwrap().version, "2.0");
}

#[tokio::test]
async fn a_deleted_version_lives_on_in_its_microvms() {
    let world = World::with_image().await;
    let only = world.control.delete_image_version(&caller(), &image_arn("demo"), "1.0").await.unwrap_err();
    assert!(only.to_string().contains("only version"), "{only}");
    let vm = world.run(None).await;
    let image = world.update().await;
    let deleted = world.control.delete_image_version(&caller(), &image_arn("demo"), "1.0").await.unwrap();
    assert_eq!((deleted.version.as_str(), deleted.state), ("1.0", VersionState::Deleting));
    assert_eq!(world.updated().await.state, ImageState::Updated);
    let gone = world.version("1.0").await.unwrap_err();
    assert_eq!(gone.to_string(), format!("MicroVMImage not found for MicroVMImage: {}, Version: 1.0", image_arn("demo")));
    let versions = world.control.list_image_versions(&caller(), &image_arn("demo"), PageRequest::default()).await.unwrap();
    assert_eq!(versions.items.iter().map(|version| version.version.as_str()).collect::<Vec<_>>(), ["2.0"]);

    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Suspended).await;
    let world = world.restart().await;
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Running).await;
    let snapshot = world.path(&format!("images/{}/1.0", image.id));
    assert!(snapshot.exists());
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Terminated).await;
    world.control.shutdown().await;
    assert!(!snapshot.exists(), "the last MicroVM took the snapshot with it");
    assert!(world.path(&format!("images/{}/2.0", image.id)).exists());
}

#[tokio::test]
async fn an_update_s_token_makes_one_version() {
    let world = World::with_image().await;
    let request = UpdateImage { client_token: Some("t".to_owned()), ..update() };
    world.control.update_image(&caller(), &image_arn("demo"), request.clone()).await.unwrap();
    world.updated().await;
    let (image, version) = world.control.update_image(&caller(), &image_arn("demo"), request.clone()).await.unwrap();
    assert_eq!((image.state, version.version.as_str(), version.state), (ImageState::Updated, "2.0", VersionState::Successful));
    let other = UpdateImage { spec: spec("other.zip"), ..request };
    let error = world.control.update_image(&caller(), &image_arn("demo"), other).await.unwrap_err();
    assert!(matches!(error, ControlError::TokenReused), "{error}");
}

#[tokio::test]
async fn images_and_versions_are_limited() {
    let world = World::with(|settings| settings.quotas = Quotas { images: 1, versions_per_image: 1, ..Quotas::default() }).await;
    world.build("demo").await;
    let image = world.control.create_image(&caller(), crate::testing::create("second")).await.unwrap_err();
    let version = world.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap_err();
    for error in [image, version] {
        assert!(matches!(error, ControlError::QuotaExceeded(_)), "{error}");
    }
}

#[tokio::test]
async fn a_stop_in_the_middle_of_an_update_fails_it() {
    let world = World::with_image().await;
    world.builder.gate.send_replace(false);
    world.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap();
    let world = world.restart().await;
    let image = world.updated().await;
    assert_eq!((image.state, image.latest_active_version.as_deref()), (ImageState::UpdateFailed, Some("1.0")));
    world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
}

#[tokio::test]
async fn a_crash_in_the_middle_of_a_deletion_ends_it_at_the_next_start() {
    let world = World::with_image().await;
    let image = world.update().await;
    world.control.inner.store.begin_version_delete(&image.id, 1, 1).await.unwrap();
    let world = world.crash().await;
    assert_eq!(world.updated().await.state, ImageState::Updated);
    assert!(matches!(world.version("1.0").await, Err(ControlError::VersionNotFound { .. })));
    assert!(!world.path(&format!("images/{}/1.0", image.id)).exists());
}
