"""One server and one image for the whole run; each test starts its own MicroVMs from it and ends them."""

from __future__ import annotations

import dataclasses
import os

import pytest

import support
from support import Microvm, Server


def pytest_sessionstart(session):
    if not support.HEARTH.exists():
        raise pytest.UsageError(f"{support.HEARTH} is not there: run `cargo xtask test`, or set HEARTH to the program to test")
    if os.geteuid() != 0:
        raise pytest.UsageError("the whole-system tests start real MicroVMs, which needs root")


LEFT_OUT: list[str] = []
TABLES: dict[tuple[str, ...], list[tuple[str, ...]]] = {}


def pytest_collection_modifyitems(config, items):
    """Long tests are for those who ask for them."""
    if os.environ.get("HEARTH_TEST_LONG"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        LEFT_OUT.extend(item.name for item in long)
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter):
    for header, rows in TABLES.items():
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        terminalreporter.write_sep("=", "measured")
        for row in [header, *rows]:
            cells = [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
            terminalreporter.write_line("  ".join(cells))
    if LEFT_OUT:
        terminalreporter.write_sep("=", "left out")
        terminalreporter.write_line(f"long tests that `cargo xtask test images` runs: {', '.join(LEFT_OUT)}")


@pytest.fixture(scope="session")
def measured():
    """Takes a row of a table, by the table's header; the tables are shown at the end."""
    return lambda header, row: TABLES.setdefault(header, []).append(row)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure is shown with what the servers of the test said."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"the log of {name}", value.log()))
    return report


@pytest.fixture(scope="session")
def server():
    with support.serving() as server:
        yield server


@dataclasses.dataclass
class Image:
    """The example app as an image, and what could be seen while it was built."""

    arn: str
    created: dict
    states: list[str]
    log_while_building: str


@pytest.fixture(scope="session")
def image(server: Server) -> Image:
    uri = support.upload(server, "flask-hello.zip", support.zip_directory(support.FLASK_HELLO))
    created = support.create_image(server, "flask-hello", uri)
    states: list[str] = []
    logs: list[str] = []

    def look(found: dict) -> None:
        if not states or states[-1] != found["state"]:
            states.append(found["state"])
        if found["state"] == "CREATING":
            logs.append(server.hearth("logs", "flask-hello").stdout)

    support.wait_image(server, created["imageArn"], "CREATED", on_look=look)
    return Image(created["imageArn"], created, states, logs[-1])


@pytest.fixture(scope="session")
def world():
    """The address of a web server outside this host."""
    with support.world() as url:
        yield url


@pytest.fixture
def microvms(server: Server):
    return server.microvms


@pytest.fixture
def run(server: Server, image: Image):
    """Starts MicroVMs from the example image, waits until they run, and terminates them after the test."""
    started: list[Microvm] = []

    def start(*, wait: bool = True, **options) -> Microvm:
        microvm = support.run_microvm(server, image.arn, **options)
        started.append(microvm)
        if wait:
            microvm.wait("RUNNING")
        return microvm

    yield start
    for microvm in started:
        microvm.terminate()
    for microvm in started:
        microvm.wait("TERMINATED")


@pytest.fixture(autouse=True)
def server_survives(request):
    """Whatever a test does, the shared server must live through it."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        assert server.running(), f"the server died\n{server.log()}"
