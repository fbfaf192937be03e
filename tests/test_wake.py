"""What requests meet that come while a MicroVM sleeps, falls asleep or wakes: an answer, however many they are (SPEC 9, 10.3)."""

import asyncio
import contextlib
import http.client
import resource
import socket
import time

import pytest

import support
from support import FLASK_PORT, idle_policy


def asleep(run, **options):
    microvm = run(idlePolicy=idle_policy(**options))
    microvm.count()
    microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
    microvm.wait("SUSPENDED")
    return microvm


def head(microvm, path: str) -> bytes:
    token = microvm.token()
    return (
        f"GET {path} HTTP/1.1\r\nHost: {microvm.endpoint}\r\nConnection: close\r\n"
        f"X-aws-proxy-auth: {token}\r\nX-aws-proxy-port: {FLASK_PORT}\r\n\r\n"
    ).encode()


def test_many_requests_at_once_to_one_that_sleeps(server, run):
    """A thousand: each is a connection of its own."""
    count, wanted = 1000, 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
    microvm = asleep(run)
    request, context, (address, port) = head(microvm, "/health"), server.tls(), server.endpoint_address()
    processes = set()

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname=microvm.endpoint, ssl_handshake_timeout=120)
        try:
            writer.write(request)
            return await reader.readline()
        finally:
            writer.close()

    async def watch() -> None:
        while True:
            processes.update(await asyncio.to_thread(lambda: [pid for pid, line in support.command_lines() if microvm.id in line]))
            await asyncio.sleep(0.1)

    async def everyone() -> list[bytes]:
        watcher = asyncio.create_task(watch())
        try:
            return await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(count))), 150)
        finally:
            watcher.cancel()

    try:
        answers = asyncio.run(everyone())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {answer.split()[1] for answer in answers} == {b"200"}, sorted(answers)[:3]
    assert len(processes) == 1, "all of them woke it once"
    assert microvm.count()["memory"] == 2, "and nothing was lost"


def test_clients_that_leave_while_they_wait_leave_it_well(server, run):
    microvm = asleep(run)
    request = head(microvm, "/")
    for _ in range(5):
        with socket.create_connection(server.endpoint_address(), 10) as plain:
            with server.tls().wrap_socket(plain, server_hostname=microvm.endpoint) as client:
                client.sendall(request)
    assert microvm.http("/health").status == 200


def test_requests_while_it_falls_asleep_are_answered(run):
    """Wherever in the suspend a request comes: while its process can still go on, that is kept; afterwards it is resumed."""
    microvm = run(idlePolicy=idle_policy())
    visits = 0
    for pause in (0, 0, 0.01, 0.03, 0.06, 0.1):
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        time.sleep(pause)
        visits += 1
        assert microvm.count()["memory"] == visits
        assert microvm.wait("RUNNING")


def test_a_download_that_a_suspend_cuts_ends_and_the_microvm_survives(server, run):
    microvm = run(idlePolicy=idle_policy())
    connection = support.EndpointConnection(server, microvm.endpoint, timeout=30)
    with contextlib.closing(connection):
        headers = {"X-aws-proxy-auth": microvm.token(), "X-aws-proxy-port": str(FLASK_PORT)}
        connection.request("GET", "/stream?chunks=1000&interval=0.05", headers=headers)
        response = connection.getresponse()
        assert response.readline() == b"chunk 0\n"
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        with pytest.raises((http.client.IncompleteRead, OSError)):
            response.read()
    microvm.wait("SUSPENDED")
    assert microvm.count()["memory"] == 1


def test_a_request_that_waits_for_its_answer_does_not_keep_it_awake(run):
    """SPEC 9.1: an open connection is no activity, bytes are."""
    microvm = run(idlePolicy=idle_policy(idle=10))
    microvm.count()
    answer = microvm.http("/sleep?seconds=50")
    assert answer.status == 502, "it was cut before it was answered"
    microvm.wait("SUSPENDED")


def test_one_that_does_not_wake_is_a_503_to_try_again(server, run):
    """Its disk is gone for a moment: what can be resumed later is told so."""
    microvm = asleep(run)
    directory = server.data_dir / "microvms" / microvm.id
    overlay = directory / "overlay.qcow2"
    overlay.rename(directory / "elsewhere")
    answer = microvm.http("/")
    assert answer.status == 503, (answer.status, answer.body)
    assert int(answer.headers["retry-after"]) > 0
    assert microvm.get()["state"] == "SUSPENDED"
    (directory / "elsewhere").rename(overlay)
    assert microvm.count()["memory"] == 2
