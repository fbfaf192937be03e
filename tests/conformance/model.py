"""The service's published models, as botocore has them: what every operation's input may be, and what may not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import botocore.session
from botocore.model import OperationModel

import support

SERVER_MODEL = support.ROOT / "crates/api/src/model.json"
COMPATIBILITY = support.ROOT / "COMPATIBILITY.md"
SUITE = Path(__file__).resolve().parent


@functools.cache
def operations() -> dict[str, OperationModel]:
    """All operations of MicroVMs, and those of `lambda-core` that are about network connectors."""
    session = botocore.session.get_session()
    found = {}
    for service in ("lambda-microvms", "lambda-core"):
        model = session.get_service_model(service)
        for name in model.operation_names:
            if service == "lambda-microvms" or "NetworkConnector" in name:
                found[name] = model.operation_model(name)
    return found


@functools.cache
def paginated() -> list[tuple[str, str]]:
    """Service and operation of every paginator."""
    session = botocore.session.get_session()
    loader = session.get_component("data_loader")
    return [
        (service, name)
        for service in ("lambda-microvms", "lambda-core")
        for name in sorted(loader.load_service_model(service, "paginators-1")["pagination"])
        if name in operations()
    ]


def server_operations() -> dict[str, dict]:
    """The operations that the server was built with."""
    return {operation["name"]: operation for operation in json.loads(SERVER_MODEL.read_text())["operations"]}
