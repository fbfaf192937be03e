"""What the whole-system tests share: a server process, clients for it, and requests through its endpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import os
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import boto3
import botocore.config
import botocore.exceptions

ROOT = Path(__file__).resolve().parent.parent
HEARTH = Path(os.environ.get("HEARTH", ROOT / "target/debug/hearth"))
BUILD_CACHE = os.environ.get("HEARTH_TEST_BUILD_CACHE")
EXAMPLES = ROOT / "examples"
FLASK_HELLO = ROOT / "tests/apps/flask-hello"

BASE_IMAGE_ARN = "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1"
BASE_IMAGE = "public.ecr.aws/lambda/microvms:al2023-minimal"
BUILD_ROLE_ARN = "arn:aws:iam::000000000000:role/build"
FLASK_PORT = 5000

START_SECONDS = 60
STOP_SECONDS = 60
BUILD_SECONDS = 200
STATE_SECONDS = 45


class Deadline:
    """A point in time that a wait may not pass. `tick` lets a moment go by between two looks: the API has no call that waits."""

    def __init__(self, seconds: float, what: str):
        self._seconds, self._what = seconds, what
        self._end = time.monotonic() + seconds

    def tick(self, seen: object = None, pause: float = 0.05) -> None:
        if time.monotonic() > self._end:
            raise AssertionError(f"waited {self._seconds} s for {self._what}; last seen: {seen}")
        time.sleep(pause)


class Server:
    """A `hearth serve` process and what a client must know of it."""

    def __init__(self, data_dir: Path, config: str = "", min_idle_seconds: int = 1, env: dict[str, str] | None = None):
        self.data_dir = data_dir
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self.config_path = data_dir.with_name(data_dir.name + ".toml")
        cache = f'build_cache_dir = "{BUILD_CACHE}"\n' if BUILD_CACHE and "build_cache_dir" not in config else ""
        self.config_path.write_text(cache + config)
        self.min_idle_seconds = min_idle_seconds
        self.env = env
        self.process: subprocess.Popen | None = None

    @classmethod
    def attach(cls, data_dir: Path) -> Server:
        """A server that somebody else started."""
        server = cls.__new__(cls)
        server.data_dir, server.process = data_dir, None
        return server

    def command(self) -> list[str]:
        return [
            str(HEARTH), "serve", "--data-dir", str(self.data_dir), "--config", str(self.config_path),
            "--api", "127.0.0.1:0", "--endpoint", "127.0.0.1:0", "--min-idle-seconds", str(self.min_idle_seconds),
        ]  # fmt: skip

    def start(self) -> Server:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self.env
            )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout, lines), daemon=True).start()
        end = time.monotonic() + START_SECONDS
        said = []
        while True:
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise AssertionError(f"hearth was not ready within {START_SECONDS} s: {said}\n{self.log()}") from None
            if line is None:
                raise AssertionError(f"hearth ended before it was ready: {said}\n{self.log()}")
            said.append(line)
            if line.startswith("ready"):
                return self

    @staticmethod
    def _read(stream, lines: queue.Queue) -> None:
        for line in stream:
            lines.put(line.decode().rstrip("\n"))
        lines.put(None)

    def stop(self) -> int:
        """SIGTERM, as a service manager does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hearth did not stop within {STOP_SECONDS} s\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-25:])

    @property
    def connect(self) -> dict:
        return json.loads((self.data_dir / "connect.json").read_text())

    def client(self, service: str, **overrides):
        connect = self.connect
        settings = {
            "region_name": connect["region"],
            "endpoint_url": connect["api"],
            "aws_access_key_id": connect["accessKeyId"],
            "aws_secret_access_key": connect["secretAccessKey"],
            # One attempt: a retry would hide an error that a test is about. No validation here: clients refuse idle times below a minute
            # by themselves, and what the server refuses is what the tests are about.
            "config": botocore.config.Config(
                retries={"total_max_attempts": 1}, parameter_validation=False, connect_timeout=5, read_timeout=60
            ),
        }
        return boto3.client(service, **(settings | overrides))

    @property
    def microvms(self):
        return self.client("lambda-microvms")

    def hearth(self, *arguments: str, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        """Runs a verb of the command line against this server."""
        command = [str(HEARTH), *arguments, "--data-dir", str(self.data_dir)]
        if "--" in arguments:
            split = arguments.index("--")
            command = [str(HEARTH), *arguments[:split], "--data-dir", str(self.data_dir), *arguments[split:]]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, **options)

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.connect["ca"])

    def endpoint_address(self) -> tuple[str, int]:
        host, port = self.connect["endpoint"].rsplit(":", 1)
        return host, int(port)


@contextlib.contextmanager
def scratch(prefix: str = "hearth-test-"):
    """A directory that MicroVMs' own users can pass through."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def serving(config: str = "", **options):
    """A server of its own with a fresh data directory, stopped and removed afterwards."""
    with scratch() as directory:
        server = Server(directory / "data", config, **options)
        try:
            yield server.start()
        finally:
            if server.running():
                server.stop()


@dataclasses.dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self):
        return json.loads(self.body)


class EndpointConnection(http.client.HTTPSConnection):
    """HTTPS to a MicroVM's name at the proxy's address, with the certificate verified for that name."""

    def __init__(self, server: Server, host: str, timeout: float):
        super().__init__(host, timeout=timeout, context=server.tls())
        self._address = server.endpoint_address()
        self._tls = server.tls()

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(socket.create_connection(self._address, self.timeout), server_hostname=self.host)


class Microvm:
    """A MicroVM as its user sees it: an id, an endpoint, and a token when one is wanted."""

    def __init__(self, server: Server, description: dict):
        self.server = server
        self.client = server.microvms
        self.description = description
        self.id: str = description["microvmId"]
        self.endpoint: str = description["endpoint"]
        self._token: str | None = None

    def get(self) -> dict:
        return self.client.get_microvm(microvmIdentifier=self.id)

    def state(self) -> str:
        return self.get()["state"]

    def wait(self, wanted: str, seconds: float = STATE_SECONDS) -> dict:
        deadline = Deadline(seconds, f"{self.id} to be {wanted}")
        while True:
            found = self.get()
            if found["state"] == wanted:
                return found
            if found["state"] == "TERMINATED":
                raise AssertionError(f"{self.id} is TERMINATED ({found.get('stateReason')}) instead of {wanted}")
            deadline.tick(found["state"])

    def token(self, *ports: dict, minutes: int = 30) -> str:
        answer = self.client.create_microvm_auth_token(
            microvmIdentifier=self.id, expirationInMinutes=minutes, allowedPorts=list(ports) or [{"port": FLASK_PORT}]
        )
        return answer["authToken"]["X-aws-proxy-auth"]

    def http(self, path: str = "/", *, method: str = "GET", token: str | None = "own", port: int | str | None = FLASK_PORT, body=None,
             headers: dict[str, str] | None = None, timeout: float = 60) -> Answer:  # fmt: skip
        """A request to the endpoint, on a connection of its own."""
        if token == "own":
            token = self._token = self._token or self.token()
        sent = dict(headers or {})
        if token is not None:
            sent["X-aws-proxy-auth"] = token
        if port is not None:
            sent["X-aws-proxy-port"] = str(port)
        started = time.monotonic()
        connection = EndpointConnection(self.server, self.endpoint, timeout)
        try:
            connection.request(method, path, body=body, headers=sent)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read(), time.monotonic() - started)
        finally:
            connection.close()

    def count(self) -> dict:
        """One visit to the example app: its counters in memory and on disk, after it."""
        answer = self.http("/")
        assert answer.status == 200, (answer.status, answer.body)
        return answer.json()

    def processes(self) -> list[str]:
        """Command lines of the processes that belong to this MicroVM."""
        return [line for _, line in command_lines() if self.id in line]

    def terminate(self) -> None:
        self.client.terminate_microvm(microvmIdentifier=self.id)


def run_microvm(server: Server, image_arn: str, **options) -> Microvm:
    return Microvm(server, server.microvms.run_microvm(imageIdentifier=image_arn, **options))


def idle_policy(idle: int = 600, suspended: int = 600, resume: bool = True) -> dict:
    return {"maxIdleDurationSeconds": idle, "suspendedDurationSeconds": suspended, "autoResumeEnabled": resume}


def zip_of(files: dict[str, str | bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def zip_directory(directory: Path) -> bytes:
    return zip_of({str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()})


def zip_with_program(directory: Path, dockerfile: str | None = None) -> bytes:
    """A directory with a Dockerfile, or this one, and one program in C, which is in the archive as `program`: linked statically, it needs
    nothing around it."""
    (source,) = directory.glob("*.c")
    with scratch() as made:
        command = ["cc", "-static", "-O2", "-Wall", "-Werror", "-o", str(made / "program"), str(source)]
        subprocess.run(command, check=True, timeout=60)
        files = {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
        instead = {"Dockerfile": dockerfile} if dockerfile else {}
        return zip_of(files | instead | {"program": (made / "program").read_bytes()})


def upload(server: Server, key: str, data: bytes, bucket: str = "artifacts") -> str:
    s3 = server.client("s3")
    if bucket not in [found["Name"] for found in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key=key, Body=data)
    return f"s3://{bucket}/{key}"


def create_image(server: Server, name: str, uri: str, **options) -> dict:
    return server.microvms.create_microvm_image(
        **{
            "name": name,
            "baseImageArn": BASE_IMAGE_ARN,
            "buildRoleArn": BUILD_ROLE_ARN,
            "codeArtifact": {"uri": uri},
            "resources": [{"minimumMemoryInMiB": 512}],
        }
        | options
    )


def wait_image(server: Server, arn: str, wanted: str, seconds: float = BUILD_SECONDS, on_look=lambda image: None) -> dict:
    deadline = Deadline(seconds, f"{arn} to be {wanted}")
    while True:
        image = server.microvms.get_microvm_image(imageIdentifier=arn)
        on_look(image)
        if image["state"] == wanted:
            return image
        if image["state"] not in ("CREATING", "UPDATING"):
            raise AssertionError(f"{arn} is {image['state']} instead of {wanted}: {build_of(server, arn)}")
        deadline.tick(image["state"], pause=0.2)


def delete_image(server: Server, arn: str) -> None:
    """Deletes an image, and waits until its files are gone too."""
    server.microvms.delete_microvm_image(imageIdentifier=arn)
    deadline = Deadline(STATE_SECONDS, f"{arn} to be gone")
    while arn in [found["imageArn"] for found in server.microvms.list_microvm_images()["items"]]:
        deadline.tick()


def build_of(server: Server, arn: str, version: str = "1.0") -> dict:
    """The build of a version: where the reason of a failure is (SPEC 2.1)."""
    builds = server.microvms.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version)["items"]
    assert len(builds) == 1, builds
    return builds[0]


def error_of(call, *arguments, **options) -> tuple[str, str | None, int]:
    """The type, message and HTTP status of a refusal."""
    try:
        answer = call(*arguments, **options)
    except botocore.exceptions.ClientError as error:
        response = error.response
        return response["Error"]["Code"], response["Error"].get("Message"), response["ResponseMetadata"]["HTTPStatusCode"]
    raise AssertionError(f"it was not refused: {answer}")


def command_lines() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")))
    return found


def processes_of(data_dir: Path) -> list[str]:
    """Processes that mention a data directory, but for servers of it: its MicroVMs, its builds."""
    return [line for _, line in command_lines() if f"{data_dir}/" in line and " serve " not in line]


def mounts_of(data_dir: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{data_dir}" in line]


def network_of_hosts() -> set[str]:
    """Everything that MicroVMs' networks consist of on this host, whoever they belong to."""
    devices = {f"device {name}" for name in os.listdir("/sys/class/net")}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=20, check=True).stdout
    namespaces = {f"namespace {name}" for name in (os.listdir("/run/netns") if os.path.isdir("/run/netns") else [])}
    return devices | set(tables.splitlines()) | namespaces


def eventually(look, wanted: str, seconds: float = 20):
    """Waits until `look` returns something true, and returns that."""
    deadline = Deadline(seconds, wanted)
    while not (found := look()):
        deadline.tick(found)
    return found


# Addresses for documentation (RFC 5737): nobody's, so nothing outside this host is ever spoken to.
WORLD_NAMESPACE = "hearth-test-world"
HOST_SIDE, WORLD_SIDE = "198.51.100.1", "198.51.100.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


@contextlib.contextmanager
def world():
    """A host of the world: a network namespace behind a veth, with a web server in it."""
    ip("netns", "add", WORLD_NAMESPACE)
    try:
        ip("link", "add", "hearthworld0", "type", "veth", "peer", "name", "eth0", "netns", WORLD_NAMESPACE)
        ip("addr", "add", f"{HOST_SIDE}/24", "dev", "hearthworld0")
        ip("link", "set", "hearthworld0", "up")
        ip("-n", WORLD_NAMESPACE, "addr", "add", f"{WORLD_SIDE}/24", "dev", "eth0")
        ip("-n", WORLD_NAMESPACE, "link", "set", "eth0", "up")
        ip("-n", WORLD_NAMESPACE, "link", "set", "lo", "up")
        code = f"""
from http.server import *
class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"hello from the world to " + self.client_address[0].encode())
server = ThreadingHTTPServer(("{WORLD_SIDE}", 8000), Hello)
print("listening", flush=True)
server.serve_forever()
"""
        command = ["ip", "netns", "exec", WORLD_NAMESPACE, sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout.readline() == "listening\n"
            yield f"http://{WORLD_SIDE}:8000/"
        finally:
            process.kill()
            process.wait(20)
    finally:
        subprocess.run(["ip", "link", "del", "hearthworld0"], timeout=20)
        ip("netns", "del", WORLD_NAMESPACE)
