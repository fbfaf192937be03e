"""Servers that people run, from Dockerfiles as their users write them: each is built, run, used, suspended, woken, and used again with what it
had kept. `images/` has the Dockerfiles. The table `IMAGES` says which are long: those are for `cargo xtask test images`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.exceptions
import pg8000.exceptions
import pg8000.native
import pytest
from websockets.sync.client import connect

import support
from support import HEARTH, Answer, Microvm, Server

DIRECTORY = Path(__file__).with_name("images")
HEADER = ("image", "build s", "first answer s", "asked in vain", "after a wake s")
# Longest time from a launch until a server that listens answers: some open their port before they are up.
FIRST_ANSWER_SECONDS = 120


class App:
    """A server in a MicroVM, as its clients see it."""

    def __init__(self, microvm: Microvm, port: int):
        self.microvm, self.port = microvm, port
        self.token = microvm.token({"port": port}, minutes=60)
        self._forwarder: subprocess.Popen | None = None
        self._local_port = 0

    def request(self, method: str, path: str, body: str | bytes | dict | None = None, headers: dict | None = None) -> Answer:
        headers = dict(headers or {})
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        return self.microvm.http(path, method=method, token=self.token, port=self.port, body=body, headers=headers, timeout=180)

    def ok(self, method: str, path: str, body: str | bytes | dict | None = None, headers: dict | None = None) -> Answer:
        answer = self.request(method, path, body, headers)
        assert answer.status in (200, 201), (method, path, answer.status, answer.body[:2000])
        return answer

    @contextlib.contextmanager
    def websocket(self, path: str, headers: dict | None = None):
        server = self.microvm.server
        stream = socket.create_connection(server.endpoint_address(), 60)
        sent = {"X-aws-proxy-auth": self.token, "X-aws-proxy-port": str(self.port)} | (headers or {})
        with connect(
            f"wss://{self.microvm.endpoint}{path}", sock=stream, ssl=server.tls(), server_hostname=self.microvm.endpoint,
            additional_headers=sent, open_timeout=120, proxy=None,
        ) as talk:  # fmt: skip
            yield talk

    def local_port(self) -> int:
        """A port here that leads to the server's, as raw TCP."""
        if self._forwarder is None:
            server = self.microvm.server
            command = [str(HEARTH), "--data-dir", str(server.data_dir), "forward", self.microvm.id, f"0:{self.port}"]
            self._forwarder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=lambda: lines.put(self._forwarder.stdout.readline()), daemon=True).start()
            self._local_port = int(lines.get(timeout=30).split()[0].rsplit(":", 1)[1])
        return self._local_port

    def close(self) -> None:
        if self._forwarder is not None:
            self._forwarder.send_signal(signal.SIGINT)
            try:
                self._forwarder.wait(20)
            finally:
                self._forwarder.kill()
                self._forwarder.wait(20)


# A story uses the server, leaves something behind, yields, and finds it again after the server was suspended and woken.
Story = Callable[[App], Iterator[None]]


def gunicorn(app: App) -> Iterator[None]:
    assert app.ok("POST", "/notes", {"text": "milk"}).json() == ["milk"]
    yield
    assert app.ok("POST", "/notes", {"text": "bread"}).json() == ["milk", "bread"]


def uvicorn(app: App) -> Iterator[None]:
    order = {"item": "tea", "amount": 2}
    assert app.ok("PUT", "/orders/7", order).json() == order
    assert app.request("PUT", "/orders/8", {"item": "tea", "amount": "many"}).status == 422
    with app.websocket("/echo") as talk:
        talk.send("hello")
        assert talk.recv(60) == "HELLO"
    yield
    assert app.ok("GET", "/orders/7").json() == order
    with app.websocket("/echo") as talk:
        talk.send("again")
        assert talk.recv(60) == "AGAIN"


def puma(app: App) -> Iterator[None]:
    assert [app.ok("POST", "/votes/ruby").text for _ in range(3)] == ["1", "2", "3"]
    yield
    assert app.ok("POST", "/votes/ruby").text == "4"
    assert app.ok("GET", "/").json() == {"ruby": 4}


def express(app: App) -> Iterator[None]:
    assert app.ok("POST", "/carts/ann", {"item": "book"}).json() == [{"item": "book"}]
    assert app.ok("GET", "/carts/bob").json() == []
    yield
    assert app.ok("GET", "/carts/ann").json() == [{"item": "book"}]


def next_js(app: App) -> Iterator[None]:
    page = app.ok("GET", "/?name=Ann").text
    assert "Hello, " in page and "Ann" in page, page
    assert app.ok("POST", "/api/visits").json() == {"visits": 1}
    yield
    assert app.ok("POST", "/api/visits").json() == {"visits": 2}


def go(app: App) -> Iterator[None]:
    assert app.ok("PUT", "/colour", "blue").status == 201
    assert app.request("GET", "/size").status == 404
    yield
    assert app.ok("GET", "/colour").text == "blue"


def java(app: App) -> Iterator[None]:
    assert [app.ok("GET", f"/add?{number}").text for number in (1, 20)] == ["1", "21"]
    yield
    assert app.ok("GET", "/add?300").text == "321"


def nginx(app: App) -> Iterator[None]:
    assert app.ok("GET", "/").headers["Server"].startswith("nginx/")
    assert app.ok("PUT", "/uploads/notes.txt", b"kept").status == 201
    yield
    assert app.ok("GET", "/uploads/notes.txt").body == b"kept"


def postgresql(app: App) -> Iterator[None]:
    with database(app) as session:
        session.run("CREATE TABLE trees (name text PRIMARY KEY, height int)")
        session.run("INSERT INTO trees VALUES ('oak', 20), ('elm', 15)")
        assert session.run("SELECT sum(height) FROM trees") == [[35]]
    yield
    with database(app) as session:
        assert session.run("SELECT name FROM trees ORDER BY height") == [["elm"], ["oak"]]
        session.run("UPDATE trees SET height = height + 1 WHERE name = 'elm'")


def database(app: App):
    return contextlib.closing(pg8000.native.Connection("app", "127.0.0.1", "app", app.local_port(), timeout=60))


def redis(app: App) -> Iterator[None]:
    assert redis_says(app, "SET colour blue") == "+OK"
    assert [redis_says(app, "INCR visits") for _ in range(2)] == [":1", ":2"]
    yield
    assert redis_says(app, "INCR visits") == ":3"
    assert redis_says(app, "STRLEN colour") == ":4"


def redis_says(app: App, command: str) -> str:
    with socket.create_connection(("127.0.0.1", app.local_port()), 60) as connection, connection.makefile("rwb") as stream:
        stream.write(command.encode() + b"\r\n")
        stream.flush()
        return stream.readline().decode().rstrip()


def ping(app: App) -> None:
    assert redis_says(app, "PING") == "+PONG"


JUPYTER = {"Authorization": "token let-me-in"}


def jupyterlab(app: App) -> Iterator[None]:
    assert app.request("GET", "/api/kernels").status == 403
    kernel = app.ok("POST", "/api/kernels", {"name": "python3"}, JUPYTER).json()["id"]
    assert run_cell(app, kernel, "import math; kept = math.factorial(20); print(kept)") == "2432902008176640000\n"
    yield
    assert run_cell(app, kernel, "print(kept + 1)") == "2432902008176640001\n"


def run_cell(app: App, kernel: str, code: str) -> str:
    """What a cell prints, by the protocol of Jupyter's kernels."""
    ours = uuid.uuid4().hex
    header = {"msg_id": ours, "msg_type": "execute_request", "username": "", "session": ours, "version": "5.3", "date": ""}
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell", "buffers": []}
    printed = ""
    with app.websocket(f"/api/kernels/{kernel}/channels?session_id={ours}", JUPYTER) as talk:
        talk.send(json.dumps(request))
        end = time.monotonic() + 120
        while True:
            said = json.loads(talk.recv(end - time.monotonic()))
            if said["parent_header"].get("msg_id") != ours:
                continue
            assert said["msg_type"] != "error", said["content"]
            if said["msg_type"] == "stream":
                printed += said["content"]["text"]
            if said["msg_type"] == "status" and said["content"]["execution_state"] == "idle":
                return printed


def playwright(app: App) -> Iterator[None]:
    page = "<title>Counter</title><button onclick='this.textContent = ++count'>0</button><script>var count = 0</script>"
    click = "(() => { document.querySelector('button').click(); return document.querySelector('button').textContent })()"
    assert app.ok("PUT", "/page", page).text == "Counter"
    assert [app.ok("POST", "/evaluate", click).json() for _ in range(2)] == ["1", "2"]
    assert app.ok("GET", "/screenshot").body.startswith(b"\x89PNG")
    yield
    assert app.ok("POST", "/evaluate", click).json() == "3"
    assert app.ok("GET", "/screenshot").body.startswith(b"\x89PNG")


def buildbot(app: App) -> Iterator[None]:
    def force(seconds: int) -> int:
        forced = {"id": 1, "jsonrpc": "2.0", "method": "force", "params": {"builderNames": ["tests"], "seconds": str(seconds)}}
        return app.ok("POST", "/api/v2/forceschedulers/force", forced).json()["result"][0]

    def finished(request: int) -> str:
        """The result of a build, when it is over."""
        deadline = support.Deadline(180, f"build {request} to be over")
        while True:
            (found,) = app.ok("GET", f"/api/v2/buildrequests/{request}").json()["buildrequests"]
            if found["complete"]:
                return {0: "success", 2: "failure"}.get(found["results"], str(found["results"]))
            deadline.tick(found, pause=0.5)

    assert finished(force(0)) == "success"
    # The next one is under way when the runner falls asleep.
    request = force(20)
    deadline = support.Deadline(60, "the second build to begin")
    while not app.ok("GET", f"/api/v2/buildrequests/{request}/builds").json()["builds"]:
        deadline.tick(pause=0.5)
    yield
    assert finished(request) == "success"
    assert finished(force(0)) == "success"


def code_server(app: App) -> Iterator[None]:
    assert app.request("GET", "/").status == 302, "without a password there is only the login page"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert app.request("POST", "/login", "password=wrong", form).status == 200
    login = app.request("POST", "/login", "password=let-me-in", form)
    assert login.status == 302, login.body[:2000]
    session = {"Cookie": login.headers["Set-Cookie"].split(";")[0]}
    assert "vscode-workbench-web-configuration" in app.ok("GET", "/?folder=/home/coder", headers=session).text
    seen = app.ok("GET", "/healthz").json()["lastHeartbeat"]
    assert seen > 0
    yield
    assert app.ok("GET", "/healthz").json()["lastHeartbeat"] == seen, "it remembers when somebody was there"
    assert "vscode-workbench-web-configuration" in app.ok("GET", "/?folder=/home/coder", headers=session).text


def get(path: str, headers: dict | None = None) -> Callable[[App], object]:
    return lambda app: app.ok("GET", path, headers=headers)


def select(app: App) -> None:
    with database(app) as session:
        assert session.run("SELECT 1") == [[1]]


@dataclasses.dataclass(frozen=True)
class Image:
    """A directory with a Dockerfile, and what is done with it."""

    name: str
    port: int
    story: Story
    # One small request: what the first answer and the one after a wake are measured by.
    ask: Callable[[App], object]
    long: bool = True
    memory: int = 512
    build_seconds: int = 600


IMAGES = [
    Image("gunicorn", 8000, gunicorn, get("/"), long=False),
    Image("uvicorn", 8000, uvicorn, get("/openapi.json")),
    Image("puma", 9292, puma, get("/"), long=False),
    Image("express", 3000, express, get("/")),
    Image("next", 3000, next_js, get("/"), memory=1024, build_seconds=1200),
    Image("go", 8080, go, lambda app: app.ok("PUT", "/asked", "")),
    Image("java", 8080, java, get("/add?0")),
    Image("nginx", 80, nginx, get("/"), long=False),
    Image("postgresql", 5432, postgresql, select),
    Image("redis", 6379, redis, ping, long=False),
    Image("code-server", 8080, code_server, get("/healthz"), memory=1024, build_seconds=1800),
    Image("jupyterlab", 8888, jupyterlab, get("/api/status", JUPYTER), memory=1024, build_seconds=900),
    Image("playwright", 3000, playwright, lambda app: app.ok("POST", "/evaluate", "1 + 1"), memory=2048, build_seconds=1200),
    Image("buildbot", 8010, buildbot, get("/api/v2/builders"), memory=1024, build_seconds=900),
]


@pytest.fixture(scope="module")
def server():
    # A browser takes minutes to start on an emulated processor.
    with support.serving("ready_timeout_seconds = 900\n") as server:
        yield server


def case(image: Image):
    marks = [pytest.mark.timeout(image.build_seconds + 600)] + [pytest.mark.long] * image.long
    return pytest.param(image, id=image.name, marks=marks)


def test_every_directory_has_a_story():
    assert {path.name for path in DIRECTORY.iterdir()} == {image.name for image in IMAGES}


@pytest.mark.parametrize("image", [case(image) for image in IMAGES])
def test_image(server: Server, image: Image, measured):
    with contextlib.ExitStack() as cleanup:
        name = f"images-{image.name}"
        arn = f"arn:aws:lambda:us-east-1:000000000000:microvm-image:{name}"
        cleanup.callback(remove_image, server, arn)
        started = time.monotonic()
        command = ["image", "build", str(DIRECTORY / image.name), "--name", name, "--memory", str(image.memory)]
        built = server.hearth(*command, timeout=image.build_seconds)
        assert built.returncode == 0, f"{built.stderr}\n" + "\n".join(built.stdout.splitlines()[-40:])
        figures = [time.monotonic() - started]

        started = time.monotonic()
        microvm = support.run_microvm(server, arn, idlePolicy=support.idle_policy())
        cleanup.callback(terminate, microvm)
        microvm.wait("RUNNING")
        app = App(microvm, image.port)
        cleanup.callback(app.close)
        vain = ask_until_it_answers(image, app)
        figures.append(time.monotonic() - started)
        story = image.story(app)
        next(story)

        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        started = time.monotonic()
        image.ask(app)
        figures.append(time.monotonic() - started)
        assert next(story, "over") == "over"
        build, first, woken = (f"{seconds:.2f}" for seconds in figures)
        measured(HEADER, (image.name, build, first, str(vain), woken))


def ask_until_it_answers(image: Image, app: App) -> int:
    """How often a server was asked before it answered."""
    deadline = support.Deadline(FIRST_ANSWER_SECONDS, f"{image.name} to answer")
    vain = 0
    while True:
        try:
            image.ask(app)
            return vain
        except (AssertionError, OSError, pg8000.exceptions.Error) as error:
            vain += 1
            deadline.tick(error, pause=0.2)


def terminate(microvm: Microvm) -> None:
    microvm.terminate()
    microvm.wait("TERMINATED")


def remove_image(server: Server, arn: str) -> None:
    # One that is not there, or still being built because the test gave up, is the server's to remove when it ends.
    with contextlib.suppress(botocore.exceptions.ClientError):
        support.delete_image(server, arn)
