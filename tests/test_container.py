"""What an app meets inside its MicroVM: a container as its Dockerfile describes it, its output in the log, and its end told with a reason.

An app in Python and one that is a static binary in an image of its own answer the same requests, and the same is expected of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

import support

APPS = Path(__file__).with_name("apps")
APP = APPS / "container"
LINES = 100_000
GROUP = "/aws/lambda-microvms/"
ROLE = {"executionRoleArn": "arn:aws:iam::000000000000:role/app"}
SHELLS = {"ingressNetworkConnectors": ["arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:ALL_INGRESS"]}


class Guest(support.Microvm):
    """A MicroVM that does what it is told."""

    def ask(self, path: str) -> dict[str, str]:
        """Lines of a name and a value."""
        answer = self.http(path)
        assert answer.status == 200, (answer.status, answer.body)
        return dict(line.split(" ", 1) for line in answer.text.splitlines())

    def say(self, where: str, text: bytes) -> None:
        assert self.http(f"/{where}", method="POST", body=text).status == 200

    def exit(self, code: int) -> support.Answer:
        return self.http("/exit", method="POST", body=str(code).encode())

    def shell(self, script: str) -> str:
        answer = self.http("/", method="POST", body=script.encode())
        assert answer.status == 200, (answer.status, answer.body)
        said = answer.json()
        assert said["code"] == 0, said["output"]
        return said["output"]

    def main(self, code: str) -> None:
        """Has the main process itself do something that may well be its last."""
        self.http("/main", method="POST", body=code.encode())


def build(server, name: str, archive: bytes, **options) -> str:
    arn = support.create_image(server, name, support.upload(server, f"{name}.zip", archive), **options)["imageArn"]
    support.wait_image(server, arn, "CREATED")
    return arn


def starter(server, arn: str):
    started: list[Guest] = []

    def start(**options) -> Guest:
        guest = Guest(server, server.microvms.run_microvm(imageIdentifier=arn, **options))
        started.append(guest)
        guest.wait("RUNNING")
        return guest

    yield start
    for guest in started:
        guest.terminate()
    for guest in started:
        guest.wait("TERMINATED")


@pytest.fixture(scope="module")
def plain(server):
    yield from starter(server, build(server, "container", support.zip_directory(APP), environmentVariables={"OVERRIDDEN": "request"}))


@pytest.fixture(scope="module")
def static(server):
    archive = support.zip_with_program(APPS / "container-static")
    options = {"environmentVariables": {"OVERRIDDEN": "request"}, "logging": {"cloudWatch": {"logGroup": "/builds"}}}
    yield from starter(server, build(server, "container-static", archive, **options))


@pytest.fixture(scope="module")
def privileged(server):
    dockerfile = (APP / "Dockerfile").read_text().replace("USER worker", "USER root")
    archive = support.zip_of({"Dockerfile": dockerfile, "app.py": (APP / "app.py").read_bytes()})
    yield from starter(server, build(server, "privileged", archive, additionalOsCapabilities=["ALL"]))


@pytest.fixture(scope="module", params=["container", "container-static"])
def image_name(request) -> str:
    """A program in Python, then a static binary."""
    return request.param


@pytest.fixture(scope="module")
def start(request, image_name):
    return request.getfixturevalue({"container": "plain", "container-static": "static"}[image_name])


@pytest.fixture(scope="module")
def guest(start) -> Guest:
    """One that is shared by what leaves it as it was."""
    return start(**ROLE, **SHELLS)


def streams(server, group: str) -> list[str]:
    return [stream["logStreamName"] for stream in server.client("logs").describe_log_streams(logGroupName=group)["logStreams"]]


def logged(server, group: str, part: str, last: str) -> list[str]:
    """What the CloudWatch Logs API has in the stream whose name has this part, once a certain line is there."""
    logs = server.client("logs")

    def read() -> list[str] | None:
        (stream,) = [name for name in streams(server, group) if part in name]
        messages, page = [], {"nextForwardToken": None}
        while True:
            token = page["nextForwardToken"]
            more = {"nextToken": token} if token else {}
            page = logs.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **more)
            messages += [event["message"] for event in page["events"]]
            if page["nextForwardToken"] == token:
                return messages if last in messages else None

    return support.eventually(read, f"the line {last!r}")


TEXT = bytes(range(10)) + bytes(range(11, 128))
# What a program writes, and the lines that are read: all there, however odd, but for what is no UTF-8.
ODD_OUTPUT = [
    (b"plain\n", ["plain"]),
    (b"\n\nafter two empty ones\n", ["", "", "after two empty ones"]),
    (b"of two", []),
    (b" writes\n", ["of two writes"]),
    (b"for Windows\r\n", ["for Windows\r"]),
    (b"progress 1%\rprogress 2%\n", ["progress 1%\rprogress 2%"]),
    (b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07\n", ["\x1b[1;31mred\x1b[0m \x1b]0;title\x07"]),
    ("\u00e4 \u65e5\u672c\u8a9e \U0001f525\n".encode(), ["\u00e4 \u65e5\u672c\u8a9e \U0001f525"]),
    (TEXT + b"\n", [TEXT.decode()]),
    (b"\xff\xfe \xc3( \xe2\x82\n", ["\ufffd\ufffd \ufffd( \ufffd"]),
    (b'{"level": "info", "text": "a \\"quote\\""}\n', ['{"level": "info", "text": "a \\"quote\\""}']),
    (b"x" * (64 << 10) + b"\n", ["x" * (64 << 10)]),
    (b"y" * (300 << 10) + b"\n", ["y" * (64 << 10)] * 4 + ["y" * (44 << 10)]),
    ("\u00e9".encode() * (65 << 10) + b"\n", ["\u00e9" * (32 << 10)] * 2 + ["\u00e9" * (1 << 10)]),
    (b"no newline at the end", ["no newline at the end"]),
]


class TestEitherProgram:
    """SPEC 12, 13: one table of expectations, two programs."""

    @pytest.mark.compat("container.image", "container.environment", "container.capabilities")
    def test_it_is_as_its_dockerfile_says(self, image_name, guest):
        said = guest.ask("/facts")
        environment = {name.removeprefix("env."): said.pop(name) for name in list(said) if name.startswith("env.")}
        for size in ("disk", "processors", "memory"):
            assert int(said.pop(size)) > 0
        assert said == {
            "pid": "1",
            "arguments": "an argument",
            "user": "1000 1000 5 1000",
            "host": "localhost",
            "directory": "/srv/work",
            "files": "1024",
            "bounding": "00000000a80425fb",
            "seccomp": "0",
            "cgroup": "0::/",
            "mount": "EPERM",
            "rename": "EPERM",
            "generation": "1",
            "shm": "65536",
        }
        assert {name: value for name, value in environment.items() if not name.startswith("AWS_ENDPOINT_URL_")} == {
            "GREETING": "good morning",
            "OVERRIDDEN": "request",
            "HOME": "/home/worker",
            "HOSTNAME": "localhost",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "AWS_REGION": "us-east-1",
            "AWS_LAMBDA_MICROVM_IMAGE_NAME": image_name,
            "AWS_LAMBDA_MICROVM_IMAGE_VERSION": "1.0",
            "AWS_LAMBDA_MICROVM_IMAGE_ARN": f"arn:aws:lambda:us-east-1:000000000000:microvm-image:{image_name}",
        }

    @pytest.mark.compat("guest.metadata", "guest.metadata-token")
    def test_the_metadata_address_tells_of_its_role(self, guest):
        """What comes of a role that can be assumed: test_identity.py."""
        said = guest.ask("/metadata")
        assert (said["unasked"], said["role"]) == ("401", "200 execution_role")
        status, found = said["credentials"].split(" ", 1)
        assert (status, json.loads(found)["Code"]) == ("200", "AssumeRoleUnauthorizedAccess")

    @pytest.mark.compat("container.children")
    def test_orphans_come_to_the_main_process_and_nothing_of_ours_is_left_to_it(self, server, guest):
        assert guest.ask("/orphan") == {"code": "3", "zombies": "0"}
        # A second instance finds its port taken. Who joins the container from outside is waited for outside.
        assert server.hearth("exec", guest.id, "--", "app").returncode == 1
        assert guest.ask("/orphan") == {"code": "3", "zombies": "0"}

    @pytest.mark.compat("clone.generation", "guest.no-role", "hook.stop-signal")
    def test_it_counts_its_resumes_has_no_role_and_gets_the_signal_that_its_image_names(self, server, start):
        guest = start()
        assert guest.ask("/facts")["generation"] == "1"
        guest.client.suspend_microvm(microvmIdentifier=guest.id)
        guest.wait("SUSPENDED")
        guest.client.resume_microvm(microvmIdentifier=guest.id)
        guest.wait("RUNNING")
        assert guest.ask("/facts")["generation"] == "2"
        said = guest.ask("/metadata")
        assert [value.split(" ")[0] for value in said.values()] == ["401", "404", "404"]
        guest.terminate()
        assert guest.wait("TERMINATED")["stateReason"] == "Success."
        assert f"signal {signal.SIGUSR1.value}" in server.hearth("logs", guest.id).stdout

    @pytest.mark.compat("container.log", "container.exit", "logs.events")
    @pytest.mark.parametrize("output, code", [("stdout", 42), ("stderr", 0)])
    def test_whatever_it_writes_is_read_back_and_its_exit_code_is_the_reason(self, server, image_name, start, output, code):
        guest = start(**ROLE)
        for text, _ in ODD_OUTPUT:
            guest.say(output, text)
        # Its endpoint is gone at once: so is the answer that was under way.
        answers = [guest.exit(code), guest.http("/facts")]
        assert guest.wait("TERMINATED")["stateReason"] == f"Container Stopped with Exit Code: {code}"
        answers.append(guest.http("/facts"))
        assert [(answer.status, answer.body) for answer in answers] == [(502, b"")] * 3
        expected = [line for _, lines in ODD_OUTPUT for line in lines]
        assert logged(server, f"{GROUP}{image_name}", guest.id, expected[-1]) == expected


@pytest.mark.compat("logs.destination", "logs.role")
def test_its_lines_go_where_its_owner_says_and_not_where_the_image_s_builds_go(server, static):
    """SPEC 13.1: what the image says is for its builds; a name is taken as it is; without a role or a wish nothing is shown."""
    default, nobody = static(**ROLE), static()
    named = static(**ROLE, logging={"cloudWatch": {"logGroup": "/mine", "logStream": "one"}})
    disabled = static(**ROLE, logging={"disabled": {}})
    for guest in (default, named, disabled, nobody):
        guest.say("stdout", f"{guest.id}\n".encode())
        support.eventually(lambda: f"{guest.id}\n" in server.hearth("logs", guest.id).stdout, "the operator's copy")
    group = f"{GROUP}container-static"
    assert default.id in logged(server, group, default.id, default.id)
    assert logged(server, "/mine", "one", named.id) == [named.id]
    shown = " ".join(streams(server, group) + streams(server, "/mine") + streams(server, "/builds"))
    assert [guest.id in shown for guest in (default, named, disabled, nobody)] == [True, False, False, False]
    assert len(streams(server, "/builds")) == 2, "the Dockerfile's run, and the boot"


class TestAContainer:
    """SPEC 13."""

    @pytest.mark.compat("container.exit", "container.log")
    def test_its_last_words_are_all_in_the_log_and_its_exit_code_is_the_reason(self, server, plain):
        guest = plain()
        guest.main(
            f"""
out = sys.stdout.buffer
out.write(b"".join(b"line %d\\n" % number for number in range({LINES})))
out.write("long {{}}\\n".format("\\u00e9" * (1 << 19)).encode())
out.write(bytes(range(1, 10)) + b"\\xff\\xfe\\n")
out.write(b"no newline")
out.flush()
os._exit(7)
"""
        )
        said = guest.wait("TERMINATED")
        assert said["stateReason"] == "Container Stopped with Exit Code: 7"
        assert guest.http("/", token=None).status in (401, 403, 404, 502)
        lines = server.hearth("logs", guest.id).stdout.split("\n")
        numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
        assert numbers == sorted(numbers)
        lost = sum(int(line[1:].split()[0]) for line in lines if line.startswith("[") and "lost here" in line)
        assert len(numbers) + lost >= LINES and (lost > 0 or len(numbers) == LINES)
        long = next(index for index, line in enumerate(lines) if line.startswith("long "))
        pieces = [line for line in lines[long:] if "\u00e9" in line]
        assert "".join(pieces) == "long " + "\u00e9" * (1 << 19), [len(piece) for piece in pieces]
        assert bytes(range(1, 10)).decode() + "\ufffd\ufffd" in lines
        assert "no newline" in lines

    @pytest.mark.compat("container.log")
    def test_lines_that_nobody_takes_are_counted_and_the_app_goes_on(self, server, plain):
        guest = plain()
        guest.main("""
going, count = True, 0
while going:
    write(1, b"line %d %s\\n" % (count, b"x" * 8000))
    count += 1
write(1, b"written %d\\n" % count)
""")
        # Not a wait for anything: for so long the host takes nothing. What it takes at all is a small part of what is written meanwhile.
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(server.process.pid, signal.SIGCONT)
        guest.main("going = False")
        said = support.eventually(lambda: "written " in (lines := server.hearth("logs", guest.id).stdout) and lines, "the last line")
        numbers = [int(number) for number in re.findall(r"^line (\d+) ", said, re.MULTILINE)]
        lost = sum(int(number) for number in re.findall(r"^\[(\d+) lines? w\w+ lost here\]", said, re.MULTILINE))
        (written,) = re.findall(r"^written (\d+)", said, re.MULTILINE)
        assert numbers == sorted(set(numbers)) and lost > 0
        assert len(numbers) + lost == int(written)

    @pytest.mark.compat("container.memory")
    def test_out_of_memory_is_told_as_such(self, plain):
        guest = plain()
        guest.main("kept = []\nwhile True: kept.append(bytearray(os.urandom(1 << 12) * (1 << 11)))")
        reason = guest.wait("TERMINATED")["stateReason"]
        assert reason.startswith("Container Stopped with Exit Code: 137. The application ran out of memory"), reason


class TestEveryCapability:
    """`additionalOsCapabilities: ["ALL"]`, SPEC 13."""

    @pytest.mark.compat("container.all")
    def test_it_mounts_makes_control_groups_and_runs_containers_of_its_own(self, privileged):
        guest = privileged()
        assert guest.shell("sed -n 's/CapEff:\\t//p' /proc/self/status") == "000001ffffffffff\n"
        guest.shell("hostname renamed && test $(hostname) = renamed")
        assert guest.shell("mkdir -p /tmp/m && mount -t tmpfs none /tmp/m && stat -f -c %T /tmp/m && umount /tmp/m") == "tmpfs\n"
        filesystem = """
            truncate -s 8M /tmp/disk && mkfs.ext4 -q /tmp/disk && mkdir -p /tmp/d && mount -o loop /tmp/disk /tmp/d
            echo kept > /tmp/d/file && cat /tmp/d/file && umount /tmp/d
        """
        assert guest.shell(filesystem) == "kept\n"
        fuse = """
            mkdir -p /dev/shm/f/lower /dev/shm/f/upper /dev/shm/f/work /dev/shm/f/merged && cd /dev/shm/f && echo below > lower/file
            fuse-overlayfs -o lowerdir=lower,upperdir=upper,workdir=work merged 2> /dev/null
            cat merged/file && echo above > merged/file && cat upper/file lower/file && stat -f -c %T merged && umount merged
        """
        assert guest.shell(fuse) == "below\nabove\nbelow\nfuseblk\n"
        group = """
            cd /sys/fs/cgroup && mkdir mine && echo 64M > mine/memory.max && cat mine/memory.max
            sh -c 'echo $$ > mine/cgroup.procs && cat /proc/self/cgroup' && rmdir mine
        """
        assert guest.shell(group) == "67108864\n0::/mine\n"
        # A group that runs out of the memory it was given does not take the app with it.
        greedy = """
            cd /sys/fs/cgroup && mkdir greedy && echo 8M > greedy/memory.max
            sh -c 'echo $$ > greedy/cgroup.procs; python3 -c "bytearray(range(256)) * (1 << 18)"; echo $?' 2>&1
        """
        assert "137" in guest.shell(greedy)
        nested = """
            mkdir -p /srv/nested/rootfs/bin && cd /srv/nested && cp /bin/busybox rootfs/bin/sh && crun spec
            python3 - <<'END'
import json
spec = json.load(open("config.json"))
spec["process"]["terminal"] = False
spec["process"]["args"] = ["sh", "-c", "echo inside $$ $(busybox cat /proc/self/cgroup); exit 5"]
spec["root"]["readonly"] = False
spec["linux"]["resources"] = {"memory": {"limit": 67108864}}
json.dump(spec, open("config.json", "w"))
END
            cp /bin/busybox rootfs/bin/busybox
            crun run inner < /dev/null && exit 1 || echo "code $?"
        """
        assert guest.shell(nested) == "inside 1 0::/\ncode 5\n"
