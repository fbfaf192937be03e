"""The stock JavaScript SDK: run, token, fetch, suspend, fetch, resume, terminate (SPEC 5.4, 9.2, 10)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .catalogue import check

SCRIPT = Path(__file__).resolve().parent / "javascript/lifecycle.mjs"


@pytest.mark.compat("javascript.lifecycle", "javascript.error")
def test_a_microvm_s_life(server, things):
    modules = os.environ.get("HEARTH_TEST_NODE")
    assert modules, "HEARTH_TEST_NODE names no directory with the SDK: run `cargo xtask test`"
    connect = server.connect
    environment = {
        "PATH": os.environ["PATH"],
        "HEARTH_TEST_NODE": modules,
        "AWS_ENDPOINT_URL": connect["api"],
        "AWS_REGION": connect["region"],
        "AWS_ACCESS_KEY_ID": connect["accessKeyId"],
        "AWS_SECRET_ACCESS_KEY": connect["secretAccessKey"],
        "NODE_EXTRA_CA_CERTS": connect["ca"],
        "IMAGE_ARN": things.image.arn,
        "ENDPOINT_PORT": str(server.endpoint_address()[1]),
    }
    answer = subprocess.run(["node", SCRIPT], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert (said["running"], said["suspended"], said["resumed"]) == ("RUNNING", "SUSPENDED", "RUNNING")
    assert said["startedAt"] and said["listed"]
    for step in ("first", "woken", "again"):
        assert said[step]["status"] == 200 and said[step]["text"] == said["first"]["text"] != "", step
    refused = said["refused"]
    assert refused["typed"]
    check("microvm-terminated", (refused["name"], refused["message"], refused["status"]), id=said["microvmId"])
