"""Logs through the CloudWatch Logs API, read with boto3 (SPEC 13.1)."""

from __future__ import annotations

import re

import pytest

from support import error_of


@pytest.fixture(scope="module")
def logs(server):
    return server.client("logs")


@pytest.fixture(scope="module")
def group(things):
    return f"/aws/lambda-microvms/{things.image.created['name']}"


@pytest.mark.compat("logs.groups")
def test_every_image_has_a_group(logs, group):
    found = [item for page in logs.get_paginator("describe_log_groups").paginate(logGroupNamePrefix=group) for item in page["logGroups"]]
    assert group in [item["logGroupName"] for item in found]
    assert f":log-group:{group}" in found[0]["arn"]


@pytest.mark.compat("logs.streams")
def test_a_build_has_a_stream_for_its_dockerfile_and_one_for_its_boot(logs, group):
    """Version 0.0 for the first, the image's own for the second."""
    names = [item["logStreamName"] for page in logs.get_paginator("describe_log_streams").paginate(logGroupName=group) for item in page["logStreams"]]
    for version in ("0.0", "1.0"):
        pattern = rf"\d{{4}}/\d\d/\d\d\[{re.escape(version)}\]\S+"
        assert any(re.fullmatch(pattern, name) for name in names), (version, names)


@pytest.mark.compat("logs.events")
def test_the_build_s_lines_are_events(logs, group):
    stream = next(item["logStreamName"] for item in logs.describe_log_streams(logGroupName=group)["logStreams"] if "[0.0]" in item["logStreamName"])
    answer = logs.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True)
    lines = [event["message"] for event in answer["events"]]
    assert any("FROM" in line or "STEP" in line for line in lines), lines
    times = [event["timestamp"] for event in answer["events"]]
    assert times == sorted(times)
    assert answer["nextForwardToken"].startswith("f/") and answer["nextBackwardToken"].startswith("b/")
    again = logs.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, nextToken=answer["nextForwardToken"])
    assert (again["events"], again["nextForwardToken"]) == ([], answer["nextForwardToken"])


@pytest.mark.compat("logs.filter")
def test_events_are_found_as_tail_finds_them(logs, group):
    """`aws logs tail` pages through FilterLogEvents."""
    pages = logs.get_paginator("filter_log_events").paginate(logGroupName=group, startTime=0, interleaved=True)
    events = [event for page in pages for event in page["events"]]
    assert events and all({"logStreamName", "timestamp", "message", "eventId"} <= set(event) for event in events)
    assert len({event["eventId"] for event in events}) == len(events)


@pytest.mark.compat("logs.unknown-group")
def test_a_group_that_is_not_there(logs):
    code, message, status = error_of(logs.describe_log_streams, logGroupName="/aws/lambda-microvms/never")
    assert (code, message, status) == ("ResourceNotFoundException", "The specified log group does not exist.", 400)
