//! Build hooks and every way in which they end, as GetMicrovmImageBuild shows it.

use std::sync::atomic::Ordering;

use hearth_guest_protocol::HookReply;
use hearth_machine::MachineEvent;
use serde_json::json;

use crate::{
    plane::ControlPlane,
    testing::{HookAnswer, World, caller, create, image_arn},
    types::{BuildSizes, ImageState, PageRequest},
};

/// Builds an image with these build hooks; returns its state and reason, and its build's sizes.
async fn build(world: &World, name: &str, hooks: &[&str]) -> (ImageState, Option<String>, BuildSizes) {
    let mut enabled = serde_json::Map::new();
    for hook in hooks {
        enabled.insert((*hook).to_owned(), json!("ENABLED"));
        enabled.insert(format!("{hook}TimeoutInSeconds"), json!(1));
    }
    let mut request = create(name);
    request.spec.echoed.insert("hooks".to_owned(), json!({"port": 9000, "microvmImageHooks": enabled}));
    world.engine.told();
    world.control.create_image(&caller(), request).await.unwrap();
    let state = world.settled(name).await.state;
    let builds = world.control.list_builds(&caller(), &image_arn(name), "1.0", PageRequest::default()).await.unwrap();
    let build = world.control.get_build(&caller(), &image_arn(name), "1.0", &builds.items[0].id).await.unwrap();
    (state, build.state_reason, build.sizes)
}

/// Every way in which a build hook ends other than well, and the state reason that follows.
fn failures(title: &str) -> Vec<(HookAnswer, String)> {
    let check = |what: &str| format!("{title} hook check failed: the application {what}");
    vec![
        (HookAnswer::status(404), check("returned a client error (HTTP 4xx) response.")),
        (HookAnswer::status(500), check("returned a server error (HTTP 5xx) response.")),
        (HookAnswer::status(204), check("returned an unexpected (HTTP 204) response.")),
        (HookAnswer::Hang, format!("{title} hook invocation timed out after PT1S")),
        (HookAnswer::garbage(), check("did not return a valid HTTP response.")),
        (HookAnswer::Exit(7), "Container Stopped with Exit Code: 7".to_owned()),
        (HookAnswer::Die, "INTERNAL_PLATFORM_ERROR: The build failed because of this host; its log says why.".to_owned()),
    ]
}

#[tokio::test]
async fn ready_is_asked_until_it_is_so_and_then_a_clone_is_validated() {
    let world = World::new().await;
    // Nothing listens where the image exposes a port: the hook alone decides.
    world.builder.config.lock().unwrap().exposed_ports = vec![5000];
    *world.engine.script.lock().unwrap() = Vec::new();
    for answer in [HookAnswer::Reply(HookReply::Refused), HookAnswer::status(503), HookAnswer::status(200)] {
        world.engine.answer("ready", answer);
    }
    world.engine.answer("validate", HookAnswer::status(503));
    let (state, reason, sizes) = build(&world, "demo", &["ready", "validate"]).await;
    assert_eq!((state, reason), (ImageState::Created, None));
    assert_eq!((sizes.code_install, sizes.disk_snapshot, sizes.memory_snapshot), (Some(100), Some(300), Some(1001)));
    let told = ["ready", "ready", "ready", "capture", "launch", "validate", "validate", "record", "kill"];
    assert_eq!(world.engine.told(), told);
    let calls = world.engine.calls.lock().unwrap().clone();
    let host = |call: &hearth_guest_protocol::HookCall| call.headers[0].1.clone();
    assert!(host(&calls[0]).ends_with(".lambda-microvm.us-east-1.localhost"), "{}", host(&calls[0]));
    assert!(calls.iter().all(|call| host(call) == host(&calls[0]) && call.body.is_empty() && call.timeout_ms <= 1000));
    assert_eq!(world.names("tmp").len(), 0, "the clone left nothing");
}

#[tokio::test]
async fn hooks_that_are_not_enabled_are_never_called() {
    let world = World::new().await;
    let (state, ..) = build(&world, "demo", &[]).await;
    assert_eq!(state, ImageState::Created);
    assert_eq!(world.engine.told(), ["capture"]);
}

#[tokio::test]
async fn a_ready_hook_that_fails_fails_the_build_at_once() {
    let world = World::new().await;
    for (number, (answer, expected)) in failures("Ready").into_iter().enumerate() {
        world.engine.answer("ready", answer);
        let (state, reason, sizes) = build(&world, &format!("ready-{number}"), &["ready", "validate"]).await;
        assert_eq!((state, reason), (ImageState::CreateFailed, Some(expected)));
        assert_eq!(sizes, BuildSizes { code_install: Some(100), ..BuildSizes::default() });
        assert_eq!(world.engine.told(), ["ready", "kill"], "asked once, and nothing was captured");
    }
}

#[tokio::test]
async fn a_validate_hook_that_fails_takes_the_snapshot_with_it() {
    let world = World::new().await;
    for (number, (answer, expected)) in failures("Validate").into_iter().enumerate() {
        world.engine.answer("validate", answer);
        let (state, reason, sizes) = build(&world, &format!("validate-{number}"), &["validate"]).await;
        assert_eq!((state, reason), (ImageState::CreateFailed, Some(expected)));
        assert_eq!(sizes, BuildSizes { code_install: Some(100), ..BuildSizes::default() });
        assert_eq!(world.engine.told(), ["capture", "launch", "validate", "kill"]);
        assert_eq!((world.names("images").len(), world.names("tmp").len()), (0, 0));
        assert_eq!(world.engine.forgotten.load(Ordering::SeqCst), number + 1, "the engine holds nothing of it");
    }
}

#[tokio::test]
async fn an_app_that_never_says_yes_runs_out_of_time() {
    let world = World::new().await;
    for (hook, title) in [("ready", "Ready"), ("validate", "Validate")] {
        for (name, answer) in [("busy", HookAnswer::status(503)), ("deaf", HookAnswer::Reply(HookReply::Refused))] {
            for _ in 0..50 {
                world.engine.answer(hook, answer.clone());
            }
            let (state, reason, _) = build(&world, &format!("{hook}-{name}"), &[hook]).await;
            assert_eq!((state, reason), (ImageState::CreateFailed, Some(format!("{title} hook invocation timed out after PT1S"))));
            let asked = world.engine.told().iter().filter(|told| *told == hook).count();
            assert!((3..10).contains(&asked), "with pauses that grow: {asked}");
            world.engine.answers.lock().unwrap().clear();
        }
    }
}

#[tokio::test]
async fn an_app_that_exits_between_two_calls_is_not_asked_again() {
    let world = World::new().await;
    *world.engine.script.lock().unwrap() = vec![MachineEvent::Listening(8080)];
    world.engine.answer("ready", HookAnswer::ExitLater(9));
    let (state, reason, _) = build(&world, "demo", &["ready"]).await;
    assert_eq!((state, reason.as_deref()), (ImageState::CreateFailed, Some("Container Stopped with Exit Code: 9")));
}
