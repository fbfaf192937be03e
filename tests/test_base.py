"""The base image that Dockerfiles begin with, where it is the Debian stand-in: what they say for Amazon Linux 2023 is done, or refused by name."""

import contextlib
import json

import pytest

import support
from support import EXAMPLES, idle_policy

# Packages come from the distribution's archives, PyPI and npm.
BUILD_SECONDS = 600

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 120)

ANNOUNCED = [
    f"FROM {support.BASE_IMAGE}",
    "RUN dnf install -y python3 python3-pip && dnf clean all",
    "WORKDIR /app",
    "COPY requirements.txt .",
    "RUN pip install --no-cache-dir -r requirements.txt",
    "COPY app.py .",
    "EXPOSE 5000",
    'CMD ["gunicorn", "--bind", "0.0.0.0:5000", "app:app"]',
]


@contextlib.contextmanager
def built(server, name: str, data: bytes):
    """An image from an archive, deleted afterwards."""
    arn = support.create_image(server, name, support.upload(server, f"base/{name}.zip", data))["imageArn"]
    try:
        try:
            support.wait_image(server, arn, "CREATED", BUILD_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.hearth('logs', name).stdout[-3000:]}") from None
        yield arn
    finally:
        server.hearth("image", "rm", name)


@contextlib.contextmanager
def running(server, arn: str, **options):
    microvm = support.run_microvm(server, arn, **options)
    try:
        microvm.wait("RUNNING")
        yield microvm
    finally:
        microvm.terminate()
        microvm.wait("TERMINATED")


def said_by_failing_build(server, tmp_path, script: str) -> str:
    """What the build's log says of a script that is run on the base image."""
    (tmp_path / "Dockerfile").write_text(f"FROM {support.BASE_IMAGE}\nCOPY script /\nRUN sh /script 2>&1; false\n")
    (tmp_path / "script").write_text(script)
    answer = server.hearth("image", "build", str(tmp_path), "--name", "base-script", timeout=BUILD_SECONDS)
    server.hearth("image", "rm", "base-script")
    assert answer.returncode != 0, "the script ends with false"
    return answer.stdout + answer.stderr


def test_example_is_the_announcements_and_answers(server):
    dockerfile = (EXAMPLES / "flask-hello/Dockerfile").read_text()
    assert [line for line in dockerfile.splitlines() if line] == ANNOUNCED
    with built(server, "announced", support.zip_directory(EXAMPLES / "flask-hello")) as arn, running(server, arn) as first:
        assert first.count() | {"hostname": ""} == {"memory": 1, "disk": 1, "hostname": ""}
        with running(server, arn, idlePolicy=idle_policy(idle=600)) as second:
            assert second.count()["memory"] == 1
            second.client.suspend_microvm(microvmIdentifier=second.id)
            second.wait("SUSPENDED")
            assert second.count()["memory"] == 2


APT_AND_PIP = f"""FROM {support.BASE_IMAGE}
RUN apt-get update && apt-get install -y python3 python3-pip && apt-get clean
WORKDIR /app
RUN pip install --no-cache-dir flask gunicorn
COPY app.py .
EXPOSE 5000
CMD ["gunicorn", "--bind", "0.0.0.0:5000", "app:app"]
"""


def test_pip_installs_into_a_python_from_apt(server):
    app = (EXAMPLES / "flask-hello/app.py").read_text()
    with built(server, "apt-and-pip", support.zip_of({"Dockerfile": APT_AND_PIP, "app.py": app})) as arn, running(server, arn) as microvm:
        assert microvm.count()["memory"] == 1


EXPRESS = f"""FROM {support.BASE_IMAGE}
RUN microdnf install -y nodejs npm shadow-utils && microdnf clean all
RUN useradd --uid 1001 web
WORKDIR /home/web
COPY --chown=web:web package.json server.js ./
RUN npm install --omit=dev
USER web
EXPOSE 5000
CMD ["node", "server.js"]
"""
PACKAGE = {"name": "greeter", "version": "1.0.0", "private": True, "dependencies": {"express": "^4"}}
EXPRESS_SERVER = """const os = require("os");
require("express")().get("/", (_, answer) => answer.json({ user: os.userInfo().username, home: os.homedir() })).listen(5000);
"""


def test_microdnf_brings_node_and_npm(server):
    files = {"Dockerfile": EXPRESS, "package.json": json.dumps(PACKAGE), "server.js": EXPRESS_SERVER}
    with built(server, "express", support.zip_of(files)) as arn, running(server, arn) as microvm:
        assert microvm.http("/").json() == {"user": "web", "home": "/home/web"}


REFUSED = [
    ("dnf install -y jq no-such-package", "Error: Unable to find a match: no-such-package"),
    ("microdnf install -y python3.2", "it would be Debian's python3.2, which this release does not have"),
    ("yum groupinstall -y 'Development Tools'", "Error: groupinstall Development Tools is not supported"),
    ("dnf install -y @development-tools", "stand-in: @development-tools: there are no groups"),
    ("dnf module enable -y nodejs:20", "Amazon Linux 2023 has no modules"),
    ("dnf install -y ./tool.rpm", "RPM packages cannot be installed on Debian"),
    ("dnf install -y --installroot=/mnt jq", "Error: --installroot is not supported"),
    ("dnf install -y --no-such-option jq", "Error: unrecognized arguments: --no-such-option"),
    ("dnf install jq", "Operation aborted."),
    ("rpm -ivh tool.rpm", "rpm: -ivh is not supported"),
    ("amazon-linux-extras install nginx1", "belongs to Amazon Linux 2"),
]


def test_dnf_refusals_name_what_is_asked_for_and_install_nothing(server, tmp_path):
    script = "".join(f"echo '<{number}>'; {command}; echo \"<status $?>\"\n" for number, (command, _) in enumerate(REFUSED))
    said = said_by_failing_build(server, tmp_path, script + "command -v jq || echo nothing was installed\n")
    for number, (command, expected) in enumerate(REFUSED):
        part = said.split(f"<{number}>", 1)[1].split("<status ", 1)
        assert expected in part[0], (command, part[0])
        assert part[1].startswith("1>"), (command, part[1][:20])
    assert "nothing was installed" in said
    assert "/usr/share/hearth/dnf-packages" in said, "the table is named"


FACTS = [
    (". /etc/os-release; echo $ID $VERSION_ID $VERSION_CODENAME", "amzn 2023"),
    (". /etc/os-release; echo $PRETTY_NAME", "Amazon Linux 2023 (stand-in on Debian"),
    ("cat /etc/system-release", "Amazon Linux release 2023"),
    ("rpm -q bash", "bash-"),
    ("rpm -q no-such-package", "package no-such-package is not installed"),
    ("rpm -E '%{_arch}'", "x86_64"),
    ("dnf -y install system-release epel-release", "epel-release means nothing on Debian"),
    ("dnf -qy install python3.11.x86_64 python3.11-pip zlib-devel 2>&1 >/dev/null | tail -n 3; python3.11 -m pip --version; pip3.11 --version", "pip 23"),
    ("pip3 install --quiet --root-user-action=ignore six && python3 -c 'import six; print(six.__name__, \"is there\")'", "six is there"),
    ("dnf -qy install /usr/bin/strace && strace --version | head -n 1", "strace -- version"),
    ("dnf -qy swap curl-minimal curl && curl --version", "curl 7"),
    ("yum list installed zlib-devel", "zlib1g-dev"),
    ("dnf -qy remove strace && test ! -e /usr/bin/strace && echo strace is gone", "strace is gone"),
    ("yum -qy update && echo updated", "updated"),
    ("dnf check-update; echo status $?", "status 0"),
    ("dnf clean all; find /var/lib/apt/lists /var/cache/apt -name '*_Packages' -o -name '*.deb' -o -name '*.bin' | wc -l", "0\n"),
    ("ls -d /usr/share/man/man* | wc -l", "9\n"),
    ("touch /a /b; update-alternatives --install /usr/bin/tool tool /a 1 --slave /usr/share/man/man7/tool.7.gz tool.7.gz /b && echo registered", "registered"),
    ("useradd app; stat -c %U /home/app", "app"),
    ("/usr/sbin/policy-rc.d; echo status $?", "status 101"),
]


def test_base_looks_and_works_like_amazon_linux(server, tmp_path):
    if "bookworm" not in open("/etc/os-release").read():
        pytest.skip("the versions are those of Debian 12")
    script = "".join(f"echo '<{number}>'\n{command}\n" for number, (command, _) in enumerate(FACTS))
    said = said_by_failing_build(server, tmp_path, script + "echo '<end>'\n")
    for number, (command, expected) in enumerate(FACTS):
        part = said.split(f"<{number}>", 1)[1].split("<", 1)[0]
        assert expected in part, (command, part)
    assert "<end>" in said
