"""What the endpoint proxy adds, carries and keeps: `cargo xtask bench ingress` starts a server and runs this against it.

The guest has lighttpd, which answers from memory, and a WebSocket server that does nothing but hold connections. "Direct" is the same
channel to the same port of the guest without the proxy: the administrator's socket hands it out. Client, proxy and guest share the
processors of this machine.
"""

import argparse
import asyncio
import base64
import http.client
import os
import re
import resource
import socket
import ssl
import statistics
import threading
import time
from pathlib import Path

import support
from support import Microvm, Server, idle_policy
from wrk import load

WEB, SOCKETS = 8080, 9000
MEMORY_MIB = 512
# MB/s and connections that AWS gives a MicroVM of this size (SPEC 6.3).
AWS_MEGABYTES, AWS_CONNECTIONS = 1.0, 8
CONNECTIONS = (1, 16, 128)
STREAMS = (1, 4, 16)
BIG = 64 << 20
WARM_UP = 50

DOCKERFILE = f"""\
FROM {support.BASE_IMAGE}
RUN apt-get update && apt-get install --yes --no-install-recommends lighttpd python3-minimal libpython3-stdlib
COPY lighttpd.conf sockets.py /app/
RUN mkdir /www && printf 'hello, world\\n' > /www/index.html && head -c {BIG} /dev/zero > /www/big
EXPOSE {SOCKETS}
CMD ["/bin/sh", "-c", "lighttpd -f /app/lighttpd.conf && exec python3 /app/sockets.py"]
"""

LIGHTTPD = f"""\
server.port = {WEB}
server.document-root = "/www"
index-file.names = ("index.html")
server.max-keep-alive-requests = 1000000
server.max-connections = 1024
server.feature-flags += ("server.h2proto" => "disable")
"""

SOCKET_SERVER = f"""\
import asyncio, base64, hashlib, resource

class Held(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        for line in data.decode("latin-1").split("\\r\\n"):
            name, _, value = line.partition(":")
            if name.lower() == "sec-websocket-key":
                key = hashlib.sha1(value.strip().encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                self.transport.write(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
                                     b"Sec-WebSocket-Accept: " + base64.b64encode(key) + b"\\r\\n\\r\\n")

async def main():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = await asyncio.get_running_loop().create_server(Held, "127.0.0.1", {SOCKETS}, backlog=4096)
    await server.serve_forever()

asyncio.run(main())
"""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a stream that is there already."""

    def __init__(self, stream: socket.socket):
        super().__init__("direct", timeout=60)
        self.sock = stream


def direct(server: Server, microvm: Microvm, port: int) -> http.client.HTTPConnection:
    """A connection to a port of the guest past the proxy."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(str(server.data_dir / "hearth.sock"))
    stream.sendall(
        f"GET /hearth/v1/microvms/{microvm.id}/ports/{port} HTTP/1.1\r\nHost: hearth\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        if not byte:
            raise SystemExit(f"the administrator's socket said only {head!r}")
        head += byte
    if b" 101 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the administrator's socket refused: {head!r}")
    return UnixConnection(stream)


def proxied(server: Server, microvm: Microvm) -> http.client.HTTPConnection:
    connection = support.EndpointConnection(server, microvm.endpoint, 60)
    connection.connect()
    return connection


def exchange(connection: http.client.HTTPConnection, headers: dict[str, str]) -> float:
    """One request on an open connection, in milliseconds."""
    started = time.perf_counter()
    connection.request("GET", "/", headers=headers)
    response = connection.getresponse()
    body = response.read()
    taken = (time.perf_counter() - started) * 1000
    if response.status != 200 or body != b"hello, world\n":
        raise SystemExit(f"the guest answered {response.status} {body!r}")
    return taken


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def latency(server: Server, microvm: Microvm, headers: dict[str, str], rounds: int) -> None:
    """Turn and turn about, so that whatever else the machine does meets all. The proxy dials for every request, so what it adds is counted
    from a direct connection that is dialled anew; one that stays open shows what dialling costs."""
    kept, warm = direct(server, microvm, WEB), proxied(server, microvm)

    def dialled() -> float:
        started = time.perf_counter()
        connection = direct(server, microvm, WEB)
        exchange(connection, {"Connection": "close"})
        connection.close()
        return (time.perf_counter() - started) * 1000

    ways = {
        "direct, kept open": lambda: exchange(kept, {}),
        "direct, dialled each time": dialled,
        "proxied": lambda: exchange(warm, headers),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(WARM_UP + rounds):
        for name, one in ways.items():
            taken = one()
            if number >= WARM_UP:
                times[name].append(taken)
    kept.close()
    warm.close()
    print(f"\n{'latency on a warm connection, ms':<36} {'p50':>8} {'p99':>8} {'n':>6}")
    for name, values in times.items():
        print(f"{name:<36} {statistics.median(values):>8.2f} {percentile(values, 99):>8.2f} {len(values):>6}")
    for name, percent in (("p50", 50), ("p99", 99)):
        added = percentile(times["proxied"], percent) - percentile(times["direct, dialled each time"], percent)
        print(f"{'added by the proxy at ' + name:<36} {added:>8.2f}")


def requests(server: Server, microvm: Microvm, headers: dict[str, str], seconds: int) -> None:
    print(f"\n{'static server through the endpoint':<36} {'requests/s':>11} {'p50':>10} {'p99':>10}")
    url = f"https://{microvm.endpoint}:{server.endpoint_address()[1]}/"
    for connections in CONNECTIONS:
        rate, median, p99 = load(url, headers, connections, seconds)
        print(f"{str(connections) + ' connections':<36} {rate:>11.0f} {median:>10} {p99:>10}", flush=True)


def download(connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
    connection.request("GET", "/big", headers=headers)
    response = connection.getresponse()
    left = BIG
    while left and (piece := response.read(1 << 18)):
        left -= len(piece)
    connection.close()
    if response.status != 200 or left:
        raise SystemExit(f"a download ended with {left} bytes missing, status {response.status}")


def throughput(server: Server, microvm: Microvm, headers: dict[str, str]) -> None:
    print(f"\n{'download through the endpoint':<36} {'MB/s':>8} {'times AWS':>10}   ({AWS_MEGABYTES:.0f} MB/s at {MEMORY_MIB} MiB)")
    ways = [("1 stream, direct", 1, lambda: (direct(server, microvm, WEB), {}))]
    ways += [(f"{streams} streams", streams, lambda: (proxied(server, microvm), headers)) for streams in STREAMS]
    for name, streams, connect in ways:
        threads = [threading.Thread(target=download, args=connect()) for _ in range(streams)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = streams * BIG / 1e6 / (time.perf_counter() - started)
        print(f"{name:<36} {rate:>8.1f} {rate / AWS_MEGABYTES:>10.0f}", flush=True)


def wakes(microvm: Microvm, rounds: int) -> None:
    times = []
    for _ in range(rounds):
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        started = time.perf_counter()
        answer = microvm.http("/", port=WEB)
        times.append((time.perf_counter() - started) * 1000)
        if answer.status != 200:
            raise SystemExit(f"a sleeping MicroVM was answered for with {answer.status}")
    line = "  ".join(f"p{percent} {percentile(times, percent):.1f}" for percent in (50, 95, 99))
    print(f"\nwake by a request to its answer, ms: {line}  n {len(times)}", flush=True)


async def open_socket(server: Server, microvm: Microvm, context: ssl.SSLContext, token: str):
    host, port = server.endpoint_address()
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=microvm.endpoint, limit=4096)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET / HTTP/1.1\r\nHost: {microvm.endpoint}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\nX-aws-proxy-auth: {token}\r\nX-aws-proxy-port: {SOCKETS}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 101 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(f"a WebSocket was refused: {head!r}")
    return writer


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: what it would give back if it ended."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


async def idle_sockets(server: Server, microvm: Microvm, pid: int, count: int, token: str) -> None:
    context = server.tls()
    # Some to begin with: what the first ones cost is not the price of one.
    held = [await open_socket(server, microvm, context, token) for _ in range(50)]
    before = resident_bytes(pid)
    gate = asyncio.Semaphore(32)

    async def one():
        async with gate:
            held.append(await open_socket(server, microvm, context, token))

    await asyncio.gather(*(one() for _ in range(count)))
    after = resident_bytes(pid)
    print(f"\n{count} idle WebSockets: {(after - before) / count / 1024:.1f} KiB of the server's memory each", flush=True)
    for writer in held:
        writer.transport.abort()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--pid", type=int, required=True, help="of the server")
    options.add_argument("--rounds", type=int, default=50, help="wakes; latency is measured twenty times as often")
    options.add_argument("--seconds", type=int, default=10, help="of each load")
    options.add_argument("--sockets", type=int, default=5000)
    arguments = options.parse_args()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server.attach(arguments.data_dir)
    files = {"Dockerfile": DOCKERFILE, "lighttpd.conf": LIGHTTPD, "sockets.py": SOCKET_SERVER}
    uri = support.upload(server, "bench-ingress.zip", support.zip_of(files))
    print("building the image", flush=True)
    image = support.create_image(server, "bench-ingress", uri, resources=[{"minimumMemoryInMiB": MEMORY_MIB}])["imageArn"]
    support.wait_image(server, image, "CREATED", 600)
    microvm = support.run_microvm(server, image, idlePolicy=idle_policy(3600, 3600))
    microvm.wait("RUNNING")
    token = microvm.token({"port": WEB}, {"port": SOCKETS})
    microvm._token = token
    headers = {"X-aws-proxy-auth": token, "X-aws-proxy-port": str(WEB)}

    latency(server, microvm, headers, arguments.rounds * 20)
    requests(server, microvm, headers, arguments.seconds)
    throughput(server, microvm, headers)
    wakes(microvm, arguments.rounds)
    asyncio.run(idle_sockets(server, microvm, arguments.pid, arguments.sockets, token))
    microvm.terminate()


if __name__ == "__main__":
    main()
