"""Into a MicroVM: the service's shell with a WebSocket client, `hearth shell`, `exec`, `cp` and `forward`. One MicroVM for all of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
import support
import websockets.exceptions
from support import HEARTH, Microvm, Server, eventually
from websockets.sync.client import connect as websocket

ALL_INGRESS = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:ALL_INGRESS"
PATIENCE = 60

ECHO_AFTER_THE_END = """
import socket
listener = socket.create_server(("127.0.0.1", 7000))
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    connection.sendall(received[::-1])
    connection.close()
"""

TALK_TO_WHOEVER_IS_THERE = """
import socket
listener = socket.create_server(("127.0.0.1", 7001))
print("listening", flush=True)
connection, _ = listener.accept()
assert connection.recv(1) == b"", "the client has said all it wanted"
try:
    while True:
        connection.sendall(bytes(65536))
except OSError:
    print("nobody is there", flush=True)
"""


@pytest.fixture(scope="module")
def vm(server: Server, image):
    microvm = support.run_microvm(server, image.arn, ingressNetworkConnectors=[ALL_INGRESS], idlePolicy=support.idle_policy())
    microvm.wait("RUNNING")
    yield microvm
    microvm.terminate()
    microvm.wait("TERMINATED")


def shell_token(vm: Microvm) -> str:
    answer = vm.client.create_microvm_shell_auth_token(microvmIdentifier=vm.id, expirationInMinutes=5)
    return answer["authToken"]["X-aws-proxy-auth"]


def open_shell(vm: Microvm, path: str = "/"):
    """As the service's documentation does it."""
    protocols = ["lambda-microvms", f"lambda-microvms.authentication.{shell_token(vm)}", "lambda-microvms.port.8022"]
    sock = socket.create_connection(vm.server.endpoint_address(), PATIENCE)
    return websocket(
        f"wss://{vm.endpoint}{path}", sock=sock, ssl=vm.server.tls(), server_hostname=vm.endpoint, subprotocols=protocols,
        compression=None, open_timeout=PATIENCE,
    )  # fmt: skip


def read_until(shell, wanted: str) -> str:
    seen = b""
    while wanted not in seen.decode(errors="replace"):
        frame = shell.recv(timeout=PATIENCE)
        assert isinstance(frame, bytes), frame
        seen += frame
    return seen.decode(errors="replace")


def verb(vm: Microvm, *arguments: str, stdin=subprocess.DEVNULL, **options) -> subprocess.CompletedProcess:
    command = [str(HEARTH), "--data-dir", str(vm.server.data_dir), *arguments]
    if "input" not in options:
        options["stdin"] = stdin
    return subprocess.run(command, capture_output=True, timeout=240, **options)


def execute(vm: Microvm, *command: str, options: tuple[str, ...] = (), **more) -> subprocess.CompletedProcess:
    return verb(vm, "exec", vm.id, *options, "--", *command, **more)


def output(vm: Microvm, *command: str, **more) -> str:
    done = execute(vm, *command, **more)
    assert done.returncode == 0, done
    return done.stdout.decode()


def processes(vm: Microvm, pattern: str) -> str:
    """Process ids in the MicroVM whose command line fits; pgrep is not in the image."""
    look = (
        "import os\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        f"    line = open(f'/proc/{{pid}}/cmdline').read() if int(pid) != os.getpid() else ''\n"
        f"    if {pattern!r} in line: print(pid)\n"
    )
    return output(vm, "python3", "-c", look)


def test_a_command_has_the_environment_of_the_app(vm: Microvm):
    """SPEC 12."""
    found = dict(line.split("=", 1) for line in output(vm, "env").splitlines())
    assert found["HOME"] == "/root"
    assert "/usr/bin" in found["PATH"].split(":")
    assert found["AWS_LAMBDA_MICROVM_IMAGE_NAME"] == "flask-hello"
    assert found["AWS_LAMBDA_MICROVM_IMAGE_VERSION"] == "1.0"
    assert found["AWS_LAMBDA_MICROVM_IMAGE_ARN"] == vm.description["imageArn"]


def test_the_services_shell(vm: Microvm):
    with open_shell(vm) as shell:
        assert shell.subprotocol == "lambda-microvms"
        first = json.loads(shell.recv(timeout=PATIENCE))
        assert first["type"] == "session_init" and len(first["session_id"]) == 36
        read_until(shell, "λ $")
        shell.send(b"stty size; echo $TERM; id -u; tty; cat /proc/1/comm; echo done-$((1+1))\n")
        seen = read_until(shell, "done-2")
        assert "0 0" in seen and "xterm" in seen and "/dev/pts/" in seen and "gunicorn" in seen, seen
        shell.send(json.dumps({"type": "resize", "cols": 132, "rows": 43}))
        shell.send(b"stty size; echo again-$((1+1))\n")
        assert "43 132" in read_until(shell, "again-2")
        # Any other text is typed.
        shell.send("sleep 600\n")
        time.sleep(0.5)
        shell.send(b"\x03")
        shell.send("exit\n")
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as closed:
            while True:
                shell.recv(timeout=PATIENCE)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1000, "shell exited")


def test_who_may_not(vm: Microvm, run):
    answer = vm.http("/", token=shell_token(vm), port=None)
    assert (answer.status, answer.body) == (502, b"")
    closed = run()
    refusal = verb(closed, "exec", closed.id, "--", "true")
    assert refusal.returncode == 1
    assert b"SHELL_INGRESS" in refusal.stderr and b"hearth run --shell" in refusal.stderr, refusal


def test_exec_is_like_a_process_of_here(vm: Microvm):
    done = execute(vm, "sh", "-c", "echo to-stdout; echo to-stderr >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"to-stdout\n", b"to-stderr\n")
    assert execute(vm, "sh", "-c", "kill -9 $$").returncode == 137
    missing = execute(vm, "no-such-program")
    assert missing.returncode == 127 and b"executable file not found in PATH" in missing.stderr, missing

    assert output(vm, "sh", "-c", "pwd; id -u; echo $A; readlink /proc/self/ns/mnt /proc/self/ns/pid").splitlines() == [
        "/app", "0", "", *output(vm, "readlink", "/proc/1/ns/mnt", "/proc/1/ns/pid").splitlines()
    ]  # fmt: skip
    options = ("-e", "A=b c", "-w", "/tmp", "-u", "www-data")
    assert output(vm, "sh", "-c", "pwd; id -un; echo $A", options=options) == "/tmp\nwww-data\nb c\n"
    assert b"not there" in execute(vm, "true", options=("-w", "/not/there")).stderr
    capabilities = output(vm, "sed", "-n", "s/CapBnd:\t//p", "/proc/self/status")
    assert capabilities == output(vm, "sed", "-n", "s/CapBnd:\t//p", "/proc/1/status")

    much = os.urandom(10 << 20)
    summed = execute(vm, "sha256sum", input=much)
    assert summed.stdout.split()[0].decode() == hashlib.sha256(much).hexdigest()
    back = execute(vm, "cat", input=much)
    assert back.stdout == much


def test_a_client_that_goes_takes_its_process_along(vm: Microvm):
    command = [str(HEARTH), "--data-dir", str(vm.server.data_dir), "exec", vm.id, "--", "sh", "-c", "echo up; sleep 4321 & sleep 4321"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout.readline() == b"up\n"
        eventually(lambda: len(processes(vm, "4321").split()) >= 2, "the processes to be there")
        client.kill()
    eventually(lambda: not processes(vm, "4321"), "the processes to be gone")


@contextlib.contextmanager
def terminal(vm: Microvm, *arguments: str, columns: int, rows: int):
    """A verb on a terminal of its own: yields the process and the terminal's other side."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    before = termios.tcgetattr(theirs)
    command = [str(HEARTH), "--data-dir", str(vm.server.data_dir), *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    try:
        yield process, ours, theirs
        assert termios.tcgetattr(theirs) == before, "the terminal is as it was"
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def expect(fd: int, wanted: bytes) -> bytes:
    """Reads what the terminal shows, up to and with what is wanted."""
    seen = b""
    deadline = support.Deadline(PATIENCE, repr(wanted))
    os.set_blocking(fd, False)
    while wanted not in seen:
        try:
            seen += os.read(fd, 65536)
        except BlockingIOError:
            deadline.tick(seen)
    return seen


def test_hearth_shell_is_a_terminal(vm: Microvm):
    with terminal(vm, "shell", vm.id, columns=100, rows=30) as (process, ours, theirs):
        expect(ours, "λ $".encode())
        os.write(ours, b"stty size; echo first-$((1+1))\n")
        assert b"30 100" in expect(ours, b"first-2")
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 90, 0, 0))
        process.send_signal(signal.SIGWINCH)
        os.write(ours, b"until [ \"$(stty size)\" = '50 90' ]; do sleep 0.1; done; echo resized-$((1+1))\n")
        expect(ours, b"resized-2")
        os.write(ours, b"exit 9\n")
        assert process.wait(PATIENCE) == 9
    with terminal(vm, "shell", vm.id, columns=80, rows=24) as (process, ours, theirs):
        expect(ours, "λ $".encode())
        process.terminate()
        assert process.wait(PATIENCE) == 143


def test_files_go_both_ways(vm: Microvm, tmp_path: Path):
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner/script").write_text("#!/bin/sh\necho ran\n")
    (tree / "inner/script").chmod(0o751)
    (tree / "link").symlink_to("inner/script")
    (tree / "dangling").symlink_to("/no/such/file")

    def copy(*arguments: str, **options) -> subprocess.CompletedProcess:
        done = verb(vm, "cp", *arguments, **options)
        assert done.returncode == 0, done
        return done

    copy(str(tree), f"{vm.id}:/tmp/new")
    copy(str(tree), f"{vm.id}:/tmp/new")
    copy(f"{tree}/.", f"{vm.id}:/tmp/new/tree/inner")
    assert output(vm, "/tmp/new/tree/inner/link") == "ran\n"
    assert output(vm, "stat", "-c", "%a %U %N", "/tmp/new/inner/script", "/tmp/new/dangling").splitlines() == [
        "751 root '/tmp/new/inner/script'", "777 root '/tmp/new/dangling' -> '/no/such/file'"
    ]  # fmt: skip
    output(vm, "sh", "-c", "mkfifo /tmp/new/fifo; ln -s / /tmp/new/out; chown 33:33 /tmp/new/inner/script")
    done = copy(f"{vm.id}:/tmp/new", str(tmp_path / "back"))
    assert b"/tmp/new/fifo: a pipe" in done.stderr
    back = tmp_path / "back"
    assert (back / "inner/script").read_text() == "#!/bin/sh\necho ran\n"
    assert (back / "inner/script").stat().st_mode & 0o7777 == 0o751
    assert os.readlink(back / "link") == "inner/script" and os.readlink(back / "out") == "/"
    copy("-a", f"{vm.id}:/tmp/new/inner/script", f"{tmp_path}/owned")
    assert (tmp_path / "owned").stat().st_uid == 33

    archive = copy(f"{vm.id}:/tmp/new/inner", "-").stdout
    listing = subprocess.run(["tar", "-t"], input=archive, capture_output=True, check=True).stdout.decode().split()
    assert sorted(name.rstrip("/") for name in listing) == ["inner", "inner/script"]
    output(vm, "mkdir", "/tmp/from-tar")
    copy("-", f"{vm.id}:/tmp/from-tar", input=archive)
    assert output(vm, "/tmp/from-tar/inner/script") == "ran\n"

    for arguments, reason in [
        ((f"{vm.id}:/no/such", str(tmp_path)), b"/no/such is not there"),
        ((str(tree / "inner/script"), f"{vm.id}:/no/such/"), b"no such directory"),
        ((str(tree / "inner/script"), f"{vm.id}:/no/such/dir"), b"/no/such is no directory"),
        ((str(tree), f"{vm.id}:/tmp/new/inner/script"), b"is a file"),
        ((str(tree), "/tmp/elsewhere"), b"ID:PATH"),
    ]:
        done = verb(vm, "cp", *arguments)
        assert done.returncode == 1 and reason in done.stderr, done


def test_a_large_file_goes_both_ways(vm: Microvm, tmp_path: Path):
    piece = os.urandom(1 << 20)
    (tmp_path / "large").write_bytes(piece * 100)
    wanted = hashlib.sha256(piece * 100).hexdigest()
    assert verb(vm, "cp", str(tmp_path / "large"), f"{vm.id}:/var/tmp/large").returncode == 0
    assert output(vm, "sha256sum", "/var/tmp/large").split()[0] == wanted
    assert verb(vm, "cp", f"{vm.id}:/var/tmp/large", str(tmp_path / "back")).returncode == 0
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == wanted
    output(vm, "rm", "/var/tmp/large")


def test_a_shell_and_a_command_wake_it(vm: Microvm):
    def suspend():
        vm.client.suspend_microvm(microvmIdentifier=vm.id)
        vm.wait("SUSPENDED")

    suspend()
    assert output(vm, "echo", "awake") == "awake\n"
    suspend()
    with open_shell(vm) as shell:
        assert json.loads(shell.recv(timeout=PATIENCE))["type"] == "session_init"
        shell.send(b"echo a$((1 + 1))wake\n")
        read_until(shell, "a2wake")
    assert vm.state() == "RUNNING"


def test_ports_are_forwarded_and_wake(vm: Microvm):
    base = [str(HEARTH), "--data-dir", str(vm.server.data_dir)]
    echo = [*base, "exec", vm.id, "--", "python3", "-c", ECHO_AFTER_THE_END]
    forward = [*base, "forward", vm.id, "0:5000", "127.0.0.1:0:7000"]
    with (
        subprocess.Popen(echo, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as server,
        subprocess.Popen(forward, stdout=subprocess.PIPE, text=True) as forwarder,
    ):
        try:
            assert server.stdout.readline() == b"listening\n"
            ports = [int(forwarder.stdout.readline().split()[0].rsplit(":", 1)[1]) for _ in range(2)]
            much = os.urandom(1 << 20)
            with socket.create_connection(("127.0.0.1", ports[1]), PATIENCE) as connection:
                connection.sendall(much)
                connection.shutdown(socket.SHUT_WR)
                back = b"".join(iter(lambda: connection.recv(65536), b""))
            assert back == much[::-1], "each direction ended on its own"
            server.kill()

            vm.client.suspend_microvm(microvmIdentifier=vm.id)
            vm.wait("SUSPENDED")
            with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\nHost: here\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.0 200"
        finally:
            forwarder.send_signal(signal.SIGINT)
            server.kill()
    assert output(vm, "echo", "awake") == "awake\n"


def test_a_client_that_has_asked_and_leaves_frees_the_app(vm: Microvm):
    """It has ended its direction, so that only the bytes it does not take can tell."""
    base = [str(HEARTH), "--data-dir", str(vm.server.data_dir)]
    talk = [*base, "exec", vm.id, "--", "python3", "-c", TALK_TO_WHOEVER_IS_THERE]
    with (
        subprocess.Popen(talk, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as talker,
        subprocess.Popen([*base, "forward", vm.id, "0:7001"], stdout=subprocess.PIPE, text=True) as forwarder,
    ):
        try:
            assert talker.stdout.readline() == b"listening\n"
            port = int(forwarder.stdout.readline().split()[0].rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(65536)
            assert talker.communicate(timeout=PATIENCE)[0] == b"nobody is there\n"
        finally:
            forwarder.send_signal(signal.SIGINT)
            talker.kill()
