"""What an app meets inside its MicroVM: a container as its Dockerfile describes it, its output in the log, and its end told with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import support

APP = Path(__file__).with_name("apps") / "container"
LINES = 100_000


class Guest(support.Microvm):
    """A MicroVM that does what it is told."""

    def shell(self, script: str) -> str:
        answer = self.http("/", method="POST", body=script.encode())
        assert answer.status == 200, (answer.status, answer.body)
        said = answer.json()
        assert said["code"] == 0, said["output"]
        return said["output"]

    def main(self, code: str) -> None:
        """Has the main process itself do something that may well be its last."""
        self.http("/main", method="POST", body=code.encode())


def build(server, name: str, dockerfile: str, **options) -> str:
    uri = support.upload(server, f"{name}.zip", support.zip_of({"Dockerfile": dockerfile, "app.py": (APP / "app.py").read_bytes()}))
    arn = support.create_image(server, name, uri, **options)["imageArn"]
    support.wait_image(server, arn, "CREATED")
    return arn


def starter(server, arn: str):
    started: list[Guest] = []

    def start() -> Guest:
        guest = Guest(server, server.microvms.run_microvm(imageIdentifier=arn))
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
    arn = build(server, "container", (APP / "Dockerfile").read_text(), environmentVariables={"OVERRIDDEN": "request"})
    yield from starter(server, arn)


@pytest.fixture(scope="module")
def privileged(server):
    dockerfile = (APP / "Dockerfile").read_text().replace("USER worker", "USER root")
    yield from starter(server, build(server, "privileged", dockerfile, additionalOsCapabilities=["ALL"]))


def facts(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines())


class TestAContainer:
    """SPEC 12, 13."""

    @pytest.mark.compat("container.image", "container.environment", "container.capabilities")
    def test_it_is_as_its_dockerfile_says(self, plain):
        guest = plain()
        said = facts(
            guest.shell(
                """
                echo "user $(id -un) $(id -Gn)"
                echo "directory $(pwd)"
                echo "main $(tr '\\0' ' ' < /proc/1/cmdline)"
                echo "greeting $GREETING"
                echo "overridden $OVERRIDDEN"
                echo "home $HOME"
                echo "path $PATH"
                echo "image $AWS_LAMBDA_MICROVM_IMAGE_NAME $AWS_LAMBDA_MICROVM_IMAGE_VERSION"
                echo "arn $AWS_LAMBDA_MICROVM_IMAGE_ARN"
                echo "region $AWS_REGION"
                echo "host $(hostname)"
                echo "files $(ulimit -n)"
                echo "shm $(df -k --output=size /dev/shm | tail -n 1 | tr -d ' ')"
                echo "bounding $(sed -n 's/CapBnd:\\t//p' /proc/self/status)"
                echo "seccomp $(sed -n 's/Seccomp:\\t//p' /proc/self/status)"
                echo "cgroup $(cat /proc/self/cgroup)"
                echo "mount $(mount -t tmpfs none /mnt 2>&1 | grep -o 'permission denied\\|must be superuser')"
                """
            )
        )
        assert said == {
            "user": "worker worker tty",
            "directory": "/srv/work",
            "main": "/usr/bin/python3 /usr/local/bin/app an argument ",
            "greeting": "good morning",
            "overridden": "request",
            "home": "/home/worker",
            "path": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "image": "container 1.0",
            "arn": "arn:aws:lambda:us-east-1:000000000000:microvm-image:container",
            "region": "us-east-1",
            "host": "localhost",
            "files": "1024",
            "shm": "65536",
            "bounding": "00000000a80425fb",
            "seccomp": "0",
            "cgroup": "0::/",
            "mount": "must be superuser",
        }

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
