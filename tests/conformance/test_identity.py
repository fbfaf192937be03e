"""Accounts, regions, policies, and STS (SPEC 1, 3.3, 4.4): a server with two accounts, two regions, and users who may do some of it."""

from __future__ import annotations

import json

import botocore.exceptions
import pytest

import support
from support import error_of

from .things import OTHER_ACCOUNT, image_arn

REGION = "eu-west-1"
SPEC = {
    "baseImageArn": support.BASE_IMAGE_ARN,
    "buildRoleArn": f"arn:aws:iam::{OTHER_ACCOUNT}:role/build",
    "codeArtifact": {"uri": "s3://no-such-bucket/nothing.zip"},
}
WORKER = f"arn:aws:iam::{OTHER_ACCOUNT}:role/worker"
STRICT = f"arn:aws:iam::{OTHER_ACCOUNT}:role/strict"


def allow(*actions: str, resource: str = "*") -> dict:
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource}


def document(*statements: dict) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def user(name: str, *statements: dict, administrator: bool = False) -> str:
    policy = f"policy = '''{document(*statements)}'''\n" if statements else ""
    keys = f'keys = [{{ access_key_id = "AKIA{name.upper()}", secret_access_key = "secret-of-{name}" }}]\n'
    return f'[[accounts.users]]\nname = "{name}"\nadministrator = {str(administrator).lower()}\n{policy}{keys}'


def role(name: str, trusted: dict, *statements: dict) -> str:
    trust = document({"Effect": "Allow", "Principal": trusted, "Action": ["sts:AssumeRole", "sts:TagSession"]})
    return f"[[accounts.roles]]\nname = \"{name}\"\ntrust = '''{trust}'''\npolicy = '''{document(*statements)}'''\n"


CONFIG = f'regions = ["{REGION}"]\n[[accounts]]\nid = "{OTHER_ACCOUNT}"\n' + "".join(
    [
        user("ann", administrator=True),
        user("lister", allow("lambda:ListMicrovmImages")),
        user("builder", allow("lambda:*")),
        user("denied", allow("lambda:*", "iam:PassRole"), {"Effect": "Deny", "Action": "lambda:CreateMicrovmImage", "Resource": "*"}),
        user("runner", allow("lambda:RunMicrovm")),
        user("keyless", allow("lambda:*", "iam:PassRole")),
        user("narrow", allow("lambda:GetMicrovmImage", resource="arn:aws:lambda:*:*:microvm-image:mine-*")),
        role("worker", {"AWS": OTHER_ACCOUNT, "Service": "lambda.amazonaws.com"}, allow("lambda:ListMicrovms")),
        role("build", {"Service": "lambda.amazonaws.com"}, allow("s3:GetObject")),
        role("strict", {"Service": "lambda.amazonaws.com"}, allow("lambda:*")),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def shared():
    with support.serving(CONFIG, min_idle_seconds=60) as server:
        yield server


@pytest.fixture
def as_user(shared):
    def client(name: str, service: str = "lambda-microvms", **overrides):
        return shared.client(service, aws_access_key_id=f"AKIA{name.upper()}", aws_secret_access_key=f"secret-of-{name}", **overrides)

    return client


@pytest.mark.compat("sts.caller-identity")
def test_everybody_may_ask_who_they_are(shared, as_user):
    found = as_user("lister", "sts").get_caller_identity()
    assert (found["Account"], found["Arn"]) == (OTHER_ACCOUNT, f"arn:aws:iam::{OTHER_ACCOUNT}:user/lister")
    assert found["UserId"]
    assert shared.client("sts").get_caller_identity()["Account"] == "000000000000"


@pytest.mark.compat("identity.accounts")
def test_accounts_see_nothing_of_each_other(shared, as_user):
    """SPEC 3.3: another account's ARN is refused, and whether it exists is not told."""
    ours, theirs = shared.microvms, as_user("ann")
    spec = SPEC | {"buildRoleArn": support.BUILD_ROLE_ARN}
    arn = ours.create_microvm_image(name="private", **spec)["imageArn"]
    assert theirs.create_microvm_image(name="private", **SPEC)["imageArn"] == image_arn("private", OTHER_ACCOUNT)
    assert [image["imageArn"] for image in theirs.list_microvm_images()["items"]] == [image_arn("private", OTHER_ACCOUNT)]
    answers = [error_of(theirs.get_microvm_image, imageIdentifier=identifier) for identifier in (arn, arn.replace("private", "nothing"))]
    for code, message, status in answers:
        assert (code, status) == ("AccessDeniedException", 403) and f"arn:aws:iam::{OTHER_ACCOUNT}:user/ann" in message
    assert answers[0][1].replace("private", "nothing") == answers[1][1]
    for call in ("delete_microvm_image", "list_microvm_image_versions", "run_microvm"):
        assert error_of(getattr(theirs, call), imageIdentifier=arn)[::2] == ("AccessDeniedException", 403)
    assert error_of(theirs.list_tags, Resource=arn)[::2] == ("AccessDeniedException", 403)


@pytest.mark.compat("identity.regions")
def test_regions_have_images_of_their_own(shared, as_user):
    """SPEC 1: the credential scope says which region is meant."""
    here, there = as_user("ann"), as_user("ann", region_name=REGION)
    base = support.BASE_IMAGE_ARN.replace("us-east-1", REGION)
    made = there.create_microvm_image(name="regional", **(SPEC | {"baseImageArn": base}))["imageArn"]
    assert made == image_arn("regional", OTHER_ACCOUNT).replace("us-east-1", REGION)
    assert "regional" in [image["name"] for image in there.list_microvm_images()["items"]]
    assert "regional" not in [image["name"] for image in here.list_microvm_images()["items"]]


@pytest.mark.compat("identity.policy")
def test_what_no_policy_allows_is_denied(as_user):
    """SPEC 4.4: the action is the operation's name in `lambda:`."""
    lister = as_user("lister")
    lister.list_microvm_images()
    code, message, status = error_of(lister.list_microvms)
    assert (code, status) == ("AccessDeniedException", 403)
    assert f"arn:aws:iam::{OTHER_ACCOUNT}:user/lister" in message and "lambda:ListMicrovms" in message


@pytest.mark.compat("identity.deny")
def test_an_explicit_deny_wins(as_user):
    denied = as_user("denied")
    assert error_of(denied.create_microvm_image, name="never", **SPEC)[::2] == ("AccessDeniedException", 403)
    denied.list_microvm_images()


@pytest.mark.compat("identity.resource")
def test_images_are_named_by_their_arn(as_user):
    """SPEC 4.4: what is allowed on some images is not on others."""
    narrow = as_user("narrow")
    allowed, other = (image_arn(name, OTHER_ACCOUNT) for name in ("mine-1", "yours-1"))
    assert error_of(narrow.get_microvm_image, imageIdentifier=allowed)[::2] == ("ResourceNotFoundException", 404)
    assert error_of(narrow.get_microvm_image, imageIdentifier=other)[::2] == ("AccessDeniedException", 403)


@pytest.mark.compat("identity.pass-role")
def test_a_role_is_passed_only_with_leave(as_user):
    """SPEC 4.4: `iam:PassRole`."""
    code, message, status = error_of(as_user("builder").create_microvm_image, name="passed", **SPEC)
    assert (code, status) == ("AccessDeniedException", 403) and "iam:PassRole" in message


@pytest.mark.compat("identity.pass-connector")
def test_connectors_are_passed_only_with_leave(shared, as_user):
    """SPEC 4.4: `lambda:PassNetworkConnector` for every connector, also the managed ones that nobody named."""
    user = as_user("runner")
    code, message, status = error_of(user.run_microvm, imageIdentifier=image_arn("none", OTHER_ACCOUNT))
    assert (code, status) == ("AccessDeniedException", 403) and "lambda:PassNetworkConnector" in message


@pytest.mark.compat("identity.use-key")
@pytest.mark.parametrize("key", [f"arn:aws:kms:us-east-1:{OTHER_ACCOUNT}:key/1234", "alias/mine"])
def test_a_key_is_named_only_with_leave_to_use_it(as_user, key):
    for call, options in [
        ("create_microvm_image", {"name": "keyed", **SPEC}),
        ("update_microvm_image", {"imageIdentifier": image_arn("keyed", OTHER_ACCOUNT), **SPEC}),
        ("run_microvm", {"imageIdentifier": image_arn("keyed", OTHER_ACCOUNT)}),
    ]:
        code, message, status = error_of(getattr(as_user("keyless"), call), kmsKeyIdentifier=key, **options)
        assert (code, status) == ("AccessDeniedException", 403) and "kms:GenerateDataKey" in message, (call, message)


@pytest.mark.compat("sts.assume-role")
def test_a_role_s_session_may_what_the_role_may(shared, as_user):
    answer = as_user("ann", "sts").assume_role(RoleArn=WORKER, RoleSessionName="shift")
    given = answer["Credentials"]
    session = {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }
    arn = f"arn:aws:sts::{OTHER_ACCOUNT}:assumed-role/worker/shift"
    assert answer["AssumedRoleUser"]["Arn"] == arn
    assert shared.client("sts", **session).get_caller_identity()["Arn"] == arn
    microvms = shared.client("lambda-microvms", **session)
    microvms.list_microvms()
    assert error_of(microvms.list_microvm_images)[::2] == ("AccessDeniedException", 403)
    without_token = {name: value for name, value in session.items() if name != "aws_session_token"}
    assert error_of(shared.client("lambda-microvms", **without_token).list_microvms)[2] == 403


@pytest.mark.compat("sts.trust")
def test_a_role_that_trusts_only_the_service_is_not_assumed(as_user):
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        as_user("ann", "sts").assume_role(RoleArn=STRICT, RoleSessionName="shift")
    assert caught.value.response["Error"]["Code"] == "AccessDenied"
