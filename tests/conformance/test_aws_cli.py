"""The stock AWS CLI: every verb of `lambda-microvms` and the connectors' verbs of `lambda-core`, once each (SPEC 5)."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import re
import subprocess

import pytest

import support

from .model import operations
from .things import OPERATOR_ROLE, VPC, managed_connector


def verb_of(operation: str) -> str:
    return "-".join(re.findall("[A-Z][a-z]+", operation)).lower()


@pytest.fixture(scope="module")
def aws(server):
    connect = server.connect
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_ENDPOINT_URL": connect["api"],
        "AWS_REGION": connect["region"],
        "AWS_DEFAULT_REGION": connect["region"],
        "AWS_ACCESS_KEY_ID": connect["accessKeyId"],
        "AWS_SECRET_ACCESS_KEY": connect["secretAccessKey"],
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_PAGER": "",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }

    def run(service: str, verb: str, **options) -> dict:
        command = ["aws", service, verb, "--output", "json"]
        for name, value in options.items():
            command.append("--" + name.replace("_", "-"))
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                command += value
            else:
                command.append(value if isinstance(value, str) else json.dumps(value))
        answer = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
        return json.loads(answer.stdout) if answer.stdout.strip() else {}

    return run


@pytest.mark.compat("cli.images")
def test_images(aws, server, things):
    microvms = functools.partial(aws, "lambda-microvms")
    name = things.name("cli")
    spec = {
        "base_image_arn": support.BASE_IMAGE_ARN,
        "build_role_arn": support.BUILD_ROLE_ARN,
        "code_artifact": {"uri": "s3://no-such-bucket/nothing.zip"},
    }
    arn = microvms("create-microvm-image", name=name, **spec)["imageArn"]
    support.wait_image(server, arn, "CREATE_FAILED")
    assert microvms("get-microvm-image", image_identifier=arn)["name"] == name
    assert arn in [image["imageArn"] for image in microvms("list-microvm-images", name_filter=name)["items"]]
    assert microvms("update-microvm-image", image_identifier=arn, **spec)["imageVersion"] == "2.0"
    support.wait_image(server, arn, "UPDATE_FAILED")
    versions = microvms("list-microvm-image-versions", image_identifier=arn)["items"]
    assert {version["imageVersion"] for version in versions} == {"1.0", "2.0"}
    assert microvms("get-microvm-image-version", image_identifier=arn, image_version="1.0")["state"] == "FAILED"
    (build,) = microvms("list-microvm-image-builds", image_identifier=arn, image_version="1.0")["items"]
    found = microvms("get-microvm-image-build", image_identifier=arn, image_version="1.0", build_id=build["buildId"])
    assert found["buildState"] == "FAILED"
    assert microvms("delete-microvm-image-version", image_identifier=arn, image_version="2.0")["state"] == "DELETING"
    microvms("tag-resource", resource=arn, tags={"a": "1"})
    assert microvms("list-tags", resource=arn)["Tags"] == {"a": "1"}
    microvms("untag-resource", resource=arn, tag_keys=["a"])
    support.eventually(lambda: len(server.microvms.list_microvm_image_versions(imageIdentifier=arn)["items"]) == 1, "one version")
    assert microvms("delete-microvm-image", image_identifier=arn)["state"] == "DELETING"
    assert microvms("list-managed-microvm-images")["items"]
    assert microvms("list-managed-microvm-image-versions", image_identifier=support.BASE_IMAGE_ARN)["items"]


@pytest.mark.compat("cli.microvms")
def test_microvms(aws, things):
    microvms = functools.partial(aws, "lambda-microvms")
    version = microvms("update-microvm-image-version", image_identifier=things.image.arn, image_version="1.0", status="ACTIVE")
    assert version["status"] == "ACTIVE"
    ingress = [managed_connector("HTTP_INGRESS"), managed_connector("SHELL_INGRESS")]
    started = microvms("run-microvm", image_identifier=things.image.arn, ingress_network_connectors=ingress)
    microvm = things.adopt(started)
    microvm.wait("RUNNING")
    one = {"microvm_identifier": microvm.id}
    assert microvms("get-microvm", **one)["state"] == "RUNNING"
    assert microvm.id in [item["microvmId"] for item in microvms("list-microvms", image_identifier=things.image.arn)["items"]]
    assert microvms("create-microvm-auth-token", **one, expiration_in_minutes="5", allowed_ports=[{"port": 8080}])["authToken"]
    assert microvms("create-microvm-shell-auth-token", **one, expiration_in_minutes="5")["authToken"]
    for verb, state in [("suspend", "SUSPENDED"), ("resume", "RUNNING"), ("terminate", "TERMINATED")]:
        microvms(f"{verb}-microvm", **one)
        assert support.eventually(lambda: microvm.state() == state, state)


@pytest.mark.compat("cli.connectors")
def test_connectors(aws, connectors, things):
    core = functools.partial(aws, "lambda-core")
    configuration = {"VpcEgressConfiguration": VPC}
    made = core("create-network-connector", name=things.name("cli"), operator_role=OPERATOR_ROLE, configuration=configuration)
    one = {"identifier": made["Id"]}
    support.eventually(lambda: connectors.get_network_connector(Identifier=made["Id"])["State"] == "ACTIVE", "ACTIVE")
    assert core("get-network-connector", **one)["Arn"] == made["Arn"]
    assert made["Id"] in [found["Id"] for found in core("list-network-connectors")["NetworkConnectors"]]
    assert core("update-network-connector", **one, configuration=configuration)["LastUpdateStatus"]
    assert core("delete-network-connector", **one)["State"] == "DELETING"


def test_every_verb_was_tried():
    sources = [ast.parse(inspect.getsource(test)) for test in (test_images, test_microvms, test_connectors)]
    words = {node.value for source in sources for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    tried = words | {f"{verb}-microvm" for verb in ("suspend", "resume", "terminate")}
    # Version 1 of the CLI was released without the youngest verb; boto3 has it.
    assert {verb_of(operation) for operation in operations()} - tried == {"list-network-connector-versions"}
