"""Network connectors (SPEC 5.5), with lambda-core's own ways: PascalCase, absent members instead of nulls, capital `Message`."""

from __future__ import annotations

import re
import uuid

import pytest

import support
from support import error_of

from .catalogue import check
from .things import OPERATOR_ROLE, VPC, managed_connector

PATH = "/2026-04-04/network-connectors"


@pytest.fixture
def make(things):
    def spec(name: str | None = None, **configuration) -> dict:
        return {
            "Name": name or things.name("connector"),
            "OperatorRole": OPERATOR_ROLE,
            "Configuration": {"VpcEgressConfiguration": VPC | configuration},
            "ClientToken": str(uuid.uuid4()),
        }

    return spec


def without_nulls(value) -> bool:
    if isinstance(value, dict):
        return all(without_nulls(item) for item in value.values())
    return value is not None


@pytest.mark.compat("connector.create", "connector.get", "connector.list", "connector.versions", "connector.delete")
def test_a_connector_s_life(raw, connectors, make):
    """The four recorded projections, from 202 PENDING to 404."""
    sent = make()
    reply = raw("POST", PATH, sent)
    assert reply.status == 202, reply.body
    made = reply.json()
    assert set(made) == {"Arn", "Configuration", "Id", "Name", "OperatorRole", "State"} and made["State"] == "PENDING"
    assert re.fullmatch(r"nc-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["Id"])
    assert made["Arn"] == f"arn:aws:lambda:us-east-1:000000000000:network-connector:{made['Id']}"
    assert made["Configuration"] == sent["Configuration"] and made["OperatorRole"] == OPERATOR_ROLE

    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE", "ACTIVE")
    found = raw("GET", f"{PATH}/{made['Id']}").json()
    assert {"LastModified", "StateReason"} | set(made) <= set(found) and without_nulls(found)
    assert found["StateReason"] == "Initial creation"
    for identifier in (made["Name"], made["Arn"]):
        assert connectors.get_network_connector(Identifier=identifier)["Id"] == made["Id"]

    listed = [item for item in raw("GET", f"{PATH}?MaxItems=100").json()["NetworkConnectors"] if item["Id"] == made["Id"]]
    assert listed and {"Arn", "Id", "LastModified", "Name", "State", "Type"} <= set(listed[0]) and listed[0]["Type"] == "VPC_EGRESS"
    (version,) = connectors.list_network_connector_versions(Identifier=made["Id"])["NetworkConnectorVersions"]
    assert version["Version"] == 1 and version["VersionArn"] == f"{made['Arn']}:1"

    deleted = raw("DELETE", f"{PATH}/{made['Id']}")
    assert (deleted.status, deleted.json()["State"]) == (202, "DELETING")
    support.eventually(lambda: raw("GET", f"{PATH}/{made['Id']}").status == 404, "the connector to be gone")


@pytest.mark.compat("connector.update")
def test_an_update_is_accepted_and_one_that_changes_nothing_says_so(connectors, make):
    made = connectors.create_network_connector(**make())
    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE", "ACTIVE")
    same = connectors.update_network_connector(Identifier=made["Id"], Configuration=made["Configuration"])
    assert same["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert same["LastUpdateStatus"] and same["LastUpdateStatusReason"] == "No configuration changes detected"
    changed = {"VpcEgressConfiguration": VPC | {"SecurityGroupIds": ["sg-1", "sg-2"]}}
    connectors.update_network_connector(Identifier=made["Id"], Configuration=changed)
    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["Configuration"] == changed, "the new configuration")
    support.eventually(
        lambda: [version["Version"] for version in connectors.list_network_connector_versions(Identifier=made["Id"])["NetworkConnectorVersions"]]
        in ([1, 2], [2, 1]),
        "two versions",
    )


@pytest.mark.compat("connector.filter")
def test_the_list_filters_by_state(connectors, make):
    made = connectors.create_network_connector(**make())
    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE", "ACTIVE")

    def ids(state: str) -> set[str]:
        pages = connectors.get_paginator("list_network_connectors").paginate(State=state)
        return {item["Id"] for page in pages for item in page["NetworkConnectors"]}

    assert made["Id"] in ids("ACTIVE") and made["Id"] not in ids("FAILED")


@pytest.mark.compat("connector.name-taken")
def test_a_name_that_is_taken_is_a_conflict(connectors, make):
    """Appendix A: ResourceConflictException."""
    made = connectors.create_network_connector(**make())
    assert error_of(connectors.create_network_connector, **make(made["Name"]))[::2] == ("ResourceConflictException", 409)


@pytest.mark.compat("message.connector-unknown")
@pytest.mark.parametrize("verb", ["get", "delete", "update", "list_versions"])
def test_connector_unknown(raw, connectors, verb):
    arn = f"arn:aws:lambda:us-east-1:000000000000:network-connector:nc-{uuid.UUID(int=0)}"
    call = getattr(connectors, {"list_versions": "list_network_connector_versions"}.get(verb, f"{verb}_network_connector"))
    check("connector-unknown", error_of(call, Identifier=arn), arn=arn)
    if verb == "get":
        assert "Message" in raw("GET", f"{PATH}/{arn}").json(), "a capital letter"


@pytest.mark.compat("message.connector-client-token", "message.connector-operator-role", "message.connector-protocol",
                    "message.connector-resource-types")  # fmt: skip
@pytest.mark.parametrize(
    ("name", "member"),
    [("connector-client-token", "ClientToken"), ("connector-operator-role", "OperatorRole"), ("connector-protocol", "NetworkProtocol"),
     ("connector-resource-types", "AssociatedComputeResourceTypes")],
)  # fmt: skip
def test_members_that_the_model_calls_optional_are_wanted(raw, make, name, member):
    sent = make()
    sent.pop(member, None)
    sent["Configuration"]["VpcEgressConfiguration"].pop(member, None)
    check(name, raw("POST", PATH, sent).refusal())


@pytest.mark.compat("connector.constraints")
def test_seventeen_subnets_are_too_many(raw, make):
    """A ValidationException with lower-case `message` and a lower-case path, although the model has neither."""
    reply = raw("POST", PATH, make(SubnetIds=[f"subnet-{number:08x}" for number in range(17)]))
    assert (reply.status, reply.exception, list(reply.json())) == (400, "ValidationException", ["message"])
    assert " at 'configuration.vpcEgressConfiguration.subnetIds' failed to satisfy constraint: " in reply.message
    assert reply.message.endswith("Member must have length less than or equal to 16")


@pytest.mark.compat("connector.run")
def test_a_microvm_runs_with_a_connector_of_the_account(connectors, things, make):
    """SPEC 10.5: at most one, echoed by its ARN; it cannot be deleted meanwhile (5.5)."""
    made = connectors.create_network_connector(**make())
    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE", "ACTIVE")
    microvm = things.run(egressNetworkConnectors=[made["Arn"]])
    assert microvm.get()["egressNetworkConnectors"] == [made["Arn"]]
    assert error_of(connectors.delete_network_connector, Identifier=made["Id"])[::2] == ("ResourceConflictException", 409)
    microvm.terminate()
    microvm.wait("TERMINATED")
    connectors.delete_network_connector(Identifier=made["Id"])


@pytest.mark.compat("connector.managed")
@pytest.mark.parametrize("name", ["HTTP_INGRESS", "SHELL_INGRESS", "ALL_INGRESS", "NO_INGRESS"])
def test_managed_connectors_are_accepted(things, name):
    """SPEC 10.5."""
    microvm = things.run(wait=None, ingressNetworkConnectors=[managed_connector(name)])
    assert microvm.get()["ingressNetworkConnectors"] == [managed_connector(name)]
    microvm.terminate()
