"""Lifecycle hooks (SPEC 8), as an app and its owner see them: a Python app that tells what it was called with, and a static binary that
misbehaves as it is told to."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

import support
from support import Microvm, idle_policy

APPS = support.ROOT / "tests/apps"
PORT = 9000
TAIL = "Please check your hook endpoint and application logs for more details."
PATH = "/aws/lambda-microvms/runtime/v1/"
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def hooks(seconds: int, *, runtime=("run", "suspend", "resume", "terminate"), build=("ready", "validate"), build_seconds: int = 60) -> dict:
    def group(names, timeout):
        return {name: "ENABLED" for name in names} | {f"{name}TimeoutInSeconds": timeout for name in names}

    return {"port": PORT, "microvmHooks": group(runtime, seconds), "microvmImageHooks": group(build, build_seconds)}


@pytest.fixture(scope="module")
def python_image(server):
    uri = support.upload(server, "hooks-python.zip", support.zip_directory(APPS / "hooks-python"))
    created = support.create_image(server, "hooks-python", uri, hooks=hooks(20))
    support.wait_image(server, created["imageArn"], "CREATED")
    return created["imageArn"]


@pytest.fixture(scope="module")
def static_archive(server, tmp_path_factory):
    """The archive with a server in C, without any library."""
    program = tmp_path_factory.mktemp("hooks") / "hooks"
    subprocess.run(["cc", "-static", "-O2", "-Wall", "-o", program, APPS / "hooks-static/hooks.c"], check=True, timeout=60)
    files = {"Dockerfile": (APPS / "hooks-static/Dockerfile").read_bytes(), "hooks": program.read_bytes()}
    return support.upload(server, "hooks-static.zip", support.zip_of(files))


@pytest.fixture(scope="module")
def static_image(server, static_archive):
    created = support.create_image(server, "hooks-static", static_archive, hooks=hooks(5))
    support.wait_image(server, created["imageArn"], "CREATED")
    return created["imageArn"]


def seen(microvm: Microvm) -> list[dict]:
    answer = microvm.http("/seen", port=PORT, token=microvm.token({"port": PORT}))
    assert answer.status == 200, answer
    return answer.json()


@pytest.mark.compat("hook.order", "hook.transport", "hook.run-body", "hook.resume-holds", "hook.stop-signal")
def test_an_app_is_told_of_its_life_in_order(server, python_image):
    payload = json.dumps({"tenant": "ä"})
    microvm = support.run_microvm(server, python_image, runHookPayload=payload, idlePolicy=idle_policy())
    microvm.wait("RUNNING")
    calls = seen(microvm)
    # The clone that was validated is another one: this one has memory of what came before the snapshot.
    assert [call["path"].removeprefix(PATH) for call in calls] == ["ready", "ready", "ready", "run"]
    assert {(call["version"], call["peer"]) for call in calls} == {("HTTP/1.1", "127.0.0.1")}

    ready, run = dict(calls[0]["headers"]), dict(calls[3]["headers"])
    assert re.fullmatch(rf"{UUID}\.lambda-microvm\.us-east-1\.localhost", ready["host"])
    assert re.fullmatch(UUID, ready["x-amzn-requestid"]) and calls[0]["body"] == ""
    body = {"microvmId": microvm.id, "runHookPayload": payload}
    assert json.loads(calls[3]["body"]) == body
    length = str(len(calls[3]["body"].encode()))
    assert run == {"host": f"localhost:{PORT}", "content-type": "application/json", "content-length": length}

    microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
    microvm.wait("SUSPENDED")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(seen, microvm)
        states = set()
        while not request.done():
            states.add(microvm.state())
        calls = request.result()
    assert [call["path"].removeprefix(PATH) for call in calls[4:]] == ["suspend", "resume"]
    assert "RUNNING" in states or microvm.state() == "RUNNING"
    assert states & {"PENDING", "SUSPENDED"}, "the request was held until the hook had answered"
    for call in calls[4:]:
        headers = dict(call["headers"])
        assert headers["host"] == f"localhost:{PORT}" and "x-amzn-requestid" not in headers and "user-agent" not in headers
        assert call["body"] == ""

    microvm.terminate()
    assert microvm.wait("TERMINATED")["stateReason"] == "Success."
    log = server.hearth("logs", microvm.id).stdout
    said = re.findall(r"(hook \w+|signal \d+)", log)
    assert said == ["hook run", "hook suspend", "hook resume", "hook terminate", "signal 15"], log


def failed(hook: str, what: str) -> str:
    return f"{hook} lifecycle hook {what}. {TAIL}"


@pytest.mark.compat("hook.run-failure", "hook.suspend-failure", "hook.resume-failure", "hook.terminate-failure", "hook.unrecorded")
def test_every_way_a_runtime_hook_can_end(server, static_image):
    """One MicroVM for each: what its app does, what its owner asks for, and the state reason."""
    cases = [
        ("run=500", [], failed("Run", "returned HTTP status 500")),
        ("run=404", [], failed("Run", "returned HTTP status 404")),
        ("run=hang", [], failed("Run", "timed out after PT5S")),
        # Endless: whether the time or the room is over first is up to the machine's speed.
        ("run=stream", [], "Run lifecycle hook"),
        ("run=headers", [], "Run lifecycle hook"),
        ("run=close", [], failed("Run", "returned no valid HTTP response")),
        ("run=garbage", [], failed("Run", "returned no valid HTTP response")),
        ("run=exit", [], "Container Stopped with Exit Code: 7"),
        ("suspend=500", ["suspend"], failed("Suspend", "returned HTTP status 500")),
        ("suspend=hang", ["suspend"], failed("Suspend", "timed out after PT5S")),
        ("run=deaf", ["suspend"], failed("Suspend", f"could not be called: nothing listens on port {PORT}")),
        ("resume=500", ["suspend", "resume"], failed("Resume", "returned HTTP status 500")),
        ("terminate=500", ["terminate"], "Success."),
        ("terminate=hang", ["terminate"], "Success."),
    ]

    def live(case) -> str:
        plan, wishes, _ = case
        microvm = support.run_microvm(server, static_image, runHookPayload=plan)
        if wishes:
            microvm.wait("RUNNING")
        for wish in wishes:
            getattr(microvm.client, f"{wish}_microvm")(microvmIdentifier=microvm.id)
            if wish == "suspend" and len(wishes) > 1:
                microvm.wait("SUSPENDED")
        return microvm.wait("TERMINATED")["stateReason"]

    with ThreadPoolExecutor(3) as pool:
        reasons = list(pool.map(live, cases))
    seen = zip(cases, reasons, strict=True)
    assert not [(plan, reason) for (plan, _, expected), reason in seen if not reason.startswith(expected)]


@pytest.mark.compat("hook.build-failure", "hook.build-sizes")
def test_build_hooks_that_fail(server, static_archive):
    """SPEC 2.1, 5.3, 6.2: the reason is on the build, and a snapshot that was not wanted is not there."""
    cases = [
        ("ready=404", "Ready hook check failed: the application returned a client error (HTTP 4xx) response."),
        ("ready=hang", "Ready hook invocation timed out after PT5S"),
        ("validate=500", "Validate hook check failed: the application returned a server error (HTTP 5xx) response."),
    ]
    for plan, reason in cases:
        name = f"hooks-{plan.replace('=', '-')}"
        created = support.create_image(
            server, name, static_archive, hooks=hooks(5, build_seconds=5), environmentVariables={"PLAN": plan}
        )
        arn = created["imageArn"]
        support.wait_image(server, arn, "CREATE_FAILED")
        build = support.build_of(server, arn)
        assert build["stateReason"] == reason
        got = server.microvms.get_microvm_image_build(imageIdentifier=arn, imageVersion="1.0", buildId=build["buildId"])
        sizes = {member for member, size in got["snapshotBuild"].items() if size is not None}
        assert sizes == {"codeInstallSizeInBytes"}, got
