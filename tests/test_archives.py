"""What of a zip, or of a directory, reaches the Dockerfile. What is refused is in test_bad_input.py."""

import io
import subprocess
import zipfile
from pathlib import Path

import pytest

import support

BUSYBOX = Path("/usr/bin/busybox")
# It serves what the build found in its context.
LISTING = """
FROM scratch
COPY busybox /bin/busybox
COPY busybox /bin/sh
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY . /c
RUN mkdir -p /www && cd /c && find . -type l -exec sh -c 'echo "$0 -> $(readlink $0)"' {} ';' -o -print | sort > /www/index.html
EXPOSE 8080
CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]
"""


@pytest.fixture
def listing(server):
    """Runs an image of the name, and says what its build found."""
    images, microvms = [], []

    def run(arn: str) -> list[str]:
        images.append(arn)
        support.wait_image(server, arn, "CREATED")
        microvm = support.run_microvm(server, arn, idlePolicy=support.idle_policy())
        microvms.append(microvm)
        microvm.wait("RUNNING")
        answer = microvm.http("/", token=microvm.token({"port": 8080}), port=8080)
        assert answer.status == 200
        return answer.text.splitlines()

    yield run
    for microvm in microvms:
        microvm.terminate()
        microvm.wait("TERMINATED")
    for arn in images:
        support.delete_image(server, arn)


def link(archive: zipfile.ZipFile, name: str, target: str) -> None:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    archive.writestr(info, target)


def of_windows(archive: zipfile.ZipFile, name: str, content: str) -> None:
    info = zipfile.ZipInfo(name)
    info.create_system, info.filename = 0, name
    archive.writestr(info, content)


@pytest.mark.compat("build.archive")
class TestZips:
    def test_links_are_kept_and_ignored_paths_left_out(self, server, listing):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("Dockerfile", LISTING)
            archive.writestr(".dockerignore", ".venv\n**/*.log\n!keep.log\nDockerfile\n.dockerignore\nbusybox\n!busybox\n")
            archive.write(BUSYBOX, "busybox")
            link(archive, ".venv/bin/python", "/usr/bin/python3")
            link(archive, "shared", "../shared")
            link(archive, "d/up", "../../..")
            link(archive, "hosts", "/etc/hosts")
            link(archive, "inside", "app/main.py")
            of_windows(archive, "app\\main.py", "print()")
            of_windows(archive, "app\\debug.log", "")
            archive.writestr("keep.log", "")
        created = support.create_image(server, "archive-links", support.upload(server, "archive-links.zip", data.getvalue()))
        assert listing(created["imageArn"]) == [
            ".", "./app", "./app/main.py", "./busybox", "./d", "./d/up -> ../../..", "./hosts -> /etc/hosts", "./inside -> app/main.py",
            "./keep.log", "./shared -> ../shared",
        ]  # fmt: skip

    def test_limits_are_settings_and_do_not_count_what_is_ignored(self):
        def reason(files: dict[str, str | bytes]) -> str:
            uri = support.upload(server, "limits.zip", support.zip_of(files))
            arn = support.create_image(server, "limits", uri)["imageArn"]
            support.wait_image(server, arn, "CREATE_FAILED")
            reason = support.build_of(server, arn)["stateReason"]
            server.microvms.delete_microvm_image(imageIdentifier=arn)
            return reason

        wrong = {"Dockerfile": "FROM scratch\nWRONG\n", ".dockerignore": "tmp\n"}
        many, large = {f"{index}": "" for index in range(20)}, {"large": b"x" * (2 << 20)}
        allowed = {
            "holds 22 files and directories; this server allows 10 (its setting build_context_entries)": wrong | many,
            "are 2097175 bytes in all; this server allows 1048576 bytes (its setting build_context_mib)": wrong | large,
        }
        with support.serving("build_context_mib = 1\nbuild_context_entries = 10\n") as server:
            for said, files in allowed.items():
                assert said in reason(files)
            ignored = {f"tmp/{name}": content for name, content in (many | large).items()}
            assert reason(wrong | ignored).startswith("The container image build failed. ")


class TestDirectories:
    def test_hearth_image_build_has_the_same_rules(self, server, listing, tmp_path):
        (tmp_path / "secret").write_text("of the host")
        context = tmp_path / "archive-directory"
        (context / ".venv").mkdir(parents=True)
        (context / "Dockerfile").write_text(LISTING)
        (context / ".dockerignore").write_text(".venv\nDockerfile\n.dockerignore\n")
        (context / "busybox").write_bytes(BUSYBOX.read_bytes())
        (context / "busybox").chmod(0o755)
        (context / ".venv/python").symlink_to("/usr/bin/python3")
        (context / "secret").symlink_to("../secret")
        (context / "etc").symlink_to("/etc")
        subprocess.run(["mkfifo", str(context / ".venv/pipe")], check=True, timeout=10)
        built = server.hearth("image", "build", str(context), "--memory", "512", timeout=support.BUILD_SECONDS)
        assert built.returncode == 0, (built.stdout, built.stderr)
        arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:archive-directory"
        assert listing(arn) == [".", "./busybox", "./etc -> /etc", "./secret -> ../secret"]

        subprocess.run(["mkfifo", str(context / "pipe")], check=True, timeout=10)
        refused = server.hearth("image", "build", str(context))
        assert refused.returncode != 0
        assert f"{context}/pipe: it is a named pipe" in refused.stderr
