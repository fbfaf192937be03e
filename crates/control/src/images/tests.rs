//! Whole builds with fakes of the builder and the engine, and a real store.

use std::sync::atomic::Ordering;

use futures::StreamExt;
use hearth_guest_protocol::Activity;
use hearth_machine::MachineEvent;

use crate::{
    Architecture, Architectures, CapacitySettings, ControlError, GuestSize,
    logs::{LogGroup, build_streams},
    plane::ControlPlane,
    testing::{Frozen, HookAnswer, World, at_rest, caller, create, exited, image_arn, log_line, run, spec, within},
    types::{BuildState, CreateImage, ImageState, MicrovmState, PageRequest, UpdateImage, VersionState, VersionStatus},
};

async fn build_log(world: &World, name: &str) -> Vec<String> {
    let builds = world.control.list_builds(&caller(), &image_arn(name), "1.0", PageRequest::default()).await.unwrap();
    let group = LogGroup::of_image("000000000000", "us-east-1", name);
    let mut lines = Vec::new();
    for stream in build_streams(builds.items[0].created_at, "1.0", &builds.items[0].id) {
        lines.extend(world.logs.follow(&group, &stream, 0).map(|line| line.text).collect::<Vec<_>>().await);
    }
    lines
}

/// Checks that a build failed as it should, and returns its reason.
async fn failed(world: &World, name: &str) -> String {
    let image = world.settled(name).await;
    assert_eq!(image.state, ImageState::CreateFailed);
    assert_eq!((image.latest_active_version, image.latest_failed_version.as_deref()), (None, Some("1.0")));
    let version = world.control.get_image_version(&caller(), &image_arn(name), "1.0").await.unwrap();
    assert_eq!((version.state, version.status, version.state_reason), (VersionState::Failed, VersionStatus::Inactive, None));
    assert_eq!((world.names("images").len(), world.names("tmp").len()), (0, 0), "no debris");
    let reason = world.build_reason(name).await;
    let log = build_log(world, name).await;
    assert_eq!(log.last().unwrap(), &format!("Build failed: {reason}"));
    reason
}

#[tokio::test]
async fn an_image_is_built() {
    let world = World::new().await;
    *world.engine.script.lock().unwrap() = vec![log_line("hello"), MachineEvent::Listening(8080), at_rest()];
    let (image, version) = world.control.create_image(&caller(), create("demo")).await.unwrap();
    assert_eq!((image.state, version.version.as_str(), version.status), (ImageState::Creating, "1.0", VersionStatus::Inactive));
    assert_eq!(version.spec.egress_network_connectors.len(), 1);
    let image = world.settled("demo").await;
    assert_eq!((image.state, image.latest_active_version.as_deref()), (ImageState::Created, Some("1.0")));
    let version = world.control.get_image_version(&caller(), &image_arn("demo"), "1.0").await.unwrap();
    assert_eq!((version.state, version.status), (VersionState::Successful, VersionStatus::Active));
    let builds = world.control.list_builds(&caller(), &image_arn("demo"), "1.0", PageRequest::default()).await.unwrap();
    let build = world.control.get_build(&caller(), &image_arn("demo"), "1.0", &builds.items[0].id).await.unwrap();
    assert_eq!(build.state, BuildState::Successful);
    assert_eq!((build.sizes.code_install, build.sizes.disk_snapshot, build.sizes.memory_snapshot), (Some(100), Some(300), Some(1001)));
    assert!(world.path(&format!("images/{}/1.0/manifest.json", image.id)).exists());
    assert!(world.names("tmp").is_empty());
    let log = build_log(&world, "demo").await;
    for line in ["STEP 1/1: FROM scratch", "hello"] {
        assert!(log.iter().any(|found| found == line), "{line}: {log:?}");
    }
}

#[tokio::test]
async fn the_app_s_environment_is_image_then_request_then_ours() {
    let world = World::new().await;
    world.build("demo").await;
    let app = world.engine.app.lock().unwrap().clone().unwrap();
    let expected = [
        ("A", "image"),
        ("B", "request"),
        ("AWS_LAMBDA_MICROVM_IMAGE_NAME", "demo"),
        ("AWS_LAMBDA_MICROVM_IMAGE_ARN", "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo"),
        ("AWS_LAMBDA_MICROVM_IMAGE_VERSION", "1.0"),
        ("AWS_REGION", "us-east-1"),
    ];
    assert_eq!(app.env, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    assert_eq!(app.hostname, "localhost");
}

#[tokio::test]
async fn artifacts_that_cannot_be_had() {
    let world = World::new().await;
    for (name, expected) in [
        ("gone", "S3_NO_SUCH_KEY: The object gone does not exist in the bucket bucket."),
        ("broken", "INTERNAL_PLATFORM_ERROR: The build failed because of this host; its log says why."),
    ] {
        let request = CreateImage { spec: spec(name), ..create(name) };
        world.control.create_image(&caller(), request).await.unwrap();
        assert_eq!(failed(&world, name).await, expected);
        assert!(!build_log(&world, name).await.join("\n").contains("/secret/path"));
    }
    let nowhere =
        CreateImage { spec: crate::types::ImageSpec { code_artifact_uri: "app.zip".to_owned(), ..spec("x") }, ..create("nowhere") };
    let error = world.control.create_image(&caller(), nowhere).await.unwrap_err();
    assert_eq!(error.to_string(), "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>");
}

#[tokio::test]
async fn create_image_of_another_architecture_is_built_for_the_host_and_says_so() {
    let world = World::new().await;
    let other = if Architecture::HOST == Architecture::Arm64 { Architecture::X86_64 } else { Architecture::Arm64 };
    let asking = |name: &str, architectures: &[Architecture]| {
        let configurations: Vec<_> = architectures.iter().map(|name| serde_json::json!({"architecture": name})).collect();
        let mut request = create(name);
        request.spec.echoed.insert("cpuConfigurations".to_owned(), configurations.into());
        request
    };
    for (name, asked, told) in
        [("other", &[other][..], true), ("both", &[Architecture::HOST, other], true), ("host", &[Architecture::HOST], false)]
    {
        world.control.create_image(&caller(), asking(name, asked)).await.unwrap();
        assert_eq!(world.settled(name).await.state, ImageState::Created);
        let builds = world.control.list_builds(&caller(), &image_arn(name), "1.0", PageRequest::default()).await.unwrap();
        assert_eq!(builds.items[0].architectures, asked);
        let log = build_log(&world, name).await;
        let notice = format!("{other} was asked for, and this host's processor is {}", Architecture::HOST);
        assert_eq!(log[0].starts_with(&notice), told, "{log:?}");
        let version = world.control.get_image_version(&caller(), &image_arn(name), "1.0").await.unwrap();
        assert_eq!(version.spec.architectures(), asked, "it comes back as it was sent");
    }

    let world = World::with(|settings| settings.architectures = Architectures::Strict).await;
    let refused = world.control.create_image(&caller(), asking("other", &[other])).await.unwrap_err();
    assert!(matches!(&refused, ControlError::Invalid(text) if text.contains("is not supported by base MicroVM image")), "{refused}");
    world.build("demo").await;
    let update = UpdateImage { spec: asking("demo", &[other]).spec, client_token: None };
    let refused = world.control.update_image(&caller(), &image_arn("demo"), update).await;
    assert!(matches!(refused, Err(ControlError::Invalid(_))));
}

#[tokio::test]
async fn a_failing_dockerfile() {
    let world = World::new().await;
    world.builder.fail.store(true, Ordering::SeqCst);
    world.build("demo").await;
    assert_eq!(failed(&world, "demo").await, "The container image build failed. RUN false");
    assert!(build_log(&world, "demo").await.iter().any(|line| line.contains("RUN false")));
}

#[tokio::test]
async fn apps_that_do_not_become_ready() {
    let world = World::new().await;
    *world.engine.script.lock().unwrap() = vec![log_line("oops"), exited(1)];
    world.build("exits").await;
    assert_eq!(failed(&world, "exits").await, "Container Stopped with Exit Code: 1");
    assert!(build_log(&world, "exits").await.contains(&"oops".to_owned()));
    assert_eq!(world.engine.kills.load(Ordering::SeqCst), 1);

    *world.engine.script.lock().unwrap() = vec![exited(0)];
    world.build("ends").await;
    let reason = failed(&world, "ends").await;
    assert!(reason.starts_with("Container Stopped with Exit Code: 0. The image's main process must keep running"), "{reason}");

    world.builder.config.lock().unwrap().argv = vec!["unstartable".to_owned()];
    world.build("unstartable").await;
    assert_eq!(failed(&world, "unstartable").await, "The application could not be started: no such file");
}

/// Creates an image, and returns when its build log has a line with this text. The clock stands still then.
async fn waited_for(world: &World, text: &str) -> Frozen {
    let clock = Frozen::now();
    world.control.create_image(&caller(), create("demo")).await.unwrap();
    within("the app to be waited for", async {
        let group = LogGroup::of_image("000000000000", "us-east-1", "demo");
        let builds = world.control.list_builds(&caller(), &image_arn("demo"), "1.0", PageRequest::default()).await.unwrap();
        let [_, console] = build_streams(builds.items[0].created_at, "1.0", &builds.items[0].id);
        let mut log = world.logs.follow(&group, &console, 0);
        while !log.next().await.unwrap().text.contains(text) {}
    })
    .await;
    clock
}

#[tokio::test]
async fn build_of_busy_app_that_never_listens_fails_at_the_limit() {
    let world = World::new().await;
    world.builder.config.lock().unwrap().exposed_ports = vec![5000];
    *world.engine.script.lock().unwrap() = vec![at_rest(), MachineEvent::Activity(Activity::Busy)];
    let clock = waited_for(&world, "Starting").await;
    clock.pass(301).await;
    assert_eq!(failed(&world, "demo").await, "The application did not accept connections on an exposed port within PT5M.");
}

#[tokio::test]
async fn build_of_busy_app_that_listens_goes_on_after_a_minute() {
    let world = World::new().await;
    *world.engine.script.lock().unwrap() = vec![MachineEvent::Listening(8080)];
    let clock = waited_for(&world, "listens on port 8080").await;
    clock.pass(59).await;
    assert!(!world.engine.told().contains(&"capture".to_owned()), "it may still be loading");
    clock.pass(2).await;
    assert_eq!(world.settled("demo").await.state, ImageState::Created);
    assert!(build_log(&world, "demo").await.iter().any(|line| line.contains("has not come to rest within PT1M")));
}

#[tokio::test]
async fn build_of_app_at_rest_on_another_port_goes_on_after_seconds() {
    let world = World::new().await;
    world.builder.config.lock().unwrap().exposed_ports = vec![5000];
    *world.engine.script.lock().unwrap() = vec![at_rest(), MachineEvent::Listening(9)];
    let clock = waited_for(&world, "listens on port 9, which the image does not EXPOSE").await;
    clock.pass(6).await;
    assert_eq!(world.settled("demo").await.state, ImageState::Created);
    let log = build_log(&world, "demo").await;
    assert!(log.iter().any(|line| line.contains("listens on 9, although the image EXPOSEs 5000")), "{log:?}");
}

#[tokio::test]
async fn build_of_app_that_exits_at_rest_fails() {
    let world = World::new().await;
    *world.engine.script.lock().unwrap() = vec![at_rest(), exited(0)];
    world.build("demo").await;
    assert!(failed(&world, "demo").await.starts_with("Container Stopped with Exit Code: 0. "));
}

#[tokio::test]
async fn an_exposed_port_among_others_is_enough() {
    let world = World::new().await;
    world.builder.config.lock().unwrap().exposed_ports = vec![5000, 5001];
    *world.engine.script.lock().unwrap() = vec![MachineEvent::Listening(9), MachineEvent::Listening(5001), at_rest()];
    assert_eq!(world.build("demo").await.state, ImageState::Created);
}

#[tokio::test]
async fn machines_that_fail_leave_no_debris() {
    let world = World::new().await;
    world.engine.fail_capture.store(true, Ordering::SeqCst);
    world.build("capture").await;
    assert!(failed(&world, "capture").await.starts_with("INTERNAL_PLATFORM_ERROR"));
    let log = build_log(&world, "capture").await;
    assert!(log.iter().any(|line| line.starts_with("The server's log says more about build ")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("no capture")), "what happened on the host is not told: {log:?}");
    world.engine.fail_boot.store(true, Ordering::SeqCst);
    world.build("boot").await;
    assert!(failed(&world, "boot").await.starts_with("INTERNAL_PLATFORM_ERROR"));
}

#[tokio::test]
async fn builds_take_turns() {
    let world = World::new().await;
    world.builder.gate.send_replace(false);
    for name in ["a", "b"] {
        world.control.create_image(&caller(), create(name)).await.unwrap();
    }
    let states = || async {
        let mut states = Vec::new();
        for name in ["a", "b"] {
            states.push(world.control.get_image_version(&caller(), &image_arn(name), "1.0").await.unwrap().state);
        }
        states.contains(&VersionState::InProgress).then_some(states)
    };
    let states = world.when("a build to run", states).await;
    assert!(states.contains(&VersionState::Pending), "{states:?}");
    world.builder.gate.send_replace(true);
    for name in ["a", "b"] {
        assert_eq!(world.settled(name).await.state, ImageState::Created);
    }
    assert_eq!(world.builder.most_at_once.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_host_without_memory_refuses_sizes_and_builds() {
    let world = World::with(|settings| {
        settings.capacity = CapacitySettings { memory_mib: Some(4096), reserve_mib: 0, overcommit: 1.0 };
    })
    .await;
    let sized = async |name: &str, memory_mib| {
        let mut request = create(name);
        request.spec.memory_mib = memory_mib;
        world.control.create_image(&caller(), request).await
    };
    let error = sized("large", 8192).await.unwrap_err();
    assert!(matches!(&error, ControlError::Invalid(text) if text.contains("more than the 4096 MiB")), "{error}");

    world.build("demo").await;
    let vm = world.run(None).await;
    sized("tight", 4096).await.unwrap();
    assert_eq!(world.settled("tight").await.state, ImageState::CreateFailed);
    let reason = world.build_reason("tight").await;
    assert!(reason.starts_with("INTERNAL_PLATFORM_ERROR: ") && reason.contains("513 MiB are promised"), "{reason}");
    assert_eq!(world.get(&vm.id).await.state, MicrovmState::Running);
}

#[tokio::test]
async fn a_snapshot_keeps_the_size_that_it_was_built_with() {
    let world = World::with(|settings| settings.guest_size = GuestSize::Peak).await;
    world.build("demo").await;
    let image = world.names("images").remove(0);
    let manifest = std::fs::read_to_string(world.path(&format!("images/{image}/1.0/manifest.json"))).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&manifest).unwrap()["memory_mib"], 2048);
}

#[tokio::test]
async fn an_image_is_deleted_when_nothing_uses_it() {
    let world = World::new().await;
    world.build("demo").await;
    let vm = world.run(None).await;
    assert!(matches!(world.control.delete_image(&caller(), &image_arn("demo")).await, Err(ControlError::ImageInUse)));
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Terminated).await;
    let image = world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
    assert_eq!(image.state, ImageState::Deleting);
    let gone = world.when("the image to be gone", || async { world.control.get_image(&caller(), &image_arn("demo")).await.err() }).await;
    assert_eq!(gone.to_string(), format!("MicroVMImage not found for MicroVMImageID: {}", image_arn("demo")));
    assert!(matches!(world.control.delete_image(&caller(), &image_arn("demo")).await, Err(ControlError::ImageNotFound(_))));
    assert!(world.names("images").is_empty());
    assert_eq!(world.engine.forgotten.load(Ordering::SeqCst), 1);
    assert_eq!(world.get(&vm.id).await.state, MicrovmState::Terminated, "it stays listed");
    assert_eq!(world.build("demo").await.state, ImageState::Created, "the name is free again");
}

/// Waits until images are gone, which must be all that there are, and checks that nothing of them is left.
async fn gone(world: &World, names: &[&str]) {
    for name in names {
        world
            .when("the image to be gone", || async {
                let found = world.control.get_image(&caller(), &image_arn(name)).await;
                matches!(found, Err(ControlError::ImageNotFound(_))).then_some(())
            })
            .await;
    }
    assert_eq!((world.names("images").len(), world.names("tmp").len()), (0, 0), "no debris");
    assert!(!world.engine.runs_any(), "no machine");
}

/// Waits until the log of a version's build says something: of the Dockerfile's phase, or of the machine's.
async fn said(world: &World, name: &str, version: &str, machine: bool, text: &str) {
    let builds = world.control.list_builds(&caller(), &image_arn(name), version, PageRequest::default()).await.unwrap();
    let streams = build_streams(builds.items[0].created_at, version, &builds.items[0].id);
    let mut log = world.logs.follow(&LogGroup::of_image("000000000000", "us-east-1", name), &streams[usize::from(machine)], 0);
    within(text, async { while !log.next().await.unwrap().text.contains(text) {} }).await;
}

/// Waits until a version's build is in the builder.
async fn in_the_builder(world: &World, name: &str, version: &str) {
    said(world, name, version, false, "STEP 1/1").await;
}

#[tokio::test]
async fn delete_image_creating_stops_the_build_and_frees_its_turn() {
    let world = World::new().await;
    world.builder.gate.send_replace(false);
    let request = CreateImage { client_token: Some("t".to_owned()), ..create("running") };
    world.control.create_image(&caller(), request.clone()).await.unwrap();
    in_the_builder(&world, "running", "1.0").await;
    world.control.create_image(&caller(), create("waiting")).await.unwrap();
    world.control.create_image(&caller(), create("next")).await.unwrap();

    for name in ["waiting", "running"] {
        let image = world.control.delete_image(&caller(), &image_arn(name)).await.unwrap();
        assert_eq!(image.state, ImageState::Deleting);
    }
    world.builder.gate.send_replace(true);
    assert_eq!(world.settled("next").await.state, ImageState::Created, "the turn is free");
    world.control.delete_image(&caller(), &image_arn("next")).await.unwrap();
    gone(&world, &["waiting", "running", "next"]).await;
    assert_eq!(world.builder.running.load(Ordering::SeqCst), 0);
    world.control.create_image(&caller(), request).await.unwrap();
    assert_eq!(world.settled("running").await.state, ImageState::Created, "name and token are free again");
}

#[tokio::test]
async fn delete_image_creating_ends_the_machine_that_waits_for_its_app() {
    let world = World::new().await;
    world.engine.script.lock().unwrap().clear();
    world.control.create_image(&caller(), create("demo")).await.unwrap();
    said(&world, "demo", "1.0", true, "Starting").await;
    assert!(world.engine.runs_any());
    world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
    gone(&world, &["demo"]).await;
}

#[tokio::test]
async fn delete_image_creating_during_validation_leaves_no_snapshot() {
    let world = World::new().await;
    world.engine.answer("validate", HookAnswer::Hang);
    let mut request = create("demo");
    let hooks = serde_json::json!({"port": 9000, "microvmImageHooks": {"validate": "ENABLED"}});
    request.spec.echoed.insert("hooks".to_owned(), hooks);
    world.control.create_image(&caller(), request).await.unwrap();
    said(&world, "demo", "1.0", true, "Validating the snapshot").await;
    world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
    gone(&world, &["demo"]).await;
    assert_eq!(world.engine.forgotten.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn delete_image_updating_stops_the_build_unless_a_microvm_lives() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.builder.gate.send_replace(false);
    let update = || UpdateImage { spec: spec("app.zip"), client_token: None };
    world.control.update_image(&caller(), &image_arn("demo"), update()).await.unwrap();
    in_the_builder(&world, "demo", "2.0").await;
    let refused = world.control.delete_image(&caller(), &image_arn("demo")).await;
    assert!(matches!(refused, Err(ControlError::ImageInUse)));
    assert_eq!(world.builder.running.load(Ordering::SeqCst), 1, "the build goes on");
    let refused = world.control.delete_image_version(&caller(), &image_arn("demo"), "2.0").await.unwrap_err();
    assert_eq!(refused.to_string(), "MicroVM Image is already in state: UPDATING");

    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Terminated).await;
    world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
    gone(&world, &["demo"]).await;
    assert_eq!(world.builder.running.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn delete_image_as_its_build_ends_leaves_nothing() {
    let world = World::new().await;
    for pauses in 0..40 {
        world.control.create_image(&caller(), create("demo")).await.unwrap();
        said(&world, "demo", "1.0", true, "Taking the snapshot").await;
        for _ in 0..pauses {
            tokio::task::yield_now().await;
        }
        world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
        gone(&world, &["demo"]).await;
    }
}

#[tokio::test]
async fn delete_image_that_cannot_be_recorded_leaves_the_build_alone() {
    let world = World::new().await;
    world.builder.gate.send_replace(false);
    let (image, _) = world.control.create_image(&caller(), create("demo")).await.unwrap();
    in_the_builder(&world, "demo", "1.0").await;
    let handle = world.control.inner.image_handles()[&image.id].clone();
    world.control.inner.store.close().await;
    assert!(matches!(handle.delete().await, Some(Err(_))));
    assert_eq!(world.builder.running.load(Ordering::SeqCst), 1, "the build goes on");
}

#[tokio::test]
async fn delete_image_is_finished_by_a_stop_and_by_the_next_start() {
    let world = World::new().await;
    world.builder.gate.send_replace(false);
    let (image, _) = world.control.create_image(&caller(), create("stopped")).await.unwrap();
    in_the_builder(&world, "stopped", "1.0").await;
    world.control.delete_image(&caller(), &image_arn("stopped")).await.unwrap();
    let world = world.restart().await;
    gone(&world, &["stopped"]).await;

    // The deletion of an image that is being built is recorded, and then the server is gone.
    let (crashed, _) = world.control.create_image(&caller(), create("crashed")).await.unwrap();
    in_the_builder(&world, "crashed", "1.0").await;
    world.control.inner.store.begin_image_delete(&crashed.id, 1).await.unwrap();
    let world = world.crash().await;
    gone(&world, &["stopped", "crashed"]).await;
    assert!(world.control.inner.store.image_by_id(&image.id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_token_makes_one_image_and_is_freed_with_it() {
    let world = World::new().await;
    let request = CreateImage { client_token: Some("t".to_owned()), ..create("demo") };
    let (image, _) = world.control.create_image(&caller(), request.clone()).await.unwrap();
    world.settled("demo").await;
    let (again, version) = world.control.create_image(&caller(), request.clone()).await.unwrap();
    assert_eq!((again.id, again.state, version.state), (image.id, ImageState::Created, VersionState::Successful));
    let other = CreateImage { name: "other".to_owned(), ..request.clone() };
    assert!(matches!(world.control.create_image(&caller(), other).await, Err(ControlError::TokenReused)));
    let taken = CreateImage { client_token: None, ..request.clone() };
    let error = world.control.create_image(&caller(), taken).await.unwrap_err();
    assert_eq!(error.to_string(), "A MicroVM image with the name 'demo' already exists in this account");
    world.control.delete_image(&caller(), &image_arn("demo")).await.unwrap();
    world.when("the image to be gone", || async { world.control.get_image(&caller(), &image_arn("demo")).await.err() }).await;
    world.control.create_image(&caller(), request).await.unwrap();
    assert_eq!(world.settled("demo").await.state, ImageState::Created);
}

#[tokio::test]
async fn a_stop_gives_builds_up() {
    let world = World::new().await;
    world.builder.gate.send_replace(false);
    world.control.create_image(&caller(), create("running")).await.unwrap();
    world.control.create_image(&caller(), create("waiting")).await.unwrap();
    let world = world.restart().await;
    for name in ["running", "waiting"] {
        assert_eq!(failed(&world, name).await, "INTERNAL_PLATFORM_ERROR: The host stopped during the build.");
    }
}

#[tokio::test]
async fn a_crash_fails_builds_and_repeats_deletions() {
    let world = World::new().await;
    let image = world.build("deleting").await;
    world.control.inner.store.begin_image_delete(&image.id, 1).await.unwrap();
    world.builder.gate.send_replace(false);
    world.control.create_image(&caller(), create("building")).await.unwrap();
    world
        .when("the build to run", || async {
            let version = world.control.get_image_version(&caller(), &image_arn("building"), "1.0").await.unwrap();
            (version.state == VersionState::InProgress).then_some(())
        })
        .await;
    let world = world.crash().await;
    assert_eq!(world.settled("building").await.state, ImageState::CreateFailed);
    assert_eq!(world.build_reason("building").await, "INTERNAL_PLATFORM_ERROR: The host stopped during the build.");
    assert!(matches!(world.control.get_image(&caller(), &image_arn("deleting")).await, Err(ControlError::ImageNotFound(_))));
    assert!(world.names("images").is_empty());
}

#[tokio::test]
async fn what_is_refused_at_once() {
    let world = World::new().await;
    let with = |change: fn(&mut crate::types::ImageSpec)| {
        let mut request = create("demo");
        change(&mut request.spec);
        let world = &world;
        async move { world.control.create_image(&caller(), request).await.unwrap_err().to_string() }
    };
    let base = "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1";
    let unknown = with(|spec| spec.base_image_version = Some("999".to_owned())).await;
    assert_eq!(unknown, format!("No managed MicroVM Image with arn {base} and version 999 is available"));
    assert!(with(|spec| spec.base_image_arn = "arn:aws:lambda:us-east-1:aws:microvm-image:x".to_owned()).await.contains("version 1 is"));
    assert_eq!(with(|spec| spec.base_image_arn = "al2023-1".to_owned()).await, "Invalid ARN format: al2023-1");
    assert!(with(|spec| spec.memory_mib = 3000).await.starts_with("The requested memory size of 3000 MiB is not supported"));
    assert!(matches!(world.control.get_image(&caller(), &image_arn("demo")).await, Err(ControlError::ImageNotFound(_))));
    assert!(matches!(world.control.get_image(&caller(), "demo").await, Err(ControlError::Invalid(_))));
    let foreign = image_arn("demo").replace("000000000000", "111111111111");
    assert!(matches!(world.control.get_image(&caller(), &foreign).await, Err(ControlError::Denied { .. })));
}

#[tokio::test]
async fn the_filter_applies_after_the_limit() {
    let world = World::new().await;
    for name in ["apple", "banana", "apricot"] {
        world.build(name).await;
    }
    let list = |token| {
        let world = &world;
        async move { world.control.list_images(&caller(), Some("ap"), PageRequest { limit: Some(1), token }).await.unwrap() }
    };
    let mut names = Vec::new();
    let mut page = list(None).await;
    while let Some(next) = page.next {
        names.push(page.items.pop().map(|image| image.name));
        page = list(Some(next)).await;
    }
    names.push(page.items.pop().map(|image| image.name));
    assert_eq!(names, [Some("apricot".to_owned()), None, Some("apple".to_owned())]);
    assert!(world.control.run_microvm(&caller(), run("apple", None)).await.is_ok());
}
