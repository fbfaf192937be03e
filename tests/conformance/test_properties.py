"""Random requests: whatever is sent, the answer comes at once, is no 5xx, and says nothing that the specification does not know (SPEC 3).

The server is one of its own: requests that happen to be right leave images behind. Runs are reproducible: the random choices are the same
every time.
"""

from __future__ import annotations

import json
import re

import pytest
from botocore.model import ListShape, MapShape, Shape, StructureShape
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import support

from .catalogue import in_catalogue, in_grammar
from .clients import Raw, Reply, quoted
from .model import operations
from .samples import render, sample

EXAMPLES = 60
# A failing example is shown as it was found: shrinking could take longer than the run may.
PROFILE = settings(
    derandomize=True, deadline=None, database=None, max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip

# Beyond SPEC 3.3: messages that AWS may have but nobody recorded. Each is a row of COMPATIBILITY.md, "message.unrecorded".
UNRECORDED = [
    r"Unknown operation: .*",
    r"User: .* is not authorized to perform this action on resource: .*",
    r"User: .* is not authorized to perform: .*",
    r"Invalid port range: startPort \d+ is greater than endPort \d+\.",
    r"The KMS key \S+ cannot be used: this server does not encrypt with customer managed keys\. Leave out kmsKeyIdentifier\.",
    r"Request must be smaller than \d+ bytes for this operation\.",
    r"The request signature we calculated does not match the signature you provided\..*",
]

ODD_TEXT = st.one_of(
    st.sampled_from(["", " ", "\x00", "..", "/", "a/../b", "%", "%2F", "?", "#", "é", "\u202e", "null", "-1", "1e9", "arn:", "arn:aws:lambda",
                     "arn:aws:lambda:us-east-1:000000000000:microvm-image:x y", "{}", "' OR 1=1 --", "$(reboot)", "\ud7ff", "𝕏"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)  # fmt: skip
ODD_NUMBER = st.sampled_from([0, -1, 1, 59, 60, 61, 65535, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**63, 2**64, 10**40, 0.5, 1e400, -0.0])
ODD = st.one_of(
    ODD_TEXT, ODD_NUMBER, st.booleans(), st.none(), st.just([]), st.just({}), st.lists(ODD_TEXT, max_size=3),
    st.dictionaries(ODD_TEXT, ODD_TEXT, max_size=3),
)  # fmt: skip


def values(shape: Shape, depth: int = 0) -> st.SearchStrategy:
    """Right values, values just beyond a constraint, and values of another type."""
    limits = shape.metadata
    choices = [st.just(sample(shape)), ODD]
    if isinstance(shape, StructureShape) and depth < 4:
        choices += [structures(shape, depth + 1)] * 3
    elif isinstance(shape, ListShape):
        choices.append(st.lists(values(shape.member, depth + 1), max_size=4))
        choices.append(st.just([sample(shape.member)] * (limits.get("max", 3) + 1)))
    elif isinstance(shape, MapShape):
        choices.append(st.dictionaries(ODD_TEXT, values(shape.value, depth + 1), max_size=4))
    elif shape.type_name == "string":
        bounds = {limits.get("min", 0), limits.get("max", 300), limits.get("min", 1) - 1, limits.get("max", 300) + 1}
        choices += [st.sampled_from(sorted("x" * min(bound, 20_000) for bound in bounds if bound >= 0)), ODD_TEXT]
    else:
        choices += [ODD_NUMBER, st.integers(limits.get("min", 0) - 2, limits.get("max", 100) + 2)]
    return st.one_of(choices)


def structures(shape: StructureShape, depth: int = 0) -> st.SearchStrategy[dict]:
    """Structures whose members are right, odd, missing or not of the model."""
    members = {name: st.one_of(st.just(sample(of)), values(of, depth)) for name, of in shape.members.items()}
    known = st.fixed_dictionaries({}, optional=members)
    return st.builds(lambda known, more: more | known, known, st.dictionaries(st.sampled_from(["future", "Name", "__type"]), ODD, max_size=1))


def acceptable(reply: Reply) -> None:
    """No 5xx, and an answer in the forms of SPEC 3.1, with words of 3.2 or 3.3."""
    assert reply.status < 500, (reply.status, reply.body)
    if reply.status < 300:
        return
    body = reply.json()
    assert isinstance(body, dict) and reply.exception, (reply.status, reply.body)
    assert "__type" not in body
    message = reply.message
    assert message is None or message == "Expected null" or in_grammar(message) or in_catalogue(message) or unrecorded(message), reply.body


def unrecorded(message: str) -> bool:
    return any(re.fullmatch(pattern, message, re.DOTALL) for pattern in UNRECORDED)


@pytest.fixture(scope="module")
def sacrificed():
    with support.serving(min_idle_seconds=60) as server:
        raw = Raw(server)
        yield raw
        raw.close()
        assert "panicked" not in server.log_path.read_text(errors="replace")


@pytest.fixture(autouse=True)
def counted(request, counts):
    counts["properties"] += 1
    yield
    counts["examples"] += EXAMPLES


@pytest.mark.compat("property.any-request", "message.unrecorded")
@pytest.mark.parametrize("name", sorted(operations()))
def test_any_request_gets_an_answer_of_the_specification(sacrificed, name):
    operation = operations()[name]

    @PROFILE
    @given(structures(operation.input_shape))
    def check(values):
        # A label that is left out would make another path.
        labels = {member for member, of in operation.input_shape.members.items() if of.serialization.get("location") == "uri"}
        whole = {label: sample(operation.input_shape.members[label]) for label in labels} | values
        acceptable(sacrificed(*render(operation, whole)))

    check()


@pytest.mark.compat("property.any-body")
@pytest.mark.parametrize("route", ["POST /2025-09-09/microvms", "POST /2025-09-09/microvm-images", "POST /2026-04-04/network-connectors"])
def test_any_bytes_for_a_body(sacrificed, route):
    method, path = route.split()
    documents = st.recursive(ODD, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)))

    @PROFILE
    @given(st.one_of(st.binary(max_size=200), documents.map(json.dumps).map(str.encode), st.integers(1, 3000).map(lambda n: b"[" * n)))
    def check(body):
        reply = sacrificed(method, path, body)
        acceptable(reply)
        assert reply.status in (400, 404)

    check()


@pytest.mark.compat("property.any-path")
@pytest.mark.parametrize("prefix", ["/2025-09-09/", "/2026-04-04/network-connectors/", "/2017-03-31/tags/", "/"])
def test_any_path(sacrificed, prefix):
    @PROFILE
    @given(st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]), st.lists(ODD_TEXT.map(quoted), max_size=6).map("/".join))
    def check(method, rest):
        acceptable(sacrificed(method, prefix + rest, b"{}" if method != "GET" else b""))

    check()


@pytest.mark.compat("property.any-query")
@pytest.mark.parametrize("path", ["/2025-09-09/microvms", "/2025-09-09/microvm-images", "/2026-04-04/network-connectors"])
def test_any_query(sacrificed, path):
    names = st.sampled_from(["maxResults", "nextToken", "nameFilter", "imageIdentifier", "imageVersion", "Marker", "MaxItems", "State", "future"])

    @PROFILE
    @given(st.lists(st.tuples(names, st.one_of(ODD_TEXT, ODD_NUMBER.map(str))), max_size=4))
    def check(pairs):
        acceptable(sacrificed("GET", path + "?" + "&".join(f"{name}={quoted(value)}" for name, value in pairs)))

    check()
