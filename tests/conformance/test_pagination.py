"""Pages (SPEC 4.2): every paginator of both services, with cursors that are opaque, sealed, and good while rows come and go."""

from __future__ import annotations

import re

import pytest

import support
from support import error_of

from .clients import quoted
from .model import paginated
from .things import VPC

FEW = 3


@pytest.fixture(scope="module")
def rows(things, microvms, connectors):
    """At least three rows for every list that callers can fill, and the arguments that each list needs."""
    broken = [things.broken(things.name("paged")) for _ in range(FEW)]
    image = broken[0].arn
    for version in range(2, FEW + 1):
        microvms.update_microvm_image(imageIdentifier=image, **things.spec("s3://no-such-bucket/nothing.zip"))
        support.wait_image(things.server, image, "UPDATE_FAILED")
    started = [things.run(wait=None) for _ in range(FEW)]
    for microvm in started:
        microvm.terminate()
    connector = None
    for number in range(FEW):
        made = connectors.create_network_connector(
            Name=f"paged-{number}", OperatorRole="arn:aws:iam::000000000000:role/operator", Configuration={"VpcEgressConfiguration": VPC}
        )
        connector = connector or made["Id"]
    return {
        "ListMicrovmImages": {},
        "ListMicrovmImageVersions": {"imageIdentifier": image},
        "ListMicrovmImageBuilds": {"imageIdentifier": image, "imageVersion": "1.0"},
        "ListMicrovms": {},
        "ListManagedMicrovmImages": {},
        "ListManagedMicrovmImageVersions": {"imageIdentifier": support.BASE_IMAGE_ARN},
        "ListNetworkConnectors": {},
        "ListNetworkConnectorVersions": {"Identifier": connector},
    }


def test_every_list_is_looked_at(rows):
    assert set(rows) == {name for _, name in paginated()}


@pytest.mark.compat("page.limit", "page.token")
@pytest.mark.parametrize(("service", "name"), paginated())
def test_pages_add_up_to_the_whole(rows, microvms, connectors, service, name):
    """One row at a time is the same as all at once: none twice, none left out."""
    client = microvms if service == "lambda-microvms" else connectors
    operation = "_".join(re.findall("[A-Z][a-z]+", name)).lower()
    paginator = client.get_paginator(operation)
    key = paginator.result_keys[0].expression
    whole = [row for page in paginator.paginate(**rows[name]) for row in page[key]]
    pages = [page[key] for page in paginator.paginate(**rows[name], PaginationConfig={"PageSize": 1})]
    assert all(len(page) <= 1 for page in pages)
    # Between the two walks a MicroVM may end: its state is not what makes it a row.
    rest = [{member: value for member, value in row.items() if member != "state"} for page in pages for row in page]
    assert rest == [{member: value for member, value in row.items() if member != "state"} for row in whole]
    if name not in ("ListMicrovmImageBuilds", "ListManagedMicrovmImages", "ListManagedMicrovmImageVersions", "ListNetworkConnectorVersions"):
        assert len(whole) >= FEW


@pytest.mark.compat("page.last")
def test_the_last_page_has_a_null_token(raw, rows):
    """SPEC 4.2: present and null for MicroVMs, absent for connectors."""
    answer = raw("GET", "/2025-09-09/managed-microvm-images").json()
    assert "nextToken" in answer and answer["nextToken"] is None
    assert "NextMarker" not in raw("GET", "/2026-04-04/network-connectors?MaxItems=100").json()


@pytest.mark.compat("page.cursor")
def test_a_cursor_that_was_changed_is_refused(rows, raw, microvms):
    """SPEC 3.1, 4.2: 400 with a null message, whichever character was changed, and for another list too."""
    cursor = microvms.list_microvms(maxResults=1)["nextToken"]
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", cursor), "URL-safe base64"
    bad = [cursor[:-1], cursor + "A", "AAAA", "no cursor"]
    for place in range(0, len(cursor.rstrip("=")) - 1, max(1, len(cursor) // 12)):
        bad.append(cursor[:place] + ("A" if cursor[place] != "A" else "B") + cursor[place + 1 :])
    for changed in bad:
        refused = raw("GET", f"/2025-09-09/microvms?maxResults=1&nextToken={quoted(changed)}")
        assert (refused.status, refused.exception, refused.json()) == (400, "ValidationException", {"message": None}), changed
    assert error_of(microvms.list_microvm_images, nextToken=cursor)[2] == 400, "a cursor of another list"


@pytest.mark.compat("page.raw-equals")
def test_a_raw_equals_sign_in_a_cursor_is_refused(raw):
    """SPEC 4.2."""
    reply = raw("GET", "/2025-09-09/microvms?nextToken=abc=", signed_as="/2025-09-09/microvms?nextToken=abc%3D")
    assert (reply.status, reply.json()) == (400, {"message": None})


@pytest.mark.compat("page.stable")
def test_a_cursor_stays_good_while_rows_come_and_go(microvms, things):
    """Rows that were there throughout are seen once each."""
    mark = things.name("moving")
    kept = [things.broken(f"{mark}-{letter}") for letter in "bdf"]
    going = things.broken(f"{mark}-c")
    first = microvms.list_microvm_images(maxResults=1)
    seen, token, moved = list(first["items"]), first.get("nextToken"), False
    while token:
        if not moved:
            microvms.delete_microvm_image(imageIdentifier=going.arn)
            things.broken(f"{mark}-a")
            moved = True
        answer = microvms.list_microvm_images(maxResults=1, nextToken=token)
        seen += answer["items"]
        token = answer.get("nextToken")
    arns = [item["imageArn"] for item in seen]
    assert len(arns) == len(set(arns))
    assert {image.arn for image in kept} <= set(arns)


@pytest.mark.compat("page.filter-after-limit")
def test_the_limit_comes_before_the_name_filter(microvms, things):
    """SPEC 4.2: an empty page with a token is legal."""
    wanted = [things.broken().created["name"] for _ in range(FEW)][-1]
    pages = list(microvms.get_paginator("list_microvm_images").paginate(nameFilter=wanted, PaginationConfig={"PageSize": 1}))
    assert [item["name"] for page in pages for item in page["items"]] == [wanted]
    assert len(pages) > 1, "pages without a row of that name come, too"


@pytest.mark.compat("page.most")
@pytest.mark.parametrize("limit", [0, 51])
def test_a_page_has_one_to_fifty_rows(raw, limit):
    """SPEC 3.2, 4.2."""
    reply = raw("GET", f"/2025-09-09/microvms?maxResults={limit}")
    word, bound = ("greater", 1) if limit < 1 else ("less", 50)
    message = f"1 validation error detected: Value '{limit}' at 'maxResults' failed to satisfy constraint: Member must have value {word} than or equal to {bound}"
    assert reply.refusal() == ("ValidationException", message, 400)


