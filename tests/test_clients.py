"""Clients that people have: curl, Node, a browser and load generators, against one app in one MicroVM."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import queue
import re
import subprocess
import threading

import pytest

import support
from support import Microvm, Server
from wrk import load

PORT = 8080
MIB = 1 << 20
# What a client must be able to move; the other direction of the same protocol moves less, because guests are emulated here.
LARGE, SMALL = 1024, 64
TRANSFER_SECONDS = 400

DOCKERFILE = f"""\
FROM {support.BASE_IMAGE}
RUN apt-get update && apt-get install --yes --no-install-recommends python3-minimal libpython3-stdlib
COPY app.py blocks.py /app/
EXPOSE {PORT}
CMD ["python3", "/app/app.py"]
"""

# Both sides make the same bytes: what arrives is compared with what was meant, not only counted.
BLOCKS = """\
import random

MIB = 1 << 20
BLOCK = random.Random(7).randbytes(MIB - 8)

def blocks(count):
    for number in range(count):
        yield number.to_bytes(8, "big") + BLOCK
"""

APP = f"""\
import base64, hashlib, json, struct, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from blocks import MIB, blocks

left = threading.Event()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *arguments):
        pass
    def endless(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\\r\\n" + bytes(65536) + b"\\r\\n")
        except OSError:
            left.set()
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/socket":
            return self.echo()
        if self.path == "/endless":
            return self.endless()
        if self.path == "/left":
            seen = left.wait(30)
            left.clear()
            return self.answer(b"left" if seen else b"still there")
        if not self.path.startswith("/blocks/"):
            return self.answer(b"hello")
        count = int(self.path.rsplit("/", 1)[1])
        self.send_response(200)
        self.send_header("Content-Length", str(count * MIB))
        self.end_headers()
        for block in blocks(count):
            self.wfile.write(block)
    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            left = int(self.headers["Content-Length"])
            while left and (piece := self.rfile.read(min(left, MIB))):
                left -= len(piece)
                yield piece
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
    def do_PUT(self):
        digest, length = hashlib.md5(), 0
        for piece in self.body():
            digest.update(piece)
            length += len(piece)
        self.answer(json.dumps({{"md5": digest.hexdigest(), "bytes": length}}).encode())
    do_POST = do_PUT
    def echo(self):
        key = self.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            first, second = self.rfile.read(2)
            length = second & 127
            if length > 125:
                length = struct.unpack(">H" if length == 126 else ">Q", self.rfile.read(2 if length == 126 else 8))[0]
            mask = self.rfile.read(4)
            data = self.rfile.read(length)
            data = (int.from_bytes(data, "big") ^ int.from_bytes((mask * (length // 4 + 1))[:length], "big")).to_bytes(length, "big")
            size = bytes([length]) if length < 126 else b"\\x7e" + struct.pack(">H", length) if length < 65536 else b"\\x7f" + struct.pack(">Q", length)
            self.wfile.write(bytes([first]) + size + data)
            if first & 15 == 8:
                return

ThreadingHTTPServer.request_queue_size = 256
ThreadingHTTPServer(("127.0.0.1", {PORT}), Handler).serve_forever()
"""


def blocks(count: int):
    names: dict = {}
    exec(BLOCKS, names)
    return names["blocks"](count)


@pytest.fixture(scope="module")
def microvm(server: Server):
    files = {"Dockerfile": DOCKERFILE, "app.py": APP, "blocks.py": BLOCKS}
    uri = support.upload(server, "clients.zip", support.zip_of(files))
    image = support.create_image(server, "clients", uri)["imageArn"]
    support.wait_image(server, image, "CREATED")
    microvm = support.run_microvm(server, image)
    microvm.wait("RUNNING")
    yield microvm
    microvm.terminate()
    microvm.wait("TERMINATED")


@pytest.fixture(scope="module")
def token(microvm: Microvm) -> str:
    return microvm.token({"port": PORT}, minutes=60)


@pytest.fixture(scope="module")
def url(server: Server, microvm: Microvm) -> str:
    return f"https://{microvm.endpoint}:{server.endpoint_address()[1]}"


def curl(server: Server, token: str, *arguments: str) -> list[str]:
    return [
        "curl", "--silent", "--show-error", "--fail", "--cacert", server.connect["ca"], "--max-time", str(TRANSFER_SECONDS),
        "--header", f"X-aws-proxy-auth: {token}", *arguments,
    ]  # fmt: skip


class TestCurl:
    @pytest.mark.parametrize(("version", "protocol"), [("--http1.1", "1.1"), ("--http2", "2")])
    def test_speaks(self, server, token, url, version, protocol):
        said = subprocess.run(
            curl(server, token, version, "--write-out", "\n%{http_version} %{http_code}", url), capture_output=True, text=True, timeout=60
        )
        assert said.stdout.splitlines() == ["hello", f"{protocol} 200"], said

    @pytest.mark.timeout(TRANSFER_SECONDS + 30)
    @pytest.mark.parametrize(("version", "count"), [("--http1.1", LARGE), ("--http2", SMALL)])
    def test_downloads_every_byte(self, server, token, url, version, count):
        wanted, got, length = hashlib.md5(), hashlib.md5(), 0
        with subprocess.Popen(curl(server, token, version, f"{url}/blocks/{count}"), stdout=subprocess.PIPE) as transfer:
            while piece := transfer.stdout.read(MIB):
                got.update(piece)
                length += len(piece)
        assert transfer.returncode == 0
        for block in blocks(count):
            wanted.update(block)
        assert (length, got.hexdigest()) == (count * MIB, wanted.hexdigest())

    @pytest.mark.timeout(TRANSFER_SECONDS + 30)
    @pytest.mark.parametrize(("version", "count"), [("--http1.1", SMALL), ("--http2", LARGE)])
    def test_uploads_every_byte(self, server, token, url, version, count):
        sent = hashlib.md5()
        # From a pipe: nobody knows the length before the end.
        command = curl(server, token, version, "--upload-file", "-", f"{url}/digest")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as transfer:
            for block in blocks(count):
                sent.update(block)
                transfer.stdin.write(block)
            answer, _ = transfer.communicate(timeout=TRANSFER_SECONDS)
        assert transfer.returncode == 0
        assert json.loads(answer) == {"md5": sent.hexdigest(), "bytes": count * MIB}


    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_that_leaves_frees_the_app(self, server, microvm, token, url, version):
        with subprocess.Popen(curl(server, token, version, f"{url}/endless"), stdout=subprocess.PIPE) as transfer:
            transfer.stdout.read(MIB)
            transfer.kill()
        assert microvm.http("/left", token=token, port=PORT).text == "left"


NODE = """\
import http2 from "node:http2";

const [url, token] = process.argv.slice(2);
const headers = { "X-aws-proxy-auth": token };
const body = new Uint8Array(3 << 20).fill(7);
const answers = { hello: await (await fetch(url, { headers })).text() };
answers.fetch = await (await fetch(url + "/digest", { method: "PUT", headers, body })).json();

const session = http2.connect(url);
const exchange = (path) => new Promise((resolve, reject) => {
  const stream = session.request({ ":path": path, ":method": "POST", ...headers });
  let text = "";
  stream.setEncoding("utf8").on("data", (piece) => { text += piece; }).on("end", () => resolve(JSON.parse(text))).on("error", reject);
  stream.end(body);
});
answers.http2 = await Promise.all(Array.from({ length: 8 }, () => exchange("/digest")));
answers.alpn = session.alpnProtocol;
session.close();
console.log(JSON.stringify(answers));
"""


def test_node(server: Server, token: str, url: str):
    """Its own fetch, which is undici, and eight requests at once over HTTP/2."""
    said = subprocess.run(
        ["node", "--input-type=module", "-", url, token],
        input=NODE, capture_output=True, text=True, timeout=120, env=os.environ | {"NODE_EXTRA_CA_CERTS": server.connect["ca"]},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    digest = {"md5": hashlib.md5(bytes([7]) * (3 << 20)).hexdigest(), "bytes": 3 << 20}
    assert json.loads(said.stdout) == {"hello": "hello", "fetch": digest, "http2": [digest] * 8, "alpn": "h2"}


class TestLoad:
    def test_h2load(self, token, url):
        said = subprocess.run(
            ["h2load", "-n", "400", "-c", "4", "-m", "10", "-H", f"X-aws-proxy-auth: {token}", url],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "Application protocol: h2" in said.stdout, said
        counted = re.search(r"requests: (.*)", said.stdout).group(1)
        assert counted == "400 total, 400 started, 400 done, 400 succeeded, 0 failed, 0 errored, 0 timeout"

    def test_wrk(self, token, url):
        # Ends the test if any request is refused.
        rate, _, _ = load(url, {"X-aws-proxy-auth": token}, connections=16, seconds=2)
        assert rate > 0


PAGE = """\
<script>
const [url, token] = TELL;
const report = (body) => fetch("/report", { method: "POST", body: JSON.stringify(body) });
const socket = new WebSocket(url, ["lambda-microvms", "lambda-microvms.authentication." + token, "lambda-microvms.port.PORT"]);
socket.binaryType = "arraybuffer";
const got = [];
socket.onopen = () => { socket.send("tick"); socket.send(new Uint8Array(100000).fill(5)); };
socket.onmessage = ({ data }) => {
  got.push(typeof data === "string" ? data : [data.byteLength, new Uint8Array(data).every((byte) => byte === 5)]);
  if (got.length === 2) socket.close(1000, "done");
};
socket.onerror = () => report({ error: true, got });
socket.onclose = ({ code, wasClean }) => report({ got, code, wasClean, protocol: socket.protocol });
</script>
"""


def test_a_browser_s_websocket(server: Server, token: str, url: str):
    """A page has no say over headers: the token travels as a subprotocol (SPEC 10.1)."""
    reports: queue.Queue[dict] = queue.Queue()
    page = PAGE.replace("TELL", json.dumps([url.replace("https", "wss") + "/socket", token])).replace("PORT", str(PORT)).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self):
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        with support.scratch() as home:
            trust(home, server.connect["ca"])
            browser = subprocess.Popen(
                ["chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={home}/profile",
                 f"http://127.0.0.1:{site.server_port}/"],
                env=os.environ | {"HOME": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                report = reports.get(timeout=60)
            finally:
                os.killpg(browser.pid, 9)
                browser.wait()
    finally:
        site.shutdown()
        site.server_close()
    assert report == {"got": ["tick", [100000, True]], "code": 1000, "wasClean": True, "protocol": "lambda-microvms"}


def trust(home, ca: str) -> None:
    """Chromium's own store of certificates, in a home of its own."""
    store = home / ".pki/nssdb"
    store.mkdir(parents=True)
    for arguments in (["-N", "--empty-password"], ["-A", "-t", "C,,", "-n", "hearth", "-i", ca]):
        subprocess.run(["certutil", "-d", f"sql:{store}", *arguments], check=True, timeout=30, capture_output=True)
