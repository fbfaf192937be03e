"""The shortcuts for people: `hearth image build`, `run`, `ps`, `logs`, `curl`, `suspend`, `resume`, `terminate`."""

import json
import re

import pytest

import support
from support import FLASK_HELLO, FLASK_PORT


def succeed(server, *arguments: str, **options) -> str:
    answer = server.hearth(*arguments, **options)
    assert answer.returncode == 0, f"{arguments}: {answer.stdout}{answer.stderr}"
    return answer.stdout


@pytest.fixture
def microvm(server, image):
    """The id of a MicroVM started with `hearth run`."""
    said = succeed(server, "run", "flask-hello")
    found = re.search(r"microvm-[0-9a-f-]{36}", said)
    assert found, said
    yield found.group()
    server.hearth("terminate", found.group())


def test_image_build_follows_the_build_and_succeeds(server, image):
    answer = server.hearth("image", "build", str(FLASK_HELLO), "--name", "built-by-hand", "--memory", "512", timeout=support.BUILD_SECONDS)
    said = answer.stdout + answer.stderr
    assert answer.returncode == 0, said
    assert "STEP" in said or "FROM" in said, "the build log is followed"
    assert "built-by-hand" in succeed(server, "image", "ls")
    again = server.hearth("image", "build", str(FLASK_HELLO), "--name", "built-by-hand", "--memory", "512", timeout=support.BUILD_SECONDS)
    assert again.returncode == 0 and "2.0 is UPDATED" in again.stdout, again.stdout + again.stderr
    succeed(server, "image", "rm", "built-by-hand")


def test_a_failing_image_build_says_why_and_fails(server, tmp_path):
    (tmp_path / "Dockerfile").write_text(f"FROM {support.BASE_IMAGE}\nRUN echo the reason is here && false\n")
    answer = server.hearth("image", "build", str(tmp_path), "--name", "fails-by-hand", timeout=support.BUILD_SECONDS)
    said = answer.stdout + answer.stderr
    assert answer.returncode != 0
    assert "the reason is here" in said and "The container image build failed." in said
    server.hearth("image", "rm", "fails-by-hand")


def test_image_build_another_platform_is_told_first(server, tmp_path):
    (tmp_path / "Dockerfile").write_text(f"FROM {support.BASE_IMAGE}\nRUN false\n")
    build = ("image", "build", str(tmp_path), "--name", "for-arm", "--platform")
    answer = server.hearth(*build, "linux/arm64", timeout=support.BUILD_SECONDS)
    assert answer.returncode == 1
    assert "ARM_64 was asked for" in answer.stdout.splitlines()[0] and "(linux/amd64)" in answer.stdout.splitlines()[0]
    arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:for-arm"
    version = server.microvms.get_microvm_image_version(imageIdentifier=arn, imageVersion="1.0")
    assert version["cpuConfigurations"] == [{"architecture": "ARM_64"}]
    refused = server.hearth(*build, "windows/amd64")
    assert refused.returncode == 2 and "linux/amd64 or linux/arm64" in refused.stderr
    server.hearth("image", "rm", "for-arm")


def test_a_directory_without_a_dockerfile_is_refused_before_anything_is_sent(server, tmp_path):
    answer = server.hearth("image", "build", str(tmp_path), "--name", "nothing")
    assert answer.returncode != 0 and "Dockerfile" in answer.stderr


def test_ps_lists_it(server, microvm):
    said = succeed(server, "ps")
    line = next(line for line in said.splitlines() if microvm in line)
    assert "RUNNING" in line


def test_curl_reaches_it_with_a_token_of_its_own(server, microvm):
    said = succeed(server, "curl", microvm, "/", "--port", str(FLASK_PORT), "--", "--silent")
    assert json.loads(said)["memory"] == 1


def test_open_prints_a_command_that_works(server, microvm):
    said = succeed(server, "open", microvm, "--port", str(FLASK_PORT))
    assert "curl" in said and "X-aws-proxy-auth" in said


def test_suspend_resume_and_terminate(server, microvm):
    for verb, state in [("suspend", "SUSPENDED"), ("resume", "RUNNING"), ("terminate", "TERMINATED")]:
        succeed(server, verb, microvm)
        support.eventually(lambda: server.microvms.get_microvm(microvmIdentifier=microvm)["state"] == state, state)


def test_the_beginning_of_an_id_is_enough(server, microvm):
    succeed(server, "suspend", microvm[: len("microvm-") + 12])


def test_logs_print_what_the_app_wrote(server, microvm):
    succeed(server, "curl", microvm, "/say?words=hello", "--port", str(FLASK_PORT))
    support.eventually(lambda: "hello" in succeed(server, "logs", microvm).splitlines(), "the app's output")


def test_an_unknown_microvm_is_named(server):
    answer = server.hearth("suspend", "microvm-unknown")
    assert answer.returncode != 0 and "microvm-unknown" in answer.stderr
