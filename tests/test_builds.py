"""Image builds as tenants and operators meet them: what a build reaches, whose layers it uses, and where its base images come from.

Most Dockerfiles here say nothing to run: their builds end when the last step is over, without a MicroVM, and what counts is in their logs."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import http.server
import io
import json
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import uuid
from pathlib import Path

import pytest

import support

NO_EGRESS = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:NO_EGRESS"
MIRRORED = "lambda/microvms"


def built(server, name: str, dockerfile: str, files: dict[str, str | bytes] | None = None, wanted: str = "CREATE_FAILED", **options) -> str:
    """Builds an image to its end and returns its log. No step is taken from the cache: earlier runs of the tests have used it too."""
    dockerfile = re.sub(r"^(FROM .*)$", rf"\1\nENV RUN_OF_TESTS={uuid.uuid4()}", dockerfile, flags=re.MULTILINE)
    archive = support.zip_of({"Dockerfile": dockerfile, **(files or {})})
    uri = support.upload(server, f"{name}.zip", archive)
    arn = support.create_image(server, name, uri, **options)["imageArn"]
    support.wait_image(server, arn, wanted)
    log = server.hearth("logs", name).stdout
    support.delete_image(server, arn)
    return log


def fetch(url: str) -> str:
    """A step that asks a web server by bash's own means: the base image has no client."""
    host, port = re.fullmatch(r"http://([^:/]+):(\d+)/", url).groups()
    return f"""RUN bash -c 'exec 3<>/dev/tcp/{host}/{port} && printf "GET / HTTP/1.0\\r\\n\\r\\n" >&3 && cat <&3' || echo refused $?"""


@contextlib.contextmanager
def listener():
    """A server on the host's loopback, and whether anybody came."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def came(server: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        server.accept()[0].close()
        return True
    return False


class TestNetwork:
    """A build has the network that its image's connectors give it, and nothing of the host's."""

    def test_build_without_connector_reaches_the_world_with_a_hosts_address(self, server, world):
        log = built(server, "reach", f"FROM {support.BASE_IMAGE}\n{fetch(world)}\n")
        assert f"hello from the world to {support.HOST_SIDE}" in log, log

    def test_build_with_a_connector_reaches_what_that_allows(self, server, world):
        log = built(server, "reach-nothing", f"FROM {support.BASE_IMAGE}\n{fetch(world)}\n", egressNetworkConnectors=[NO_EGRESS])
        assert "hello from the world" not in log and "refused" in log, log

    def test_step_reaches_no_address_of_the_host(self, server, world):
        del world
        api = server.connect["api"].rstrip("/") + "/"
        with listener() as host:
            port = host.getsockname()[1]
            steps = [fetch(f"http://{address}:{port}/") for address in ("127.0.0.1", "10.0.2.2", "10.0.3.1", support.HOST_SIDE)]
            steps += [fetch(api), fetch("http://169.254.169.254:80/")]
            log = built(server, "reach-host", "\n".join([f"FROM {support.BASE_IMAGE}", *steps]))
            assert not came(host)
        assert log.count("refused 1") == len(steps), log

    def test_port_of_the_host_can_be_used_by_each_step_again(self, server):
        with listener() as host:
            port = host.getsockname()[1]
            code = f'perl -MSocket -e \'socket(S,2,1,6); bind(S, sockaddr_in({port}, inet_aton("127.0.0.1"))) or die; listen(S,1); print "bound\\n"; fork or sleep 300\''
            log = built(server, "ports", f"FROM {support.BASE_IMAGE}\nRUN {code}\nRUN true; {code}\n")
        assert len(re.findall(r"bound$", log, re.M)) == 2, log

    def test_address_on_the_host_that_an_image_is_from_is_not_asked(self, server):
        with listener() as host:
            log = built(server, "from-host", f"FROM 127.0.0.1:{host.getsockname()[1]}/image:1\nCMD true\n")
            assert not came(host)
        assert "connection refused" in log, log


class Registry:
    """Debian's docker-registry on the loopback, with one user, or for everybody."""

    def __init__(self, program: Path, directory: Path, password: str | None):
        self.password = password
        self.address = self._free()
        auth = ""
        if password:
            entry = subprocess.run(["htpasswd", "-Bbn", "user", password], capture_output=True, text=True, check=True, timeout=20).stdout
            (directory / "passwords").write_text(entry)
            auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {directory}/passwords\n"
        config = directory / "registry.yml"
        config.write_text(
            f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {directory}/registry\nhttp:\n  addr: {self.address}\n{auth}"
        )
        self.log = (directory / "registry.log").open("wb")
        self.process = subprocess.Popen([str(program), "serve", str(config)], stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        support.eventually(self._answers, "the registry to answer")

    @staticmethod
    def _free() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"127.0.0.1:{server.getsockname()[1]}"

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self._request("GET", "/v2/").status in (200, 401)
        return False

    def _request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/octet-stream"):
        headers = {"Content-Type": kind}
        if self.password:
            headers["Authorization"] = "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()
        connection = http.client.HTTPConnection(self.address, timeout=20)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer

    def push(self, repository: str, tag: str, files: dict[str, bytes]) -> str:
        """Makes an image of one layer, and returns its digest."""
        tree = io.BytesIO()
        with tarfile.open(fileobj=tree, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                tar.addfile(entry, io.BytesIO(content))
        layer = gzip.compress(tree.getvalue())
        config = {"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin", "PULLED=yes"]},
                  "rootfs": {"type": "layers", "diff_ids": [self._digest(tree.getvalue())]}}  # fmt: skip
        config = json.dumps(config).encode()
        for blob in (layer, config):
            place = self._request("POST", f"/v2/{repository}/blobs/uploads/").headers["Location"]
            place = place.removeprefix(f"http://{self.address}")
            assert self._request("PUT", f"{place}&digest={self._digest(blob)}", blob).status == 201
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        part = lambda kind, blob: {"mediaType": kind, "size": len(blob), "digest": self._digest(blob)}  # noqa: E731
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": part("application/vnd.docker.container.image.v1+json", config),
                    "layers": [part("application/vnd.docker.image.rootfs.diff.tar.gzip", layer)]}  # fmt: skip
        manifest = json.dumps(manifest).encode()
        assert self._request("PUT", f"/v2/{repository}/manifests/{tag}", manifest, kind).status == 201
        return self._digest(manifest)

    @staticmethod
    def _digest(data: bytes) -> str:
        return "sha256:" + hashlib.sha256(data).hexdigest()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.log.close()


@pytest.fixture(scope="module")
def registry_program():
    """The registry's program out of its package, which would start a service where it is installed."""
    with support.scratch() as directory:
        subprocess.run(["apt-get", "download", "--quiet=2", "docker-registry"], cwd=directory, check=True, timeout=120, capture_output=True)
        (package,) = directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(package), str(directory)], check=True, timeout=60)
        yield directory / "usr/bin/docker-registry"


@pytest.fixture
def registry(registry_program):
    with contextlib.ExitStack() as stack:

        def start(password: str | None = None) -> Registry:
            registry = Registry(registry_program, stack.enter_context(support.scratch()), password)
            stack.callback(registry.stop)
            return registry

        yield start


@contextlib.contextmanager
def ecr(token: str):
    """The Elastic Container Registry's API as far as logins go. It knows the caller by the key that signed."""
    asked: list[tuple[str, str]] = []

    class Api(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.headers["X-Amz-Target"], self.headers["Authorization"]))
            body = json.dumps({"authorizationData": [{"authorizationToken": base64.b64encode(token.encode()).decode()}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


def shell() -> dict[str, bytes]:
    """A shell that needs nothing around it."""
    return {"bin/sh": Path("/bin/busybox").read_bytes()}


class TestRegistries:
    """Images are pulled where Dockerfiles say; the managed one from its registry or a mirror of it, once."""

    def test_image_of_a_local_registry_is_pulled_with_the_operators_login(self, registry):
        private = registry("secret")
        digest = private.push("tools/shell", "1", shell())
        with support.scratch() as directory:
            logins = directory / "logins.json"
            port = private.address.rsplit(":", 1)[1]
            login = {"auth": base64.b64encode(b"user:secret").decode()}
            logins.write_text(json.dumps({"auths": {private.address: login, f"localhost:{port}": login}}))
            config = f'[registries]\nlocal = ["{private.address}"]\nauth_file = "{logins}"\n'
            with support.serving(config) as server:
                log = built(server, "tagged", f"FROM {private.address}/tools/shell:1\nRUN echo pulled $PULLED\n")
                assert "pulled yes" in log, log
                log = built(server, "digest", f"ARG D={digest}\nFROM localhost:{port}/tools/shell@$D\nRUN echo digest $PULLED\n")
                assert "digest yes" in log, log
            with support.serving(f'[registries]\nlocal = ["{private.address}"]\n') as server:
                log = built(server, "no-login", f"FROM {private.address}/tools/shell:1\nRUN echo pulled $PULLED\n")
                assert "pulled yes" not in log, log

    def test_image_of_a_private_registry_is_pulled_with_the_login_of_the_build_role(self, registry, tmp_path):
        private = registry("from-the-role")
        private.push("team/shell", "1", shell())
        trust, policy = tmp_path / "trust", tmp_path / "policy"
        principal = {"Effect": "Allow", "Principal": {"AWS": "000000000000"}, "Action": "sts:AssumeRole"}
        trust.write_text(json.dumps({"Version": "2012-10-17", "Statement": principal}))
        policy.write_text(json.dumps({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "ecr:*", "Resource": "*"}}))
        with support.serving() as cloud, ecr("user:from-the-role") as (endpoint, asked):
            created = cloud.hearth("iam", "role", "create", "build", "--trust", str(trust), "--policy", str(policy))
            assert created.returncode == 0, created.stderr
            keys = cloud.connect
            config = f"""[registries]
local = ["{private.address}"]
[roles.aws]
access_key_id = "{keys["accessKeyId"]}"
secret_access_key = "{keys["secretAccessKey"]}"
endpoint = "{keys["api"]}"
ecr_endpoint = "{endpoint}"
ecr_registries = ["{private.address}"]
"""
            with support.serving(config) as server:
                log = built(server, "private", f"FROM {private.address}/team/shell:1\nRUN echo role $PULLED\n")
                assert "role yes" in log, log
        (target, authorization), *_ = asked
        assert target.endswith(".GetAuthorizationToken")
        assert "/us-east-1/ecr/aws4_request" in authorization and keys["accessKeyId"] not in authorization, "the role signs, not the operator"

    def test_managed_base_is_pulled_once_from_its_mirror(self, registry):
        mirror = registry()
        mirror.push(MIRRORED, "al2023-minimal", shell())
        with support.scratch() as directory:
            config = (
                f'build_cache_dir = "{directory}/cache"\n'
                f'[registries]\nlocal = ["{mirror.address}"]\nbase_mirror = "{mirror.address}/{MIRRORED}"\n'
            )
            with support.serving(config) as server:
                # What the image may reach does not count for the managed base.
                log = built(server, "real", f"FROM {support.BASE_IMAGE}\nRUN echo base $PULLED\n", egressNetworkConnectors=[NO_EGRESS])
                assert "pulled from its registry" in log and "base yes" in log, log
                mirror.stop()
                log = built(server, "again", f"FROM {support.BASE_IMAGE}\nRUN echo again $PULLED\n")
                assert "pulled earlier" in log and "again yes" in log, log
                log = built(server, "other-tag", "FROM public.ecr.aws/lambda/microvms:al2023\nRUN cat /etc/os-release\n")
                assert "stand-in, made of Debian packages" in log, log


def test_layer_store_that_the_builder_cannot_use_begins_anew():
    with support.scratch() as directory, support.serving(f'build_cache_dir = "{directory}/cache"\n') as server:
        built(server, "first", f"FROM {support.BASE_IMAGE}\nRUN true\n")
        (data,) = (directory / "cache/accounts").glob("*/0/data")
        shutil.chown(data, 0, 0)
        log = built(server, "second", f"FROM {support.BASE_IMAGE}\nRUN echo built again\n")
        assert "built again" in log, log


def test_builds_at_once_share_neither_ports_nor_layers():
    dockerfile = f"""FROM {support.BASE_IMAGE}
ENV RUN_OF_TESTS={uuid.uuid4()}
COPY tag /tag
RUN perl -MSocket -e 'socket(S,2,1,6); bind(S, sockaddr_in(18441, inet_aton("127.0.0.1"))) or die; listen(S,1); sleep 3; print "my tag ", `cat /tag`'
"""
    with support.serving("max_concurrent_builds = 2\n") as server:
        arns = {}
        for tag in ("A", "B"):
            uri = support.upload(server, f"{tag}.zip", support.zip_of({"Dockerfile": dockerfile, "tag": tag}))
            arns[tag] = support.create_image(server, f"at-once-{tag}", uri)["imageArn"]
        for tag, arn in arns.items():
            support.wait_image(server, arn, "CREATE_FAILED")
            assert f"my tag {tag}" in server.hearth("logs", f"at-once-{tag}").stdout
