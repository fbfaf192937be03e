"""COMPATIBILITY.md says what is the same as on AWS and what is not; here it is held to that: every row has its proof, every proof its row."""

from __future__ import annotations

import ast
import dataclasses
import re

import support

from . import catalogue, drift
from .model import COMPATIBILITY, SUITE, operations

VERDICTS = ("same", "different", "extension")


@dataclasses.dataclass
class Row:
    id: str
    operations: list[str]
    behaviour: str
    verdict: str


def rows() -> list[Row]:
    """Every table row whose first cell is an id in back quotes."""
    found = []
    for line in COMPATIBILITY.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if re.fullmatch(r"`[a-z0-9.-]+`", cells[0]):
            assert len(cells) == 4, f"a row has four cells: {line}"
            found.append(Row(cells[0].strip("`"), [] if cells[1] in ("all", "none") else cells[1].split(", "), cells[2], cells[3]))
    return found


def claims() -> dict[str, set[str]]:
    """Ids and the tests that claim them, as `pytest.mark.compat` says: read from the sources, so that a part of the suite can be run."""
    found: dict[str, set[str]] = {}
    for path in sorted((support.ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        tests = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test")]
        for test in tests:
            for decorator in test.decorator_list:
                for call in ast.walk(decorator):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.compat":
                        for argument in call.args:
                            found.setdefault(ast.literal_eval(argument), set()).add(f"{path.name}::{test.name}")
    return found


def test_no_row_is_there_twice():
    ids = [row.id for row in rows()]
    assert len(ids) == len(set(ids)) and ids


def test_every_row_has_a_test():
    assert not {row.id for row in rows()} - claims().keys(), "rows that no test proves"


def test_every_claim_has_a_row():
    known = {row.id for row in rows()}
    assert not {id: tests for id, tests in claims().items() if id not in known}, "tests that claim a row that is not there"


def test_every_row_says_how_it_compares_and_a_difference_says_why():
    for row in rows():
        verdict, _, why = row.verdict.partition(":")
        assert verdict in VERDICTS, row
        assert verdict != "different" or len(why.split()) >= 4, f"{row.id}: why?"


def test_every_operation_has_a_row_and_no_other_is_named():
    named = {operation for row in rows() for operation in row.operations}
    assert named == set(operations())


def test_every_message_of_the_catalogue_has_a_row():
    assert not {f"message.{name}" for name in catalogue.CATALOGUE} - {row.id for row in rows()}


def test_every_operation_is_called_with_boto3():
    words = set()
    for path in SUITE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant):
                words.add(node.value)
    assert not {"_".join(re.findall("[A-Z][a-z]+", name)).lower() for name in operations()} - words


def test_the_server_checks_inputs_as_the_published_model_says():
    assert not list(drift.inputs(operations()))


def test_drift_new_member_is_reported():
    """`cargo xtask model` would say so of a model that has more than this one."""
    known = drift.published_tree(operations()["RunMicrovm"].input_shape)
    newer = drift.published_tree(operations()["RunMicrovm"].input_shape)
    newer["members"]["future"] = {"required": True, "in": "body", "wire": "future", "shape": {"type": "string", "max": 5}}
    newer["members"]["maximumDurationInSeconds"]["shape"]["max"] += 1
    assert sorted(drift.compare("Run", newer, known)) == [
        "Run.future: not served, string (max 5)",
        "Run.maximumDurationInSeconds: max is 28801, served as 28800",
    ]
