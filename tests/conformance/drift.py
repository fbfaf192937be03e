"""What a published model has that the server does not serve: inputs against the model that the server checks them by, outputs and errors against
the model that the suite checks answers by.

`cargo xtask model` runs this file with the newest botocore; its argument is the directory of models of the one that the tests pin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import botocore
from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

from .model import all_operations, operations, server_model

LOCATIONS = {None: "body", "uri": "uri", "querystring": "querystring"}
CONSTRAINTS = ("type", "min", "max", "pattern", "enum", "sensitive", "union")


def published_tree(shape: Shape | None, inside: tuple[str, ...] = ()) -> dict:
    """A shape with everything in it, in the form of the server's model."""
    if shape is None:
        return {"type": "structure", "members": {}}
    if shape.name in inside:
        return {"type": "recursive"}
    inside = (*inside, shape.name)
    tree = {key: shape.metadata[key] for key in CONSTRAINTS if shape.metadata.get(key)}
    tree["type"] = "integer" if shape.type_name == "long" else shape.type_name
    if isinstance(shape, StructureShape):
        tree["union"] = shape.is_tagged_union
        tree["members"] = {
            name: {
                "required": name in shape.required_members,
                "in": LOCATIONS.get(member.serialization.get("location"), member.serialization.get("location")),
                "wire": member.serialization.get("name", name),
                "shape": published_tree(member, inside),
            }
            for name, member in shape.members.items()
        }
    elif isinstance(shape, ListShape):
        tree["member"] = published_tree(shape.member, inside)
    elif isinstance(shape, MapShape):
        tree |= {"key": published_tree(shape.key, inside), "value": published_tree(shape.value, inside)}
    return tree


def server_tree(name: str, inside: tuple[str, ...] = ()) -> dict:
    """A shape of the server's model with everything in it."""
    if name in inside:
        return {"type": "recursive"}
    inside = (*inside, name)
    shape = dict(server_model()["shapes"][name])
    if "members" in shape:
        shape["members"] = {
            member["name"]: {
                "required": member.get("required", False),
                "in": member.get("in", "body"),
                "wire": member.get("wire", member["name"]),
                "shape": server_tree(member["shape"], inside),
            }
            for member in shape["members"]
        }
    return shape | {part: server_tree(shape[part], inside) for part in ("member", "key", "value") if part in shape}


def described(shape: dict) -> str:
    """A shape that is missing, in a few words."""
    limits = [f"{key} {shape[key]}" for key in CONSTRAINTS[1:] if shape.get(key)]
    return f"{shape['type']}" + (f" ({', '.join(limits)})" if limits else "")


def compare(at: str, published: dict, served: dict) -> Iterator[str]:
    """Each difference between two trees, one a line."""
    for key in CONSTRAINTS:
        if (published.get(key) or None) != (served.get(key) or None):
            yield f"{at}: {key} is {published.get(key)!r}, served as {served.get(key)!r}"
    wanted, had = published.get("members", {}), served.get("members", {})
    for name, member in wanted.items():
        if name not in had:
            yield f"{at}.{name}: not served, {described(member['shape'])}"
            continue
        for key in ("required", "in", "wire"):
            if member[key] != had[name][key]:
                yield f"{at}.{name}: {key} is {member[key]!r}, served as {had[name][key]!r}"
        yield from compare(f"{at}.{name}", member["shape"], had[name]["shape"])
    for name in had.keys() - wanted.keys():
        yield f"{at}.{name}: served, and not in the published model"
    for part in ("member", "key", "value"):
        if part in published and part in served:
            yield from compare(f"{at}[{part}]", published[part], served[part])


def inputs(published: dict[str, OperationModel]) -> Iterator[str]:
    """What the server does not check as a published model says."""
    served = server_model()["operations"]
    for name, operation in sorted(published.items()):
        if name not in served:
            yield f"{name}: not served"
            continue
        http = operation.http
        essence = (http["method"], http["requestUri"], int(http["responseCode"]))
        ours = (served[name]["method"], served[name]["uri"], served[name]["status"])
        if essence != ours:
            yield f"{name}: is {essence}, served as {ours}"
        yield from compare(f"{name} input", published_tree(operation.input_shape), server_tree(served[name]["input"]))
    for name in sorted(served.keys() - published.keys()):
        yield f"{name}: served, and not in the published model"


def answers(published: dict[str, OperationModel], known: dict[str, OperationModel]) -> Iterator[str]:
    """What answers and errors have in one published model that they have not in another."""
    for name, operation in sorted(published.items()):
        if name not in known:
            continue
        yield from compare(f"{name} output", published_tree(operation.output_shape), published_tree(known[name].output_shape))
        errors = {shape.name: shape for shape in known[name].error_shapes}
        for shape in operation.error_shapes:
            if shape.name in errors:
                yield from compare(f"{name} {shape.name}", published_tree(shape), published_tree(errors[shape.name]))
            else:
                yield f"{name}: error {shape.name} is not known"


def main(pinned: Path) -> None:
    newest = operations()
    found = [*inputs(newest), *answers(newest, operations(pinned))]
    print(f"The models of botocore {botocore.__version__}, {len(newest)} operations of MicroVMs and network connectors:")
    print("\n".join(f"  {line}" for line in found) or "  nothing that Hearth does not serve")
    if others := sorted(all_operations().keys() - newest.keys()):
        print(f"Of the same services, and not of MicroVMs: {', '.join(others)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
