"""What goes over the wire beside the operations themselves (SPEC 1, 2, 3.1, 3.2)."""

from __future__ import annotations

import http.client
import json
import uuid

import pytest

from .clients import quoted
from .things import UNKNOWN_IMAGE, UNKNOWN_MICROVM

IMAGES = "/2025-09-09/microvm-images"
MICROVMS = "/2025-09-09/microvms"


@pytest.mark.compat("wire.headers")
def test_answers_are_json_with_a_request_id(raw):
    """SPEC 1, B.1."""
    for reply in (raw("GET", MICROVMS), raw("GET", f"{MICROVMS}/{UNKNOWN_MICROVM}")):
        assert reply.headers["Content-Type"] == "application/json"
        assert uuid.UUID(reply.headers["x-amzn-requestid"])


@pytest.mark.compat("wire.error-shape")
def test_an_error_s_type_is_a_header_and_its_members_are_all_there(raw):
    """SPEC 3.1, B.5: no `__type`, lower-case `message`, nulls for what is unset."""
    reply = raw("GET", f"{MICROVMS}/{UNKNOWN_MICROVM}")
    assert reply.exception == "ResourceNotFoundException"
    assert reply.json() == {"message": f"MicroVM not found: {UNKNOWN_MICROVM}", "resourceId": None, "resourceType": None}
    assert set(raw("POST", MICROVMS, {}).json()) == {"message"}


@pytest.mark.compat("wire.encoded-arns")
def test_arns_in_paths_may_be_encoded_or_raw(raw, things):
    """SPEC 2."""
    for written in (things.failed.arn, quoted(things.failed.arn), quoted(things.failed.arn).lower().replace("%3a", "%3a")):
        assert raw("GET", f"{IMAGES}/{written}").status == 200, written


@pytest.mark.compat("wire.malformed")
@pytest.mark.parametrize("body", ["{", "[]", "null", '"text"', "\x00", '{"name": 5}', '{"name": ["x"]}', '{"resources": {}}', '{"tags": []}', "{} {}"])
def test_a_request_that_cannot_be_parsed_gets_a_null_message(raw, body):
    """SPEC 3.1."""
    reply = raw("POST", IMAGES, body)
    assert (reply.status, reply.exception, reply.json()) == (400, "ValidationException", {"message": None})


@pytest.mark.compat("wire.boolean-structure")
def test_a_boolean_where_a_structure_belongs(raw):
    """SPEC 3.1."""
    reply = raw("POST", IMAGES, '{"codeArtifact": true}')
    assert (reply.status, reply.json()) == (400, {"Message": "Expected null"})


@pytest.mark.compat("wire.unknown-members")
def test_members_that_nobody_knows_and_nulls_are_ignored(raw):
    """SPEC 1.1, 1.2: a request of another model is judged by what is known of it."""
    reply = raw("POST", MICROVMS, {"imageIdentifier": UNKNOWN_IMAGE, "future": {"a": [1]}, "idlePolicy": None, "logging": None})
    assert reply.refusal() == ("ResourceNotFoundException", f"No active version found for MicroVM image {UNKNOWN_IMAGE}", 404)


@pytest.mark.compat("wire.unknown-route")
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/2025-09-09/no-such-thing"), ("PATCH", MICROVMS), ("GET", "/2015-03-31/functions"), ("GET", f"{IMAGES}/a/b/c/d/e/f"),
     ("POST", f"{MICROVMS}/{UNKNOWN_MICROVM}/exec"), ("GET", f"{IMAGES}/arn:aws:lambda:us-east-1:000000000000:microvm-image/slash")],
)  # fmt: skip
def test_an_unknown_route_is_a_json_404(raw, method, path):
    """SPEC 3.1, 2: AWS's gateway answers HTML; JSON here, as the specification asks."""
    reply = raw(method, path)
    assert reply.status == 404 and isinstance(reply.json(), dict) and reply.exception


@pytest.mark.compat("grammar.null")
def test_a_member_that_is_missing(raw):
    """SPEC 3.2."""
    message = raw("POST", IMAGES, {"name": "good"}).message
    assert message.startswith("3 validation errors detected: ")
    for member in ("baseImageArn", "buildRoleArn", "codeArtifact"):
        assert f"Value null at '{member}' failed to satisfy constraint: Member must not be null" in message


@pytest.mark.compat("grammar.pattern")
def test_a_name_with_a_space(raw, things):
    """SPEC 3.2, B.5."""
    reply = raw("POST", IMAGES, things.spec("s3://a/b") | {"name": "bad name!"})
    message = "1 validation error detected: Value 'bad name!' at 'name' failed to satisfy constraint: Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+"
    assert reply.refusal() == ("ValidationException", message, 400)


@pytest.mark.compat("grammar.sensitive", "run.payload-length")
def test_a_payload_that_is_too_long_is_not_repeated(raw):
    """SPEC 3.2, 7: 4096 code points, however many units of UTF-8 or UTF-16 they are, and the message has no value."""
    reply = raw("POST", MICROVMS, {"imageIdentifier": UNKNOWN_IMAGE, "runHookPayload": "🔥" * 4097})
    message = "1 validation error detected: Value at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096"
    assert reply.refusal() == ("ValidationException", message, 400)
    assert raw("POST", MICROVMS, {"imageIdentifier": UNKNOWN_IMAGE, "runHookPayload": "🔥" * 4096}).status == 404


@pytest.mark.compat("run.idle-policy")
@pytest.mark.parametrize("missing", ["maxIdleDurationSeconds", "suspendedDurationSeconds", "autoResumeEnabled"])
def test_all_three_members_of_an_idle_policy_are_wanted(raw, missing):
    """SPEC 3.2: the path names the block."""
    policy = {"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 0, "autoResumeEnabled": True}
    del policy[missing]
    reply = raw("POST", MICROVMS, {"imageIdentifier": UNKNOWN_IMAGE, "idlePolicy": policy})
    message = f"1 validation error detected: Value null at 'idlePolicy.{missing}' failed to satisfy constraint: Member must not be null"
    assert reply.refusal() == ("ValidationException", message, 400)


@pytest.mark.compat("wire.region")
def test_another_region_is_refused_with_a_null_message(server, raw):
    """SPEC 1: AccessDeniedException, message null."""
    refused = server.client("lambda-microvms", region_name="mars-north-1")
    with pytest.raises(refused.exceptions.AccessDeniedException) as caught:
        refused.list_microvms()
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


@pytest.mark.compat("wire.unsigned")
def test_a_request_without_a_signature_is_refused(server):
    """SPEC 1: SigV4."""
    connection = http.client.HTTPConnection(server.connect["api"].removeprefix("http://"), timeout=10)
    connection.request("GET", MICROVMS)
    response = connection.getresponse()
    assert response.status == 403 and response.headers["x-amzn-errortype"] and json.loads(response.read())
    connection.close()


@pytest.mark.compat("wire.signature")
@pytest.mark.parametrize("override", [{"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "AKIAUNKNOWN"}])
def test_a_signature_that_does_not_fit_is_refused(server, override):
    """SPEC 1."""
    client = server.client("lambda-microvms", **override)
    with pytest.raises(client.exceptions.ClientError) as caught:
        client.list_microvms()
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
