"""What the service says when it refuses: the catalogue of SPEC 3.3, the connectors' part of 5.5, and the grammar of 3.2.

Words in braces stand for what the request named; a test gives those that it knows.
"""

from __future__ import annotations

import dataclasses
import re

VALIDATION = "ValidationException"
NOT_FOUND = "ResourceNotFoundException"
PARAMETER = "InvalidParameterValueException"


@dataclasses.dataclass(frozen=True)
class Refusal:
    status: int
    code: str
    message: str

    def pattern(self, **known: str) -> re.Pattern:
        parts = re.split(r"\{(\w+)\}", self.message)
        text = "".join(
            re.escape(part) if index % 2 == 0 else (re.escape(known[part]) if part in known else ".+") for index, part in enumerate(parts)
        )
        return re.compile(text, re.DOTALL)


CATALOGUE = {
    "image-unknown": Refusal(404, NOT_FOUND, "MicroVMImage not found for MicroVMImageID: {arn}"),
    "version-unknown": Refusal(404, NOT_FOUND, "MicroVMImage not found for MicroVMImage: {arn}, Version: {version}"),
    "microvm-unknown": Refusal(404, NOT_FOUND, "MicroVM not found: {id}"),
    "no-active-version": Refusal(404, NOT_FOUND, "No active version found for MicroVM image {arn}"),
    "no-active-version-pinned": Refusal(404, NOT_FOUND, "No active version found for MicroVM image {arn} and version {version}"),
    "bare-name": Refusal(400, VALIDATION, "Invalid ARN format: {arn}"),
    "bare-name-run": Refusal(400, VALIDATION, "Malformed ARN - doesn't start with 'arn:'"),
    "name-taken": Refusal(400, VALIDATION, "A MicroVM image with the name '{name}' already exists in this account"),
    "delete-image-in-use": Refusal(400, VALIDATION, "Cannot delete microvm image with running microvms."),
    "image-busy": Refusal(409, "ConflictException", "MicroVM Image is already in state: UPDATING"),
    "delete-only-version": Refusal(400, VALIDATION, "{unrecorded}"),
    "memory-size": Refusal(
        400,
        VALIDATION,
        "The requested memory size of {size} MiB is not supported by base MicroVM image {arn}."
        " Supported memory sizes in MiB are: [512, 1024, 2048, 4096, 8192].",
    ),
    "artifact-uri": Refusal(400, VALIDATION, "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"),
    "base-version-unknown": Refusal(400, VALIDATION, "No managed MicroVM Image with arn {arn} and version {version} is available"),
    "base-version-form": Refusal(400, VALIDATION, "{before}Expected a single major version number"),
    "environment-reserved": Refusal(400, VALIDATION, "Environment variable key '{key}' is reserved"),
    "ready-hook-needed": Refusal(
        400,
        VALIDATION,
        "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook"
        " (run, resume, suspend, or terminate) is enabled.",
    ),
    "payload-without-hook": Refusal(
        400, VALIDATION, "The run hook must be enabled in the MicroVM image to pass the run hook payload."
    ),
    "logging-without-role": Refusal(400, VALIDATION, "Logging cannot be enabled without providing executionRoleArn"),
    "connector-malformed": Refusal(400, VALIDATION, "Malformed network connector ARN"),
    "connector-unrecognized": Refusal(400, VALIDATION, "Unrecognized managed network connector ARN: {arn}"),
    "two-egress-connectors": Refusal(400, VALIDATION, "Only one egress network connector can be provided"),
    "all-ingress-mixed": Refusal(
        400,
        VALIDATION,
        "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead",
    ),
    "shell-without-connector": Refusal(
        400, VALIDATION, "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM."
    ),
    "token-lifetime": Refusal(400, VALIDATION, "ExpirationMinutes {minutes} exceeded max allowed of 60."),
    "microvm-terminated": Refusal(400, VALIDATION, "The MicroVM {id} has been terminated and its state cannot be changed."),
    "memory-quota": Refusal(
        402, "ServiceQuotaExceededException", "The base maximum allocated memory limit has been reached for this account."
    ),
    "cross-account": Refusal(403, "AccessDeniedException", "{caller}"),
    "connector-unknown": Refusal(404, NOT_FOUND, "Network connector not found for: {arn}"),
    "connector-client-token": Refusal(400, PARAMETER, "ClientToken is a required field"),
    "connector-operator-role": Refusal(400, PARAMETER, "NetworkConnectorOperatorRole is required for VPC_EGRESS connector type"),
    "connector-protocol": Refusal(400, PARAMETER, "NetworkProtocol cannot be null or empty{rest}"),
    "connector-resource-types": Refusal(
        400, PARAMETER, "AssociatedComputeResourceTypes is required for VPC_EGRESS connector type"
    ),
}  # fmt: skip

SEEN: set[str] = set()


def check(name: str, answer: tuple[str | None, str | None, int], /, **known: str) -> None:
    """An answer, as `error_of` gives it, must be this refusal of the catalogue, word for word."""
    refusal = CATALOGUE[name]
    code, message, status = answer
    assert (status, code) == (refusal.status, refusal.code), answer
    assert refusal.pattern(**known).fullmatch(message or ""), f"{message!r} is not {refusal.message!r} with {known}"
    SEEN.add(name)


CONSTRAINT = (
    r"Member must (?:not be null"
    r"|have (?:length|value) (?:less|greater) than or equal to \d+"
    r"|satisfy regular expression pattern: .+?"
    r"|satisfy enum value set: \[.*?\]"
    r"|satisfy constraint: \[.*?\]"
    r"|have exactly one of its members set)"
    r"|Map (?:keys|value) must satisfy constraint: \[.*?\]"
)
VIOLATION = rf"Value (?:null |'.*?' )?at '[^']+' failed to satisfy constraint: (?:{CONSTRAINT})"
VIOLATIONS = re.compile(rf"(?P<count>\d+) validation errors? detected: {VIOLATION}(?:; {VIOLATION})*", re.DOTALL)


def in_grammar(message: str) -> bool:
    """Whether a message has the form of SPEC 3.2."""
    return VIOLATIONS.fullmatch(message) is not None


def in_catalogue(message: str) -> bool:
    """Whether a message is one of SPEC 3.3; the two whose words are not recorded do not count."""
    return any(
        refusal.pattern().fullmatch(message)
        for name, refusal in CATALOGUE.items()
        if name not in ("delete-only-version", "cross-account")
    )
