"""The few images and MicroVMs that the suite shares, made when they are first wanted."""

from __future__ import annotations

import functools
import itertools

import support
from support import Microvm, Server

STATIC_SERVER = support.ROOT / "examples/static-server"
STATIC_PORT = 8080
REGION = "us-east-1"
ACCOUNT = "000000000000"
OTHER_ACCOUNT = "999999999999"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/execution"
OPERATOR_ROLE = f"arn:aws:iam::{ACCOUNT}:role/operator"
UNKNOWN_MICROVM = "microvm-00000000-0000-4000-8000-000000000000"
VPC = {
    "SubnetIds": ["subnet-0a1b2c3d"],
    "SecurityGroupIds": ["sg-0a1b2c3d"],
    "NetworkProtocol": "IPv4",
    "AssociatedComputeResourceTypes": ["MicroVm"],
}


def image_arn(name: str, account: str = ACCOUNT) -> str:
    return f"arn:aws:lambda:{REGION}:{account}:microvm-image:{name}"


def managed_connector(name: str) -> str:
    return f"arn:aws:lambda:{REGION}:aws:network-connector:aws-network-connector:{name}"


UNKNOWN_IMAGE = image_arn("unknown")


class Image:
    """What creating an image answered, and what it was when its build had ended."""

    def __init__(self, created: dict, settled: dict):
        self.arn: str = created["imageArn"]
        self.created = created
        self.settled = settled


class Things:
    def __init__(self, server: Server, microvms):
        self.server = server
        self._client = microvms
        self._started: list[Microvm] = []
        self._numbers = itertools.count(1)

    def name(self, about: str) -> str:
        """A name that no other image of the run has."""
        return f"{about}-{next(self._numbers)}"

    def spec(self, uri: str) -> dict:
        """What creating and updating an image need."""
        return {
            "baseImageArn": support.BASE_IMAGE_ARN,
            "buildRoleArn": support.BUILD_ROLE_ARN,
            "codeArtifact": {"uri": uri},
            "resources": [{"minimumMemoryInMiB": 512}],
        }

    @functools.cached_property
    def uri(self) -> str:
        return support.upload(self.server, "static-server.zip", support.zip_directory(STATIC_SERVER))

    @functools.cached_property
    def image(self) -> Image:
        """An image with one active version."""
        return self.build(self.name("static-server"), description="one page")

    def build(self, name: str, **options) -> Image:
        created = self._client.create_microvm_image(name=name, **(self.spec(self.uri) | options))
        return Image(created, support.wait_image(self.server, created["imageArn"], "CREATED"))

    def broken(self, name: str | None = None, **options) -> Image:
        """An image whose build fails at once, because there is no archive. It has everything but an active version."""
        spec = self.spec("s3://no-such-bucket/nothing.zip") | options
        created = self._client.create_microvm_image(name=name or self.name("broken"), **spec)
        return Image(created, support.wait_image(self.server, created["imageArn"], "CREATE_FAILED"))

    @functools.cached_property
    def failed(self) -> Image:
        return self.broken(tags={"team": "conformance"}, environmentVariables={"MODE": "test"}, description="no archive")

    def run(self, wait: str | None = "RUNNING", **options) -> Microvm:
        microvm = support.run_microvm(self.server, options.pop("imageIdentifier", None) or self.image.arn, **options)
        self._started.append(microvm)
        if wait:
            microvm.wait(wait)
        return microvm

    def adopt(self, description: dict) -> Microvm:
        """A MicroVM that another client started, to be ended with the others."""
        microvm = Microvm(self.server, description)
        self._started.append(microvm)
        return microvm

    @functools.cached_property
    def microvm(self) -> Microvm:
        """A MicroVM that runs, for tests that leave it as it is."""
        return self.run()

    @functools.cached_property
    def terminated(self) -> Microvm:
        microvm = self.run(wait=None)
        microvm.terminate()
        microvm.wait("TERMINATED")
        return microvm

    def end(self) -> None:
        for microvm in self._started:
            microvm.terminate()
        for microvm in self._started:
            microvm.wait("TERMINATED")
