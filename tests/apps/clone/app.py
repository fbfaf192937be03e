"""Tells what is new in a clone of it and what is not, and how its clocks and connections went through a suspend.

One thread answers every request, so that each clone draws from the same generators in the same order."""

import ctypes
import errno
import json
import os
import random
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

GENERATION = Path("/dev/hearth/generation")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# A process without any of Python's start-up that draws from OpenSSL.
NEW_PROCESS = ["python3", "-I", "-S", "-c", "import _ssl; print(_ssl.RAND_bytes(16).hex())"]

libc = ctypes.CDLL(None, use_errno=True)
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
TIMER_ABSTIME = 1


def tls_secrets() -> list[str]:
    """The secrets of a TLS 1.3 session with ourselves, through memory."""
    with tempfile.NamedTemporaryFile("r", dir="/dev/shm") as log:
        serving, asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        serving.load_cert_chain("certificate.pem")
        asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
        asking.keylog_filename = log.name
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [asking.wrap_bio(to_client, to_server), serving.wrap_bio(to_server, to_client, server_side=True)]
        while ends:
            for end in list(ends):
                try:
                    end.do_handshake()
                    assert end.version() == "TLSv1.3"
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    pass
        return sorted(line.split()[-1] for line in log.read().splitlines() if line.startswith("CLIENT_"))


def generators() -> dict:
    return {"random": random.getrandbits(128), "openssl": ssl.RAND_bytes(16).hex(), "tls": tls_secrets()}


def in_a_fork(what) -> dict:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, json.dumps(what()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        said = json.load(answer)
    os.waitpid(child, 0)
    return said


def openssl_poll() -> None:
    """`RAND_poll`, which Python has no name for: of the library that its module uses."""
    (library,) = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcrypto.so" in line}
    assert ctypes.CDLL(library).RAND_poll() == 1


REMEDIES = {"RAND_add": lambda: ssl.RAND_add(os.urandom(32), 32), "RAND_poll": openssl_poll}


def draw(remedy: str) -> dict:
    """What this process draws first of all in its clone, then what new processes do, then itself with fresh bytes."""
    said = {"as it is": generators()}
    with open("/dev/urandom", "rb", buffering=0) as device:
        said["kernel"] = {
            "urandom": device.read(16).hex(),
            "uuid": Path("/proc/sys/kernel/random/uuid").read_text(),
            "uuid4": str(uuid.uuid4()),
        }
    said["boot_id"] = BOOT_ID.read_text()
    said["fork"] = in_a_fork(lambda: {"openssl": ssl.RAND_bytes(16).hex(), "tls": tls_secrets()})
    said["new process"] = subprocess.run(NEW_PROCESS, stdout=subprocess.PIPE, text=True, check=True).stdout
    REMEDIES[remedy]()
    random.seed()
    said["with fresh bytes"] = generators()
    said["generation"] = GENERATION.read_text()
    return said


def clocks() -> dict:
    return {
        "wall": time.time(),
        "monotonic": time.clock_gettime(time.CLOCK_MONOTONIC),
        "boot": time.clock_gettime(time.CLOCK_BOOTTIME),
        "generation": GENERATION.read_text(),
    }


def wall_timer(due: float, flags: int) -> int:
    """A timerfd on the wall clock."""
    timer = libc.timerfd_create(time.CLOCK_REALTIME, os.O_CLOEXEC)
    setting = struct.pack("=qqqq", 0, 0, int(due), int(due % 1 * 1e9))
    assert timer >= 0 and libc.timerfd_settime(timer, flags, setting, None) == 0, os.strerror(ctypes.get_errno())
    return timer


class Sleepers:
    """Threads that each wait for something, and when and how they woke."""

    def __init__(self, due: float, seconds: float):
        self.woken: dict[str, dict] = {}
        self.threads = []
        timer = wall_timer(due, TFD_TIMER_ABSTIME)
        watch = wall_timer(due + 3600, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET)
        self.begin("sleep", lambda: time.sleep(seconds))
        self.begin("timer", lambda: os.read(timer, 8))
        self.begin("leap", lambda: os.read(watch, 8))
        self.begin("until", lambda: self.until(due))
        self.begin("cron", lambda: self.cron(due))

    def begin(self, name: str, wait) -> None:
        began = time.monotonic()

        def run() -> None:
            error = None
            try:
                wait()
            except OSError as failed:
                error = errno.errorcode[failed.errno]
            self.woken[name] = {"wall": time.time(), "slept": time.monotonic() - began, "error": error}

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    @staticmethod
    def until(due: float) -> None:
        """To a point of the wall clock, at once."""
        left = struct.pack("=qq", int(due), int(due % 1 * 1e9))
        assert libc.clock_nanosleep(time.CLOCK_REALTIME, TIMER_ABSTIME, left, None) == 0

    @staticmethod
    def cron(due: float) -> None:
        """To a point of the wall clock, in short steps."""
        while time.time() < due:
            time.sleep(0.25)

    def report(self) -> dict:
        for thread in self.threads:
            thread.join(30)
        return self.woken


def loopback() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


def unix() -> tuple[socket.socket, socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("/tmp/socket")
        listener.listen()
        near = socket.socket(socket.AF_UNIX)
        near.connect("/tmp/socket")
        return near, listener.accept()[0]


class Connections:
    def __init__(self, outside: list):
        self.pairs = {"loopback": loopback(), "unix": unix()}
        self.outside = socket.create_connection(outside, 10)
        self.peer = outside

    def report(self) -> dict:
        said = {}
        for name, (near, far) in self.pairs.items():
            near.sendall(b"still here")
            far.settimeout(10)
            said[name] = far.recv(64).decode()
        try:
            said["outside"] = self.outside.recv(64).decode()
        except OSError as error:
            said["outside"] = errno.errorcode.get(error.errno, str(error))
        with socket.create_connection(self.peer, 10):
            said["outside again"] = "connected"
        return said


def rename() -> str:
    try:
        socket.sethostname("renamed")
        return "renamed"
    except OSError as error:
        return errno.errorcode[error.errno]


class App(BaseHTTPRequestHandler):
    sleepers: Sleepers
    connections: Connections

    def answer(self, said) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        tell = {
            "/draw/RAND_add": lambda: draw("RAND_add"),
            "/draw/RAND_poll": lambda: draw("RAND_poll"),
            "/clocks": clocks,
            "/sleepers": lambda: App.sleepers.report(),
            "/connections": lambda: App.connections.report(),
            "/rename": rename,
        }
        self.answer(tell[self.path]())

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/sleepers":
            App.sleepers = Sleepers(time.time() + wanted["due"], wanted["sleep"])
        else:
            App.connections = Connections(wanted["outside"])
        self.answer(clocks())

    def log_message(self, *_):
        pass


# What an app does before its snapshot, unaware. The kernel makes up the boot's id when it is first read.
random.seed()
generators()
BOOT_ID.read_text()
HTTPServer(("0.0.0.0", 5000), App).serve_forever()
