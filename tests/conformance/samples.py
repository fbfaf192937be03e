"""Good values for the shapes of the published models, and requests made of them without a client's help."""

from __future__ import annotations

import json
import urllib.parse

from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

import support

from .things import OPERATOR_ROLE, ROLE, UNKNOWN_IMAGE, UNKNOWN_MICROVM

# What a shape's constraints do not tell, by the shape's name.
SAMPLES = {
    "MicrovmIdentifier": UNKNOWN_MICROVM,
    "MicrovmImageIdentifier": UNKNOWN_IMAGE,
    "TaggableResource": UNKNOWN_IMAGE,
    "RoleArn": ROLE,
    "NetworkConnectorRoleArn": OPERATOR_ROLE,
    "NetworkConnectorSubnetId": "subnet-0a1b2c3d",
    "NetworkConnectorSecurityGroupId": "sg-0a1b2c3d",
    "CodeArtifact": {"uri": "s3://no-such-bucket/nothing.zip"},
    "Resources": {"minimumMemoryInMiB": 512},
}
MEMBERS = {"baseImageArn": support.BASE_IMAGE_ARN, "imageVersion": "1.0", "baseImageVersion": "1"}


def sample(shape: Shape, variant: str | None = None, name: str | None = None) -> object:
    """A value that meets every constraint. All members of a structure are there; of a union, one."""
    if shape.name in SAMPLES:
        return SAMPLES[shape.name]
    if name in MEMBERS:
        return MEMBERS[name]
    if isinstance(shape, StructureShape):
        members = shape.members
        if shape.is_tagged_union and members:
            chosen = variant or next(iter(members))
            return {chosen: sample(members[chosen], name=chosen)}
        return {member: sample(of, name=member) for member, of in members.items()}
    if isinstance(shape, ListShape):
        return [sample(shape.member)] * max(1, shape.metadata.get("min", 1))
    if isinstance(shape, MapShape):
        return {"key": sample(shape.value)}
    if shape.type_name == "string":
        return shape.enum[0] if shape.enum else "x" * max(8, shape.metadata.get("min", 0))
    if shape.type_name == "boolean":
        return True
    return max(1, shape.metadata.get("min", 1))


def render(operation: OperationModel, values: dict) -> tuple[str, str, bytes]:
    """Method, path with query string, and body of a request, whatever the values are."""
    shape = operation.input_shape
    path, query, body = operation.http["requestUri"], [], {}
    for member, value in values.items():
        serialization = shape.members[member].serialization if member in shape.members else {}
        wire = serialization.get("name", member)
        match serialization.get("location"):
            case "uri":
                path = path.replace("{" + wire + "}", urllib.parse.quote(text(value), safe=""))
            case "querystring":
                query += [(wire, text(item)) for item in (value if isinstance(value, list) else [value])]
            case _:
                body[member] = value
    if query:
        path += "?" + urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    sends_body = any(not member.serialization.get("location") for member in shape.members.values())
    return operation.http["method"], path, json.dumps(body).encode() if sends_body else b""


def text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
