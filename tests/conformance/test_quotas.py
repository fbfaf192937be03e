"""Quotas (SPEC 3.1, 7, 14): a server that allows little."""

from __future__ import annotations

import pytest

import support
from support import error_of

from .catalogue import check
from .clients import Raw
from .things import OPERATOR_ROLE, UNKNOWN_MICROVM, VPC, Things

CONFIG = """
[quotas]
allocated_memory_mib = 512
images = 2
versions_per_image = 2
connectors = 1
shell_token = { per_second = 0.02, burst = 1 }
resume = { per_second = 0.02, burst = 1 }
"""
EXCEEDED = ("ServiceQuotaExceededException", 402)


@pytest.fixture(scope="module")
def small():
    with support.serving(CONFIG, min_idle_seconds=60) as server:
        yield server


@pytest.fixture(scope="module")
def few(small):
    few = Things(small, small.microvms)
    yield few
    few.end()


@pytest.mark.compat("message.memory-quota", "quota.memory")
def test_memory(small, few):
    """SPEC 3.3, 7: refused once the quota is reached; suspended MicroVMs count, terminated ones do not."""
    first = few.run()

    def refused():
        return error_of(small.microvms.run_microvm, imageIdentifier=few.image.arn)

    check("memory-quota", refused())
    small.microvms.suspend_microvm(microvmIdentifier=first.id)
    first.wait("SUSPENDED")
    check("memory-quota", refused())
    raw = Raw(small)
    reply = raw("POST", "/2025-09-09/microvms", {"imageIdentifier": few.image.arn})
    raw.close()
    assert set(reply.json()) == {"message", "quotaCode", "resourceId", "resourceType", "serviceCode"}
    first.terminate()
    first.wait("TERMINATED")
    few.run(wait=None).terminate()


@pytest.mark.compat("quota.images", "quota.versions")
def test_images_and_versions(small, few):
    """SPEC 3.1, 14."""
    assert few.image and few.failed
    spec = few.spec("s3://no-such-bucket/nothing.zip")
    assert error_of(small.microvms.create_microvm_image, name="third", **spec)[::2] == EXCEEDED
    small.microvms.update_microvm_image(imageIdentifier=few.failed.arn, **spec)
    support.wait_image(small, few.failed.arn, "UPDATE_FAILED")
    assert error_of(small.microvms.update_microvm_image, imageIdentifier=few.failed.arn, **spec)[::2] == EXCEEDED


@pytest.mark.compat("quota.connectors")
def test_connectors(small):
    """SPEC 3.1: NetworkConnectorLimitExceededException is a 400."""
    core = small.client("lambda-core")
    spec = {"OperatorRole": OPERATOR_ROLE, "Configuration": {"VpcEgressConfiguration": VPC}}
    core.create_network_connector(Name="one", **spec)
    assert error_of(core.create_network_connector, Name="two", **spec)[::2] == ("NetworkConnectorLimitExceededException", 400)


@pytest.mark.compat("quota.rates")
def test_rates(small):
    """SPEC 3.1, 14: 429 with `Retry-After`; a call of another kind has its own rate."""
    raw = Raw(small)
    path = f"/2025-09-09/microvms/{UNKNOWN_MICROVM}"
    for verb, body in [("shell-auth-token", {"expirationInMinutes": 5}), ("resume", {})]:
        assert raw("POST", f"{path}/{verb}", body).status == 404
        reply = raw("POST", f"{path}/{verb}", body)
        assert (reply.status, reply.exception) == (429, "ThrottlingException")
        assert {"message", "serviceCode", "quotaCode"} <= set(reply.json())
        assert 1 <= int(reply.headers["Retry-After"]) <= 50
    raw.close()
    client = small.microvms
    assert error_of(client.resume_microvm, microvmIdentifier=UNKNOWN_MICROVM)[::2] == ("ThrottlingException", 429)
