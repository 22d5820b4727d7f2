# SPDX-License-Identifier: Apache-2.0
"""What becomes of schemas and other specifications before any engine sees them."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.structured import capabilities, cost
from vllm_ext.structured.disjoint import are_disjoint
from vllm_ext.structured.errors import RefusedError, SchemaError
from vllm_ext.structured.normalize import normalize_schema
from vllm_ext.structured.routing import plan_spec


def plan(schema: Any, **options: Any) -> Any:
    return plan_spec("json", json.dumps(schema), **options)


@pytest.mark.parametrize(
    ("schema", "pointer", "keyword"),
    [
        ({"properties": {"a/b": {"not": {}}}}, "/properties/a~1b/not", "not"),
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "/items/uniqueItems", "uniqueItems"),
        ({"anyOf": [{}, {"type": "string", "format": "colour"}]}, "/anyOf/1/format", "format"),
        ({"$defs": {"x": {"if": {}, "then": {}}}, "items": {"$ref": "#/$defs/x"}}, "/$defs/x/if", "if"),
        ({"$ref": "https://example.org/s.json"}, "/$ref", "$ref"),
        ({"$ref": "#/$defs/gone"}, "/$ref", "$ref"),
        ({"type": "colour"}, "/type", "type"),
        ({"type": "string", "enum": [1]}, "/enum", "enum"),
        ({"type": "string", "minLength": -1}, "/minLength", "minLength"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf", "oneOf"),
        ({"items": [3]}, "/items/0", "schema"),
        ({"type": "object", "minProperties": 3}, "/minProperties", "minProperties"),
        ({"type": "object", "propertyNames": {"anyOf": [False]}}, "/propertyNames/anyOf", "anyOf"),
        ({"type": "object", "propertyNames": 3}, "/propertyNames", "schema"),
        ({"type": "string", "maxLength": float("inf")}, "/maxLength", "maxLength"),
        ({"type": "string", "maxLength": float("nan")}, "/maxLength", "maxLength"),
        ({"type": "integer", "maximum": float("inf")}, "/maximum", "maximum"),
    ],
)
def test_refusals_name_the_pointer(schema: Any, pointer: str, keyword: str) -> None:
    with pytest.raises(
        RefusedError, match=f"{keyword.replace('$', '[$]')}' at #?{pointer.replace('$', '[$]')}"
    ) as error:
        plan(schema)
    assert keyword in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"title": "t", "x-vendor": 1, "type": "integer", "maxLength": 3}, {"type": "integer"}),
        (
            {"type": ["string", "null"], "maxLength": 2},
            {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        ),
        ({"allOf": [{"type": "string"}]}, {"type": "string"}),
        ({"type": "object", "propertyNames": False}, {"type": "object", "additionalProperties": False}),
        ({"type": "object", "propertyNames": True}, {"type": "object"}),
        (
            {"type": "object", "required": ["a", "a"], "minProperties": 2},
            {"type": "object", "required": ["a"], "minProperties": 2},
        ),
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, {"type": "integer", "exclusiveMinimum": 3}),
        (
            {"type": "array", "items": [{}], "additionalItems": False},
            {"type": "array", "prefixItems": [{}], "items": False},
        ),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, {"type": "array", "maxItems": 1}),
        ({"const": 1, "enum": [1, 2]}, {"const": 1}),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
        ({"unevaluatedProperties": False, "type": "object"}, {"type": "object", "additionalProperties": False}),
        (
            {"definitions": {"a/b": {"type": "null"}}, "$ref": "#/definitions/a~1b"},
            {"$ref": "#/$defs/d0", "$defs": {"d0": {"type": "null"}}},
        ),
        ({"oneOf": [{"type": "null"}, {"type": "string"}]}, {"anyOf": [{"type": "null"}, {"type": "string"}]}),
    ],
)
def test_normal_forms(given: Any, expected: Any) -> None:
    before = json.dumps(given)
    assert normalize_schema(given) == expected
    assert json.dumps(given) == before


def test_a_reference_without_a_value_in_between_is_refused() -> None:
    for schema in (
        {"$ref": "#"},
        {
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        },
    ):
        with pytest.raises(SchemaError, match="refers to itself"):
            normalize_schema(schema)
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    with pytest.raises(SchemaError, match="nested too deeply"):
        normalize_schema({"$defs": {**chain, "d5000": {}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"type": "string"}, {"type": "integer"}, True),
        ({"type": "integer"}, {"type": "number"}, False),
        ({"const": 1}, {"const": 1.0}, False),
        ({"const": True}, {"const": 1}, True),
        ({"enum": ["a", 2]}, {"type": "null"}, True),
        ({"enum": [1.5]}, {"type": "integer"}, True),
        ({"$ref": "#/$defs/x"}, {"type": "null"}, True),
        ({"type": "object", "required": ["k"]}, {"type": "object", "additionalProperties": False}, True),
        ({"type": "object", "required": ["k"]}, {"type": "object"}, False),
        (
            {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": "b"}}},
            True,
        ),
        (
            {"type": "object", "properties": {"k": {"const": "a"}}},
            {"type": "object", "properties": {"k": {"const": "b"}}},
            False,
        ),
        ({}, {"type": "null"}, False),
        ({"type": "integer", "minimum": 0, "maximum": 9}, {"type": "integer", "minimum": 10}, True),
        ({"type": "number", "maximum": 9}, {"type": "integer", "minimum": 9}, False),
        ({"type": "number", "maximum": 9}, {"type": "number", "exclusiveMinimum": 9}, True),
        ({"maximum": 9}, {"minimum": 10}, False),
        ({"type": "string", "pattern": "^a[0-9]$"}, {"type": "string", "pattern": "^b[0-9]$"}, True),
        ({"type": "string", "pattern": "^a[0-9]|b$"}, {"type": "string", "pattern": "^b[0-9]$"}, False),
        ({"type": "string", "pattern": "^a?c"}, {"type": "string", "pattern": "^c"}, False),
        ({"type": "string", "pattern": "^a\\.c"}, {"type": "string", "pattern": "^a-c"}, True),
        ({"type": "string", "pattern": "^a\\dc"}, {"type": "string", "pattern": "^add"}, False),
        ({"type": "string", "pattern": "a"}, {"type": "string", "pattern": "^b"}, False),
        ({"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}, True),
        ({"type": "array", "maxItems": 3}, {"type": "array", "minItems": 4}, True),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            {"type": "array", "items": {"type": "string"}},
            True,
        ),
        ({"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": {"type": "string"}}, False),
        ({"enum": [[1, True], {"a": 1.0}]}, {"enum": [[1, 1], {"a": 2}]}, True),
        ({"enum": [[1, True], {"a": 1.0}]}, {"enum": [{"a": 1}]}, False),
    ],
)
def test_disjointness(left: Any, right: Any, expected: bool) -> None:
    definitions = {"x": {"type": "string"}}
    assert are_disjoint(left, right, definitions) is expected
    assert are_disjoint(right, left, definitions) is expected


def test_a_type_beside_alternatives_of_that_type_says_nothing() -> None:
    """As vLLM writes the schema of `tool_choice: required`."""

    def call(name: str, given: Any) -> Any:
        properties = {"name": {"type": "string", "enum": [name]}, "parameters": given}
        return {"properties": properties, "required": ["name", "parameters"]}

    calls = [call("a", {"type": "object", "properties": {"x": {"type": "integer"}}}), call("b", {"type": "object"})]
    chosen = plan({"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}})
    assert chosen.engine == "xgrammar"
    assert "allOf" not in chosen.text
    assert [each["type"] for each in json.loads(chosen.text)["items"]["anyOf"]] == ["object"] * 2
    # The type says something beside these.
    for options in ([{}, {"type": "object"}], [{"minLength": 1}, {"type": "object"}], [{"type": "string"}, calls[0]]):
        node = normalize_schema({"type": "object", "anyOf": options})
        assert node.get("type") == "object" or "allOf" in node


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


def test_lengths_and_numbered_objects_for_xgrammar() -> None:
    schema = json.loads(plan({"type": "object", "properties": {"title": {"type": "string", "maxLength": 3}}}).text)
    assert schema["properties"]["title"] == {"$ref": "#/$defs/length_0_3"}
    assert schema["$defs"] == {"length_0_3": {"type": "string", "pattern": "^.{0,3}$"}}
    assert "x-vllm-ext" in schema


@given(st.text(max_size=40))
def test_estimates_take_any_text(text: str) -> None:
    assert cost.estimate_regex(text) >= 0
    capabilities.is_plain_pattern(text)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("abc", 3),
        ("a{10}", 10),
        ("(ab){3}", 6),
        ("((a{10}){10}){10}", 1000),
        ("[a-z]+\\d", 2 * cost.WIDE),
        ("a{2,}", 2),
    ],
)
def test_estimates_of_regexes(pattern: str, states: int) -> None:
    assert cost.estimate_regex(pattern) == states


@pytest.mark.parametrize(
    ("pattern", "is_plain"),
    [
        ("^a$", True), ("^\\S+$", False), ("^[^\\s]+$", False), ("^[a\\s]+$", True), ("^[^a]$", True),
        ("^[a^]$", False),
        ("^[a-z]+-\\d{2,}$", True), ("^(a|b)$", True), ("^(?:a)+$", True), ("^[ -~]+$", True),
        ("a", False), ("^a|b$", False), ('^a"$', False), ("^\\\\$", False), ("^(?=a)a$", False), ("^\\n$", False),
        ("^(?<n>a)$", False), ("^\\p{L}$", False), ("^a^b$", False), ("^\\u0041$", False), ("^a\\$", False),
    ],
)  # fmt: skip
def test_patterns_that_xgrammar_reads_as_schemas_do(pattern: str, is_plain: bool) -> None:
    assert capabilities.is_plain_pattern(pattern) is is_plain


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/" + "x" * 500_000},
        {"$ref": "https://" + "x" * 500_000},
        {"type": "string", "format": "x" * 500_000},
        {"type": "x" * 500_000},
        {"type": "string", "minLength": "x" * 500_000},
        {"properties": {"p" * 500_000: {"not": {}}}},
        {"properties": {"\ud800": {"not": {}}}},
        {"type": "string", "const": "x" * 100, "enum": [10**1000]},
    ],
    ids=lambda schema: str(schema)[:20],
)
def test_messages_are_short_and_can_be_sent(schema: Any) -> None:
    """They are remembered with their verdict, and go into the answer."""
    with pytest.raises(RefusedError) as error:
        plan(schema)
    assert len(str(error.value).encode()) < 1000
