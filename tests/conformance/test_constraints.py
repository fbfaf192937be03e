"""Every constraint of the published model, broken one at a time, is refused in the words of SPEC 3.2: nothing is left to the client's validation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest
from botocore.model import ListShape, MapShape, OperationModel, Shape, StructureShape

from .catalogue import in_grammar
from .model import operations
from .samples import render, sample


@dataclasses.dataclass
class Broken:
    """A request with one thing wrong, and what must be said of it."""

    what: str
    input: dict
    said: str


def lower(member: str) -> str:
    return member[0].lower() + member[1:]


def broken_inputs(operation: OperationModel) -> Iterator[Broken]:
    shape = operation.input_shape
    yield from broken_members(shape.members, shape.required_members, sample(shape), (), "")


def broken_members(members: dict[str, Shape], required: list[str], whole: dict, keys: tuple, path: str) -> Iterator[Broken]:
    """`whole` is a good value of the outermost structure, `keys` lead to the one that has these members."""
    for name, member in members.items():
        place = (*keys, name)
        at = f"{path}.{lower(name)}" if path else lower(name)
        constraint = f"at '{at}' failed to satisfy constraint: "
        if name in required and member.serialization.get("location") != "uri":
            yield Broken(f"{at} missing", put(whole, place, None), f"Value null {constraint}Member must not be null")
        for what, value, broken in broken_values(member):
            shown = f"Value '{value}' " if isinstance(value, (str, int)) else ""
            yield Broken(f"{at} {what}", put(whole, place, value), ("Value " if member.metadata.get("sensitive") else shown) + constraint + broken)
        if isinstance(member, StructureShape):
            # A union takes one member at a time.
            for only in list(member.members) if member.is_tagged_union else [None]:
                inside = {only: member.members[only]} if only else member.members
                wanted = [] if only else member.required_members
                yield from broken_members(inside, wanted, put(whole, place, sample(member, only)), place, at)
        # How an item is named is not recorded, only the list's or map's own place.
        for what, value in broken_items(member):
            yield Broken(f"{at} with an item that is {what}", put(whole, place, value), f"at '{at}")


def broken_values(shape: Shape) -> Iterator[tuple[str, object, str]]:
    """Values that break one constraint of a shape each. A label of a path cannot be empty."""
    limits = shape.metadata
    lengths = isinstance(shape, (ListShape, MapShape)) or shape.type_name == "string"
    word = "length" if lengths else "value"
    in_path = shape.serialization.get("location") == "uri"
    if (least := limits.get("min")) and not in_path:
        yield "too small", sized(shape, least - 1), f"Member must have {word} greater than or equal to {least}"
    if most := limits.get("max"):
        yield "too large", sized(shape, most + 1), f"Member must have {word} less than or equal to {most}"
    if "enum" in limits:
        yield "unheard of", "UNHEARD_OF", f"Member must satisfy enum value set: [{', '.join(shape.enum)}]"
    elif "pattern" in limits:
        yield "misshapen", misshapen(shape), f"Member must satisfy regular expression pattern: {limits['pattern']}"


def broken_items(shape: Shape) -> Iterator[tuple[str, object]]:
    if isinstance(shape, ListShape):
        for what, value, _ in broken_values(shape.member):
            yield what, [value]
        if isinstance(shape.member, StructureShape):
            for broken in broken_members(shape.member.members, shape.member.required_members, sample(shape.member), (), ""):
                yield broken.what, [broken.input]
    if isinstance(shape, MapShape):
        for what, value, _ in broken_values(shape.key):
            yield f"{what} (key)", {value: sample(shape.value)}
        for what, value, _ in broken_values(shape.value):
            yield f"{what} (value)", {"key": value}


def sized(shape: Shape, size: int) -> object:
    if isinstance(shape, ListShape):
        return [sample(shape.member)] * size
    if isinstance(shape, MapShape):
        return {f"key{number}": sample(shape.value) for number in range(size)}
    if shape.type_name == "string":
        return (sample(shape) + "x" * size)[:size]
    return size


def misshapen(shape: Shape) -> str:
    """Something that no pattern of the model matches, but long enough."""
    return ("it: is * none!\t" + "!" * shape.metadata.get("min", 0))[: shape.metadata.get("max", 1000)]


def put(whole: dict, keys: tuple, value: object) -> dict:
    """A copy with another value at a place; `None` takes the member out."""
    copy = json.loads(json.dumps(whole))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return copy


@pytest.mark.compat("grammar.constraints")
@pytest.mark.parametrize("name", sorted(operations()))
def test_every_constraint_is_kept(raw, counts, name):
    operation = operations()[name]
    wrong = []
    for broken in broken_inputs(operation):
        reply = raw(*render(operation, broken.input))
        counts["constraints"] += 1
        message = reply.message or ""
        # A value may break its length and its pattern at once, so that what is said may be one of several violations.
        if reply.status != 400 or reply.exception != "ValidationException" or broken.said not in message or not in_grammar(message):
            wrong.append(f"{broken.what}: {reply.status} {reply.body[:300]} lacks {broken.said!r}")
    assert not wrong, "\n".join(wrong)
