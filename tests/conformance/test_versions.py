"""Versions and builds of an image (SPEC 2.1, 5.2, 5.3): one image is updated once, and the tests look at what could be seen meanwhile."""

from __future__ import annotations

import dataclasses
import re
import uuid

import pytest

import support
from support import error_of

from . import catalogue
from .things import Image

VERSION = {
    "additionalOsCapabilities", "baseImageArn", "baseImageVersion", "buildPhaseOverrides", "buildRoleArn", "codeArtifact",
    "cpuConfigurations", "createdAt", "description", "egressNetworkConnectors", "environmentVariables", "hooks", "imageArn", "imageVersion",
    "kmsKeyIdentifier", "logging", "resources", "roleConfiguration", "state", "stateReason", "status", "tags", "updatedAt", "versionStateTimeBucket",
}  # fmt: skip
BUILD = {
    "architecture", "buildId", "buildState", "chipset", "chipsetGeneration", "createdAt", "imageArn", "imageVersion", "stateReason",
    "terminationReasonCode",
}  # fmt: skip


@dataclasses.dataclass
class History:
    """An image with an inactive, an active and a failed version, and the answers to calls made on the way."""

    image: Image
    updated: dict
    while_updating: dict
    refused: dict[str, tuple]
    after: dict


@pytest.fixture(scope="module")
def history(server, microvms, raw, things):
    image = things.build(things.name("history"), environmentVariables={"MODE": "first"}, description="first", tags={"kept": "yes"})
    path = f"/2025-09-09/microvm-images/{image.arn}"
    updated = raw("PUT", path, things.spec(things.uri))
    assert updated.status == 200, updated.body
    refused = {
        "patch": error_of(microvms.update_microvm_image_version, imageIdentifier=image.arn, imageVersion="1.0", status="INACTIVE"),
        "delete version": error_of(microvms.delete_microvm_image_version, imageIdentifier=image.arn, imageVersion="1.0"),
    }
    while_updating = microvms.get_microvm_image(imageIdentifier=image.arn)
    support.wait_image(server, image.arn, "UPDATED")
    after = microvms.get_microvm_image(imageIdentifier=image.arn)
    microvms.update_microvm_image_version(imageIdentifier=image.arn, imageVersion="1.0", status="INACTIVE")
    support.wait_image(server, image.arn, "UPDATED")
    microvms.update_microvm_image(imageIdentifier=image.arn, **things.spec("s3://no-such-bucket/nothing.zip"))
    support.wait_image(server, image.arn, "UPDATE_FAILED")
    return History(image, updated.json(), while_updating, refused, after)


@pytest.mark.compat("image.update")
def test_update_answers_create_s_projection_without_tags(history):
    """SPEC 5.2: the next version, UPDATING, and the version that is active still."""
    from .test_images import CREATED

    assert set(history.updated) == CREATED - {"tags"}
    assert (history.updated["imageVersion"], history.updated["state"]) == ("2.0", "UPDATING")
    assert history.updated["latestActiveImageVersion"] == "1.0"


@pytest.mark.compat("image.update-no-inheritance")
def test_update_inherits_nothing(history, microvms):
    """SPEC 5.2: what an update leaves out is unset."""
    version = microvms.get_microvm_image_version(imageIdentifier=history.image.arn, imageVersion="2.0")
    assert version.get("environmentVariables") is None and version.get("description") is None


@pytest.mark.compat("image.updating")
def test_the_old_version_stays_active_until_the_new_one_is(history):
    """SPEC 2.1, 5.2: never CREATED again."""
    assert (history.while_updating["state"], history.while_updating["latestActiveImageVersion"]) == ("UPDATING", "1.0")
    assert (history.after["state"], history.after["latestActiveImageVersion"]) == ("UPDATED", "2.0")


@pytest.mark.compat("message.image-busy")
@pytest.mark.parametrize("call", ["patch", "delete version"])
def test_an_image_that_updates_is_busy(history, call):
    """SPEC 3.3."""
    catalogue.check("image-busy", history.refused[call])


@pytest.mark.compat("version.failed-update")
def test_a_failed_update_leaves_the_active_version(history, microvms):
    """SPEC 6.2: image UPDATE_FAILED, `latestFailedImageVersion` set, the active one stays."""
    image = microvms.get_microvm_image(imageIdentifier=history.image.arn)
    assert (image["state"], image["latestActiveImageVersion"], image["latestFailedImageVersion"]) == ("UPDATE_FAILED", "2.0", "3.0")


@pytest.mark.compat("version.get")
def test_get_answers_build_inputs_and_states(history, raw):
    """SPEC 5.3."""
    answer = raw("GET", f"/2025-09-09/microvm-images/{history.image.arn}/versions/1.0").json()
    assert VERSION <= set(answer), VERSION - set(answer)
    assert (answer["imageVersion"], answer["state"], answer["status"]) == ("1.0", "SUCCESSFUL", "INACTIVE")
    assert answer["environmentVariables"] == {"MODE": "first"} and answer["description"] == "first"
    assert re.fullmatch(r"SUCCESSFUL#\d{8}", answer["versionStateTimeBucket"])


@pytest.mark.compat("version.list")
def test_list_answers_the_same_without_the_environment(history, raw):
    """SPEC 5.3."""
    items = {item["imageVersion"]: item for item in raw("GET", f"/2025-09-09/microvm-images/{history.image.arn}/versions").json()["items"]}
    assert {version: (item["state"], item["status"]) for version, item in items.items()} == {
        "1.0": ("SUCCESSFUL", "INACTIVE"),
        "2.0": ("SUCCESSFUL", "ACTIVE"),
        "3.0": ("FAILED", "INACTIVE"),
    }
    assert VERSION <= set(items["1.0"]) and items["1.0"]["environmentVariables"] is None


@pytest.mark.compat("version.inactive")
def test_an_inactive_version_is_not_launched(history, microvms):
    """SPEC 5.3."""
    refused = error_of(microvms.run_microvm, imageIdentifier=history.image.arn, imageVersion="1.0")
    catalogue.check("no-active-version-pinned", refused, arn=history.image.arn, version="1.0")


@pytest.mark.compat("version.patch")
def test_patch_answers_the_whole_version(history, server, raw):
    """SPEC 5.3. The image passes through UPDATING (2.1)."""
    path = f"/2025-09-09/microvm-images/{history.image.arn}/versions/1.0"
    reply = raw("PATCH", path, {"status": "ACTIVE"})
    assert reply.status == 200 and VERSION <= set(reply.json())
    support.wait_image(server, history.image.arn, "UPDATED")
    assert raw("GET", path).json()["status"] == "ACTIVE"
    assert raw("PATCH", path, {"status": "INACTIVE"}).status == 200
    support.wait_image(server, history.image.arn, "UPDATED")


@pytest.mark.compat("version.delete")
def test_delete_of_a_version(history, server, raw):
    """SPEC 5.3."""
    path = f"/2025-09-09/microvm-images/{history.image.arn}/versions/3.0"
    reply = raw("DELETE", path)
    assert reply.status == 200, reply.body
    assert reply.json() == {"imageIdentifier": history.image.arn, "imageVersion": "3.0", "state": "DELETING"}
    support.eventually(lambda: raw("GET", path).status == 404, "the version to be gone")
    image = support.wait_image(server, history.image.arn, "UPDATED")
    assert image["latestActiveImageVersion"] == "2.0"


@pytest.mark.compat("message.delete-only-version")
def test_the_only_version_is_not_deleted(microvms, things):
    """SPEC 3.3: refused as a validation; the words are not recorded."""
    catalogue.check("delete-only-version", error_of(microvms.delete_microvm_image_version, imageIdentifier=things.failed.arn, imageVersion="1.0"))


@pytest.mark.compat("version.client-token")
def test_a_client_token_makes_an_update_idempotent(microvms, server, things):
    """SPEC 4.1."""
    image, token = things.broken(), str(uuid.uuid4())
    spec = things.spec("s3://no-such-bucket/other.zip") | {"imageIdentifier": image.arn, "clientToken": token}
    first = microvms.update_microvm_image(**spec)
    assert first["imageVersion"] == "2.0"
    assert microvms.update_microvm_image(**spec)["imageVersion"] == "2.0"
    support.wait_image(server, image.arn, "UPDATE_FAILED")
    assert error_of(microvms.update_microvm_image, **(spec | {"description": "another"}))[::2] == ("ConflictException", 409)
    deleted = microvms.delete_microvm_image_version(imageIdentifier=image.arn, imageVersion="1.0")
    assert (deleted["imageVersion"], deleted["state"]) == ("1.0", "DELETING")


@pytest.mark.compat("build.list", "build.chipset")
def test_builds_are_listed(history, raw):
    """SPEC 2.1, 5.3: one for each chipset that the version is built for; here the host's own."""
    path = f"/2025-09-09/microvm-images/{history.image.arn}/versions/2.0/builds"
    (item,) = raw("GET", path).json()["items"]
    assert set(item) == BUILD
    assert (item["buildState"], item["architecture"], item["chipset"]) == ("SUCCESSFUL", "X86_64", "INTEL")
    assert uuid.UUID(item["buildId"]) and item["imageVersion"] == "2.0"


@pytest.mark.compat("build.filters")
@pytest.mark.parametrize(
    ("filter", "found"), [({"architecture": "X86_64"}, 1), ({"architecture": "ARM_64"}, 0), ({"chipset": "INTEL"}, 1), ({"chipset": "GRAVITON"}, 0)]
)
def test_builds_are_filtered(history, microvms, filter, found):
    """SPEC 5.3."""
    assert len(microvms.list_microvm_image_builds(imageIdentifier=history.image.arn, imageVersion="2.0", **filter)["items"]) == found


@pytest.mark.compat("build.architecture", "build.filters")
def test_builds_for_another_architecture_are_found_by_it(server, microvms, things):
    """SPEC 5.3, 6.1: scripts that ask for ARM_64 look for their builds by ARM_64, and wait until there is one and it has ended."""
    name = things.name("foreign")
    asked = [{"architecture": "ARM_64"}]
    image = things.build(name, cpuConfigurations=asked)
    assert image.created["cpuConfigurations"] == asked
    version = {"imageIdentifier": image.arn, "imageVersion": "1.0"}
    assert microvms.get_microvm_image_version(**version)["cpuConfigurations"] == asked
    for found in ({"architecture": "ARM_64"}, {"chipset": "GRAVITON"}, {}):
        (item,) = microvms.list_microvm_image_builds(**version, **found)["items"]
        assert (item["buildState"], item["architecture"], item["chipset"]) == ("SUCCESSFUL", "ARM_64", "GRAVITON")
        assert item["stateReason"] == "ARM_64 was asked for. Built for X86_64, the architecture of this host."
    build = microvms.get_microvm_image_build(**version, buildId=item["buildId"])
    assert {member: build[member] for member in item} == item
    for other in ({"architecture": "X86_64"}, {"architecture": "ARM_64", "chipset": "INTEL"}):
        assert microvms.list_microvm_image_builds(**version, **other)["items"] == []
    first = server.hearth("logs", name).stdout.splitlines()[0]
    assert "ARM_64 was asked for" in first and "built and run for X86_64" in first


@pytest.mark.compat("build.architecture")
def test_a_build_for_several_architectures_is_found_by_each(microvms, things):
    image = things.broken(cpuConfigurations=[{"architecture": "ARM_64"}, {"architecture": "X86_64"}])
    version = {"imageIdentifier": image.arn, "imageVersion": "1.0"}
    (one,) = microvms.list_microvm_image_builds(**version)["items"]
    assert one["architecture"] == "X86_64"
    for architecture in ("ARM_64", "X86_64"):
        (item,) = microvms.list_microvm_image_builds(**version, architecture=architecture)["items"]
        assert (item["buildId"], item["architecture"], item["buildState"]) == (one["buildId"], architecture, "FAILED")


@pytest.mark.compat("build.architecture-strict")
def test_a_strict_server_refuses_other_architectures(things):
    said = (
        f"The requested CPU architecture ARM_64 is not supported by base MicroVM image {support.BASE_IMAGE_ARN}."
        ' Supported CPU architectures are: [X86_64]. This server\'s setting architectures is "strict".'
    )
    spec = things.spec("s3://no-such-bucket/nothing.zip")
    with support.serving('architectures = "strict"\n') as strict:
        for asked in (["ARM_64"], ["X86_64", "ARM_64"]):
            options = {"cpuConfigurations": [{"architecture": architecture} for architecture in asked]}
            assert error_of(strict.microvms.create_microvm_image, name="other", **spec, **options) == ("ValidationException", said, 400)
        own = strict.microvms.create_microvm_image(name="own", **spec, cpuConfigurations=[{"architecture": "X86_64"}])
        support.wait_image(strict, own["imageArn"], "CREATE_FAILED")
        refused = error_of(strict.microvms.update_microvm_image, imageIdentifier=own["imageArn"], **spec, **options)
        assert refused == ("ValidationException", said, 400)
        (version, _) = strict.microvms.list_managed_microvm_image_versions(imageIdentifier=support.BASE_IMAGE_ARN)["items"]
        assert version["supportedCpuConfigurations"] == [{"architecture": "X86_64"}]


@pytest.mark.compat("build.get")
def test_a_build_has_the_sizes_of_its_snapshot(history, raw, microvms):
    """SPEC 5.3: measured from the files, and absent when the container build failed."""
    path = f"/2025-09-09/microvm-images/{history.image.arn}/versions/2.0/builds"
    (item,) = raw("GET", path).json()["items"]
    answer = raw("GET", f"{path}/{item['buildId']}").json()
    assert set(answer) == BUILD | {"snapshotBuild"}
    sizes = microvms.get_microvm_image_build(imageIdentifier=history.image.arn, imageVersion="2.0", buildId=item["buildId"])["snapshotBuild"]
    assert set(sizes) == {"codeInstallSizeInBytes", "diskSnapshotSizeInBytes", "memorySnapshotSizeInBytes"}
    assert all(size > 0 for size in sizes.values())
    assert 10 << 20 < sizes["memorySnapshotSizeInBytes"] <= 512 << 20, "what a small guest has touched of its memory"


@pytest.mark.compat("build.failed")
def test_a_failed_build_has_no_sizes(things, raw, microvms):
    """SPEC 5.3."""
    (item,) = microvms.list_microvm_image_builds(imageIdentifier=things.failed.arn, imageVersion="1.0")["items"]
    answer = raw("GET", f"/2025-09-09/microvm-images/{things.failed.arn}/versions/1.0/builds/{item['buildId']}").json()
    assert answer.get("snapshotBuild") is None and answer["buildState"] == "FAILED"


@pytest.mark.compat("build.unknown")
def test_an_unknown_build_is_not_found(things, microvms):
    """SPEC 5.3, appendix A: ResourceNotFoundException."""
    refused = error_of(microvms.get_microvm_image_build, imageIdentifier=things.failed.arn, imageVersion="1.0", buildId=str(uuid.uuid4()))
    assert refused[::2] == ("ResourceNotFoundException", 404)
