"""What is new in every clone of a snapshot and what repeats, and how time and connections go through a suspend (SPEC 9.2, 9.3).

docs/uniqueness.md says it to users; this is its proof."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import support
from support import Microvm

APP = Path(__file__).with_name("apps") / "clone"
CLONES, AT_A_TIME = 50, 3
# From the beginning of a sleep: late enough to be asleep by then.
DUE_SECONDS = 12
# The spec's bound for the clock of a machine. A round trip that takes longer cannot show it to be right.
CLOCK_SECONDS = 0.05


class Clone(Microvm):
    def tell(self, path: str):
        answer = self.http(path)
        assert answer.status == 200, (answer.status, answer.body, self.server.hearth("logs", self.id).stdout)
        return answer.json()

    def begin(self, path: str, **wanted) -> dict:
        return self.http(path, method="POST", body=json.dumps(wanted).encode()).json()

    def sleep_until(self, end: float) -> float:
        """Suspends until the host's wall clock shows `end`; returns for how long it certainly stood still."""
        self.client.suspend_microvm(microvmIdentifier=self.id)
        self.wait("SUSPENDED")
        asleep = time.time()
        assert asleep < end, f"the suspend took until {asleep - end:.1f} s after it was to end"
        time.sleep(end - asleep)
        self.client.resume_microvm(microvmIdentifier=self.id)
        self.wait("RUNNING")
        return end - asleep

    def clock_error(self) -> tuple[float, float]:
        """By how much its wall clock is certainly wrong, and how long the question took at best."""
        best = None
        for _ in range(5):
            before = time.time()
            said = self.tell("/clocks")["wall"]
            after = time.time()
            if best is None or after - before < best[1]:
                best = max(before - said, said - after, 0.0), after - before
        return best


@pytest.fixture(scope="module")
def clones(server) -> Iterator:
    """Starts clones of an app that has drawn from every generator before its snapshot."""
    with support.scratch() as directory:
        key, certificate = directory / "key.pem", directory / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=clone"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, timeout=30, capture_output=True)
        files = {name: (APP / name).read_bytes() for name in ("Dockerfile", "app.py")}
        files["certificate.pem"] = key.read_bytes() + certificate.read_bytes()
    arn = support.create_image(server, "clone", support.upload(server, "clone.zip", support.zip_of(files)))["imageArn"]
    support.wait_image(server, arn, "CREATED")

    def start() -> Clone:
        return Clone(server, server.microvms.run_microvm(imageIdentifier=arn))

    yield start
    server.microvms.delete_microvm_image(imageIdentifier=arn)


@pytest.fixture(scope="module")
def drawn(clones) -> list[dict]:
    """What each of many clones says."""

    def one(number: int) -> dict:
        clone = clones()
        try:
            clone.wait("RUNNING")
            # Either half of them is told another remedy of docs/uniqueness.md.
            return clone.tell(f"/draw/{('RAND_add', 'RAND_poll')[number % 2]}")
        finally:
            clone.terminate()
            clone.wait("TERMINATED")

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(one, range(CLONES)))


def different(drawn: list[dict], *path: str) -> int:
    """How many different values the clones have there."""
    values = drawn
    for name in path:
        values = [value[name] for value in values]
    assert all(values), "there is something to compare"
    return len({str(value) for value in values})


class TestClones:
    @pytest.mark.compat("clone.kernel")
    @pytest.mark.parametrize("source", ["urandom", "uuid", "uuid4"])
    def test_what_comes_from_the_kernel_is_new_in_each(self, drawn, source):
        assert different(drawn, "kernel", source) == CLONES

    @pytest.mark.compat("clone.kernel")
    def test_a_process_of_the_clone_s_own_is_new_whether_started_or_forked(self, drawn):
        assert different(drawn, "new process") == CLONES
        assert different(drawn, "fork", "openssl") == CLONES
        secrets = [secret for clone in drawn for secret in clone["fork"]["tls"]]
        assert len(set(secrets)) == len(secrets) > CLONES, "no two sessions of TLS share a key"

    @pytest.mark.compat("clone.user-space")
    def test_generators_of_user_space_go_on_where_the_snapshot_was_taken(self, drawn):
        assert different(drawn, "as it is", "random") == 1
        assert different(drawn, "as it is", "openssl") == 1
        assert different(drawn, "as it is", "tls") == 1
        assert different(drawn, "boot_id") == 1
        assert different(drawn, "generation") == 1

    @pytest.mark.compat("clone.user-space")
    def test_fresh_bytes_of_the_kernel_help_them(self, drawn):
        assert different(drawn, "with fresh bytes", "random") == CLONES
        assert different(drawn, "with fresh bytes", "openssl") == CLONES
        secrets = [secret for clone in drawn for secret in clone["with fresh bytes"]["tls"]]
        assert len(set(secrets)) == len(secrets) > CLONES, "no two sessions of TLS share a key"


@pytest.fixture(scope="module")
def clone(clones) -> Iterator[Clone]:
    clone = clones()
    clone.wait("RUNNING")
    yield clone
    clone.terminate()
    clone.wait("TERMINATED")


class TestASuspend:
    @pytest.mark.compat("time.wall", "time.monotonic", "time.sleepers", "time.connections", "clone.generation")
    def test_clocks_sleepers_and_connections(self, clone, world):
        host, port = world.removeprefix("http://").rstrip("/").split(":")
        clone.begin("/connections", outside=[host, int(port)])
        before = clone.begin("/sleepers", due=DUE_SECONDS, sleep=DUE_SECONDS)
        due = before["wall"] + DUE_SECONDS
        stood_still = clone.sleep_until(due + 1)
        after = clone.tell("/clocks")

        # The wall clock is the host's again, the others stood still with the machine.
        error, round_trip = clone.clock_error()
        assert error <= max(CLOCK_SECONDS, round_trip / 2), (error, round_trip)
        passed = {name: after[name] - before[name] for name in ("wall", "monotonic", "boot")}
        assert passed["wall"] - passed["monotonic"] > stood_still - CLOCK_SECONDS, (passed, stood_still)
        assert abs(passed["monotonic"] - passed["boot"]) < CLOCK_SECONDS, passed
        assert int(after["generation"]) == int(before["generation"]) + 1

        connections = clone.tell("/connections")
        assert connections == {
            "loopback": "still here",
            "unix": "still here",
            "outside": "ECONNABORTED",
            "outside again": "connected",
        }

        woken = clone.tell("/sleepers")
        assert {name: sleeper["error"] for name, sleeper in woken.items()} == {
            "sleep": None, "timer": None, "leap": "ECANCELED", "until": None, "cron": None,
        }  # fmt: skip
        # What began before goes on with its rest; what waited for the wall clock is late by the suspend, not by its rest.
        assert woken["sleep"]["slept"] >= DUE_SECONDS
        assert woken["sleep"]["wall"] - before["wall"] > DUE_SECONDS + stood_still - CLOCK_SECONDS
        for name in ("timer", "leap", "until", "cron"):
            assert woken[name]["slept"] < woken["sleep"]["slept"], (name, woken)
            assert woken[name]["wall"] < woken["sleep"]["wall"], (name, woken)
        for name in ("timer", "until", "cron"):
            assert woken[name]["wall"] >= due, (name, woken)

    @pytest.mark.compat("container.capabilities")
    def test_root_without_every_capability_does_not_rename_the_machine(self, clone):
        assert clone.tell("/rename") == "EPERM"
