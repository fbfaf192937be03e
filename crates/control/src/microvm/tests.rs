//! Whole lives of MicroVMs on a fake engine, with a real store.

use std::{
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use hearth_machine::{MachineEvent, Target};

use crate::{
    CapacitySettings, ControlError,
    arn::managed_connector,
    logs::{LogGroup, stream_name},
    plane::{ConnectError, ControlPlane, DataPlane, Refusal},
    testing::{Frozen, World, caller, exited, idle, image_arn, log_line, run, within},
    types::{Microvm, MicrovmFilter, MicrovmState, PageRequest, PortSpec},
};

use MicrovmState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};

async fn reason(world: &World, id: &str) -> String {
    world.reaches(id, Terminated).await.state_reason.unwrap()
}

#[tokio::test]
async fn run_answers_pending_and_the_microvm_runs() {
    let world = World::with_image().await;
    world.engine.close_gate();
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    assert_eq!(vm.state, Pending);
    assert_eq!(vm.ingress_network_connectors, [managed_connector("us-east-1", "HTTP_INGRESS")]);
    assert_eq!(vm.egress_network_connectors, [managed_connector("us-east-1", "INTERNET_EGRESS")]);
    assert!(vm.endpoint.ends_with(".lambda-microvm.us-east-1.localhost") && !vm.endpoint.contains(&vm.id[8..]), "{}", vm.endpoint);
    assert_eq!(world.get(&vm.id).await, vm);
    world.engine.open_gate();
    let running = world.reaches(&vm.id, Running).await;
    assert_eq!(Microvm { state: Pending, ..running.clone() }, vm);
    assert_eq!(world.connect(&running).await.unwrap(), vm.id);
    let listed = world.control.list_microvms(&caller(), MicrovmFilter::default(), PageRequest::default()).await.unwrap();
    assert_eq!(listed.items, [running]);
}

#[tokio::test]
async fn a_request_waits_for_a_launch() {
    let world = World::with_image().await;
    world.engine.close_gate();
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    let (answer, ()) = tokio::join!(world.connect(&vm), async { world.engine.open_gate() });
    assert_eq!(answer.unwrap(), vm.id);
}

#[tokio::test]
async fn idle_suspends_and_a_request_wakes() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    let clock = Frozen::now();
    clock.pass(50).await;
    world.admit(&vm, 8080).await.activity.touch();
    clock.pass(50).await;
    assert_eq!(world.get(&vm.id).await.state, Running, "bytes moved 50 s ago");
    clock.pass(11).await;
    world.reaches(&vm.id, Suspended).await;
    assert!(!world.engine.runs(&vm.id));
    assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id);
    assert_eq!(world.get(&vm.id).await.state, Running);
    clock.pass(59).await;
    assert_eq!(world.get(&vm.id).await.state, Running, "the wake was activity");
    clock.pass(2).await;
    world.reaches(&vm.id, Suspended).await;
    assert_eq!(world.engine.suspends.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn the_idle_timer_is_exact() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    let activity = world.admit(&vm, 8080).await.activity;
    let clock = Frozen::now();
    clock.pass(7).await;
    activity.touch();
    for (milliseconds, state) in [(59_900, Running), (200, Suspended)] {
        tokio::time::advance(Duration::from_millis(milliseconds)).await;
        clock.pass(0).await;
        assert_eq!(world.reaches(&vm.id, state).await.state, state);
    }
}

#[tokio::test]
async fn what_a_microvm_does_by_itself_keeps_it_awake_if_the_operator_says_so() {
    let world = World::with(|settings| settings.activity.outbound = true).await;
    world.build("demo").await;
    let vm = world.run(idle(60, 600, true)).await;
    let clock = Frozen::now();
    clock.pass(30).await;
    world.engine.usage.lock().unwrap().sent_bytes += 10_000;
    clock.pass(31).await;
    assert_eq!(world.get(&vm.id).await.state, Running);
    clock.pass(61).await;
    world.reaches(&vm.id, Suspended).await;
}

#[tokio::test]
async fn open_requests_keep_it_awake_if_the_operator_says_so() {
    let world = World::with(|settings| settings.activity.open_requests = true).await;
    world.build("demo").await;
    let vm = world.run(idle(60, 600, true)).await;
    let silent = world.control.open(&world.admit(&vm, 8080).await, &Target::Port(8080)).await.unwrap();
    let clock = Frozen::now();
    for _ in 0..2 {
        clock.pass(61).await;
        assert_eq!(world.get(&vm.id).await.state, Running);
    }
    clock.pass(30).await;
    drop(silent);
    clock.pass(59).await;
    assert_eq!(world.get(&vm.id).await.state, Running, "its end is activity");
    clock.pass(2).await;
    world.reaches(&vm.id, Suspended).await;
}

#[tokio::test]
async fn neither_does_by_default() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    let _silent = world.control.open(&world.admit(&vm, 8080).await, &Target::Port(8080)).await.unwrap();
    let clock = Frozen::now();
    clock.pass(30).await;
    world.engine.usage.lock().unwrap().sent_bytes += 10_000;
    clock.pass(31).await;
    world.reaches(&vm.id, Suspended).await;
}

#[tokio::test]
async fn without_a_policy_nothing_is_idle() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    let clock = Frozen::now();
    clock.pass(28_000).await;
    assert_eq!(world.get(&vm.id).await.state, Running);
}

#[tokio::test]
async fn suspended_for_too_long_is_terminated() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 100, true)).await;
    let clock = Frozen::now();
    clock.pass(61).await;
    world.reaches(&vm.id, Suspended).await;
    clock.pass(98).await;
    assert_eq!(world.get(&vm.id).await.state, Suspended);
    clock.pass(3).await;
    assert_eq!(reason(&world, &vm.id).await, "MicroVM exceeded maximum suspended duration.");
}

#[tokio::test]
async fn a_suspended_duration_of_zero_terminates_when_idle() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 0, true)).await;
    let clock = Frozen::now();
    clock.pass(61).await;
    assert_eq!(reason(&world, &vm.id).await, "MicroVM exceeded maximum idle duration.");
    assert_eq!(world.engine.suspends.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn the_lifetime_ends_every_state() {
    let world = World::with_image().await;
    let running = world.run(None).await;
    let suspended = world.run(None).await;
    world.control.suspend_microvm(&caller(), &suspended.id).await.unwrap();
    world.reaches(&suspended.id, Suspended).await;
    world.engine.close_gate();
    let pending = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    let clock = Frozen::now();
    clock.pass(28_801).await;
    for id in [&running.id, &suspended.id] {
        assert_eq!(reason(&world, id).await, "MicroVM exceeded maximum lifetime.");
    }
    world.reaches(&pending.id, Terminating).await;
    world.engine.open_gate();
    assert_eq!(reason(&world, &pending.id).await, "MicroVM exceeded maximum lifetime.");
    assert!(world.names("microvms").is_empty());
}

#[tokio::test]
async fn suspend_and_resume_by_hand() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    for _ in 0..2 {
        world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    }
    world.reaches(&vm.id, Suspended).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(world.get(&vm.id).await.state, Suspended);
    for _ in 0..2 {
        world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    }
    world.reaches(&vm.id, Running).await;
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!((world.engine.launches.load(Ordering::SeqCst), world.engine.suspends.load(Ordering::SeqCst)), (2, 1));
}

#[tokio::test]
async fn terminate_is_idempotent_and_leaves_nothing() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    assert_eq!(world.names("microvms"), std::slice::from_ref(&vm.id));
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert!(world.get(&vm.id).await.terminated_at.is_some());
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    assert!(world.names("microvms").is_empty());
    assert_eq!(world.engine.kills.load(Ordering::SeqCst), 1);
    let refused = [
        world.control.suspend_microvm(&caller(), &vm.id).await,
        world.control.resume_microvm(&caller(), &vm.id).await,
        world.control.create_auth_token(&caller(), &vm.id, Duration::from_secs(60), vec![PortSpec::All]).await.map(drop),
    ];
    for result in refused {
        assert!(matches!(result, Err(ControlError::Terminated(_))), "{result:?}");
    }
}

#[tokio::test]
async fn terminate_during_a_launch_waits_for_the_engine_and_kills() {
    let world = World::with_image().await;
    world.engine.close_gate();
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(world.get(&vm.id).await.state, Terminating);
    world.engine.open_gate();
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert!(!world.engine.runs(&vm.id));
    assert!(world.names("microvms").is_empty());
}

#[tokio::test]
async fn terminate_during_a_suspend() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.engine.close_gate();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(world.get(&vm.id).await.state, Suspending);
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.engine.open_gate();
    assert_eq!(reason(&world, &vm.id).await, "Success.");
    assert!(world.names("microvms").is_empty());
}

#[tokio::test]
async fn suspend_during_a_launch_follows_it() {
    let world = World::with_image().await;
    world.engine.close_gate();
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.engine.open_gate();
    world.reaches(&vm.id, Suspended).await;
}

#[tokio::test]
async fn a_request_during_a_suspend_cancels_it() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.engine.close_gate();
    for _ in 0..2 {
        world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
        assert_eq!(world.get(&vm.id).await.state, Suspending);
        assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id, "the gate is closed: nothing was launched");
        assert_eq!(world.get(&vm.id).await.state, Running);
    }
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.engine.open_gate();
    world.reaches(&vm.id, Suspended).await;
    assert_eq!(world.engine.launches.load(Ordering::SeqCst), 1);
    assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id, "and it resumes like any other");
    world.engine.say(&vm.id, exited(0)).await;
    assert_eq!(reason(&world, &vm.id).await, "Container Stopped with Exit Code: 0");
}

#[tokio::test]
async fn a_host_that_stops_suspends_what_a_request_has_just_saved() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.engine.close_gate();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.engine.open_gate();
    let world = world.restart().await;
    assert_eq!(world.get(&vm.id).await.state, Suspended);
    assert_eq!(within("the answer", world.connect(&vm)).await.unwrap(), vm.id);
}

#[tokio::test]
async fn a_request_that_comes_too_late_to_cancel_a_suspend_is_held_and_answered() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.engine.cancels.store(false, Ordering::SeqCst);
    world.engine.close_gate();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    let (answer, ()) = tokio::join!(within("the answer", world.connect(&vm)), async {
        tokio::task::yield_now().await;
        world.engine.open_gate();
    });
    assert_eq!(answer.unwrap(), vm.id);
    assert_eq!(world.engine.launches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_thousand_waiters_cause_one_resume() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.engine.close_gate();
    let admission = world.admit(&vm, 8080).await;
    let waiters = futures::future::join_all((0..1000).map(|_| world.control.connect(&admission)));
    let (answers, ()) = tokio::join!(within("the answers", waiters), async {
        world.reaches(&vm.id, Pending).await;
        world.engine.open_gate();
    });
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(world.engine.launches.load(Ordering::SeqCst), 2);
    assert_eq!(world.reaches(&vm.id, Running).await.state, Running);
}

#[tokio::test]
async fn waiters_that_go_away_change_nothing() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.engine.close_gate();
    let (control, admission) = (world.control.clone(), world.admit(&vm, 8080).await);
    let waiter = tokio::spawn(async move { control.connect(&admission).await.map(drop) });
    world.reaches(&vm.id, Pending).await;
    waiter.abort();
    world.engine.open_gate();
    world.reaches(&vm.id, Running).await;
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_record_without_a_driver() {
    let world = World::with_image().await;
    for polls in 0..8 {
        let (token, request) = (format!("token-{polls}"), run("demo", None));
        let request = crate::types::RunMicrovm { client_token: Some(token), ..request };
        let caller = caller();
        let mut call = Box::pin(world.control.run_microvm(&caller, request.clone()));
        for _ in 0..polls {
            let _ = futures::poll!(&mut call);
            tokio::task::yield_now().await;
        }
        drop(call);
        let vm = world.control.run_microvm(&caller, request).await.unwrap();
        world.reaches(&vm.id, Running).await;
    }
    assert_eq!(world.engine.launches.load(Ordering::SeqCst), 8, "each token made one MicroVM");
}

#[tokio::test]
async fn a_resume_that_fails_loses_nothing_and_tells_who_waited() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.reaches(&vm.id, MicrovmState::Running).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, MicrovmState::Suspended).await;
    world.engine.fail_launch.store(true, Ordering::SeqCst);
    assert!(matches!(world.connect(&vm).await, Err(ConnectError::NotWoken(reason)) if reason.contains("host")));
    let asleep = world.get(&vm.id).await;
    assert_eq!(asleep.state, MicrovmState::Suspended);
    assert!(asleep.state_reason.is_some());
    assert!(world.path(&format!("microvms/{}/suspended", vm.id)).exists());

    world.engine.fail_launch.store(false, Ordering::SeqCst);
    world.connect(&vm).await.unwrap();
    let awake = world.get(&vm.id).await;
    assert_eq!((awake.state, awake.state_reason), (MicrovmState::Running, None));
}

#[tokio::test]
async fn without_auto_resume_a_request_is_refused_and_a_call_resumes() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, false)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    assert!(matches!(world.connect(&vm).await, Err(ConnectError::Unreachable(_))));
    assert_eq!(world.get(&vm.id).await.state, Suspended);
    world.control.resume_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Running).await;
    assert_eq!(world.connect(&vm).await.unwrap(), vm.id);
}

#[tokio::test]
async fn a_wake_that_takes_too_long_is_given_up() {
    let world = World::with_image().await;
    let vm = world.run(idle(60, 600, true)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.engine.close_gate();
    let clock = Frozen::now();
    let (answer, ()) = tokio::join!(within("the answer", world.connect(&vm)), async {
        world.reaches(&vm.id, Pending).await;
        clock.pass(61).await;
    });
    assert!(matches!(answer, Err(ConnectError::TooSlow(limit)) if limit == Duration::from_secs(60)));
}

#[tokio::test]
async fn what_nobody_can_reach() {
    let world = World::with_image().await;
    let closed = run("demo", None);
    let closed = crate::types::RunMicrovm { ingress_network_connectors: vec![managed_connector("us-east-1", "NO_INGRESS")], ..closed };
    let vm = world.control.run_microvm(&caller(), closed).await.unwrap();
    let vm = world.reaches(&vm.id, Running).await;
    assert!(matches!(world.connect(&vm).await, Err(ConnectError::Unreachable(_))), "no ingress");
    let vm = world.run(None).await;
    let refused = world.admit(&vm, 1).await;
    assert!(matches!(world.control.connect(&refused).await, Err(ConnectError::Unreachable(_))), "nothing listens");
    let admission = world.admit(&vm, 8080).await;
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Terminated).await;
    assert!(matches!(world.control.connect(&admission).await, Err(ConnectError::Unreachable(_))), "terminated");
}

#[tokio::test]
async fn an_unknown_host_and_a_wrong_token_are_answered_alike() {
    let world = World::with_image().await;
    let (vm, other) = (world.run(None).await, world.run(None).await);
    let token = world.control.create_auth_token(&caller(), &vm.id, Duration::from_secs(60), vec![PortSpec::Port(80)]).await.unwrap();
    let admit = |host: &str, port| world.control.admit(host, &token, port).map(|admission| admission.microvm_id);
    assert_eq!(admit(&vm.endpoint, 80), Ok(vm.id.clone()));
    assert_eq!(admit(&format!("{}:8443", vm.endpoint.to_uppercase()), 80), Ok(vm.id.clone()));
    assert_eq!(admit(&other.endpoint, 80), Err(Refusal::AuthenticationFailed));
    assert_eq!(admit("nobody.lambda-microvm.us-east-1.localhost", 80), Err(Refusal::AuthenticationFailed));
    assert_eq!(admit(&vm.endpoint, 81), Err(Refusal::PortDenied));
    assert_eq!(world.control.admit(&vm.endpoint, "", 80).unwrap_err(), Refusal::MissingAuthentication);
}

#[tokio::test]
async fn an_app_that_exits_ends_its_microvm_and_its_last_words_are_kept() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.engine.say(&vm.id, log_line("goodbye")).await;
    world.engine.say(&vm.id, exited(3)).await;
    assert_eq!(reason(&world, &vm.id).await, "Container Stopped with Exit Code: 3");
    let group = LogGroup::of_image("000000000000", "us-east-1", "demo");
    let stream = stream_name(vm.started_at, "1.0", &vm.id);
    let lines: Vec<_> = futures::StreamExt::collect(world.logs.follow(&group, &stream, 0)).await;
    let texts: Vec<&str> = lines.iter().map(|line: &crate::logs::LogLine| line.text.as_str()).collect();
    assert_eq!(texts, ["goodbye", "MicroVM terminates: Container Stopped with Exit Code: 3"]);
}

#[tokio::test]
async fn machines_that_fail_say_why() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.engine.say(&vm.id, MachineEvent::Died { reason: "killed by signal 9".to_owned() }).await;
    assert!(reason(&world, &vm.id).await.contains("killed by signal 9"));

    let vm = world.run(None).await;
    world.engine.fail_suspend.store(true, Ordering::SeqCst);
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    assert_eq!(reason(&world, &vm.id).await, "The MicroVM could not be suspended: the host's disk is full.");

    world.engine.fail_launch.store(true, Ordering::SeqCst);
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    assert!(reason(&world, &vm.id).await.contains("hearth doctor"));
    assert!(world.names("microvms").is_empty());
}

#[tokio::test]
async fn a_shutdown_suspends_and_a_request_to_the_next_server_wakes() {
    let world = World::with_image().await;
    let stateless = world.run(None).await;
    let manual = world.run(idle(60, 600, false)).await;
    world.control.suspend_microvm(&caller(), &manual.id).await.unwrap();
    world.reaches(&manual.id, Suspended).await;
    world.engine.close_gate();
    let launching = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    world.engine.open_gate();
    let world = world.restart().await;
    for vm in [&stateless, &launching] {
        assert_eq!(world.get(&vm.id).await.state, Suspended);
        assert_eq!(within("the answer", world.connect(vm)).await.unwrap(), vm.id, "the host's doing is undone by a request");
    }
    assert!(matches!(world.connect(&manual).await, Err(ConnectError::Unreachable(_))), "the user's doing is not");
    world.control.resume_microvm(&caller(), &manual.id).await.unwrap();
    world.reaches(&manual.id, Running).await;
}

#[tokio::test]
async fn after_a_crash_what_ran_is_over_and_what_slept_sleeps() {
    let world = World::with_image().await;
    let running = world.run(None).await;
    let sleeping = world.run(idle(60, 600, true)).await;
    let over = world.run(None).await;
    world.control.suspend_microvm(&caller(), &sleeping.id).await.unwrap();
    world.reaches(&sleeping.id, Suspended).await;
    world.control.terminate_microvm(&caller(), &over.id).await.unwrap();
    let over = world.reaches(&over.id, Terminated).await;
    std::fs::create_dir(world.path("microvms/microvm-orphan")).unwrap();
    std::fs::create_dir_all(world.path("images/orphan/1.0")).unwrap();
    std::fs::write(world.path("tmp/file"), b"x").unwrap();
    let world = world.crash().await;
    assert_eq!(reason(&world, &running.id).await, "The host stopped while the MicroVM was running.");
    assert_eq!(world.names("microvms"), std::slice::from_ref(&sleeping.id));
    assert_eq!((world.names("images").len(), world.names("tmp").len()), (1, 0));
    let again = world.get(&over.id).await;
    assert_eq!((again.state_reason, again.state), (over.state_reason, Terminated));
    world.control.terminate_microvm(&caller(), &over.id).await.unwrap();
    assert_eq!(within("the answer", world.connect(&sleeping)).await.unwrap(), sleeping.id);
}

#[tokio::test]
async fn the_lifetime_goes_on_while_no_server_runs() {
    let world = World::with_image().await;
    let brief = crate::types::RunMicrovm { maximum_duration_seconds: 1, ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), brief).await.unwrap();
    world.reaches(&vm.id, Running).await;
    let world = world.restart().await;
    assert_eq!(reason(&world, &vm.id).await, "MicroVM exceeded maximum lifetime.");
    let lived = world.get(&vm.id).await.terminated_at.unwrap().duration_since(vm.started_at).unwrap();
    assert!(lived >= Duration::from_millis(990), "{lived:?}");
}

#[tokio::test]
async fn a_token_makes_one_microvm() {
    let world = World::with_image().await;
    let request = crate::types::RunMicrovm { client_token: Some("t".to_owned()), ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), request.clone()).await.unwrap();
    world.reaches(&vm.id, Running).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    let again = world.control.run_microvm(&caller(), request.clone()).await.unwrap();
    assert_eq!((again.id.as_str(), again.state), (vm.id.as_str(), Suspended), "in its present state");
    let other = crate::types::RunMicrovm { maximum_duration_seconds: 7, ..request };
    assert!(matches!(world.control.run_microvm(&caller(), other).await, Err(ControlError::TokenReused)));
}

#[tokio::test]
async fn what_cannot_be_run() {
    let world = World::with_image().await;
    let try_run = |image: String, version: Option<&str>| {
        let request = crate::types::RunMicrovm { image, version: version.map(str::to_owned), ..run("demo", None) };
        let world = &world;
        async move { world.control.run_microvm(&caller(), request).await.unwrap_err() }
    };
    assert_eq!(try_run("demo".to_owned(), None).await.to_string(), "Malformed ARN - doesn't start with 'arn:'");
    for (name, version, tail) in [("none", None, ""), ("demo", Some("2.0"), " and version 2.0"), ("demo", Some("1"), " and version 1")] {
        let text = try_run(image_arn(name), version).await.to_string();
        assert_eq!(text, format!("No active version found for MicroVM image {}{tail}", image_arn(name)));
    }
    let foreign = image_arn("demo").replace("000000000000", "111111111111");
    assert!(matches!(try_run(foreign, None).await, ControlError::Denied { .. }));
    let payload = crate::types::RunMicrovm { run_hook_payload: Some("x".to_owned()), ..run("demo", None) };
    assert!(matches!(world.control.run_microvm(&caller(), payload).await, Err(ControlError::Invalid(_))));
    assert!(matches!(world.control.get_microvm(&caller(), "microvm-x").await, Err(ControlError::MicrovmNotFound(_))));
}

/// A world whose host has room for so much.
async fn cramped(memory_mib: u64) -> World {
    let world = World::with(|settings| {
        settings.capacity = CapacitySettings { memory_mib: Some(memory_mib), reserve_mib: 0, overcommit: 1.0 };
    })
    .await;
    world.build("demo").await;
    world
}

#[tokio::test]
async fn a_host_without_memory_refuses_to_run_and_to_wake() {
    let world = cramped(1000).await;
    let refused = async || match world.control.run_microvm(&caller(), run("demo", None)).await {
        Err(ControlError::InsufficientCapacity(text)) => text.contains("513 MiB are promised"),
        other => panic!("{other:?}"),
    };
    let first = world.run(idle(60, 600, true)).await;
    assert!(refused().await);
    world.control.suspend_microvm(&caller(), &first.id).await.unwrap();
    world.reaches(&first.id, Suspended).await;
    let second = world.run(None).await;
    assert!(refused().await, "what sleeps has made room for one");

    let launches = world.engine.launches.load(Ordering::SeqCst);
    assert!(matches!(within("the refusal", world.connect(&first)).await, Err(ConnectError::NotWoken(_))));
    assert!(matches!(world.control.resume_microvm(&caller(), &first.id).await, Err(ControlError::InsufficientCapacity(_))));
    assert_eq!(world.get(&first.id).await, Microvm { state: Suspended, ..first.clone() }, "nothing has happened to it");
    assert_eq!(world.engine.launches.load(Ordering::SeqCst), launches);

    world.control.terminate_microvm(&caller(), &second.id).await.unwrap();
    world.reaches(&second.id, Terminated).await;
    assert_eq!(within("the answer", world.connect(&first)).await.unwrap(), first.id);
    assert!(refused().await);
}

#[tokio::test]
async fn what_a_microvm_has_changed_needs_room_when_it_wakes() {
    let world = cramped(600).await;
    let vm = world.run(idle(60, 600, true)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.engine.suspended_bytes.store(700 << 20, Ordering::SeqCst);
    let refused = world.control.resume_microvm(&caller(), &vm.id).await;
    assert!(matches!(&refused, Err(ControlError::InsufficientCapacity(text)) if text.contains("needs 701 MiB")), "{refused:?}");
    world.engine.suspended_bytes.store(500 << 20, Ordering::SeqCst);
    world.control.resume_microvm(&caller(), &vm.id).await.expect("no more than its part");
}

#[tokio::test]
async fn the_memory_of_an_image_counts_once_for_all_of_its_microvms() {
    let world = cramped(1400).await;
    world.engine.memory_bytes.store(300 << 20, Ordering::SeqCst);
    for name in ["one", "two"] {
        world.build(name).await;
    }
    let try_run = async |name| world.control.run_microvm(&caller(), run(name, None)).await;
    let end = async |vm: Microvm| {
        world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
        world.reaches(&vm.id, Terminated).await;
    };
    let first = try_run("one").await.unwrap();
    let second = try_run("one").await.expect("two MicroVMs and their image");
    end(first).await;
    let refused = try_run("two").await;
    assert!(matches!(&refused, Err(ControlError::InsufficientCapacity(text)) if text.contains("needs 812 MiB")), "{refused:?}");
    end(second).await;
    try_run("two").await.expect("the image of those that are gone counts no more");
}

#[tokio::test]
async fn launches_that_fail_and_suspends_that_are_cancelled_promise_nothing_twice() {
    let world = cramped(600).await;
    world.engine.fail_launch.store(true, Ordering::SeqCst);
    let vm = world.control.run_microvm(&caller(), run("demo", None)).await.unwrap();
    world.reaches(&vm.id, Terminated).await;
    world.engine.fail_launch.store(false, Ordering::SeqCst);
    let vm = world.run(idle(60, 600, true)).await;
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Suspended).await;
    world.engine.fail_launch.store(true, Ordering::SeqCst);
    world.connect(&vm).await.unwrap_err();
    world.engine.fail_launch.store(false, Ordering::SeqCst);
    world.connect(&vm).await.unwrap();
    world.engine.close_gate();
    world.control.suspend_microvm(&caller(), &vm.id).await.unwrap();
    world.connect(&vm).await.unwrap();
    world.engine.open_gate();
    let refused = world.control.run_microvm(&caller(), run("demo", None)).await;
    assert!(matches!(refused, Err(ControlError::InsufficientCapacity(_))));
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Terminated).await;
    world.run(None).await;
}

#[tokio::test]
async fn a_disk_that_fails_is_told_and_ends_nothing() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.engine.say(&vm.id, MachineEvent::DiskFailed { full: true }).await;
    world.engine.say(&vm.id, exited(0)).await;
    assert_eq!(reason(&world, &vm.id).await, "Container Stopped with Exit Code: 0");
    let group = LogGroup::of_image("000000000000", "us-east-1", "demo");
    let stream = stream_name(vm.started_at, "1.0", &vm.id);
    let lines: Vec<crate::logs::LogLine> = futures::StreamExt::collect(world.logs.follow(&group, &stream, 0)).await;
    assert!(lines.iter().any(|line| line.text.contains("the host's disk is full")), "{lines:?}");
}

#[tokio::test]
async fn others_do_not_see_it() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    for other in [
        crate::types::Caller { account: "111111111111".to_owned(), ..caller() },
        crate::types::Caller { region: "eu-west-1".to_owned(), ..caller() },
    ] {
        assert!(matches!(world.control.get_microvm(&other, &vm.id).await, Err(ControlError::MicrovmNotFound(_))));
        assert!(matches!(world.control.terminate_microvm(&other, &vm.id).await, Err(ControlError::MicrovmNotFound(_))));
        let listed = world.control.list_microvms(&other, MicrovmFilter::default(), PageRequest::default()).await.unwrap();
        assert!(listed.items.is_empty());
    }
}

#[tokio::test]
async fn pages_follow_one_another_while_microvms_come_and_go() {
    let world = World::with_image().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(world.run(None).await.id);
    }
    let list = |token: Option<String>, image: Option<String>| {
        let filter = MicrovmFilter { image, version: None };
        let world = &world;
        async move { world.control.list_microvms(&caller(), filter, PageRequest { limit: Some(2), token }).await }
    };
    let first = list(None, None).await.unwrap();
    world.run(None).await;
    let second = list(first.next.clone(), None).await.unwrap();
    let third = list(second.next, None).await.unwrap();
    assert_eq!(third.next, None);
    let seen: Vec<String> = [first.items, second.items, third.items].concat().into_iter().map(|vm| vm.id).collect();
    ids.reverse();
    assert_eq!(seen, ids);
    let filtered = list(first.next, Some(image_arn("demo"))).await;
    assert!(matches!(filtered, Err(ControlError::BadCursor)), "another list's cursor");
}

#[tokio::test]
async fn terminated_microvms_are_swept_with_their_tokens_and_the_operator_s_logs() {
    let world = World::with(|settings| settings.terminated_retention = Duration::ZERO).await;
    world.build("demo").await;
    let logging = Some(serde_json::json!({"cloudWatch": {"logGroup": "/mine", "logStream": "s"}}));
    let request = crate::types::RunMicrovm { client_token: Some("t".to_owned()), logging, ..run("demo", None) };
    let vm = world.control.run_microvm(&caller(), request.clone()).await.unwrap();
    world.reaches(&vm.id, Running).await;
    world.engine.say(&vm.id, log_line("x")).await;
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.when("the record to be swept", || async { world.control.get_microvm(&caller(), &vm.id).await.err() }).await;
    let stream = stream_name(vm.started_at, "1.0", &vm.id);
    let texts = async |group: LogGroup, stream: &str| {
        let chunk = world.logs.read(&group, stream, 0).await.unwrap();
        chunk.lines.into_iter().map(|line| line.text).collect::<Vec<_>>()
    };
    let own = LogGroup::of_image("000000000000", "us-east-1", "demo");
    assert!(texts(own.clone(), &stream).await.is_empty() && texts(own.private(), &stream).await.is_empty());
    let shipped = texts(LogGroup::new("000000000000", "us-east-1", "/mine"), "s").await;
    assert_eq!(shipped[0], "x", "what the API shows stays");
    let again = world.control.run_microvm(&caller(), request).await.unwrap();
    assert_ne!(again.id, vm.id);
}

#[tokio::test]
async fn terminated_microvms_stay_listed_until_then() {
    let world = World::with_image().await;
    let vm = world.run(None).await;
    world.control.terminate_microvm(&caller(), &vm.id).await.unwrap();
    world.reaches(&vm.id, Terminated).await;
    let clock = Frozen::now();
    clock.pass(3600).await;
    let listed = world.control.list_microvms(&caller(), MicrovmFilter::default(), PageRequest::default()).await.unwrap();
    assert_eq!(listed.items.len(), 1);
    assert!(listed.items[0].terminated_at.unwrap() <= SystemTime::now());
}
