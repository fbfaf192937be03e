"""`hearth iam`: an operator makes users and roles, and hands their keys to stock clients."""

from __future__ import annotations

import json
import shlex
import urllib.error
import urllib.request

import botocore.config
import botocore.exceptions
import pytest

import support

ACCOUNT = "000000000000"
OTHER = "111122223333"


def allow(*actions: str, resource: str = "*", **members) -> dict:
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource} | members


@pytest.fixture(scope="module")
def own():
    with support.serving() as server:
        yield server


@pytest.fixture
def document(tmp_path):
    def write(name: str, *statements: dict) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"Version": "2012-10-17", "Statement": list(statements)}))
        return str(path)

    return write


def made(server, *arguments: str) -> dict:
    """The keys that a verb printed, as arguments of a client."""
    printed = server.hearth("iam", *arguments)
    assert printed.returncode == 0, printed.stderr
    exports = dict(word.split("=", 1) for word in shlex.split(printed.stdout, comments=True) if word.startswith("AWS_") and "=" in word)
    return {"aws_access_key_id": exports["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": exports["AWS_SECRET_ACCESS_KEY"]}


def code_of(call, **parameters) -> str:
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(**parameters)
    return caught.value.response["Error"]["Code"]


def test_a_user_may_what_its_policy_says_until_it_is_removed(own, document):
    policy = document("lister", allow("lambda:ListMicrovms"))
    keys = made(own, "user", "create", "lister", "--policy", policy)
    microvms = own.client("lambda-microvms", **keys)
    assert microvms.list_microvms()["items"] == []
    assert code_of(microvms.list_microvm_images) == "AccessDeniedException"
    assert f"arn:aws:iam::{ACCOUNT}:user/lister\tpolicy\t{keys['aws_access_key_id']}\tiam" in own.hearth("iam", "user", "ls").stdout
    second = made(own, "key", "create", "lister")
    assert own.hearth("iam", "key", "rm", keys["aws_access_key_id"]).returncode == 0
    assert code_of(microvms.list_microvms) == "UnrecognizedClientException"
    own.client("lambda-microvms", **second).list_microvms()
    assert own.hearth("iam", "user", "rm", "lister").returncode == 0
    assert code_of(own.client("lambda-microvms", **second).list_microvms) == "UnrecognizedClientException"


def test_what_is_not_a_policy_is_refused_with_the_place(own, document):
    bad = document("bad", allow("lambda"))
    refused = own.hearth("iam", "user", "create", "nobody", "--policy", bad)
    assert refused.returncode == 1 and "MalformedPolicyDocument: Statement[0]: Action: 'lambda' is not an action" in refused.stderr
    refused = own.hearth("iam", "policy", "validate", bad)
    assert refused.returncode == 1 and "Statement[0]" in refused.stderr
    assert own.hearth("iam", "policy", "validate", document("good", allow("lambda:*"))).returncode == 0
    refused = own.hearth("iam", "user", "rm", "nobody")
    assert refused.returncode == 1 and "does not exist" in refused.stderr


def test_sessions_and_their_keys_outlive_a_restart(document):
    with support.serving() as server:
        trust = document("trust", {"Effect": "Allow", "Principal": {"AWS": ACCOUNT}, "Action": "sts:AssumeRole"})
        policy = document("store", allow("s3:*", resource="arn:aws:s3:::shared/*"), allow("lambda:ListMicrovms"))
        arn = server.hearth("iam", "role", "create", "store", "--trust", trust, "--policy", policy).stdout.strip()
        assert arn == f"arn:aws:iam::{ACCOUNT}:role/store"
        given = server.client("sts").assume_role(RoleArn=arn, RoleSessionName="one", DurationSeconds=900)["Credentials"]
        session = {
            "aws_access_key_id": given["AccessKeyId"],
            "aws_secret_access_key": given["SecretAccessKey"],
            "aws_session_token": given["SessionToken"],
        }
        server.stop()
        server.start()
        server.client("lambda-microvms", **session).list_microvms()

        server.client("s3").create_bucket(Bucket="shared")
        objects = server.client("s3", **session)
        objects.put_object(Bucket="shared", Key="a", Body=b"content")
        assert objects.get_object(Bucket="shared", Key="a")["Body"].read() == b"content"
        assert code_of(objects.list_objects_v2, Bucket="shared") == "AccessDenied"
        # Without it, boto3 makes URLs of version 2.
        signer = server.client("s3", **session, config=botocore.config.Config(signature_version="s3v4"))
        url = signer.generate_presigned_url("get_object", Params={"Bucket": "shared", "Key": "a"}, ExpiresIn=60)
        assert urllib.request.urlopen(url, timeout=10).read() == b"content"
        for part, other in (("X-Amz-Expires=60", "X-Amz-Expires=61"), ("/a?", "/b?"), ("X-Amz-Security-Token", "X-Amz-Nothing")):
            broken = url.replace(part, other)
            assert broken != url
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(broken, timeout=10)
            assert 400 <= caught.value.code < 500
        forever = signer.generate_presigned_url("get_object", Params={"Bucket": "shared", "Key": "a"}, ExpiresIn=604801)
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(forever, timeout=10)

        assert server.hearth("iam", "role", "rm", "store").returncode == 0
        assert code_of(server.client("lambda-microvms", **session).list_microvms) == "UnrecognizedClientException"


def test_another_account_has_buckets_of_its_own(own):
    admin = made(own, "user", "create", "boss", "--account", OTHER, "--admin")
    assert own.client("sts", **admin).get_caller_identity()["Account"] == OTHER
    ours, theirs = own.client("s3"), own.client("s3", **admin)
    ours.create_bucket(Bucket="artifacts")
    ours.put_object(Bucket="artifacts", Key="k", Body=b"ours")
    assert code_of(theirs.get_object, Bucket="artifacts", Key="k") == "NoSuchBucket"
    theirs.create_bucket(Bucket="artifacts")
    theirs.put_object(Bucket="artifacts", Key="k", Body=b"theirs")
    assert ours.get_object(Bucket="artifacts", Key="k")["Body"].read() == b"ours"
    url = theirs.generate_presigned_url("get_object", Params={"Bucket": "artifacts", "Key": "k"}, ExpiresIn=60)
    assert urllib.request.urlopen(url, timeout=10).read() == b"theirs"
    over = theirs.generate_presigned_url("get_object", Params={"Bucket": "artifacts", "Key": "k"}, ExpiresIn=-1)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(over, timeout=10)
    assert caught.value.code == 403


def test_a_user_of_lambda_only_does_not_reach_the_objects(own, document):
    keys = made(own, "user", "create", "lambda-only", "--policy", document("lambda", allow("lambda:*")))
    objects = own.client("s3", **keys)
    assert code_of(objects.list_buckets) == "AccessDenied"
    assert code_of(objects.put_object, Bucket="artifacts", Key="k", Body=b"x") == "AccessDenied"


def test_the_shortcut_for_builds_takes_a_role_of_the_account(own, document, tmp_path):
    trust = document("trust", {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"})
    created = own.hearth("iam", "role", "create", "builder", "--trust", trust, "--policy", document("all", allow("*")))
    assert created.returncode == 0, created.stderr
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM scratch\n")
    build = ("image", "build", str(context), "--name", "by-role")
    refused = own.hearth(*build)
    assert refused.returncode == 1 and "--role" in refused.stderr, refused.stderr
    built = own.hearth(*build, "--role", "builder", timeout=support.BUILD_SECONDS)
    assert "CREATE_FAILED" in built.stderr, "the role is taken; what fails is an image without a command"
