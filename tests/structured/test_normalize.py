# SPDX-License-Identifier: Apache-2.0
"""Schemas in their normal form, or refused by the pointer of what has none."""

from __future__ import annotations

import json
from typing import Any

import pytest

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
        ({"const": {"a": [float("inf")]}}, "/const", "const"),
        ({"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True}, "/uniqueItems", "uniqueItems"),
        ({"type": "array", "items": {"const": 1}, "uniqueItems": True, "minItems": 2}, "/uniqueItems", "uniqueItems"),
        ({"type": ["array", "null"], "items": {"const": 1}, "uniqueItems": True}, "/uniqueItems", "uniqueItems"),
        ({"enum": [1, float("nan")]}, "/enum", "enum"),
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
        (
            {"type": "array", "items": {"$ref": "#/$defs/c"}, "uniqueItems": True, "$defs": {"c": {"enum": [1, 1.0]}}},
            {
                "anyOf": [
                    {"type": "array", "maxItems": 0},
                    {"type": "array", "prefixItems": [{"const": 1}], "items": False, "minItems": 1},
                ],
                "$defs": {"d0": {"enum": [1, 1.0]}},
            },
        ),
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


def test_arrays_of_few_different_items_are_all_written_out() -> None:
    schema = {"type": "array", "items": {"enum": [*"abcd"]}, "uniqueItems": True, "minItems": 1, "maxItems": 3}
    options = [[place["const"] for place in each["prefixItems"]] for each in normalize_schema(schema)["anyOf"]]
    assert len(options) == 4 + 12 + 24
    assert all(len(set(chosen)) == len(chosen) for chosen in options)
    assert len({tuple(chosen) for chosen in options}) == len(options)
