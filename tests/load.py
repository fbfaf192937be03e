"""How many GetMicrovm calls a second the server answers, and how soon, at 1, 8 and 64 connections: `cargo xtask bench` runs this.

The load generator knows nothing of signatures, but one stays good for minutes: every request is the same signed one. Server and generator
share the processors.
"""

import argparse
import os
import urllib.parse
from pathlib import Path

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import support
from support import Server
from wrk import load

CONNECTIONS = (1, 8, 64)


def signed(server: Server, path: str) -> tuple[str, dict[str, str]]:
    connect = server.connect
    url = connect["api"] + path
    request = AWSRequest("GET", url, headers={"Host": urllib.parse.urlsplit(url).netloc})
    SigV4Auth(Credentials(connect["accessKeyId"], connect["secretAccessKey"]), "lambda", connect["region"]).add_auth(request)
    return url, dict(request.headers)


def microvm(server: Server) -> str:
    """A MicroVM to ask for: one that ended is as good as any, and leaves the processors to the server."""
    images = [image for image in server.microvms.list_microvm_images()["items"] if image.get("latestActiveImageVersion")]
    if images:
        arn = images[0]["imageArn"]
    else:
        uri = support.upload(server, "static-server.zip", support.zip_directory(support.ROOT / "examples/static-server"))
        arn = support.create_image(server, "static-server", uri)["imageArn"]
        support.wait_image(server, arn, "CREATED", 600)
    started = support.run_microvm(server, arn)
    started.wait("RUNNING")
    started.terminate()
    started.wait("TERMINATED")
    return started.id


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--seconds", type=int, default=10)
    arguments = options.parse_args()

    server = Server.__new__(Server)
    server.data_dir, server.log_path = arguments.data_dir, Path(os.devnull)
    url, headers = signed(server, f"/2025-09-09/microvms/{microvm(server)}")
    load(url, headers, 8, 2)
    print(f"\n{'GetMicrovm':<16} {'requests/s':>12} {'p50':>10} {'p99':>10}")
    for connections in CONNECTIONS:
        rate, median, p99 = load(url, headers, connections, arguments.seconds)
        print(f"{connections:>3} connections  {rate:>12.0f} {median:>10} {p99:>10}", flush=True)


if __name__ == "__main__":
    main()
