"""Tags (SPEC 4.3), on the path that they share with classic Lambda."""

from __future__ import annotations

import pytest

from support import error_of

from .clients import quoted
from .things import OPERATOR_ROLE, UNKNOWN_IMAGE, UNKNOWN_MICROVM, VPC


@pytest.mark.compat("tags.set", "tags.list", "tags.remove")
def test_tags_come_and_go(microvms, raw, things):
    """204 with no body, and the image's version is none the newer."""
    image = things.broken(tags={"a": "1"})
    path = f"/2017-03-31/tags/{quoted(image.arn)}"
    added = raw("POST", path, {"Tags": {"b": "2", "c": "ü / = + -"}})
    assert (added.status, added.body) == (204, b"")
    assert raw("GET", path).json() == {"Tags": {"a": "1", "b": "2", "c": "ü / = + -"}}
    removed = raw("DELETE", path + "?tagKeys=a&tagKeys=c&tagKeys=never")
    assert (removed.status, removed.body) == (204, b"")
    assert microvms.list_tags(Resource=image.arn)["Tags"] == {"b": "2"}
    microvms.tag_resource(Resource=image.arn, Tags={"b": "3"})
    microvms.untag_resource(Resource=image.arn, TagKeys=["none"])
    found = microvms.get_microvm_image(imageIdentifier=image.arn)
    assert (found["tags"], found["state"]) == ({"b": "3"}, "CREATE_FAILED")


@pytest.mark.compat("tags.connector")
def test_connectors_have_tags(microvms, connectors, things):
    made = connectors.create_network_connector(
        Name=things.name("tagged"), OperatorRole=OPERATOR_ROLE, Configuration={"VpcEgressConfiguration": VPC}, Tags={"a": "1"}
    )
    microvms.tag_resource(Resource=made["Arn"], Tags={"b": "2"})
    assert microvms.list_tags(Resource=made["Arn"])["Tags"] == {"a": "1", "b": "2"}


@pytest.mark.compat("tags.microvm")
def test_microvms_have_none(microvms):
    """A MicroVM has no ARN, and its id does not pass for one."""
    assert error_of(microvms.list_tags, Resource=UNKNOWN_MICROVM)[::2] == ("ValidationException", 400)


@pytest.mark.compat("tags.unknown")
@pytest.mark.parametrize("call", ["list_tags", "tag_resource", "untag_resource"])
def test_tags_of_what_is_not_there(microvms, call):
    """Appendix A: ResourceNotFoundException."""
    options = {"list_tags": {}, "tag_resource": {"Tags": {"a": "1"}}, "untag_resource": {"TagKeys": ["a"]}}[call]
    assert error_of(getattr(microvms, call), Resource=UNKNOWN_IMAGE, **options)[::2] == ("ResourceNotFoundException", 404)
