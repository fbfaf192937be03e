"""Things that break under a running server: it says what happened, lives on, and keeps nothing."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess

import support
from support import Server, idle_policy


def kill_machine(microvm) -> None:
    pids = [pid for pid, line in support.command_lines() if microvm.id in line and "qemu" in line]
    assert pids, "a running MicroVM has a QEMU process"
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_machine_that_dies_is_terminated_with_a_reason(server, run):
    microvm, neighbour = run(), run()
    token = microvm.token()
    kill_machine(microvm)
    found = microvm.wait("TERMINATED")
    assert found["stateReason"]
    answer = microvm.http("/", token=token)
    assert (answer.status, answer.body) == (502, b"")
    assert not (server.data_dir / "microvms" / microvm.id).exists()
    assert neighbour.count()["memory"] == 1, "nobody else notices"


def test_an_app_that_exits_ends_its_microvm_with_the_exit_code(run):
    """SPEC 2.1, 13."""
    microvm = run()
    with contextlib.suppress(Exception):
        microvm.http("/exit?code=3", timeout=10)
    found = microvm.wait("TERMINATED")
    assert found["stateReason"] == "Container Stopped with Exit Code: 3"


def test_a_damaged_suspended_state_is_a_clear_end(server, run):
    microvm = run(idlePolicy=idle_policy())
    microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
    microvm.wait("SUSPENDED")
    state = [path for path in (server.data_dir / "microvms" / microvm.id).rglob("*") if path.is_file() and "qcow2" not in path.name]
    assert state, "a suspended MicroVM has its state on disk"
    for path in state:
        os.truncate(path, path.stat().st_size // 2)
    answer = microvm.http("/")
    assert answer.status in (502, 503)
    found = microvm.wait("TERMINATED")
    assert found["stateReason"]


def test_a_damaged_snapshot_refuses_new_microvms_with_a_reason():
    with support.serving() as server:
        uri = support.upload(server, "flask-hello.zip", support.zip_directory(support.FLASK_HELLO))
        arn = support.create_image(server, "flask-hello", uri)["imageArn"]
        support.wait_image(server, arn, "CREATED")
        server.stop()
        for memory in (server.data_dir / "images").rglob("memory"):
            os.truncate(memory, 4096)
        server.start()
        try:
            microvm = support.run_microvm(server, arn)
        except Exception as refusal:  # refusing at once is as good as failing the launch
            assert refusal.response["ResponseMetadata"]["HTTPStatusCode"] >= 400
        else:
            found = microvm.wait("TERMINATED")
            assert found["stateReason"]
        assert "rebuild the image" in server.log_path.read_text()
        assert server.running()


def test_a_full_disk_fails_the_build_and_not_the_server():
    with support.scratch() as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200m,mode=0711", "hearth-full", directory], check=True, timeout=20)
        try:
            # The layer cache stays elsewhere: what runs full is where images are written.
            server = Server(directory / "data").start()
            try:
                uri = support.upload(server, "flask-hello.zip", support.zip_directory(support.FLASK_HELLO))
                fill(directory, leaving=64 << 20)
                free = free_bytes(directory)
                arn = support.create_image(server, "too-big", uri)["imageArn"]
                support.wait_image(server, arn, "CREATE_FAILED")
                assert support.build_of(server, arn)["stateReason"].startswith("DISK_STORAGE_FULL")
                server.microvms.delete_microvm_image(imageIdentifier=arn)
                assert server.microvms.list_microvms()["items"] == []
                assert free_bytes(directory) > free - (8 << 20), "what did not fit is removed"
            finally:
                server.stop()
        finally:
            subprocess.run(["umount", directory], check=True, timeout=20)


def free_bytes(directory) -> int:
    return shutil.disk_usage(directory).free


def fill(directory, leaving: int) -> None:
    with (directory / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free_bytes(directory) - leaving)


class TestClientsThatStall:
    def test_one_that_never_finishes_its_headers_holds_nobody_up(self, server, run):
        microvm = run()
        with socket.create_connection(server.endpoint_address(), 10) as plain:
            with server.tls().wrap_socket(plain, server_hostname=microvm.endpoint) as slow:
                slow.sendall(f"GET / HTTP/1.1\r\nHost: {microvm.endpoint}\r\nX-".encode())
                assert microvm.count()["memory"] == 1
        with socket.create_connection(server.endpoint_address(), 10):
            assert microvm.count()["memory"] == 2, "nor one that does not even begin"

    def test_an_upload_that_breaks_off_leaves_the_app_working(self, server, run):
        microvm = run()
        token = microvm.token()
        with socket.create_connection(server.endpoint_address(), 10) as plain:
            with server.tls().wrap_socket(plain, server_hostname=microvm.endpoint) as upload:
                head = f"POST / HTTP/1.1\r\nHost: {microvm.endpoint}\r\nX-aws-proxy-auth: {token}\r\nX-aws-proxy-port: 5000\r\nContent-Length: 1000000\r\n\r\n"
                upload.sendall(head.encode() + b"x" * 10_000)
        assert microvm.http("/").status == 200

    def test_a_silent_connection_does_not_keep_it_awake(self, server, run):
        microvm = run(idlePolicy=idle_policy(idle=2))
        with socket.create_connection(server.endpoint_address(), 10) as plain:
            with server.tls().wrap_socket(plain, server_hostname=microvm.endpoint):
                microvm.wait("SUSPENDED")
