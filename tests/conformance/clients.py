"""The suite's ways to the server beside stock clients: requests that no SDK would send, signed as one would, and the record of what was answered."""

from __future__ import annotations

import dataclasses
import http.client
import json
import urllib.parse

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.model import ListShape, StructureShape

import support

TIMEOUT = 10


# The one member that AWS leaves out instead of sending null (SPEC 5.3).
ABSENT = {("GetMicrovmImageBuild", "snapshotBuild")}


class Witness:
    """Notes which operations were answered, and which refusals were seen, whatever test made the call. An answer about MicroVMs that lacks a
    member of the published model fails the test that asked."""

    def __init__(self):
        self.answered: set[str] = set()
        self.refused: set[str] = set()

    def note(self, http_response, parsed: dict, model, **_) -> None:
        error = parsed.get("Error", {}).get("Code")
        if error:
            self.refused.add(error)
        else:
            self.answered.add(model.name)
            if model.service_model.service_name == "lambda-microvms" and model.output_shape:
                lacks = missing(json.loads(http_response.content or "{}"), model.output_shape)
                lacks = {member for member in lacks if (model.name, member) not in ABSENT}
                assert not lacks, f"the answer of {model.name} lacks {sorted(lacks)}"


def missing(answer: dict, shape: StructureShape) -> set[str]:
    """Members of the model that an answer, or an item of its list, does not have. Null counts as had."""
    lacks = shape.members.keys() - answer.keys()
    items = shape.members.get("items")
    if isinstance(items, ListShape):
        lacks |= {f"items.{member}" for item in answer["items"] for member in items.member.members.keys() - item.keys()}
    return lacks


@dataclasses.dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def exception(self) -> str | None:
        return self.headers.get("x-amzn-errortype")

    @property
    def message(self) -> str | None:
        body = self.json()
        return body.get("message", body.get("Message"))

    def refusal(self) -> tuple[str | None, str | None, int]:
        return self.exception, self.message, self.status


class Raw:
    """A connection to the server's API that is kept open, and requests over it."""

    def __init__(self, server: support.Server):
        connect = server.connect
        self._server = server
        self._credentials = Credentials(connect["accessKeyId"], connect["secretAccessKey"])
        self._region = connect["region"]
        self._url = connect["api"]
        self._connection = http.client.HTTPConnection(self._url.removeprefix("http://"), timeout=TIMEOUT)

    def __call__(self, method: str, path: str, body: dict | bytes | str = b"", *, signed_as: str | None = None) -> Reply:
        """Sends a request with a raw path, query string included; `signed_as` is the path as a client writes it that escapes more."""
        data = json.dumps(body) if isinstance(body, dict) else body
        data = data.encode() if isinstance(data, str) else data
        signed = AWSRequest(method, self._url + (signed_as or path), data=data, headers={"Content-Type": "application/json"})
        SigV4Auth(self._credentials, "lambda", self._region).add_auth(signed)
        try:
            self._connection.request(method, path, body=data, headers=dict(signed.headers))
            response = self._connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()


def quoted(label: str) -> str:
    """A path label as SDKs write it."""
    return urllib.parse.quote(label, safe="")
