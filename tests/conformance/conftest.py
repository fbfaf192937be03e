"""One server with AWS's own settings for the suite, one small image and two MicroVMs; most tests need none of them running.

`@pytest.mark.compat("id", …)` claims rows of COMPATIBILITY.md: the test is their proof.
"""

from __future__ import annotations

import boto3
import botocore.config
import pytest

import support

from . import catalogue
from .clients import Raw, Witness
from .model import operations
from .things import Things

WITNESS = Witness()
# What the closing lines of the run count beside calls and messages.
COUNTS = {"constraints": 0, "properties": 0, "examples": 0}


def pytest_configure(config):
    # Every boto3 client of the run is made by the default session.
    boto3.setup_default_session()
    boto3.DEFAULT_SESSION.events.register("after-call", WITNESS.note)


def pytest_terminal_summary(terminalreporter):
    names = set(operations())
    terminalreporter.write_sep("-", "conformance")
    unanswered = ", ".join(sorted(names - WITNESS.answered))
    terminalreporter.write_line(f"operations answered to boto3  {len(names & WITNESS.answered)} of {len(names)}" + (f", not {unanswered}" if unanswered else ""))
    terminalreporter.write_line(f"catalogue messages seen       {len(catalogue.SEEN)} of {len(catalogue.CATALOGUE)}")
    terminalreporter.write_line(f"error classes seen            {len(WITNESS.refused)}: {', '.join(sorted(WITNESS.refused))}")
    terminalreporter.write_line(f"constraints of the model      {COUNTS['constraints']} broken one at a time")
    terminalreporter.write_line(f"properties                    {COUNTS['properties']}, with {COUNTS['examples']} random requests")


@pytest.fixture(scope="session")
def counts():
    return COUNTS


@pytest.fixture(scope="package")
def server():
    with support.serving(min_idle_seconds=60) as server:
        yield server


def stock(server: support.Server, service: str):
    """A client as its users have it, validation of its own included; only its retries are off, which would hide refusals."""
    return server.client(service, config=botocore.config.Config(retries={"total_max_attempts": 1}))


@pytest.fixture(scope="package")
def microvms(server):
    return stock(server, "lambda-microvms")


@pytest.fixture(scope="package")
def connectors(server):
    return stock(server, "lambda-core")


@pytest.fixture(scope="package")
def lenient(server):
    """A client that sends whatever it is told to."""
    return server.client("lambda-microvms")


@pytest.fixture(scope="package")
def raw(server):
    raw = Raw(server)
    yield raw
    raw.close()


@pytest.fixture(scope="package")
def things(server, microvms):
    """Images and MicroVMs that tests share; each is made when it is first wanted."""
    things = Things(server, microvms)
    yield things
    things.end()


@pytest.fixture(scope="package")
def image(things):
    return things.image
