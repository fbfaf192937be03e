"""What a guest sees of the size that its image asks for (SPEC 6.3), what it meets at its disk's end, and what a host refuses to hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import support
from support import Microvm

APP = Path(__file__).with_name("apps") / "container-static"
# Memory in MiB: processors and GiB of disk. 1024 is shown at its peak; 4096 differs in no other way, and each size takes a build.
BASELINE = {512: (1, 8), 2048: (1, 8), 8192: (4, 32)}
# Guests see four times what their images ask for, and nothing is promised twice: there is room for one of them and its image.
PEAK = """
guest_size = "peak"

[capacity]
memory_mib = 5120
overcommit = 1
"""
# Of memory and of disk, the kernel and the file system keep a part to themselves.
OWN_PART = 0.13


def image_of(server, memory_mib: int) -> str:
    dockerfile = (APP / "Dockerfile").read_text().replace("USER worker", "USER root")
    uri = support.upload(server, "size.zip", support.zip_with_program(APP, dockerfile))
    return support.create_image(server, f"size-{memory_mib}", uri, resources=[{"minimumMemoryInMiB": memory_mib}])["imageArn"]


def told(microvm: Microvm, path: str) -> dict[str, str]:
    answer = microvm.http(path)
    assert answer.status == 200, (answer.status, answer.body)
    return dict(line.split(" ", 1) for line in answer.text.splitlines())


def assert_sees(microvm: Microvm, memory_mib: int, processors: int, disk_gib: int) -> None:
    facts = told(microvm, "/facts")
    assert int(facts["processors"]) == min(processors, os.cpu_count())
    for seen, whole in [(int(facts["memory"]), memory_mib << 10), (int(facts["disk"]), disk_gib << 20)]:
        assert (1 - OWN_PART) * whole < seen <= whole, (memory_mib, facts)


def host_memory_mib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") >> 20


@pytest.fixture(scope="module")
def sized(server) -> Iterator[dict[int, Microvm]]:
    """A MicroVM of each size that this host can hold."""
    most = host_memory_mib() * 3 // 4
    images = {size: image_of(server, size) for size in BASELINE if size <= most}
    guests = {}
    for size, image in images.items():
        support.wait_image(server, image, "CREATED")
        guests[size] = support.run_microvm(server, image)
    for guest in guests.values():
        guest.wait("RUNNING")
    yield guests
    for guest in guests.values():
        guest.terminate()


@pytest.mark.compat("size.baseline")
@pytest.mark.parametrize("size", BASELINE)
def test_a_guest_sees_what_its_image_asks_for(sized, size):
    if size not in sized:
        pytest.skip(f"this host has {host_memory_mib()} MiB of memory")
    assert_sees(sized[size], size, *BASELINE[size])


@pytest.mark.compat("size.disk")
def test_a_disk_that_is_full_is_an_error_in_the_guest_and_nothing_else(sized):
    guest = sized[512]
    assert told(guest, "/fill") == {"reserve": "ENOSPC", "write": "ENOSPC", "remove": "done"}
    assert guest.state() == "RUNNING"
    assert told(guest, "/facts")["generation"] == "1"


@pytest.mark.compat("size.peak", "capacity.refused")
def test_a_guest_at_aws_s_peak_and_a_host_that_has_no_room_for_two():
    with support.serving(PEAK) as server:
        image = image_of(server, 1024)
        support.wait_image(server, image, "CREATED")
        first = support.run_microvm(server, image)
        first.wait("RUNNING")
        assert_sees(first, 4096, 2, 8)

        def refused(call, **parameters) -> None:
            code, message, status = support.error_of(call, **parameters)
            assert (code, status) == ("InsufficientCapacityException", 500)
            promised = re.search(r"(\d+) MiB are promised.*Suspend or terminate MicroVMs", message)
            assert promised and 4096 < int(promised[1]) < 4096 + 512, f"the MicroVM's memory and its image's: {message}"

        refused(server.microvms.run_microvm, imageIdentifier=image)
        assert [item["microvmId"] for item in server.microvms.list_microvms()["items"]] == [first.id]
        # One that sleeps takes no room; it finds none either when another has it.
        server.microvms.suspend_microvm(microvmIdentifier=first.id)
        first.wait("SUSPENDED")
        second = support.run_microvm(server, image)
        second.wait("RUNNING")
        refused(server.microvms.resume_microvm, microvmIdentifier=first.id)
        assert first.state() == "SUSPENDED"
        second.terminate()
        second.wait("TERMINATED")
        server.microvms.resume_microvm(microvmIdentifier=first.id)
        first.wait("RUNNING")
        assert told(first, "/facts")["generation"] == "2"
