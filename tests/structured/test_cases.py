# SPDX-License-Identifier: Apache-2.0
"""The capability table against jsonschema: verdicts of bench/structured/cases.py, and what the pack makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bench.records import RESULTS, load_records
from bench.structured.acceptance import (
    accepts_guidance,
    accepts_xgrammar,
    find_plan,
    judge_pack,
    judge_stock,
    validate_stock,
)
from bench.structured.cases import CASES, Case
from bench.structured.conformance import ARMS, CASE, judge, render
from vllm_ext.structured import capabilities
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.routing import plan_spec

FORMATS = jsonschema.FormatChecker()


def is_valid(schema: Any, text: str) -> bool:
    """Whether a text is JSON, by the letter, and valid."""
    try:
        value = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    except ValueError:
        return False
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(kind(schema, format_checker=FORMATS).is_valid(value))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_agrees_with_every_verdict(case: Case) -> None:
    assert [text for text in case.valid if not is_valid(case.schema, text)] == []
    assert [text for text in case.invalid if is_valid(case.schema, text)] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pack_honours_or_refuses_by_pointer(case: Case) -> None:
    """Never silently wrong; what it refuses is named, and stock vLLM does not serve it correctly either."""
    verdict, _ = judge(case, ARMS["pack"])
    if verdict != "refused":
        assert verdict == "honoured"
        return
    with pytest.raises(RefusedError, match=r"keyword '[^']+' at [#/]"):
        plan_spec(*case.spec)  # type: ignore[arg-type]
    for is_first in (True, False):
        stock = judge_stock(*case.spec, case.texts, is_first)
        assert stock is None or stock[1] != [True] * 3 + [False] * 3


def test_every_keyword_of_the_table_has_a_case() -> None:
    def list_keys(node: Any) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(list_keys, node))
        return set(node).union(*map(list_keys, node.values())) if isinstance(node, dict) else set()

    covered = set().union(*(list_keys(case.schema) for case in CASES))
    # The rest are names of the same thing in other drafts, or halves of a pair that has a case.
    assert capabilities.KNOWN - covered <= {"$recursiveRef", "dependencies", "maxContains", "else"}


def test_the_pack_honours_more_than_stock_at_its_best() -> None:
    counts = {
        arm: sum(judge(case, ARMS[arm])[0] == "honoured" for case in CASES) for arm in ("stock", "stock_first", "pack")
    }
    assert counts["pack"] > counts["stock_first"] >= counts["stock"]


def test_stock_is_silently_wrong_where_the_notes_say_so() -> None:
    """These runs are why the feature exists; when vLLM mends one, its row of docs/structured-output.md goes."""
    wrong = {case.name for case in CASES if judge(case, ARMS["stock"])[0] == "wrong"}
    assert {"allOf", "maxLength", "pattern with a quote", "property called title", "$ref with siblings"} <= wrong


def test_the_engines_are_chosen_by_the_schema() -> None:
    found = {case.name: judge_pack(*case.spec, ()) for case in CASES}
    engines = {name: judged[0] for name, judged in found.items() if judged is not None}
    assert engines["properties"] == engines["$ref, recursive"] == engines["maxLength"] == "xgrammar"
    assert engines["allOf"] == engines["multipleOf"] == engines["pattern with a quote"] == "guidance"
    assert engines["maxLength of a text"] == engines["pattern of any characters"] == "guidance"
    tools = {name: engine for name, engine in engines.items() if name.startswith("tool call")}
    assert {engine for name, engine in tools.items() if "bounds" in name} == {"xgrammar"}
    assert {engine for name, engine in tools.items() if "format" in name} == {"guidance"}
    assert validate_stock("json", '{"type": "integer"}') == "xgrammar"


def test_the_page_has_the_verdicts_on_record(repository: Path) -> None:
    records = [record for record in load_records(RESULTS) if record.case == CASE]
    page = (repository / "docs" / "structured-output.md").read_text()
    assert f"<!-- verdicts -->\n{render(records, with_equal=False)}\n<!-- end of verdicts -->" in page
    for record in records:
        assert record.settings["verdicts"] == {case.name: list(judge(case, ARMS[record.arm])) for case in CASES}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
                {"required": ["a"]},
            ]
        },
    ],
    ids=["xgrammar", "guidance"],
)
def test_whitespace_is_bounded_by_both_engines(schema: Any) -> None:
    texts = ('{"a":[1,2]}', '{"a":  [1,2]}', '{"a":   [1,2]}', '{"a":[1,  2]}', '{"a":[1,    2]}')
    expected = {"any": [1, 1, 1, 1, 1], 2: [1, 1, 0, 1, 0], "compact": [1, 0, 0, 0, 0]}
    for whitespace, accepted in expected.items():
        plan, grammar = find_plan("json", json.dumps(schema), whitespace)
        accepts = accepts_guidance if plan.engine == "guidance" else accepts_xgrammar
        assert [int(accepts(grammar, text)) for text in texts] == accepted, whitespace
