//! Runtime hooks and every way in which they end, as GetMicrovm shows it; and what an app is told when its MicroVM ends.

use std::{sync::atomic::Ordering, time::Duration};

use hearth_guest_protocol::HookReply;
use serde_json::json;

use crate::{
    plane::{ControlPlane, DataPlane},
    testing::{Frozen, HookAnswer, World, caller, create, exited, idle, image_arn, run, within},
    types::{CreateImage, ImageState, Microvm, MicrovmState, RunMicrovm},
};

use MicrovmState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};

const TAIL: &str = "Please check your hook endpoint and application logs for more details.";

/// A world with an image that has these runtime hooks, with a timeout of a second.
async fn world_with(hooks: &[&str]) -> World {
    let world = World::new().await;
    let enabled: serde_json::Map<_, _> = hooks.iter().map(|hook| ((*hook).to_owned(), json!("ENABLED"))).collect();
    let mut request: CreateImage = create("demo");
    request.spec.echoed.insert("hooks".to_owned(), json!({"port": 9000, "microvmHooks": enabled}));
    world.control.create_image(&caller(), request).await.unwrap();
    assert_eq!(world.settled("demo").await.state, ImageState::Created);
    world.engine.told();
    world
}

async fn start(world: &World) -> Microvm {
    world.control.run_microvm(&caller(), run("demo", None)).await.unwrap()
}

async fn reason(world: &World, id: &str) -> String {
    world.reaches(id, Terminated).await.state_reason.unwrap()
}

/// Every way in which a hook ends other than well, and the state reason that follows.
fn failures(title: &str) -> Vec<(HookAnswer, String)> {
    let hook = |what: &str| format!("{title} lifecycle hook {what}. {TAIL}");
    vec![
        (HookAnswer::status(404), hook("returned HTTP status 404")),
        (HookAnswer::status(500), hook("returned HTTP status 500")),
        (HookAnswer::status(503), hook("returned HTTP status 503")),
        (HookAnswer::status(204), hook("returned HTTP status 204")),
        (HookAnswer::Hang, hook("timed out after PT1S")),
        (HookAnswer::Reply(HookReply::Refused), hook("could not be called: nothing listens on port 9000")),
        (HookAnswer::garbage(), hook("returned no valid HTTP response")),
        (HookAnswer::Exit(7), "Container Stopped with Exit Code: 7".to_owned()),
        (
            HookAnswer::Die,
            "The MicroVM's machine ended unexpectedly: killed by signal 9. Run another one; if it happens again, see the server's log."
                .to_owned(),
        ),
    ]
}

#[tokio::test]
async fn hooks_are_called_in_the_order_of_a_microvm_s_life() {
    let world = world_with(&["run", "suspend", "resume", "terminate"]).await;
    let request = RunMicrovm { run_hook_payload: Some("{\"tenant\":\"a\"}".to_owned()), ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), request).await.unwrap();
    world.reaches(&vm.id, Running).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Running).await;
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert_eq!(world.engine.told(), ["launch", "run", "suspend", "suspend", "launch", "resume", "terminate", "stop", "kill"]);

    let calls = world.engine.calls.lock().unwrap().clone();
    let body = format!(r#"{{"microvmId":"{}","runHookPayload":"{{\"tenant\":\"a\"}}"}}"#, vm.id);
    assert_eq!(String::from_utf8(calls[0].body.clone()).unwrap(), body);
    assert!(calls.iter().all(|call| call.port == 9000 && call.timeout_ms == 1000));
    assert!(calls[1..].iter().all(|call| call.body.is_empty()));
}

#[tokio::test]
async fn hooks_that_are_not_enabled_are_never_called() {
    let world = world_with(&[]).await;
    let vm = world.run(None).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Running).await;
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Terminated).await;
    assert!(world.engine.calls.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_run_hook_that_fails_ends_the_microvm_without_another_try() {
    let world = world_with(&["run", "terminate"]).await;
    for (answer, expected) in failures("Run") {
        world.engine.answer("run", answer);
        let vm = start(&world).await;
        assert_eq!(reason(&world, &vm.id).await, expected);
        assert_eq!(world.engine.told(), ["launch", "run", "kill"]);
    }
    assert!(world.names("microvms").is_empty());
}

#[tokio::test]
async fn a_suspend_hook_that_fails_ends_the_microvm() {
    let world = world_with(&["suspend", "terminate"]).await;
    for (answer, expected) in failures("Suspend") {
        world.engine.answer("suspend", answer);
        let vm = world.run(None).await;
        world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
        assert_eq!(reason(&world, &vm.id).await, expected);
        assert_eq!(world.engine.told(), ["launch", "suspend", "kill"]);
    }
}

#[tokio::test]
async fn a_resume_hook_that_fails_ends_the_microvm() {
    let world = world_with(&["resume", "terminate"]).await;
    for (answer, expected) in failures("Resume") {
        world.engine.answer("resume", answer);
        let vm = world.run(idle(60, 600, true)).await;
        world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
        world.reaches(&vm.id, Suspended).await;
        assert!(world.connect(&vm).await.is_err(), "the request that woke it");
        assert_eq!(reason(&world, &vm.id).await, expected);
        assert_eq!(world.engine.told(), ["launch", "suspend", "launch", "resume", "kill"]);
    }
}

#[tokio::test]
async fn whatever_a_terminate_hook_does_the_microvm_ends_as_it_was_asked_to() {
    let world = world_with(&["terminate"]).await;
    for (answer, _) in failures("Terminate") {
        let ends_by_itself = matches!(answer, HookAnswer::Exit(_) | HookAnswer::Die);
        world.engine.answer("terminate", answer);
        let vm = world.run(None).await;
        world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
        assert_eq!(reason(&world, &vm.id).await, "Success.");
        let told = world.engine.told();
        assert_eq!(told.contains(&"stop".to_owned()), !ends_by_itself, "{told:?}");
    }
}

#[tokio::test]
async fn only_a_microvm_that_runs_and_is_ended_is_told_so() {
    let world = world_with(&["run", "terminate"]).await;
    let exits = world.run(None).await;
    world.engine.say(&exits.id, exited(3)).await;
    assert_eq!(reason(&world, &exits.id).await, "Container Stopped with Exit Code: 3");
    let sleeps = world.run(None).await;
    world.control.suspend_microvm(&caller(), &sleeps.id).await.unwrap();
    world.reaches(&sleeps.id, Suspended).await;
    world.control.terminate_microvm(&caller(), &sleeps.id).await.unwrap();
    world.reaches(&sleeps.id, Terminated).await;
    assert!(!world.engine.told().contains(&"terminate".to_owned()));

    let clock = Frozen::now();
    let old = world.run(None).await;
    clock.pass(28_801).await;
    assert_eq!(reason(&world, &old.id).await, "MicroVM exceeded maximum lifetime.");
    assert_eq!(world.engine.told(), ["launch", "run", "terminate", "stop", "kill"]);
}

#[tokio::test]
async fn terminate_does_not_wait_for_a_hook_that_hangs() {
    let world = world_with(&["run", "suspend"]).await;
    let clock = Frozen::now();
    world.engine.answer("run", HookAnswer::Hang);
    let launching = start(&world).await;
    within("the run hook to be called", async {
        while world.engine.calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await
        }
    })
    .await;
    assert_eq!(world.get(&launching.id).await.state, Pending, "not before the hook has answered");
    world.control.terminate_microvm(&caller(), &launching.id).await.unwrap();
    assert_eq!(reason(&world, &launching.id).await, "Success.");

    world.engine.answer("suspend", HookAnswer::Hang);
    let vm = world.run(None).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(world.get(&vm.id).await.state, Suspending);
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert_eq!(world.engine.suspends.load(Ordering::SeqCst), 0);
    drop(clock);
}

#[tokio::test]
async fn a_request_during_a_suspend_hook_cancels_the_suspend_and_the_app_hears_of_it() {
    let world = world_with(&["suspend", "resume"]).await;
    let vm = world.run(idle(60, 600, true)).await;
    world.engine.told();
    let clock = Frozen::now();
    world.engine.answer("suspend", HookAnswer::Slow(Duration::from_millis(500)));
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    let admission = world.admit(&vm, 8080).await;
    let (stream, ()) = tokio::join!(world.control.connect(&admission), async {
        within("the hook to be called", async {
            while world.engine.told.lock().unwrap().is_empty() {
                tokio::task::yield_now().await
            }
        })
        .await;
        clock.pass(1).await;
    });
    stream.unwrap();
    assert_eq!(world.get(&vm.id).await.state, Running);
    assert_eq!(world.engine.told(), ["suspend", "resume"], "one hook each, and no machine was suspended");
}

#[tokio::test]
async fn a_host_that_stops_suspends_whatever_the_app_says() {
    let world = world_with(&["suspend"]).await;
    world.engine.answer("suspend", HookAnswer::status(500));
    let vm = world.run(None).await;
    let world = world.restart().await;
    assert_eq!(world.get(&vm.id).await.state, Suspended);
    assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id);
}

#[tokio::test]
async fn hooks_outlive_the_version_they_came_with_and_a_restart() {
    let world = world_with(&["resume"]).await;
    let vm = world.run(None).await;
    let world = world.restart().await;
    assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id);
    assert_eq!(world.engine.told(), ["launch", "resume"]);
}

#[tokio::test]
async fn an_app_that_does_not_follow_its_stop_signal_is_killed_after_a_while() {
    let world = world_with(&[]).await;
    world.engine.obeys_stop.store(false, Ordering::SeqCst);
    let vm = world.run(None).await;
    world.engine.told();
    let clock = Frozen::now();
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    within("the stop signal", async {
        while world.engine.told.lock().unwrap().is_empty() {
            tokio::task::yield_now().await
        }
    })
    .await;
    clock.pass(1).await;
    assert_eq!(world.get(&vm.id).await.state, Terminating);
    clock.pass(2).await;
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert_eq!(world.engine.told(), ["stop", "kill"]);
}

#[tokio::test]
async fn a_payload_needs_a_run_hook() {
    let payload = RunMicrovm { run_hook_payload: Some("x".to_owned()), ..run("demo", None) };
    let world = world_with(&["suspend"]).await;
    let error = world.control.run_microvm(&caller(), payload).await.unwrap_err();
    assert_eq!(error.to_string(), "The run hook must be enabled in the MicroVM image to pass the run hook payload.");
    assert!(world.control.get_image(&caller(), &image_arn("demo")).await.is_ok());
}
