"""The service's published models, as botocore has them: what every operation's input may be, and what may not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import botocore.session
from botocore.loaders import Loader
from botocore.model import OperationModel

SUITE = Path(__file__).resolve().parent
ROOT = SUITE.parent.parent
SERVER_MODEL = ROOT / "crates/api/src/model.json"
COMPATIBILITY = ROOT / "COMPATIBILITY.md"
SERVICES = ("lambda-microvms", "lambda-core")


@functools.cache
def all_operations(data: Path | None = None) -> dict[str, OperationModel]:
    """Every operation of the two services, as the installed botocore has them, or another one with this directory of models."""
    session = botocore.session.get_session()
    if data:
        session.register_component("data_loader", Loader(extra_search_paths=[str(data)], include_default_search_paths=False))
    models = [session.get_service_model(service) for service in SERVICES]
    return {name: model.operation_model(name) for model in models for name in model.operation_names}


@functools.cache
def operations(data: Path | None = None) -> dict[str, OperationModel]:
    """All operations of MicroVMs, and those of `lambda-core` that are about network connectors."""
    return {
        name: operation
        for name, operation in all_operations(data).items()
        if operation.service_model.service_name == "lambda-microvms" or "NetworkConnector" in name
    }


@functools.cache
def paginated() -> list[tuple[str, str]]:
    """Service and operation of every paginator."""
    session = botocore.session.get_session()
    loader = session.get_component("data_loader")
    return [
        (service, name)
        for service in SERVICES
        for name in sorted(loader.load_service_model(service, "paginators-1")["pagination"])
        if name in operations()
    ]


@functools.cache
def server_model() -> dict[str, dict]:
    """The operations and shapes that the server was built with, by their names."""
    model = json.loads(SERVER_MODEL.read_text())
    return {"operations": {operation["name"]: operation for operation in model["operations"]}, "shapes": model["shapes"]}
