"""MicroVMs: run, get, list, suspend, resume, terminate, tokens (SPEC 5.4, 7)."""

from __future__ import annotations

import datetime
import re
import uuid

import pytest

import support
from support import error_of

from .clients import quoted
from .things import ROLE, STATIC_PORT, managed_connector

DETAIL = {
    "egressNetworkConnectors", "endpoint", "executionRoleArn", "idlePolicy", "imageArn", "imageVersion", "ingressNetworkConnectors",
    "kmsKeyIdentifier", "maximumDurationInSeconds", "microvmId", "startedAt", "state", "stateReason", "terminatedAt", "terminationReasonCode",
}  # fmt: skip
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.mark.compat("run.answer", "run.defaults", "run.endpoint-domain", "terminate")
def test_run_answers_every_member_with_its_default(raw, things):
    """SPEC 5.4, 7, B.2."""
    reply = raw("POST", "/2025-09-09/microvms", {"imageIdentifier": things.image.arn})
    assert reply.status == 200, reply.body
    answer = reply.json()
    path = f"/2025-09-09/microvms/{answer['microvmId']}"
    try:
        assert set(answer) == DETAIL
        assert re.fullmatch(f"microvm-{UUID}", answer["microvmId"])
        assert re.fullmatch(rf"{UUID}\.lambda-microvm\.us-east-1\.localhost", answer["endpoint"]), "a bare host name"
        assert answer["endpoint"][:36] != answer["microvmId"].removeprefix("microvm-")
        assert (answer["imageArn"], answer["imageVersion"], answer["state"]) == (things.image.arn, "1.0", "PENDING")
        assert answer["maximumDurationInSeconds"] == 28_800
        assert answer["ingressNetworkConnectors"] == [managed_connector("HTTP_INGRESS")]
        assert answer["egressNetworkConnectors"] == [managed_connector("INTERNET_EGRESS")]
        for member in ("executionRoleArn", "idlePolicy", "stateReason", "terminatedAt", "terminationReasonCode"):
            assert answer[member] is None, member
        assert isinstance(answer["startedAt"], float)
        assert set(raw("GET", path).json()) == DETAIL
    finally:
        for _ in range(2):
            ended = raw("DELETE", path)
            assert (ended.status, ended.json()) == (200, {}), "again is as good"
    support.eventually(lambda: raw("GET", path).json()["state"] == "TERMINATED", "TERMINATED")
    after = raw("GET", path).json()
    assert after["stateReason"] == "Success." and after["terminatedAt"] >= answer["startedAt"]


@pytest.mark.compat("run.echo")
def test_run_echoes_its_settings_but_no_secrets(things):
    """SPEC 5.4: `runHookPayload`, `logging` and `clientToken` are never echoed."""
    policy = support.idle_policy(idle=300, suspended=3600, resume=False)
    microvm = things.run(
        wait=None,
        idlePolicy=policy,
        maximumDurationInSeconds=600,
        executionRoleArn=ROLE,
        logging={"disabled": {}},
        ingressNetworkConnectors=[managed_connector("HTTP_INGRESS"), managed_connector("SHELL_INGRESS")],
        egressNetworkConnectors=[],
    )
    answer = microvm.get()
    assert (answer["idlePolicy"], answer["maximumDurationInSeconds"], answer["executionRoleArn"]) == (policy, 600, ROLE)
    assert [arn.rsplit(":", 1)[1] for arn in answer["ingressNetworkConnectors"]] == ["HTTP_INGRESS", "SHELL_INGRESS"]
    assert answer["egressNetworkConnectors"] == [managed_connector("INTERNET_EGRESS")], "an empty list is the same as none"
    assert not {"runHookPayload", "logging", "clientToken"} & set(answer)
    microvm.terminate()


@pytest.mark.compat("run.client-token")
def test_a_client_token_makes_run_idempotent(things, microvms):
    """SPEC 4.1."""
    token = str(uuid.uuid4())
    first = things.run(wait=None, clientToken=token)
    again = microvms.run_microvm(imageIdentifier=things.image.arn, clientToken=token)
    assert again["microvmId"] == first.id
    code, _, status = error_of(microvms.run_microvm, imageIdentifier=things.image.arn, clientToken=token, maximumDurationInSeconds=60)
    assert (code, status) == ("ConflictException", 409)
    first.terminate()


@pytest.mark.compat("microvm.list", "microvm.list-terminated")
def test_list_answers_five_members_and_keeps_what_ended(things, raw):
    """SPEC 2, 5.4."""
    ended = things.terminated.id
    items, token = [], None
    while not items or token:
        query = f"imageIdentifier={quoted(things.image.arn)}" + (f"&nextToken={quoted(token)}" if token else "")
        answer = raw("GET", f"/2025-09-09/microvms?{query}").json()
        items += answer["items"]
        token = answer["nextToken"]
    by_id = {item["microvmId"]: item for item in items}
    assert by_id[ended]["state"] == "TERMINATED"
    assert all(set(item) == {"imageArn", "imageVersion", "microvmId", "startedAt", "state"} for item in items)


@pytest.mark.compat("microvm.list-filters")
def test_list_filters_by_image_and_version(things, microvms):
    """SPEC 4.2."""
    listed = microvms.get_paginator("list_microvms")

    def ids(**filters) -> set[str]:
        return {item["microvmId"] for page in listed.paginate(**filters) for item in page["items"]}

    assert things.terminated.id in ids(imageIdentifier=things.image.arn, imageVersion="1.0")
    assert things.terminated.id not in ids(imageIdentifier=things.image.arn, imageVersion="7.0")
    assert things.terminated.id not in ids(imageIdentifier=things.failed.arn)


@pytest.mark.compat("suspend", "resume", "token.suspended")
def test_suspend_and_resume_answer_at_once_and_twice(things, raw, microvms):
    """SPEC 5.4: both work without an idle policy, again is not an error, and a token can be had while suspended."""
    microvm = things.run()
    path = f"/2025-09-09/microvms/{microvm.id}"
    assert page(microvm).status == 200
    for verb, state in [("suspend", "SUSPENDED"), ("suspend", "SUSPENDED"), ("resume", "RUNNING"), ("resume", "RUNNING")]:
        reply = raw("POST", f"{path}/{verb}")
        assert (reply.status, reply.json()) == (200, {}), verb
        microvm.wait(state)
        assert page(microvm).status == (200 if state == "RUNNING" else 502)
    microvms.suspend_microvm(microvmIdentifier=microvm.id)
    microvm.wait("SUSPENDED")
    microvms.resume_microvm(microvmIdentifier=microvm.id)
    assert microvm.wait("RUNNING")["endpoint"] == microvm.endpoint
    microvm.terminate()


def page(microvm) -> support.Answer:
    return microvm.http("/", token=microvm.token({"port": STATIC_PORT}), port=STATIC_PORT)


@pytest.mark.compat("endpoint.default-port")
def test_the_endpoint_s_port_is_8080_unless_a_header_names_another(things):
    """SPEC 10.1."""
    answer = things.microvm.http("/", token=things.microvm.token({"port": STATIC_PORT}), port=None)
    assert answer.status == 200


@pytest.mark.compat("token.answer")
def test_a_token_is_a_map_of_headers(raw, things):
    """SPEC 5.4, 10.2: a compact JWE in five parts, of which the second is empty."""
    path = f"/2025-09-09/microvms/{things.microvm.id}/auth-token"
    reply = raw("POST", path, {"expirationInMinutes": 60, "allowedPorts": [{"port": 1}, {"range": {"startPort": 2, "endPort": 3}}, {"allPorts": {}}]})
    assert reply.status == 200, reply.body
    assert list(reply.json()) == ["authToken"] and list(reply.json()["authToken"]) == ["X-aws-proxy-auth"]
    parts = reply.json()["authToken"]["X-aws-proxy-auth"].split(".")
    assert len(parts) == 5 and parts[1] == "" and all(parts[index] for index in (0, 2, 3, 4))


@pytest.mark.compat("shell-token")
def test_a_shell_token_is_the_same_map(things, microvms):
    """SPEC 5.4, 11."""
    for ingress in (["HTTP_INGRESS", "SHELL_INGRESS"], ["ALL_INGRESS"]):
        microvm = things.run(wait=None, ingressNetworkConnectors=[managed_connector(name) for name in ingress])
        answer = microvms.create_microvm_shell_auth_token(microvmIdentifier=microvm.id, expirationInMinutes=5)
        assert list(answer["authToken"]) == ["X-aws-proxy-auth"] and answer["authToken"]["X-aws-proxy-auth"].count(".") == 4
        microvm.terminate()


@pytest.mark.compat("microvm.timestamps")
def test_times_are_epoch_seconds(things, raw):
    """SPEC 1."""
    answer = raw("GET", f"/2025-09-09/microvms/{things.terminated.id}").json()
    now = datetime.datetime.now(datetime.UTC).timestamp()
    assert now - 3600 < answer["startedAt"] <= answer["terminatedAt"] < now + 5
