"""Whose certificate a client meets at an endpoint: the operator's own, one from an ACME authority, or the local authority's."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

import support
from support import HEARTH, Server

DOMAIN = "hearth.test"
HOST = f"0d2b7a54-5f0a-4f1c-9a53-0a3f3f6f2a11.lambda-microvm.us-east-1.{DOMAIN}"
WILDCARD = f"*.lambda-microvm.us-east-1.{DOMAIN}"
REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


def openssl(*arguments: str | Path, stdin: bytes = b"", timeout: float = 30) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


class Authority:
    """A certificate authority of the operator's, with an intermediate one as real ones have."""

    def __init__(self, directory: Path):
        self.dir = directory
        self.root = directory / "root.pem"
        self._key(directory / "root.key")
        openssl("req", "-x509", "-new", "-key", directory / "root.key", "-subj", "/CN=Test root", "-days", "30", "-out", self.root)
        self._key(directory / "middle.key")
        extensions = "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign"
        self._sign("root", "middle", "/CN=Test intermediate", extensions, 30)

    @staticmethod
    def _key(path: Path) -> None:
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)

    def _sign(self, issuer: str, subject: str, name: str, extensions: str, days: int) -> None:
        request, config = self.dir / f"{subject}.csr", self.dir / f"{subject}.cnf"
        config.write_text(extensions)
        openssl("req", "-new", "-key", self.dir / f"{subject}.key", "-subj", name, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.dir / f"{issuer}.pem", "-CAkey", self.dir / f"{issuer}.key", "-CAcreateserial",
                "-days", str(days), "-extfile", config, "-out", self.dir / f"{subject}.pem")  # fmt: skip

    def issue(self, common_name: str, days: int = 30, names: str = f"DNS:{WILDCARD}") -> None:
        """Writes chain.pem and key.pem, as whatever renews certificates would."""
        self._key(self.dir / "leaf.key")
        self._sign("middle", "leaf", f"/CN={common_name}", f"subjectAltName={names}\nextendedKeyUsage=serverAuth", days)
        chain = (self.dir / "leaf.pem").read_text() + (self.dir / "middle.pem").read_text()
        for name, text in [("key.pem", (self.dir / "leaf.key").read_text()), ("chain.pem", chain)]:
            (self.dir / f"{name}.new").write_text(text)
            (self.dir / f"{name}.new").rename(self.dir / name)


def connect(server: Server, cafile: Path | str, name: str = HOST) -> ssl.SSLSocket:
    plain = socket.create_connection(server.endpoint_address(), 20)
    return ssl.create_default_context(cafile=cafile).wrap_socket(plain, server_hostname=name)


def common_name(server: Server, cafile: Path | str, name: str = HOST) -> str:
    with connect(server, cafile, name) as connection:
        return dict(part[0] for part in connection.getpeercert()["subject"])["commonName"]


def doctor(config: Path, data_dir: Path) -> str:
    command = [HEARTH, "doctor", "--config", config, "--data-dir", data_dir, "--api", "127.0.0.1:0", "--endpoint", "127.0.0.1:0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def operator():
    with support.scratch() as directory:
        authority = Authority(directory)
        authority.issue("first")
        config = f'domain = "{DOMAIN}"\n[[tls.certificates]]\nchain = "{directory}/chain.pem"\nkey = "{directory}/key.pem"\n'
        with support.serving(config) as server:
            server.authority = authority
            yield server


class TestOperatorsCertificate:
    def test_clients_that_trust_its_root_are_content(self, operator):
        root = operator.authority.root
        host, port = operator.endpoint_address()
        curl = ["curl", "--silent", "--show-error", "--cacert", root, "--connect-to", f"::{host}:{port}", f"https://{HOST}/"]
        assert subprocess.run(curl, capture_output=True, text=True, timeout=30).stdout == "Request missing authentication"
        for version in ["-tls1_2", "-tls1_3"]:
            said = openssl("s_client", "-connect", f"{host}:{port}", "-servername", HOST, "-CAfile", root, "-verify_return_error", version)
            assert "Verify return code: 0 (ok)" in said
        script = f"""
            const tls = require('tls'), fs = require('fs');
            const socket = tls.connect({{host: '{host}', port: {port}, servername: '{HOST}', ca: fs.readFileSync('{root}'),
                                         ALPNProtocols: ['h2', 'http/1.1']}},
                () => {{ console.log(socket.authorized, socket.alpnProtocol); socket.end(); }});
        """
        done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=30)
        assert done.stdout.strip() == "true h2", done.stderr

    def test_the_local_authority_serves_what_it_does_not_cover(self, operator):
        elsewhere = HOST.replace("us-east-1", "eu-west-1")
        for name in [elsewhere, "localhost"]:
            assert common_name(operator, operator.connect["ca"], name) == "Hearth MicroVM endpoint"

    def test_a_name_that_is_no_endpoint_s_is_not_recognised(self, operator):
        host, port = operator.endpoint_address()
        command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-servername", "example.com"]
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        assert "unrecognized name" in said.stderr

    def test_a_renewed_one_is_served_at_once_and_open_connections_live_on(self, operator):
        authority = operator.authority
        with connect(operator, authority.root) as opened:
            opened.sendall(REQUEST)
            assert opened.recv(4096).startswith(b"HTTP/1.1 403")
            authority.issue("second")
            served = lambda: common_name(operator, authority.root)  # noqa: E731
            support.eventually(lambda: served() == "second", "the renewed certificate to be served")

            (authority.dir / "chain.pem").write_text("rubbish")
            operator.process.send_signal(signal.SIGHUP)
            support.eventually(lambda: "stay in use" in operator.log(), "the server to complain of rubbish")
            assert served() == "second"

            authority.issue("third")
            operator.process.send_signal(signal.SIGHUP)
            support.eventually(lambda: served() == "third", "the certificate to be read again on SIGHUP")
            opened.sendall(REQUEST)
            assert opened.recv(4096).startswith(b"HTTP/1.1 403"), "the connection from before is still there"

    def test_what_is_wrong_with_it_is_told(self, operator):
        with support.scratch() as directory:
            authority = Authority(directory)
            server = Server(directory / "data", f'domain = "{DOMAIN}"\ntls.certificates = [{{ chain = "chain.pem", key = "key.pem" }}]\n')
            authority.issue("short", days=7)
            assert "6 days left" in doctor(server.config_path, server.data_dir)
            authority.issue("elsewhere", names=f"DNS:*.{DOMAIN}")
            assert "not for endpoints in us-east-1" in doctor(server.config_path, server.data_dir)
            shutil.copy(directory / "root.key", directory / "key.pem")
            assert "key.pem is not the key of the first certificate in" in doctor(server.config_path, server.data_dir)
            refused = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
            assert refused.returncode != 0 and "key.pem is not the key of the first certificate in" in refused.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pebble:
    """Let's Encrypt's test server, and a name server that it asks."""

    def __init__(self, directory: Path):
        self.dir, self.authority = directory, Authority(directory)
        self.authority.issue("pebble", names="DNS:localhost,IP:127.0.0.1")
        self.port, self.management, self.dns, self.control = (free_port() for _ in range(4))
        config = {
            "listenAddress": f"127.0.0.1:{self.port}",
            "managementListenAddress": f"127.0.0.1:{self.management}",
            "certificate": str(directory / "chain.pem"),
            "privateKey": str(directory / "key.pem"),
            "httpPort": 5002,
            "tlsPort": 5001,
        }
        (directory / "pebble.json").write_text(json.dumps({"pebble": config}))
        # What an operator would write for a name server with an API.
        self.hook = directory / "hook"
        self.hook.write_text(
            "#!/bin/sh -eu\n"
            f'echo "$1 $2" >> {directory}/calls\n'
            'case $1 in add) path=set-txt value=",\\"value\\":\\"$3\\"" ;; remove) path=clear-txt value= ;; esac\n'
            f'curl -fsS -d "{{\\"host\\":\\"$2.\\"$value}}" http://127.0.0.1:{self.control}/$path\n'
        )
        self.hook.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.dir / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @contextlib.contextmanager
    def running(self):
        # No waits and no made-up failures: those are for testing ACME clients, which is a library's business.
        env = os.environ | {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"}
        names = ["pebble-challtestsrv", "-dns01", f"127.0.0.1:{self.dns}", "-management", f"127.0.0.1:{self.control}",
                 "-http01", "", "-https01", "", "-tlsalpn01", ""]  # fmt: skip
        acme = ["pebble", "-config", str(self.dir / "pebble.json"), "-dnsserver", f"127.0.0.1:{self.dns}", "-strict"]
        log = (self.dir / "pebble.log").open("wb")
        processes = [subprocess.Popen(command, stdout=log, stderr=log, env=env) for command in [names, acme]]
        try:
            for port in [self.port, self.management, self.control]:
                support.eventually(lambda: listens(port), f"pebble to listen on {port}: {(self.dir / 'pebble.log').read_text()}")
            yield self
        finally:
            for process in processes:
                process.terminate()
                process.wait(20)
            log.close()

    def root(self) -> Path:
        """The root of what it issues, made anew at its every start."""
        path = self.dir / "issuer.pem"
        url = f"https://127.0.0.1:{self.management}/roots/0"
        subprocess.run(["curl", "-fsS", "--cacert", self.authority.root, "-o", path, url], check=True, timeout=20)
        return path

    def config(self, hook: str | None = None) -> str:
        return (
            f'domain = "{DOMAIN}"\nregions = ["eu-west-1"]\n[tls.acme]\nagree_to_terms = true\ncontacts = ["ops@hearth.test"]\n'
            f'directory = "https://127.0.0.1:{self.port}/dir"\nca = "{self.authority.root}"\ndns_hook = "{hook or self.hook}"\n'
        )


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class TestAcme:
    def test_a_wildcard_is_proved_by_dns_kept_and_served(self):
        with support.scratch() as directory, Pebble(directory).running() as pebble:
            server = Server(directory / "data", pebble.config("/bin/false")).start()
            try:
                support.eventually(lambda: "no certificate could be had" in server.log(), "the failing hook to be told")
                assert common_name(server, server.connect["ca"]) == "Hearth MicroVM endpoint", "the local authority stands in"
                server.stop()

                server.config_path.write_text(pebble.config())
                server.start()
                issued = lambda: "a certificate is in use" in server.log()  # noqa: E731
                support.eventually(issued, "a certificate from the authority", seconds=60)
                root = pebble.root()
                for region in ["us-east-1", "eu-west-1"]:
                    connect(server, root, HOST.replace("us-east-1", region)).close()
                challenges = {f"_acme-challenge.lambda-microvm.{region}.{DOMAIN}" for region in ["us-east-1", "eu-west-1"]}
                assert {call for call in pebble.calls} == {f"{action} {name}" for action in ["add", "remove"] for name in challenges}
                kept = server.data_dir / "acme"
                assert {path.name: path.stat().st_mode & 0o777 for path in kept.iterdir()} == {"account.json": 0o600, "certificate.json": 0o600}

                server.stop()
                before = len(pebble.calls)
                server.start()
                connect(server, root).close()
                assert len(pebble.calls) == before, "the kept one is served, and no other asked for"
                assert "days left" in doctor(server.config_path, server.data_dir)
            finally:
                if server.running():
                    server.stop()
