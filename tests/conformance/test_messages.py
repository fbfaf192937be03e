"""The catalogue of SPEC 3.3, word for word. What needs an image while it is updated is in test_versions.py, connectors in test_connectors.py."""

from __future__ import annotations

import pytest

import support
from support import error_of

from .catalogue import check
from .things import OTHER_ACCOUNT, UNKNOWN_IMAGE, UNKNOWN_MICROVM, image_arn, managed_connector

PORTS = [{"port": 8080}]


@pytest.fixture
def create(microvms, things):
    """Tries to create an image with these members; its name is good for nothing else."""

    def attempt(**options):
        spec = things.spec("s3://artifacts/nothing.zip") | {"name": "refused"} | options
        return error_of(microvms.create_microvm_image, **spec)

    return attempt


@pytest.mark.compat("message.image-unknown")
@pytest.mark.parametrize("call", ["get_microvm_image", "delete_microvm_image", "list_microvm_image_versions"])
def test_image_unknown(microvms, call):
    check("image-unknown", error_of(getattr(microvms, call), imageIdentifier=UNKNOWN_IMAGE), arn=UNKNOWN_IMAGE)


@pytest.mark.compat("message.image-unknown")
def test_image_unknown_to_update(microvms, things):
    refused = error_of(microvms.update_microvm_image, imageIdentifier=UNKNOWN_IMAGE, **things.spec("s3://artifacts/nothing.zip"))
    check("image-unknown", refused, arn=UNKNOWN_IMAGE)


@pytest.mark.compat("message.version-unknown")
@pytest.mark.parametrize(
    ("call", "options"),
    [("get_microvm_image_version", {}), ("list_microvm_image_builds", {}), ("update_microvm_image_version", {"status": "ACTIVE"}),
     ("delete_microvm_image_version", {})],
)  # fmt: skip
def test_version_unknown(microvms, things, call, options):
    refused = error_of(getattr(microvms, call), imageIdentifier=things.failed.arn, imageVersion="9.0", **options)
    check("version-unknown", refused, arn=things.failed.arn, version="9.0")


@pytest.mark.compat("message.microvm-unknown")
@pytest.mark.parametrize(
    ("call", "options"),
    [("get_microvm", {}), ("suspend_microvm", {}), ("resume_microvm", {}), ("terminate_microvm", {}),
     ("create_microvm_auth_token", {"expirationInMinutes": 5, "allowedPorts": PORTS}),
     ("create_microvm_shell_auth_token", {"expirationInMinutes": 5})],
)  # fmt: skip
def test_microvm_unknown(microvms, call, options):
    check("microvm-unknown", error_of(getattr(microvms, call), microvmIdentifier=UNKNOWN_MICROVM, **options), id=UNKNOWN_MICROVM)


@pytest.mark.compat("message.no-active-version")
def test_no_active_version(microvms, things):
    for arn in (UNKNOWN_IMAGE, things.failed.arn):
        check("no-active-version", error_of(microvms.run_microvm, imageIdentifier=arn), arn=arn)


@pytest.mark.compat("message.no-active-version-pinned")
def test_no_active_version_pinned(microvms, things):
    for arn, version in ((UNKNOWN_IMAGE, "1.0"), (things.failed.arn, "1.0"), (things.failed.arn, "9.0")):
        check("no-active-version-pinned", error_of(microvms.run_microvm, imageIdentifier=arn, imageVersion=version), arn=arn, version=version)


@pytest.mark.compat("message.bare-name")
@pytest.mark.parametrize("call", ["get_microvm_image", "delete_microvm_image", "list_microvm_image_versions"])
def test_bare_name(microvms, call):
    check("bare-name", error_of(getattr(microvms, call), imageIdentifier="static-server"))


@pytest.mark.compat("message.bare-name-run")
def test_bare_name_run(microvms):
    check("bare-name-run", error_of(microvms.run_microvm, imageIdentifier="static-server"))


@pytest.mark.compat("message.name-taken")
def test_name_taken(create, things):
    name = things.failed.created["name"]
    check("name-taken", create(name=name), name=name)


@pytest.mark.compat("message.delete-image-in-use")
def test_delete_image_in_use(microvms, things):
    assert things.microvm
    check("delete-image-in-use", error_of(microvms.delete_microvm_image, imageIdentifier=things.image.arn))


@pytest.mark.compat("message.memory-size")
@pytest.mark.parametrize("size", [0, 511, 700, 16384])
def test_memory_size(create, size):
    check("memory-size", create(resources=[{"minimumMemoryInMiB": size}]), size=str(size), arn=support.BASE_IMAGE_ARN)


@pytest.mark.compat("message.artifact-uri")
@pytest.mark.parametrize("uri", ["https://example.org/x.zip", "s3://bucket", "000000000000.dkr.ecr.us-east-1.amazonaws.com/app:1"])
def test_artifact_uri(create, uri):
    check("artifact-uri", create(codeArtifact={"uri": uri}))


@pytest.mark.compat("message.base-version-unknown")
def test_base_version_unknown(create):
    check("base-version-unknown", create(baseImageVersion="999"), arn=support.BASE_IMAGE_ARN, version="999")


@pytest.mark.compat("message.base-version-form")
def test_base_version_form(create):
    check("base-version-form", create(baseImageVersion="1.0"))


@pytest.mark.compat("message.environment-reserved")
def test_environment_reserved(create):
    check("environment-reserved", create(environmentVariables={"AWS_REGION": "eu-west-1"}), key="AWS_REGION")


@pytest.mark.compat("message.ready-hook-needed")
@pytest.mark.parametrize("hook", ["run", "resume", "suspend", "terminate"])
def test_ready_hook_needed(create, hook):
    check("ready-hook-needed", create(hooks={"port": 9000, "microvmHooks": {hook: "ENABLED"}}))


@pytest.mark.compat("message.payload-without-hook")
def test_payload_without_hook(microvms, things):
    check("payload-without-hook", error_of(microvms.run_microvm, imageIdentifier=things.image.arn, runHookPayload="{}"))


@pytest.mark.compat("message.logging-without-role")
def test_logging_without_role(microvms, things):
    logging = {"cloudWatch": {"logGroup": "/my/group"}}
    check("logging-without-role", error_of(microvms.run_microvm, imageIdentifier=things.image.arn, logging=logging))


@pytest.mark.compat("key.refused")
def test_key_refused(create, microvms, things):
    """No encryption is accepted that is not done, and nothing is left of the request."""
    said = "The KMS key alias/mine cannot be used: this server does not encrypt with customer managed keys. Leave out kmsKeyIdentifier."
    refusals = [
        create(kmsKeyIdentifier="alias/mine"),
        error_of(microvms.run_microvm, imageIdentifier=things.image.arn, kmsKeyIdentifier="alias/mine"),
        error_of(
            microvms.update_microvm_image, imageIdentifier=things.image.arn, kmsKeyIdentifier="alias/mine", **things.spec(things.uri)
        ),
    ]
    assert refusals == [("ValidationException", said, 400)] * 3
    assert microvms.get_microvm_image(imageIdentifier=things.image.arn)["latestActiveImageVersion"] == "1.0"


@pytest.mark.compat("message.connector-malformed")
@pytest.mark.parametrize("member", ["ingressNetworkConnectors", "egressNetworkConnectors"])
def test_connector_malformed(microvms, things, member):
    check("connector-malformed", error_of(microvms.run_microvm, imageIdentifier=things.image.arn, **{member: ["HTTP_INGRESS"]}))


@pytest.mark.compat("message.connector-unrecognized")
@pytest.mark.parametrize("member", ["ingressNetworkConnectors", "egressNetworkConnectors"])
def test_connector_unrecognized(microvms, things, member):
    arn = managed_connector("MOON_BASE")
    check("connector-unrecognized", error_of(microvms.run_microvm, imageIdentifier=things.image.arn, **{member: [arn]}), arn=arn)


@pytest.mark.compat("message.two-egress-connectors")
def test_two_egress_connectors(microvms, things):
    two = [managed_connector("INTERNET_EGRESS")] * 2
    check("two-egress-connectors", error_of(microvms.run_microvm, imageIdentifier=things.image.arn, egressNetworkConnectors=two))


@pytest.mark.compat("message.all-ingress-mixed")
def test_all_ingress_mixed(microvms, things):
    """Only told when a shell token is asked for."""
    microvm = things.run(wait=None, ingressNetworkConnectors=[managed_connector("ALL_INGRESS"), managed_connector("HTTP_INGRESS")])
    check("all-ingress-mixed", error_of(microvms.create_microvm_shell_auth_token, microvmIdentifier=microvm.id, expirationInMinutes=5))
    microvm.terminate()


@pytest.mark.compat("message.shell-without-connector")
def test_shell_without_connector(microvms, things):
    refused = error_of(microvms.create_microvm_shell_auth_token, microvmIdentifier=things.microvm.id, expirationInMinutes=5)
    check("shell-without-connector", refused)


@pytest.mark.compat("message.token-lifetime")
def test_token_lifetime(microvms, things):
    refused = error_of(microvms.create_microvm_auth_token, microvmIdentifier=things.microvm.id, expirationInMinutes=61, allowedPorts=PORTS)
    check("token-lifetime", refused, minutes="61")


@pytest.mark.compat("message.microvm-terminated")
@pytest.mark.parametrize(
    ("call", "options"),
    [("suspend_microvm", {}), ("resume_microvm", {}), ("create_microvm_auth_token", {"expirationInMinutes": 5, "allowedPorts": PORTS})],
)
def test_microvm_terminated(microvms, things, call, options):
    ended = things.terminated.id
    check("microvm-terminated", error_of(getattr(microvms, call), microvmIdentifier=ended, **options), id=ended)


@pytest.mark.compat("message.cross-account")
def test_cross_account(raw):
    """A capital `Message` that names the caller; whether the image exists is not told."""
    replies = [raw("GET", f"/2025-09-09/microvm-images/{image_arn(name, OTHER_ACCOUNT)}") for name in ("here", "there")]
    for reply in replies:
        check("cross-account", reply.refusal())
        assert "arn:aws:" in reply.json()["Message"] and "message" not in reply.json()
    assert replies[0].body.replace(b"here", b"there") == replies[1].body.replace(b"tthere", b"there")


@pytest.mark.compat("message.slash-arn")
def test_slash_arn(raw):
    """SPEC 2: the ARN form with a slash is refused with 403, percent-encoded as SDKs send it."""
    reply = raw("GET", "/2025-09-09/microvm-images/" + UNKNOWN_IMAGE.replace(":microvm-image:", "%3Amicrovm-image%2F"))
    assert (reply.status, reply.exception) == (403, "AccessDeniedException")
