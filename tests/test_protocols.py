"""What endpoints speak beside plain requests, by real clients against one app in one MicroVM: gRPC, WebSocket, streams, TLS, and faults."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events
import httpx
import pytest
import websockets.exceptions
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.sync.client import connect as websocket
from websockets.uri import parse_uri

import support
from support import Microvm, Server

APP = Path(__file__).with_name("apps") / "protocols"
HTTP, GRPC, SOCKET, TLS = 8080, 8081, 8082, 8443
MIB = 1 << 20
SECONDS = 60


@pytest.fixture(scope="module")
def microvm(server: Server):
    uri = support.upload(server, "protocols.zip", support.zip_directory(APP))
    image = support.create_image(server, "protocols", uri)["imageArn"]
    support.wait_image(server, image, "CREATED")
    microvm = support.run_microvm(server, image)
    microvm.wait("RUNNING")
    yield microvm
    microvm.terminate()
    microvm.wait("TERMINATED")


@pytest.fixture(scope="module")
def token(microvm: Microvm) -> str:
    return microvm.token({"allPorts": {}}, minutes=60)


@pytest.fixture(scope="module", autouse=True)
def slow(server: Server, microvm: Microvm):
    """A client that never finishes its headers; looked at in the end."""
    with raw(server, microvm) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: ")
        yield stream


@contextlib.contextmanager
def raw(server: Server, microvm: Microvm, *protocols: str):
    """A TLS connection for bytes that no client's library would send."""
    context = server.tls()
    if protocols:
        context.set_alpn_protocols(list(protocols))
    with context.wrap_socket(socket.create_connection(server.endpoint_address(), SECONDS), server_hostname=microvm.endpoint) as stream:
        yield stream


def read_until(stream: ssl.SSLSocket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        piece = stream.recv(1 << 16)
        assert piece, f"the connection ended before {wanted!r}: {data!r}"
        data += piece
    return data


def read_all(stream: ssl.SSLSocket) -> bytes:
    data = b""
    while piece := stream.recv(1 << 16):
        data += piece
    return data


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def client(request, server: Server, microvm: Microvm, token: str):
    http2 = request.param
    with httpx.Client(verify=server.tls(), http1=not http2, http2=http2, timeout=SECONDS, trust_env=False) as client:
        address, port = server.endpoint_address()
        client.base_url = f"https://{address}:{port}"
        client.headers = {"Host": microvm.endpoint, "X-aws-proxy-auth": token}

        def name(request: httpx.Request) -> None:
            request.extensions["sni_hostname"] = microvm.endpoint

        client.event_hooks = {"request": [name]}
        yield client


class TestGrpc:
    @pytest.fixture
    def channel(self, server, microvm):
        address, port = server.endpoint_address()
        credentials = grpc.ssl_channel_credentials(Path(server.connect["ca"]).read_bytes())
        options = [("grpc.ssl_target_name_override", microvm.endpoint), ("grpc.enable_http_proxy", 0)]
        with grpc.secure_channel(f"{address}:{port}", credentials, options) as channel:
            yield channel

    @pytest.fixture
    def calls(self, token):
        metadata = (("x-aws-proxy-auth", token), ("x-aws-proxy-port", str(GRPC)), ("client", "python"))
        return {"metadata": metadata, "timeout": SECONDS}

    @pytest.mark.compat("endpoint.grpc")
    def test_unary(self, channel, calls):
        answer, call = channel.unary_unary("/test/echo").with_call(b"x" * 3 * MIB, **calls)
        assert answer == b"x" * 3 * MIB
        assert (call.code(), dict(call.trailing_metadata())) == (grpc.StatusCode.OK, {"seen": "python", "token": "False"})

    @pytest.mark.compat("endpoint.grpc")
    def test_streams(self, channel, calls):
        assert channel.stream_unary("/test/total")(iter([b"a" * 1000] * 100), **calls) == b"100000"
        assert [int(answer) for answer in channel.unary_stream("/test/count")(b"200", **calls)] == list(range(200))

    @pytest.mark.compat("endpoint.grpc")
    def test_a_conversation(self, channel, calls):
        """Each message is an answer to the last, so that none may be held back."""
        heard = threading.Semaphore(0)

        def messages():
            for number in range(5):
                yield str(number).encode()
                assert heard.acquire(timeout=SECONDS)

        answers = []
        for answer in channel.stream_stream("/test/chat")(messages(), **calls):
            answers.append(answer)
            heard.release()
        assert answers == [b"re: %d" % number for number in range(5)]

    @pytest.mark.compat("endpoint.grpc")
    def test_an_error(self, channel, calls):
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/test/fail")("é".encode(), **calls)
        error = raised.value
        assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not so: é")
        assert dict(error.trailing_metadata())["why"] == "test"
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/test/nothing")(b"", **calls)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED

    @pytest.mark.compat("endpoint.grpc")
    def test_a_deadline_and_a_cancelled_call_end_in_the_app_too(self, channel, calls):
        answers = channel.unary_stream("/test/wait")(b"", **calls | {"timeout": 3})
        with pytest.raises(grpc.RpcError) as raised:
            list(answers)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert channel.unary_unary("/test/was_cancelled")(b"", **calls) == b"True"
        answers = channel.unary_stream("/test/wait")(b"", **calls)
        assert next(answers) == b"waiting"
        answers.cancel()
        assert channel.unary_unary("/test/was_cancelled")(b"", **calls) == b"True"


class TestWebSocket:
    @pytest.fixture(params=["header", "subprotocol"])
    def connect(self, request, server, microvm, token):
        marks = ["lambda-microvms", f"lambda-microvms.authentication.{token}", f"lambda-microvms.port.{SOCKET}"]
        headers = {"X-aws-proxy-auth": token, "X-aws-proxy-port": str(SOCKET)}

        def connect(path: str, *protocols: str):
            options = {"subprotocols": [*protocols] or None, "additional_headers": headers}
            if request.param == "subprotocol":
                options = {"subprotocols": [*marks, *protocols]}
            return websocket(
                f"wss://{microvm.endpoint}{path}", sock=socket.create_connection(server.endpoint_address(), SECONDS), ssl=server.tls(),
                server_hostname=microvm.endpoint, compression=None, max_size=4 * MIB, **options,
            )  # fmt: skip

        connect.marked = request.param == "subprotocol"
        return connect

    @pytest.mark.compat("endpoint.websocket")
    def test_messages_of_both_kinds_and_pings_of_both_sides(self, connect):
        with connect("/", "first") as socket:
            assert socket.subprotocol == "first" or (connect.marked and socket.subprotocol == "lambda-microvms")
            socket.send("grüße")
            assert socket.recv(SECONDS) == "grüße"
            socket.send(bytes(range(256)) * 4096)
            assert socket.recv(SECONDS) == bytes(range(256)) * 4096
            assert socket.ping(b"client").wait(SECONDS)
            socket.send("ping")
            assert socket.recv(SECONDS) == "pong"

    @pytest.mark.compat("endpoint.websocket")
    def test_either_side_says_why_it_closes(self, connect):
        with connect("/") as socket:
            socket.send("close")
            with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
                socket.recv(SECONDS)
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "as you wish")
        with connect("/noted") as socket:
            socket.close(4002, "enough")
        with connect("/last") as socket:
            assert socket.recv(SECONDS) == "[4002, 'enough']"

    @pytest.mark.compat("endpoint.websocket-h2")
    def test_over_http2(self, server, microvm, token):
        """RFC 8441: a stream of a connection that others use too."""
        with raw(server, microvm, "h2") as stream:
            talk = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
            talk.initiate_connection()
            stream.sendall(talk.data_to_send())

            def events():
                while True:
                    found = talk.receive_data(stream.recv(1 << 16))
                    for event in found:
                        if isinstance(event, h2.events.DataReceived):
                            talk.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    stream.sendall(talk.data_to_send())
                    yield from found

            happened = events()
            wait_for(happened, h2.events.RemoteSettingsChanged)
            assert talk.remote_settings.enable_connect_protocol == 1
            talk.send_headers(
                1,
                [
                    (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"), (":path", "/"), (":authority", microvm.endpoint),
                    ("sec-websocket-version", "13"), ("sec-websocket-protocol", "first"),
                    ("x-aws-proxy-auth", token), ("x-aws-proxy-port", str(SOCKET)),
                ],
            )  # fmt: skip
            stream.sendall(talk.data_to_send())
            answered = dict(wait_for(happened, h2.events.ResponseReceived).headers)
            assert (answered[":status"], answered["sec-websocket-protocol"]) == ("200", "first")

            frames = ClientProtocol(parse_uri(f"wss://{microvm.endpoint}/"), state=State.OPEN)

            def exchange(send) -> object:
                send()
                for data in frames.data_to_send():
                    if data:
                        talk.send_data(1, data)
                stream.sendall(talk.data_to_send())
                while True:
                    frames.receive_data(wait_for(happened, h2.events.DataReceived).data)
                    if received := frames.events_received():
                        return received[0]

            assert exchange(lambda: frames.send_text(b"hello")).data == b"hello"
            assert exchange(lambda: frames.send_binary(bytes(16000))).data == bytes(16000)
            assert exchange(lambda: frames.send_ping(b"still?")).opcode == Opcode.PONG
            talk.send_headers(
                3, [(":method", "GET"), (":scheme", "https"), (":path", "/beside"), (":authority", microvm.endpoint), ("x-aws-proxy-auth", token)],
                end_stream=True,
            )  # fmt: skip
            stream.sendall(talk.data_to_send())
            assert wait_for(happened, h2.events.DataReceived).data == b"/beside"
            exchange(lambda: frames.send_close(1000, "done"))
            assert (frames.close_rcvd.code, frames.close_rcvd.reason) == (1000, "done")
            assert wait_for(happened, h2.events.StreamEnded, 1).stream_id == 1


def wait_for(happened, kind: type, stream: int | None = None):
    for event in happened:
        assert not isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated), event
        if isinstance(event, kind) and (stream is None or stream == event.stream_id):
            return event
    raise AssertionError("the connection ended")


class TestStreams:
    @pytest.mark.compat("endpoint.events")
    def test_events_arrive_as_they_are_written(self, client):
        """The app writes an event when somebody has seen the one before."""
        seen = []
        with client.stream("GET", "/events") as answer:
            assert answer.http_version == client.get("/version").http_version
            for line in answer.iter_lines():
                if line:
                    seen.append(line)
                    assert client.post("/open").status_code == 200
        assert seen == ["data: 0", "data: 1", "data: 2"]

    @pytest.mark.compat("endpoint.back-pressure")
    def test_an_upload_waits_for_an_app_that_does_not_read(self, server, client):
        client.post("/shut")
        sent, done = [], threading.Event()
        before = memory_of(server)

        def body():
            while len(sent) < 3200 and not done.is_set():
                yield bytes(1 << 16)
                sent.append(None)

        def upload():
            # What a client makes of an answer in the middle of its upload is the client's affair.
            with contextlib.suppress(httpx.HTTPError):
                client.post("/unread", content=body())

        uploader = threading.Thread(target=upload, daemon=True)
        uploader.start()
        try:
            stalled(lambda: len(sent))
            assert 0 < len(sent) << 16 < 48 * MIB, "of 200 MiB"
            assert memory_of(server) - before < 32 * MIB
        finally:
            done.set()
            assert client.post("/open").status_code == 200
            uploader.join(SECONDS)
        assert not uploader.is_alive()

    @pytest.mark.compat("endpoint.back-pressure")
    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_a_download_waits_for_its_client_and_ends_with_it(self, server, microvm, token, version):
        microvm.http("/shut", method="POST", token=token, port=HTTP)
        before = memory_of(server)
        with subprocess.Popen(command(server, microvm, token, HTTP, "/endless", version), stdout=subprocess.PIPE) as download:
            assert download.stdout.read(MIB)
            assert microvm.http("/beside", token=token, port=HTTP).text == "/beside"
            assert memory_of(server) - before < 32 * MIB
            download.kill()
        assert microvm.http("/gone", token=token, port=HTTP).json() is True

    @pytest.mark.compat("endpoint.early-answer")
    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_an_answer_before_the_upload_s_end(self, server, microvm, token, version):
        with support.scratch() as directory:
            (directory / "body").write_bytes(bytes(8 * MIB))
            said = curl(
                server, microvm, token, HTTP, "/refuse", version, "--header", "Expect:", "--data-binary", f"@{directory}/body",
                "--write-out", " %{http_code}",
            )  # fmt: skip
        assert said.stdout == "no 413", said


def memory_of(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) << 10


def stalled(progress) -> None:
    """Waits until nothing moved for two seconds."""
    deadline = support.Deadline(SECONDS, "the upload to stop")
    last, since = 0, time.monotonic()
    while not last or time.monotonic() - since < 2:
        deadline.tick(last)
        if (now := progress()) != last:
            last, since = now, time.monotonic()


def command(server: Server, microvm: Microvm, token: str, port: int, path: str, *arguments: str) -> list[str]:
    address, own = server.endpoint_address()
    return [
        "curl", "--silent", "--show-error", "--cacert", server.connect["ca"], "--max-time", str(SECONDS),
        "--resolve", f"{microvm.endpoint}:{own}:{address}", "--header", f"X-aws-proxy-auth: {token}", "--header", f"X-aws-proxy-port: {port}",
        *arguments, f"https://{microvm.endpoint}:{own}{path}",
    ]  # fmt: skip


def curl(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=SECONDS + 10)


class TestBytes:
    """What only shows on the wire of HTTP/1.1."""

    def head(self, microvm: Microvm, token: str, line: str, *headers: str) -> bytes:
        return "\r\n".join([line, f"Host: {microvm.endpoint}", f"X-aws-proxy-auth: {token}", *headers, "", ""]).encode()

    @pytest.mark.compat("endpoint.continue")
    def test_the_app_invites_the_body(self, server, microvm, token):
        with raw(server, microvm) as stream:
            stream.sendall(self.head(microvm, token, "POST /length HTTP/1.1", "Content-Length: 4", "Expect: 100-continue"))
            assert read_until(stream, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            stream.sendall(b"body")
            assert b" 200 " in read_until(stream, b"\r\n\r\n4").splitlines()[0]
        with raw(server, microvm) as stream:
            stream.sendall(self.head(microvm, token, "POST /refuse HTTP/1.1", "Content-Length: 4", "Expect: 100-continue"))
            assert read_until(stream, b"no").startswith(b"HTTP/1.1 413 "), "no invitation, and an answer"

    @pytest.mark.compat("endpoint.smuggling")
    def test_a_request_in_another_s_body_stays_there(self, server, microvm, token):
        hidden = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        for headers in (
            ["Content-Length: 4", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", f"Content-Length: {5 + len(hidden)}"],
            ["Content-Length: 5", f"Content-Length: {5 + len(hidden)}"],
            ["Transfer-Encoding: chunked, identity"],
            [f"Content-Length: {5 + len(hidden)}", "Transfer-Encoding : chunked"],
        ):
            with raw(server, microvm) as stream:
                stream.sendall(self.head(microvm, token, "POST /outer HTTP/1.1", *headers, "Connection: close") + b"0\r\n\r\n" + hidden)
                read_all(stream)
        seen = microvm.http("/requests", token=token, port=HTTP).json()
        assert not [line for line in seen if "smuggled" in line], seen

    @pytest.mark.compat("endpoint.broken-answer")
    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    @pytest.mark.parametrize("kind", ["chunked", "length"])
    def test_half_an_answer_is_no_answer(self, server, microvm, token, kind, version):
        said = curl(server, microvm, token, HTTP, f"/dies/{kind}", version)
        # The reset of an HTTP/2 stream drops what has not left yet.
        possible = ("half", "") if version == "--http2" else ("half",)
        assert said.returncode != 0 and said.stdout in possible, said


class TestTls:
    @pytest.mark.compat("endpoint.tls-app")
    def test_an_app_that_speaks_tls_is_found_out(self, server, microvm, token):
        found = curl(server, microvm, token, TLS, "/tls")
        assert found.stdout == "true", found
        with_body = curl(server, microvm, token, TLS, "/length", "--data", "body")
        assert with_body.stdout == "4", "known from the request before"

    @pytest.mark.compat("endpoint.force-tls")
    def test_tls_where_it_is_asked_for(self, server, microvm, token):
        force = ["--header", "X-aws-proxy-force-tls: true", "--write-out", "%{http_code}"]
        assert curl(server, microvm, token, TLS, "/tls", *force).stdout == "true200"
        assert curl(server, microvm, token, HTTP, "/tls", *force).stdout == "502", "this port speaks none"

    @pytest.mark.compat("endpoint.http2-app")
    def test_http2_to_an_app_that_has_none(self, server, microvm, token):
        said = curl(server, microvm, token, HTTP, "/", "--header", "X-aws-proxy-force-h2: true", "--write-out", "%{http_code}")
        assert said.stdout == "502", said
        assert curl(server, microvm, token, HTTP, "/after").stdout == "/after"


@pytest.mark.compat("endpoint.slow-client")
def test_headers_that_do_not_end_are_not_waited_for(slow):
    """Half a minute since the first test began."""
    slow.settimeout(SECONDS)
    assert b" 200 " not in read_all(slow), "there was no request"
