# SPDX-License-Identifier: Apache-2.0
"""What becomes of schemas and other specifications before any engine sees them."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from typing import Any

import pytest

from vllm_ext.structured import cost
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.routing import plan_spec


def plan(schema: Any, **options: Any) -> Any:
    return plan_spec("json", json.dumps(schema), **options)


def test_engines_and_fallbacks() -> None:
    chosen = plan({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert (chosen.engine, chosen.is_plain, chosen.fallback.engine) == ("xgrammar", True, "guidance")
    assert plan({"allOf": [{"type": "string"}, {"minLength": 1}]}).engine == "guidance"
    with pytest.raises(RefusedError, match="does not know this tokenizer"):
        plan({"allOf": [{"type": "string"}, {"minLength": 1}]}, has_guidance=False)
    # A large list compiles as it is used; a long one of xgrammar's own would take seconds.
    assert plan({"enum": [f"w{i}" for i in range(9000)]}).engine == "guidance"
    assert plan_spec("regex", "a^b").engine == "guidance"
    assert plan_spec("regex", "^[a-z]{3}$").engine == "xgrammar"
    for pattern in (r"\Aab\z", "[[:alpha:]]+", r"a\b"):
        assert plan_spec("regex", pattern).engine == "guidance"
    assert plan_spec("regex", r"[:;]\\A\[").engine == "xgrammar"
    assert plan_spec("choice", json.dumps(["a", "b"])).engine == "xgrammar"


def make_tag(schema: Any) -> str:
    tag = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</a>"}
    return json.dumps({"type": "structural_tag", "format": tag})


def test_tags_cost_what_their_schemas_do() -> None:
    row = {"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 30}
    for schema in ({**row, "items": row}, {"enum": [f"word {i}" for i in range(500)]}):
        chosen = plan_spec("structural_tag", make_tag(schema))
        assert plan(schema).states <= chosen.states <= plan(schema).states + 100
        assert not chosen.is_plain
    easy = plan_spec("structural_tag", make_tag({"type": "integer"}))
    assert (easy.is_plain, easy.is_budgeted) == (True, True)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", "{", "not JSON"),
        ("json", '"' + "x" * cost.MAX_SPEC_BYTES + '"', "bytes, more than"),
        ("json", '{"a":' * 5000, "not JSON"),
        ("regex", "a\0b", "NUL"),
        ("regex", "(a{1,1000}){1,100000}", "too large: about"),
        ("grammar", 'root ::= "a"{1,9999999}', "too large: about"),
        ("json", json.dumps({"type": "string", "maxLength": 10**9}), "too large: about"),
        ("structural_tag", json.dumps({"structures": [{"schema": {"not": {}}}]}), "/structures/0/schema"),
        ("json", "false", "allows no value"),
        ("structural_tag", json.dumps({"format": {"type": "regex", "pattern": "ab$cd"}}), "/format/pattern: xgrammar"),
        ("structural_tag", make_tag({"enum": [f"word number {i}" for i in range(20_000)]}), "too large: about"),
        (
            "structural_tag",
            json.dumps({"format": {"type": "repeat", "max": 10**6, "content": {"type": "const_string", "value": "a"}}}),
            "too large: about",
        ),
    ],
)
def test_what_is_hopeless_is_refused_without_an_engine(kind: Any, text: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        plan_spec(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "[" * 200_000),
        ("regex", "[^\\" * 60_000),
        ("regex", "{1," * 100_000),
        ("regex", "[" * 200_000 + "\\"),
        ("regex", "{" + "1" * 200_000),
        ("grammar", "[" * 200_000 + "\\"),
        ("json", json.dumps({"type": "string", "pattern": "^{" + "1" * 200_000})),
        ("json", json.dumps({"type": "string", "pattern": "^[" + "\\d" * 100_000})),
        ("json", json.dumps({"type": "string", "pattern": "^" + "[" * 200_000})),
        ("json", json.dumps({"type": "string", "pattern": "^" + "(a|" * 60_000 + "$"})),
        ("json", '[' * 70 + "]" * 70),
        (
            "json",
            json.dumps({
                "$defs": {
                    f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/e{i}"}]} for i in range(30)
                } | {f"e{i}": {"const": i} for i in range(31)} | {"d30": {"const": 99}},
                "oneOf": [{"$ref": "#/$defs/d0"}, {"type": "string"}],
            }),
        ),
        (
            "json",
            json.dumps({"oneOf": [{"anyOf": [{"const": f"{i} {j}"} for j in range(40)]} for i in range(60)]}),
        ),
        (
            "json",
            json.dumps({"oneOf": [{"enum": [f"{side}{i}" for i in range(4500)]} for side in "ab"]}),
        ),
        ("json", json.dumps({"oneOf": [{"enum": [i, -i - 1]} for i in range(0, 9000, 9)]})),
        (
            "json",
            json.dumps({"prefixItems": [{"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True}] * 7000}),
        ),
        ("json", json.dumps({"properties": {"n" * 5000: {}}, "allOf": [{"minProperties": 1}]})),
        ("json", json.dumps({"type": "object", "properties": {"n" * 5000: {"multipleOf": 2}}})),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_planning_takes_no_longer_than_its_text(kind: Any, text: str) -> None:
    """Quadratic and exponential ways would take minutes here, and hold the interpreter's lock."""
    began = time.process_time()
    with contextlib.suppress(RefusedError):
        plan_spec(kind, text)
    assert time.process_time() - began < 5


def test_a_surrogate_alone_is_refused() -> None:
    with pytest.raises(RefusedError, match="surrogate"):
        plan_spec("regex", "a\ud800")


def test_planning_leaves_nothing_for_the_garbage_collector() -> None:
    """vLLM freezes what is there at its start; after that a full collection is rare, and a schema may be large."""
    node = {"type": "object", "properties": {"title": {"const": "x"}, "next": {"$ref": "#/$defs/node"}}}
    text = json.dumps(
        {"$defs": {"node": node}, "anyOf": [{"$ref": "#/$defs/node"}, {"type": "string", "maxLength": 9}]}
    )
    plan_spec("json", text, True)
    gc.collect()
    gc.disable()
    try:
        plan_spec("json", text, True)
        assert gc.collect() == 0
    finally:
        gc.enable()
