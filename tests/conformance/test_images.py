"""Images: create, get, list, update, delete (SPEC 5.2), with the members that AWS answers."""

from __future__ import annotations

import datetime
import re
import secrets
import uuid

import pytest

import support
from support import error_of

from .things import UNKNOWN_IMAGE, managed_connector

CREATED = {
    "additionalOsCapabilities", "baseImageArn", "baseImageVersion", "buildPhaseOverrides", "buildRoleArn", "codeArtifact",
    "cpuConfigurations", "createdAt", "description", "egressNetworkConnectors", "environmentVariables", "hooks", "id", "imageArn",
    "imageVersion", "kmsKeyIdentifier", "latestActiveImageVersion", "latestFailedImageVersion", "logging", "name", "resources",
    "roleConfiguration", "state", "tags", "updatedAt",
}  # fmt: skip
SUMMARY = {"createdAt", "id", "imageArn", "latestActiveImageVersion", "latestFailedImageVersion", "name", "state", "tags", "updatedAt"}
ITEM = {"createdAt", "id", "imageArn", "latestActiveImageVersion", "latestFailedImageVersion", "name", "state"}


@pytest.mark.compat("image.create", "image.defaults", "wire.nulls")
def test_create_answers_every_member_of_the_projection(raw, things):
    """SPEC 5.2, B.1: the recorded key set, unset members as nulls, and the defaults."""
    name = things.name("created")
    sent = {
        "name": name,
        "baseImageArn": support.BASE_IMAGE_ARN,
        "buildRoleArn": support.BUILD_ROLE_ARN,
        "codeArtifact": {"uri": "s3://no-such-bucket/nothing.zip"},
    }
    reply = raw("POST", "/2025-09-09/microvm-images", sent)
    assert reply.status == 201, reply.body
    answer = reply.json()
    assert set(answer) == CREATED
    assert answer["imageArn"] == f"arn:aws:lambda:us-east-1:000000000000:microvm-image:{name}"
    assert (answer["name"], answer["imageVersion"], answer["state"]) == (name, "1.0", "CREATING")
    assert uuid.UUID(answer["id"])
    assert re.fullmatch(r"\d+\.0", answer["baseImageVersion"])
    assert answer["resources"] == [{"minimumMemoryInMiB": 2048}]
    assert answer["egressNetworkConnectors"] == [managed_connector("INTERNET_EGRESS")]
    assert answer["codeArtifact"] == sent["codeArtifact"]
    for member in (
        "additionalOsCapabilities", "buildPhaseOverrides", "cpuConfigurations", "description", "environmentVariables", "hooks",
        "kmsKeyIdentifier", "latestActiveImageVersion", "latestFailedImageVersion", "logging", "roleConfiguration", "tags",
    ):  # fmt: skip
        assert answer[member] is None, member
    assert isinstance(answer["createdAt"], (int, float)) and isinstance(answer["updatedAt"], (int, float))


@pytest.mark.compat("image.echo")
def test_create_echoes_what_it_was_given(microvms, things):
    """SPEC 5.2: every input of a build is part of the answer."""
    options = {
        "description": "words",
        "environmentVariables": {"MODE": "test"},
        "tags": {"team": "conformance"},
        "additionalOsCapabilities": ["ALL"],
        "logging": {"cloudWatch": {"logGroup": "/my/group", "logStream": "one"}},
        "hooks": {"port": 9000, "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 60}},
        "cpuConfigurations": [{"architecture": "X86_64"}],
    }
    created = things.broken(**options).created
    assert {member: created[member] for member in options} == options
    assert isinstance(created["createdAt"], datetime.datetime)


@pytest.mark.compat("image.states")
def test_a_build_that_succeeds_makes_the_image_created_and_its_version_active(microvms, things):
    """SPEC 2.1, 6.2."""
    image = things.image.settled
    assert image["state"] == "CREATED"
    assert image["latestActiveImageVersion"] == "1.0" and image.get("latestFailedImageVersion") is None
    version = microvms.get_microvm_image_version(imageIdentifier=things.image.arn, imageVersion="1.0")
    assert (version["state"], version["status"]) == ("SUCCESSFUL", "ACTIVE")


@pytest.mark.compat("image.failure")
def test_a_build_that_fails_makes_the_image_create_failed(microvms, things):
    """SPEC 2.1, 6.2: version FAILED and INACTIVE, image CREATE_FAILED, the reason on the build alone."""
    image = microvms.get_microvm_image(imageIdentifier=things.failed.arn)
    assert (image["state"], image["latestFailedImageVersion"]) == ("CREATE_FAILED", "1.0")
    assert image.get("latestActiveImageVersion") is None and "stateReason" not in image
    version = microvms.get_microvm_image_version(imageIdentifier=things.failed.arn, imageVersion="1.0")
    assert (version["state"], version["status"], version.get("stateReason")) == ("FAILED", "INACTIVE", None)
    (build,) = microvms.list_microvm_image_builds(imageIdentifier=things.failed.arn, imageVersion="1.0")["items"]
    assert build["buildState"] == "FAILED" and build["stateReason"].startswith("S3_NO_SUCH_BUCKET")


# The head of a program for ARM_64: enough for the kernel to refuse it.
ARM_PROGRAM = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + bytes([2, 0, 183, 0, 1, 0, 0, 0]).ljust(48, b"\0")


@pytest.mark.compat("build.advice")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('["true"]', r"Container Stopped with Exit Code: 0\. The image's main process must keep running: .*foreground.*"),
        ("no-such-server --port 80", r"Container Stopped with Exit Code: 127\. A command was not found.*"),
        (
            '["/server"]',
            r"The application could not be started: /server: exec format error\."
            r" It is a program for ARM_64, and this host's processor is X86_64 \(linux/amd64\): build it for that\.",
        ),
        ('["/etc/passwd"]', r"The application could not be started: /etc/passwd: permission denied\. .*chmod \+x.*"),
    ],
)
def test_a_build_whose_app_does_not_run_says_what_to_do(server, things, microvms, command, said):
    """The service's own words come first; the rest is in the log too."""
    dockerfile = f"FROM {support.BASE_IMAGE}\nCOPY server /server\nRUN chmod 755 /server\nCMD {command}\n"
    uri = support.upload(server, "not-running.zip", support.zip_of({"Dockerfile": dockerfile, "server": ARM_PROGRAM}))
    name = things.name("not-running")
    arn = microvms.create_microvm_image(name=name, **things.spec(uri))["imageArn"]
    support.wait_image(server, arn, "CREATE_FAILED")
    reason = support.build_of(server, arn)["stateReason"]
    assert re.fullmatch(said, reason), reason
    log = server.hearth("logs", name).stdout
    assert f"Build failed: {reason}" in log and str(server.data_dir) not in log, log


@pytest.mark.compat("image.get")
def test_get_answers_a_summary(raw, things):
    """SPEC 5.2: no build configuration; `tags` is an object even when there are none (4.3)."""
    answer = raw("GET", f"/2025-09-09/microvm-images/{things.failed.arn}").json()
    assert set(answer) == SUMMARY
    assert answer["tags"] == {"team": "conformance"}
    assert raw("GET", f"/2025-09-09/microvm-images/{things.image.arn}").json()["tags"] == {}


@pytest.mark.compat("image.list")
def test_list_answers_items_without_tags(raw, things):
    """SPEC 5.2."""
    arn, name = things.failed.arn, things.failed.created["name"]
    answer = raw("GET", f"/2025-09-09/microvm-images?nameFilter={name}").json()
    assert set(answer) == {"items", "nextToken"} and answer["nextToken"] is None
    assert [item["imageArn"] for item in answer["items"]] == [arn]
    assert set(answer["items"][0]) == ITEM


@pytest.mark.compat("image.name-filter")
def test_a_name_filter_is_a_part_of_the_name(microvms, things):
    """SPEC 5.2: substring match."""
    mark = uuid.uuid4().hex[:8]
    names = [things.broken(f"{before}{mark}{after}").created["name"] for before, after in [("a-", ""), ("", "-z"), ("m-", "-m")]]
    pages = microvms.get_paginator("list_microvm_images").paginate(nameFilter=mark)
    assert sorted(item["name"] for page in pages for item in page["items"]) == sorted(names)


@pytest.mark.compat("image.delete")
def test_delete_answers_deleting_and_then_the_image_is_not_found(raw, microvms, things):
    """SPEC 2.1, 5.2."""
    image = things.broken()
    reply = raw("DELETE", f"/2025-09-09/microvm-images/{image.arn}")
    assert (reply.status, reply.json()) == (200, {"imageIdentifier": image.arn, "state": "DELETING"})

    def gone():
        found = raw("GET", f"/2025-09-09/microvm-images/{image.arn}")
        assert found.status == 404 or found.json()["state"] == "DELETING", "a delete waiter knows no other state"
        return found.status == 404

    support.eventually(gone, "the image to be gone")
    assert image.arn not in [item["imageArn"] for item in microvms.list_microvm_images(nameFilter=image.created["name"])["items"]]


@pytest.mark.compat("image.delete-building")
@pytest.mark.parametrize("state", ["CREATING", "UPDATING"])
def test_delete_stops_a_build_that_runs(server, microvms, things, state):
    """Its processes and files are gone with the image, the next build has its turn, and the name is free."""
    # Names the process among those of other servers.
    command = f"sleep {secrets.randbelow(10**8) + 10**8}"
    dockerfile = f"FROM {support.BASE_IMAGE}\nRUN {command}\n"
    spec = things.spec(support.upload(server, "sleeper.zip", support.zip_of({"Dockerfile": dockerfile})))
    name = things.name("stopped")
    if state == "UPDATING":
        arn = things.broken(name).arn
        microvms.update_microvm_image(imageIdentifier=arn, **spec)
    else:
        arn = microvms.create_microvm_image(name=name, **spec)["imageArn"]

    def runs():
        return [line for _, line in support.command_lines() if command in line]

    support.eventually(runs, "the Dockerfile to run", 60)
    waiting = microvms.create_microvm_image(name=things.name("waiting"), **things.spec("s3://no-such-bucket/nothing.zip"))
    assert microvms.get_microvm_image(imageIdentifier=arn)["state"] == state
    assert microvms.delete_microvm_image(imageIdentifier=arn)["state"] == "DELETING"
    support.eventually(lambda: error_of_get(microvms, arn), "the image to be gone", 30)
    assert not runs()
    support.wait_image(server, waiting["imageArn"], "CREATE_FAILED", 30)
    assert not list((server.data_dir / "tmp").glob("build-*"))
    assert things.broken(name).arn == arn


@pytest.mark.compat("image.delete-building")
def test_delete_ends_the_machine_of_a_build(server, microvms, things):
    """The app never gets ready, and nobody has to wait until its time is over."""
    dockerfile = f'FROM {support.BASE_IMAGE}\nCMD ["sleep", "infinity"]\n'
    uri = support.upload(server, "never-ready.zip", support.zip_of({"Dockerfile": dockerfile}))
    hooks = {"port": 9000, "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 3600}}
    name = things.name("never-ready")
    arn = microvms.create_microvm_image(name=name, **things.spec(uri), hooks=hooks)["imageArn"]
    build = support.build_of(server, arn)["buildId"]

    def machines():
        return [line for _, line in support.command_lines() if f"build-{build}" in line and "qemu" in line]

    try:
        support.eventually(lambda: "cannot be called yet" in server.hearth("logs", name).stdout, "the app to be asked", 120)
        assert machines()
    finally:
        removed = server.hearth("image", "rm", name)
    assert (removed.returncode, removed.stdout) == (0, f"{name} is gone\n"), removed.stderr
    assert not machines() and not list((server.data_dir / "tmp").glob("*"))
    assert not list((server.data_dir / "images").glob(f"*/*{build}*"))


@pytest.mark.compat("image.name-free-again")
def test_the_name_of_a_deleted_image_is_free_again(microvms, things):
    """SPEC 2.1: reserved while DELETING, and no longer."""
    image = things.broken()
    microvms.delete_microvm_image(imageIdentifier=image.arn)
    support.eventually(
        lambda: error_of_get(microvms, image.arn) is not None,
        "the image to be gone",
    )
    again = things.broken(image.created["name"])
    assert again.arn == image.arn and again.created["imageVersion"] == "1.0"


def error_of_get(microvms, arn):
    try:
        microvms.get_microvm_image(imageIdentifier=arn)
    except microvms.exceptions.ResourceNotFoundException as error:
        return error
    return None


@pytest.mark.compat("image.client-token")
def test_a_client_token_makes_creation_idempotent(microvms, things):
    """SPEC 4.1: the same parameters answer the same image, others are a conflict."""
    name, token = things.name("idempotent"), str(uuid.uuid4())
    spec = things.spec("s3://no-such-bucket/nothing.zip") | {"name": name, "clientToken": token}
    first = microvms.create_microvm_image(**spec)
    assert microvms.create_microvm_image(**spec)["imageArn"] == first["imageArn"]
    code, message, status = error_of(microvms.create_microvm_image, **(spec | {"description": "another"}))
    assert (code, status) == ("ConflictException", 409) and message


@pytest.mark.compat("image.client-token-life")
def test_a_client_token_ends_with_its_image(microvms, things):
    """SPEC 4.1: AWS replays the creation of an image that was deleted; "a better implementation should scope tokens to the life of the resource"."""
    name, token = things.name("reborn"), str(uuid.uuid4())
    first = things.broken(name, clientToken=token)
    microvms.delete_microvm_image(imageIdentifier=first.arn)
    support.eventually(lambda: error_of_get(microvms, first.arn) is not None, "the image to be gone")
    second = things.broken(name, clientToken=token)
    assert microvms.get_microvm_image(imageIdentifier=second.arn)["state"] == "CREATE_FAILED"


@pytest.mark.compat("managed.list")
def test_managed_images_are_listed(raw, microvms):
    """SPEC 2, 5.3."""
    (item,) = [item for item in raw("GET", "/2025-09-09/managed-microvm-images").json()["items"] if item["imageArn"] == support.BASE_IMAGE_ARN]
    assert set(item) == {"createdAt", "imageArn", "updatedAt"}
    assert microvms.list_managed_microvm_images()["items"]


@pytest.mark.compat("managed.versions")
def test_managed_images_have_versions_named_by_their_major_number(raw, microvms):
    """SPEC 2, 5.3: listed as "1", "0", although images echo "1.0"."""
    items = raw("GET", f"/2025-09-09/managed-microvm-images/{support.BASE_IMAGE_ARN}/versions").json()["items"]
    assert items
    for item in items:
        assert {"createdAt", "imageArn", "imageVersion", "status", "updatedAt"} <= set(item)
        assert re.fullmatch(r"\d+", item["imageVersion"]) and item["imageArn"] == support.BASE_IMAGE_ARN
        assert item["status"] in ("AVAILABLE", "DEPRECATED", "RECALLED")
    assert microvms.list_managed_microvm_image_versions(imageIdentifier=support.BASE_IMAGE_ARN)["items"]


@pytest.mark.compat("managed.base-version")
def test_an_image_may_name_the_major_version_of_its_base(microvms, things):
    """SPEC 2: "1" in, "1.0" out."""
    newest = microvms.list_managed_microvm_image_versions(imageIdentifier=support.BASE_IMAGE_ARN)["items"][0]["imageVersion"]
    assert things.broken(baseImageVersion=newest).created["baseImageVersion"] == f"{newest}.0"


@pytest.mark.compat("image.unknown-update")
def test_update_of_an_unknown_image_is_not_found(microvms, things):
    """SPEC 3.3."""
    code, _, status = error_of(microvms.update_microvm_image, imageIdentifier=UNKNOWN_IMAGE, **things.spec(things.uri))
    assert (code, status) == ("ResourceNotFoundException", 404)
