"""Who a MicroVM is: credentials of its execution role at the metadata address, and what an app does with them on this very server."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

import support

ACCOUNT = "000000000000"
APP = Path(__file__).with_name("apps") / "identity"
METADATA = "http://169.254.169.254"
API = f"{METADATA}:8470"
CREDENTIALS = "/latest/meta-data/iam/security-credentials/"
# Credentials are renewed after half of this.
SESSION_SECONDS = 16
CONFIG = f"""
[roles]
session_seconds = {SESSION_SECONDS}

[extensions]
self_suspend = true
"""
# What of the SDK the app needs: everything but the models of services that are not here.
PACKAGES = ["boto3", "botocore", "dateutil", "jmespath", "s3transfer", "urllib3"]
MODELS = ["lambda-microvms", "lambda-core", "sts"]

TRUST = {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": ["sts:AssumeRole", "sts:TagSession"]}
LOGS = "arn:aws:logs:*:*:log-group:/aws/lambda-microvms/*"
ROLES = {
    "build": [],
    "runner": [
        {"Effect": "Allow", "Action": ["lambda:*", "iam:PassRole"], "Resource": "*"},
        {"Effect": "Allow", "Action": ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"], "Resource": LOGS},
    ],
    "reader": [{"Effect": "Allow", "Action": "lambda:ListMicrovms", "Resource": "*"}],
}


def arn(role: str) -> str:
    return f"arn:aws:iam::{ACCOUNT}:role/{role}"


def artifact() -> bytes:
    files = {name: (APP / name).read_bytes() for name in ("Dockerfile", "app.py")}
    site = Path(boto3.__file__).parent.parent
    modules = [site / "six.py", *(path for package in PACKAGES for path in sorted((site / package).rglob("*")) if path.is_file())]
    data = site / "botocore/data"
    for path in modules:
        if path.suffix == ".pyc" or (data in path.parents and path.parent != data and path.relative_to(data).parts[0] not in MODELS):
            continue
        files[f"sdk/{path.relative_to(site)}"] = path.read_bytes()
    return support.zip_of(files)


class Guest(support.Microvm):
    """A MicroVM that does what the test's app can be told to."""

    def post(self, path: str, **wanted):
        answer = self.http(path, method="POST", body=json.dumps(wanted), headers={"content-type": "application/json"})
        assert answer.status == 200, (answer.status, answer.body)
        return answer.json()

    def ask(self, path: str, method: str = "GET", base: str = METADATA, **headers: str) -> dict:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.post("/ask", url=base + path, method=method, headers=headers)

    def metadata_token(self, seconds: str = "60") -> str:
        return self.ask("/latest/api/token", "PUT", x_aws_ec2_metadata_token_ttl_seconds=seconds)["body"]

    def metadata(self, path: str, method: str = "GET") -> dict:
        return self.ask(path, method, x_aws_ec2_metadata_token=self.metadata_token())

    def credentials(self) -> dict:
        answer = self.metadata(CREDENTIALS + "execution_role")
        assert answer["status"] == 200, answer
        return json.loads(answer["body"])

    def sdk(self, service: str, call: str, **parameters) -> dict:
        return self.post("/sdk", service=service, call=call, parameters=parameters)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    documents = tmp_path_factory.mktemp("policies")

    def write(name: str, statements) -> str:
        path = documents / name
        path.write_text(json.dumps({"Version": "2012-10-17", "Statement": statements}))
        return str(path)

    with support.serving(CONFIG) as server:
        for role, statements in ROLES.items():
            # A policy says something: this one, about nothing that is here.
            policy = write(f"{role}.json", statements or [{"Effect": "Allow", "Action": "sqs:*", "Resource": "*"}])
            made = server.hearth("iam", "role", "create", role, "--trust", write("trust.json", TRUST), "--policy", policy)
            assert made.returncode == 0, made.stderr
        yield server


@pytest.fixture(scope="module")
def image_arn(own):
    created = support.create_image(own, "identity", support.upload(own, "identity.zip", artifact()))
    support.wait_image(own, created["imageArn"], "CREATED")
    return created["imageArn"]


@pytest.fixture(scope="module")
def guests(own, image_arn):
    """One MicroVM with each role, and one with none."""
    guests = {}
    for role in ("runner", "reader", None):
        passed = {"executionRoleArn": arn(role)} if role else {}
        guests[role] = Guest(own, own.microvms.run_microvm(imageIdentifier=image_arn, **passed))
    for guest in guests.values():
        guest.wait("RUNNING")
    yield guests
    for guest in guests.values():
        guest.terminate()


@pytest.fixture(scope="module")
def cloud():
    """Stands for an AWS account: a server with a user, and a role that the user may assume."""
    with support.serving() as server:
        yield server


@pytest.fixture
def runner(guests):
    return guests["runner"]


@pytest.mark.compat("guest.metadata-token")
def test_the_metadata_service_wants_a_token_that_was_put_from_here(runner):
    for headers in ({}, {"x_aws_ec2_metadata_token": "guessed"}):
        for path in (CREDENTIALS, CREDENTIALS + "execution_role", "/latest/meta-data/", "/"):
            assert runner.ask(path, **headers)["status"] == 401, (path, headers)
    put = {"x_aws_ec2_metadata_token_ttl_seconds": "60"}
    assert runner.ask("/latest/api/token", "PUT")["status"] == 400
    assert runner.ask("/latest/api/token", "PUT", x_aws_ec2_metadata_token_ttl_seconds="21601")["status"] == 400
    assert runner.ask("/latest/api/token", "PUT", x_forwarded_for="192.0.2.1", **put)["status"] == 403
    assert runner.ask("/latest/api/token", **put)["status"] == 405
    issued = runner.ask("/latest/api/token", "PUT", **put)
    assert issued["headers"]["x-aws-ec2-metadata-token-ttl-seconds"] == "60"
    assert runner.ask(CREDENTIALS, x_aws_ec2_metadata_token=issued["body"])["body"] == "execution_role"
    assert runner.http("/hold-port-80").text == "held", "port 80 stays the app's"


@pytest.mark.compat("guest.metadata")
def test_it_tells_what_an_instance_s_does(runner):
    assert runner.metadata("/latest/meta-data/")["body"].split() == ["iam/", "placement/"]
    assert runner.metadata("/latest/meta-data/placement/region")["body"] == "us-east-1"
    assert runner.metadata("/latest/meta-data/placement/availability-zone")["body"] == "us-east-1a"
    assert runner.metadata("/latest/meta-data/nothing")["status"] == 404
    credentials = runner.credentials()
    assert credentials["Code"] == "Success" and credentials["Type"] == "AWS-HMAC" and credentials["Token"]
    assert credentials["AccessKeyId"].startswith("ASIA") and credentials["SecretAccessKey"]
    for member in ("LastUpdated", "Expiration"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", credentials[member])


@pytest.mark.compat("guest.credentials")
def test_a_static_binary_has_them_too(own):
    archive = support.zip_with_program(APP.with_name("container-static"))
    image = support.create_image(own, "static", support.upload(own, "static.zip", archive))["imageArn"]
    support.wait_image(own, image, "CREATED")
    guest = support.run_microvm(own, image, executionRoleArn=arn("reader"))
    guest.wait("RUNNING")
    said = dict(line.split(" ", 1) for line in guest.http("/metadata").text.splitlines())
    status, credentials = said["credentials"].split(" ", 1)
    assert (said["role"], status) == ("200 execution_role", "200")
    assert still_good(own, json.loads(credentials))
    guest.terminate()


@pytest.mark.compat("guest.api")
def test_an_sdk_that_is_told_nothing_runs_microvms_with_the_role(runner, image_arn):
    me = runner.sdk("sts", "get_caller_identity")
    assert me.get("Arn") == f"arn:aws:sts::{ACCOUNT}:assumed-role/runner/{runner.id}", me
    listed = runner.sdk("lambda-microvms", "list_microvms")
    assert runner.id in [item["microvmId"] for item in listed["items"]]
    child = runner.sdk("lambda-microvms", "run_microvm", imageIdentifier=image_arn, executionRoleArn=arn("reader"))
    assert child.get("state") == "PENDING", child
    support.Microvm(runner.server, child).wait("RUNNING")
    assert runner.sdk("lambda-microvms", "terminate_microvm", microvmIdentifier=child["microvmId"]) == {}


@pytest.mark.compat("guest.own-role")
def test_each_has_its_own_role_and_no_other_s(guests):
    runner, reader = guests["runner"], guests["reader"]
    assert reader.sdk("sts", "get_caller_identity")["Arn"].endswith(f"assumed-role/reader/{reader.id}")
    assert "items" in reader.sdk("lambda-microvms", "list_microvms")
    refused = reader.sdk("lambda-microvms", "terminate_microvm", microvmIdentifier=runner.id)
    assert "AccessDeniedException" in refused["error"] and "assumed-role/reader" in refused["error"]
    keys = [guest.credentials()["AccessKeyId"] for guest in (runner, reader)]
    assert keys[0] != keys[1]
    # A token of one is worth nothing in the other.
    assert reader.ask(CREDENTIALS, x_aws_ec2_metadata_token=runner.metadata_token())["status"] == 401
    assert reader.metadata(CREDENTIALS + "runner")["status"] == 404


@pytest.mark.compat("guest.no-role")
def test_without_a_role_there_is_nothing_to_be_had(guests):
    nobody = guests[None]
    assert nobody.metadata("/latest/meta-data/")["body"].split() == ["placement/"]
    for path in (CREDENTIALS, CREDENTIALS + "execution_role"):
        assert nobody.metadata(path)["status"] == 404
    assert "NoCredentialsError" in nobody.sdk("lambda-microvms", "list_microvms")["error"]
    assert "error" in nobody.ask("/", base=API), "the API is not reached"


@pytest.mark.compat("guest.credentials")
def test_credentials_are_renewed_in_time_and_after_a_sleep(runner):
    first = runner.credentials()
    renewed = support.eventually(
        lambda: (found := runner.credentials())["AccessKeyId"] != first["AccessKeyId"] and found, "new credentials", SESSION_SECONDS
    )
    runner.client.suspend_microvm(microvmIdentifier=runner.id)
    runner.wait("SUSPENDED")
    support.eventually(lambda: not still_good(runner.server, renewed), "the old credentials to expire", 2 * SESSION_SECONDS)
    runner.client.resume_microvm(microvmIdentifier=runner.id)
    runner.wait("RUNNING")
    assert runner.credentials()["AccessKeyId"] != renewed["AccessKeyId"]
    assert runner.sdk("sts", "get_caller_identity")["Arn"].endswith(runner.id)


def still_good(server, credentials: dict) -> bool:
    """Outside, too, they are what they are."""
    sts = server.client(
        "sts",
        aws_access_key_id=credentials["AccessKeyId"],
        aws_secret_access_key=credentials["SecretAccessKey"],
        aws_session_token=credentials["Token"],
    )
    try:
        return bool(sts.get_caller_identity())
    except sts.exceptions.ClientError as error:
        assert error.response["Error"]["Code"] == "ExpiredToken"
        return False


@pytest.mark.compat("guest.self-suspend")
def test_an_app_may_suspend_itself_where_the_operator_allows_it(own, image_arn):
    guest = Guest(own, own.microvms.run_microvm(imageIdentifier=image_arn, idlePolicy=support.idle_policy()))
    guest.wait("RUNNING")
    assert guest.ask("/latest/hearth/suspend", "PUT")["status"] == 401
    token = guest.metadata_token()
    with ThreadPoolExecutor(1) as background:
        asked = background.submit(guest.ask, "/latest/hearth/suspend", "PUT", x_aws_ec2_metadata_token=token)
        guest.wait("SUSPENDED")
        # The sleep may come before the answer: the proxy's connection is cut then.
        assert asked.exception(60) is not None or asked.result()["status"] == 202
    assert guest.metadata("/latest/meta-data/placement/region")["status"] == 200
    guest.wait("RUNNING")
    guest.terminate()


@pytest.mark.compat("logs.role")
def test_logs_are_shown_as_the_role_allows_and_kept_in_any_case(own, guests):
    logs = own.client("logs")

    def streams() -> dict[str | None, list[str]]:
        shown = [stream["logStreamName"] for stream in logs.describe_log_streams(logGroupName="/aws/lambda-microvms/identity")["logStreams"]]
        return {role: [name for name in shown if guest.id in name] for role, guest in guests.items()}

    # Each request is a line of the app's.
    for guest in guests.values():
        guest.http("/environment")
    support.eventually(lambda: streams()["runner"], "the log of the MicroVM whose role may write one")
    of = streams()
    assert of["reader"] == [] and of[None] == [] and len(of["runner"]) == 1, of
    kept = own.hearth("logs", guests["reader"].id).stdout
    assert "does not allow logs:CreateLogStream" in kept, kept


def test_images_say_where_the_api_is(guests):
    environment = guests[None].http("/environment").json()
    for service in ("LAMBDA_MICROVMS", "LAMBDA_CORE", "STS", "CLOUDWATCH_LOGS", "S3"):
        assert environment[f"AWS_ENDPOINT_URL_{service}"] == API
    assert environment["AWS_REGION"] == "us-east-1" and "AWS_ACCESS_KEY_ID" not in environment


@pytest.mark.compat("guest.aws-account")
def test_credentials_of_another_account_s_role_come_from_its_token_service(cloud, tmp_path):
    def document(name: str, statement: dict) -> str:
        path = tmp_path / name
        path.write_text(json.dumps({"Version": "2012-10-17", "Statement": statement}))
        return str(path)

    trust = document("trust", {"Effect": "Allow", "Principal": {"AWS": ACCOUNT}, "Action": "sts:AssumeRole"})
    everything = document("policy", {"Effect": "Allow", "Action": "s3:*", "Resource": "*"})
    assumes = document("assumes", {"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": arn("theirs")})
    assert cloud.hearth("iam", "role", "create", "theirs", "--trust", trust, "--policy", everything).returncode == 0
    keys = dict(re.findall(r"(AWS_\w+)=(\S+)", cloud.hearth("iam", "user", "create", "operator", "--policy", assumes).stdout))
    profiles = tmp_path / "credentials"
    profiles.write_text(
        f"[hearth]\naws_access_key_id = {keys['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {keys['AWS_SECRET_ACCESS_KEY']}\n"
    )
    config = f'[roles.aws]\nprofile = "hearth"\nendpoint = "{cloud.connect["api"]}"\n'
    with support.serving(config, env=os.environ | {"AWS_SHARED_CREDENTIALS_FILE": str(profiles)}) as here:
        image = support.create_image(here, "identity", support.upload(here, "identity.zip", artifact()))["imageArn"]
        support.wait_image(here, image, "CREATED")
        guest, refused = (
            Guest(here, here.microvms.run_microvm(imageIdentifier=image, executionRoleArn=arn(role))) for role in ("theirs", "nobody-s")
        )
        guest.wait("RUNNING")
        credentials = guest.credentials()
        sts = cloud.client(
            "sts",
            aws_access_key_id=credentials["AccessKeyId"],
            aws_secret_access_key=credentials["SecretAccessKey"],
            aws_session_token=credentials["Token"],
        )
        assert sts.get_caller_identity()["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/theirs/{guest.id}"
        # Nothing sends these credentials to a server that does not know them.
        assert not [name for name in guest.http("/environment").json() if name.startswith("AWS_ENDPOINT_URL")]
        refused.wait("RUNNING")
        assert refused.credentials()["Code"] == "AssumeRoleUnauthorizedAccess"
        assert "AccessDenied" in here.log()
        # What is not switched on is not there.
        assert guest.metadata("/latest/hearth/suspend", "PUT")["status"] == 404
        for microvm in (guest, refused):
            microvm.terminate()
            microvm.wait("TERMINATED")
