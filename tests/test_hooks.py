"""Lifecycle hooks (SPEC 8), as an app and its owner see them: a Python app that tells what it was called with, and a static binary that
misbehaves as it is told to."""

import json
import re
from collections.abc import Iterator
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
def static_archive(server):
    """The archive with a server in C, without any library."""
    return support.upload(server, "hooks-static.zip", support.zip_with_program(APPS / "hooks-static"))


@pytest.fixture(scope="module")
def static_image(server, static_archive):
    created = support.create_image(server, "hooks-static", static_archive, hooks=hooks(3))
    support.wait_image(server, created["imageArn"], "CREATED")
    return created["imageArn"]


def seen(microvm: Microvm) -> list[dict]:
    answer = microvm.http("/seen", port=PORT, token=microvm.token({"port": PORT}))
    assert answer.status == 200, answer
    return answer.json()


@pytest.mark.compat("hook.order", "hook.transport", "hook.run-body", "hook.resume-holds", "hook.stop-signal")
def test_an_app_is_told_of_its_life_in_order(server, python_image):
    # As long as it may be, in code points.
    payload = "ä🔥" * 2048
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


# What the static server can do when it is called, and what is said of it then. The answer that `stream` begins is endless and slow, `flood`
# and `headers` are endless and fast; after `deaf` nobody listens any more, which is the next hook's trouble.
OUTCOMES = {
    "500": "returned HTTP status 500",
    "503": "returned HTTP status 503",
    "404": "returned HTTP status 404",
    "204": "returned HTTP status 204",
    "hang": "timed out after PT3S",
    "stream": "timed out after PT3S",
    "flood": "timed out after PT3S",
    "headers": "returned no valid HTTP response",
    "close": "returned no valid HTTP response",
    "garbage": "returned no valid HTTP response",
}
DEAF = f"could not be called: nothing listens on port {PORT}"
EXITED = "Container Stopped with Exit Code: 7"
# A life up to the hook, and who is called before it.
LIVES = {"run": ([], None), "suspend": (["suspend"], "run"), "resume": (["suspend", "resume"], "suspend"), "terminate": (["terminate"], "run")}


def runtime_cases() -> Iterator[tuple[str, str, str]]:
    """A hook, what its app does, and the state reason that follows."""
    for hook, (_, before) in LIVES.items():
        # Which status it is makes no difference beyond the words: all of them for one hook.
        statuses = ("404", "503", "204") if hook != "run" else ()
        outcomes = {plan: f"{hook.title()} lifecycle hook {what}. {TAIL}" for plan, what in OUTCOMES.items() if plan not in statuses}
        outcomes["exit"] = EXITED
        if before:
            outcomes[f"{before}=deaf"] = f"{hook.title()} lifecycle hook {DEAF}. {TAIL}"
        for plan, reason in outcomes.items():
            yield hook, plan if "=" in plan else f"{hook}={plan}", "Success." if hook == "terminate" else reason


@pytest.mark.compat("hook.run-failure", "hook.suspend-failure", "hook.resume-failure", "hook.terminate-failure", "hook.unrecorded")
def test_every_way_a_runtime_hook_can_end(server, static_image):
    """One MicroVM for each: what its app does, what its owner asks for, and the state reason."""

    def live(case) -> tuple[str, bool]:
        hook, plan, _ = case
        microvm = support.run_microvm(server, static_image, runHookPayload=plan)
        wishes, _ = LIVES[hook]
        if wishes:
            microvm.wait("RUNNING")
        for wish in wishes:
            getattr(microvm.client, f"{wish}_microvm")(microvmIdentifier=microvm.id)
            if wish == "suspend" and len(wishes) > 1:
                microvm.wait("SUSPENDED")
        reason = microvm.wait("TERMINATED")["stateReason"]
        # The app writes a line just before it misbehaves, and is ended for it.
        return reason, plan.replace("=", " ") in server.hearth("logs", microvm.id).stdout

    cases = list(runtime_cases())
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(live, cases))
    seen = [(*case, *end) for case, end in zip(cases, ends, strict=True)]
    assert not [found for found in seen if found[2] != found[3]]
    assert not [found for found in seen if not found[4]], "the app did as it was told, and its last words are in the log"


BUILD_OUTCOMES = [
    ("ready=404", "Ready hook check failed: the application returned a client error (HTTP 4xx) response."),
    ("ready=hang", "Ready hook invocation timed out after PT3S"),
    ("ready=garbage", "Ready hook check failed: the application did not return a valid HTTP response."),
    ("ready=exit", EXITED),
    ("ready=500", "Ready hook check failed: the application returned a server error (HTTP 5xx) response."),
    ("validate=hang", "Validate hook invocation timed out after PT3S"),
    ("validate=exit", EXITED),
    ("validate=500", "Validate hook check failed: the application returned a server error (HTTP 5xx) response."),
    # Nobody listens when /validate is to be called: that may change, but does not in time.
    ("ready=deaf", "Validate hook invocation timed out after PT3S"),
]


@pytest.mark.compat("hook.build-failure", "hook.build-sizes")
def test_build_hooks_that_fail(server, static_archive):
    """SPEC 2.1, 5.3, 6.2: the reason is on the build, and a snapshot that was not wanted is not there."""
    images = {}
    for plan, _ in BUILD_OUTCOMES:
        options = {"hooks": hooks(3, build_seconds=3), "environmentVariables": {"PLAN": plan}}
        images[plan] = support.create_image(server, f"hooks-{plan.replace('=', '-')}", static_archive, **options)["imageArn"]
    for plan, reason in BUILD_OUTCOMES:
        support.wait_image(server, images[plan], "CREATE_FAILED")
        build = support.build_of(server, images[plan])
        assert build["stateReason"] == reason
        got = server.microvms.get_microvm_image_build(imageIdentifier=images[plan], imageVersion="1.0", buildId=build["buildId"])
        sizes = {member for member, size in got["snapshotBuild"].items() if size is not None}
        assert sizes == {"codeInstallSizeInBytes"}, got
