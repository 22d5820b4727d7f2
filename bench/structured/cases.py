# SPDX-License-Identifier: Apache-2.0
"""Conformance cases: a schema for every keyword, with texts that are valid and texts that are not.

`tests/structured/test_cases.py` holds every verdict against the package jsonschema, so nothing here is a matter of
opinion. Texts are as `json.dumps` writes them, properties in the schema's order, which both engines want.
"""

from __future__ import annotations

from typing import Any

from bench.structured.case import Case
from bench.structured.tool_calls import FORMS, TOOLS


def _string(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


def _closed(properties: dict[str, Any], *required: str, **keywords: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **keywords,
    }


_INT = {"type": "integer"}
_TREE = _closed({"v": _INT, "c": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "v")
_KINDS = {
    kind: _closed({"kind": {"const": kind}, value: {"type": name}}, "kind", value)
    for kind, value, name in (("cat", "lives", "integer"), ("dog", "name", "string"))
}
_TITLED = [_closed({"title": {"type": name}}, "title") for name in ("string", "integer")]

CASES: tuple[Case, ...] = (
    Case("type", {"type": "integer"}, ("0", "-7", "12"), ('"1"', "1.5", "null")),
    Case("type list", {"type": ["string", "null"]}, ('""', '"a"', "null"), ("1", "[]", "true")),
    Case("const", {"const": {"a": [1]}}, ('{"a":[1]}', '{"a":[1]}', '{"a":[1]}'), ('{"a":[2]}', "{}", "1")),
    Case("enum", {"enum": ["red", 2, None]}, ('"red"', "2", "null"), ('"blue"', "3", "true")),
    Case("enum beside type", {"type": "string", "enum": ["a", "b", 1]}, ('"a"', '"b"', '"a"'), ("1", '"c"', "null")),
    Case("minLength", _string(minLength=2), ('"ab"', '"abc"', '"h\u00e9"'), ('"a"', '""', '"a\x01b"')),
    Case("maxLength", _string(maxLength=2), ('"ab"', '""', '"h\u00e9"'), ('"abc"', '"\t"', "1")),
    Case(
        "maxLength of a text",
        _string(maxLength=200),
        ('"say \\"hi\\""', '"two\\nlines"', '"a\\\\b"'),
        ('"' + "x" * 201 + '"', "1", '"\t"'),
    ),
    Case("pattern", _string(pattern="^[a-z]+$"), ('"a"', '"bcd"', '"zz"'), ('"A"', '""', '"a1"')),
    Case("pattern, not anchored", _string(pattern="b"), ('"b"', '"abc"', '"bb"'), ('"a"', '""', '"B"')),
    Case("pattern with a quote", _string(pattern='^a"b$'), ('"a\\"b"',) * 3, ('"a"b"', '"ab"', '"a"')),
    Case(
        "pattern of any characters",
        _string(pattern="^.+$"),
        ('"a"', '"say \\"hi\\""', '"a\\\\b"'),
        ('""', "1", '"a'),
    ),
    Case(
        "pattern with length",
        _string(pattern="^[a-z]+$", maxLength=3),
        ('"a"', '"ab"', '"abc"'),
        ('"abcd"', '"A"', '""'),
    ),
    Case(
        "format date",
        _string(format="date"),
        ('"2024-02-29"', '"1999-12-31"', '"2000-02-29"'),
        ('"2023-02-29"', '"2023-02-31"', '"2023-1-1"'),
    ),
    Case(
        "format ipv4",
        _string(format="ipv4"),
        ('"1.2.3.4"', '"255.255.0.1"', '"0.0.0.0"'),
        ('"01.2.3.4"', '"256.1.1.1"', '"1.2.3"'),
    ),
    Case(
        "format ipv6",
        _string(format="ipv6"),
        ('"::1"', '"1:2:3:4:5:6:7:8"', '"fe80::1"'),
        ('":::"', '"1::2::3"', '"g::1"'),
    ),
    Case(
        "format email",
        _string(format="email"),
        ('"a@example.org"', '"a.b@x.org"', '"z@y.de"'),
        ('"a"', '"example.org"', '""'),
    ),
    Case(
        "format uuid",
        _string(format="uuid"),
        (
            '"123e4567-e89b-12d3-a456-426614174000"',
            '"00000000-0000-0000-0000-000000000000"',
            '"A23E4567-E89B-12D3-A456-426614174000"',
        ),
        ('"123e4567"', '"123e4567-e89b-12d3-a456-42661417400g"', '""'),
    ),
    Case("minimum", {"type": "integer", "minimum": -5}, ("-5", "0", "400"), ("-6", "-50", "-5.5")),
    Case("maximum", {"type": "integer", "maximum": 120}, ("120", "0", "-4"), ("121", "1000", "120.5")),
    Case("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0}, ("1", "0.5", "3"), ("0", "-1", "0.0")),
    Case("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 1.5}, ("1", "0.5", "-3"), ("1.5", "2", "1.6")),
    Case("minimum as a fraction", {"type": "integer", "minimum": 1.5}, ("2", "3", "40"), ("1", "0", "-2")),
    Case("multipleOf", {"type": "integer", "multipleOf": 7}, ("7", "0", "14"), ("8", "1", "20")),
    Case(
        "multipleOf with a bound",
        {"type": "integer", "multipleOf": 7, "minimum": 0},
        ("7", "0", "14"),
        ("8", "-7", "20"),
    ),
    Case("multipleOf of a number", {"type": "number", "multipleOf": 0.5}, ("1", "0.5", "1.5"), ("0.3", "1.2", "0.75")),
    Case("items", {"type": "array", "items": _INT}, ("[]", "[1]", "[1, 2]"), ('["a"]', "[1, null]", "{}")),
    Case(
        "prefixItems",
        {"type": "array", "prefixItems": [_INT, _string()], "items": False},
        ('[1, "a"]', "[1]", "[]"),
        ('["a"]', "[1, 2]", '[1, "a", 2]'),
    ),
    Case(
        "items as a list",
        {
            "type": "array",
            "items": [_INT],
            "additionalItems": False,
            "$schema": "http://json-schema.org/draft-07/schema#",
        },
        ("[1]", "[]", "[2]"),
        ('["a"]', "[1, 2]", "{}"),
    ),
    Case(
        "minItems",
        {"type": "array", "items": _INT, "minItems": 2},
        ("[1, 2]", "[1, 2, 3]", "[0, 0]"),
        ("[]", "[1]", '["a", "b"]'),
    ),
    Case(
        "maxItems",
        {"type": "array", "items": _INT, "maxItems": 2},
        ("[1, 2]", "[]", "[0]"),
        ("[1, 2, 3]", "[1, 2, 3, 4]", '["a"]'),
    ),
    Case(
        "uniqueItems",
        {"type": "array", "items": _INT, "uniqueItems": True},
        ("[1, 2]", "[]", "[3]"),
        ("[1, 1]", "[2, 3, 2]", '["a"]'),
    ),
    Case(
        "uniqueItems of an enum",
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        ('["b", "a"]', "[]", '["a", "c", "b"]'),
        ('["a", "a"]', '["d"]', '["a", "b", "a"]'),
    ),
    Case(
        "contains",
        {"type": "array", "items": _INT, "contains": {"const": 1}},
        ("[1]", "[2, 1]", "[1, 1]"),
        ("[]", "[2]", "[2, 3]"),
    ),
    Case(
        "minContains",
        {"type": "array", "items": _INT, "contains": {"const": 1}, "minContains": 2},
        ("[1, 1]", "[1, 2, 1]", "[1, 1, 1]"),
        ("[1]", "[2, 2]", "[]"),
    ),
    Case(
        "unevaluatedItems",
        {"type": "array", "prefixItems": [_INT], "unevaluatedItems": False},
        ("[1]", "[]", "[2]"),
        ("[1, 2]", '["a"]', '[1, "a"]'),
    ),
    Case(
        "properties",
        _closed({"a": _INT, "b": _string()}),
        ('{"a": 1}', '{"a": 1, "b": "x"}', "{}"),
        ('{"a": "x"}', '{"b": 1}', '{"c": 1}'),
    ),
    Case(
        "required",
        _closed({"a": _INT, "b": _INT}, "b"),
        ('{"b": 1}', '{"a": 1, "b": 2}', '{"b": 0}'),
        ("{}", '{"a": 1}', '{"b": "x"}'),
    ),
    Case(
        "required, not in properties",
        {"type": "object", "properties": {"a": _INT}, "required": ["b"]},
        ('{"b": 1}', '{"a": 1, "b": 2}', '{"b": null}'),
        ("{}", '{"a": 1}', "[]"),
    ),
    Case(
        "additionalProperties",
        {"type": "object", "properties": {"a": _INT}, "additionalProperties": _string()},
        ('{"a": 1}', '{"a": 1, "b": "x"}', '{"b": "x"}'),
        ('{"a": "x"}', '{"b": 1}', '{"a": 1, "b": 2}'),
    ),
    Case(
        "additionalProperties with required",
        {"type": "object", "required": ["k"], "additionalProperties": _INT},
        ('{"k": 1}', '{"k": 1, "b": 2}', '{"k": 0}'),
        ("{}", '{"b": 1}', '{"k": "x"}'),
    ),
    Case(
        "patternProperties",
        {"type": "object", "patternProperties": {"^S_": _string()}, "additionalProperties": False},
        ('{"S_a": "x"}', "{}", '{"S_b": ""}'),
        ('{"S_a": 1}', '{"a": "x"}', '{"S_a": "x", "b": "y"}'),
    ),
    Case(
        "patternProperties with properties",
        _closed({"a": _INT}, patternProperties={"^S_": _string()}),
        ('{"a": 1}', '{"a": 1, "S_x": "y"}', '{"S_x": "y"}'),
        ('{"S_x": 1}', '{"b": 1}', '{"a": "x"}'),
    ),
    Case(
        "patternProperties with required",
        {"type": "object", "patternProperties": {"^S_": _string()}, "required": ["a"]},
        ('{"a": 1}', '{"a": null, "S_x": "y"}', '{"a": []}'),
        ("{}", '{"S_x": "y"}', '{"a": 1, "S_x": 2}'),
    ),
    Case(
        "propertyNames",
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": _INT},
        ('{"ab": 1}', "{}", '{"a": 1, "b": 2}'),
        ('{"A": 1}', '{"ab": "x"}', '{"a1": 1}'),
    ),
    Case(
        "minProperties",
        _closed({"a": _INT, "b": _INT}, minProperties=1),
        ('{"a": 1}', '{"b": 1}', '{"a": 1, "b": 2}'),
        ("{}", '{"c": 1}', '{"a": "x"}'),
    ),
    Case(
        "minProperties of declared ones",
        {"type": "object", "properties": {"a": _INT, "b": _INT, "c": _INT}, "minProperties": 2},
        ('{"a": 1, "b": 2}', '{"a": 1, "c": 2}', '{"a": 1, "b": 2, "c": 3}'),
        ('{"a": 1}', "{}", '{"a": "x", "b": 1}'),
    ),
    Case(
        "maxProperties",
        _closed({"a": _INT, "b": _INT, "c": _INT}, maxProperties=2),
        ('{"a": 1}', "{}", '{"b": 1, "c": 2}'),
        ('{"a": 1, "b": 2, "c": 3}', '{"d": 1}', '{"a": "x"}'),
    ),
    Case(
        "minProperties of others",
        {"type": "object", "additionalProperties": _INT, "minProperties": 2},
        ('{"a": 1, "b": 2}', '{"x": 0, "y": 1}', '{"a": 1, "b": 2, "c": 3}'),
        ('{"a": 1}', "{}", '{"a": 1, "a": 2}'),
    ),
    Case(
        "dependentRequired",
        _closed({"a": _INT, "b": _INT}, dependentRequired={"a": ["b"]}),
        ('{"b": 1}', '{"a": 1, "b": 2}', "{}"),
        ('{"a": 1}', '{"c": 1}', '{"a": "x"}'),
    ),
    Case(
        "dependentSchemas",
        _closed({"a": _INT, "b": _INT}, dependentSchemas={"a": {"required": ["b"]}}),
        ('{"b": 1}', '{"a": 1, "b": 2}', "{}"),
        ('{"a": 1}', '{"c": 1}', '{"a": "x"}'),
    ),
    Case(
        "unevaluatedProperties",
        {"type": "object", "properties": {"a": _INT}, "unevaluatedProperties": False},
        ('{"a": 1}', "{}", '{"a": 2}'),
        ('{"b": 1}', '{"a": "x"}', '{"a": 1, "b": 2}'),
    ),
    Case("allOf of one", {"allOf": [_string()]}, ('"a"', '""', '"b"'), ("1", "null", "[]")),
    Case("allOf", {"allOf": [_string(), {"enum": ["yes", "no"]}]}, ('"yes"', '"no"', '"yes"'), ('"maybe"', "1", "{}")),
    Case(
        "allOf of objects",
        {
            "allOf": [
                {"type": "object", "properties": {"a": _INT}, "required": ["a"]},
                {"type": "object", "properties": {"b": _string()}, "required": ["b"]},
            ]
        },
        ('{"a": 1, "b": "x"}', '{"a": 2, "b": ""}', '{"a": 0, "b": "y"}'),
        ('{"a": 1}', '{"b": "x"}', '{"a": "x", "b": "y"}'),
    ),
    Case(
        "allOf of references",
        {
            "$defs": {
                "named": {"type": "object", "properties": {"name": _string()}, "required": ["name"]},
                "aged": {"type": "object", "properties": {"age": _INT}, "required": ["age"]},
            },
            "allOf": [{"$ref": "#/$defs/named"}, {"$ref": "#/$defs/aged"}],
        },
        ('{"name": "x", "age": 1}', '{"name": "", "age": 0}', '{"name": "y", "age": 7}'),
        ('{"name": "x"}', '{"age": 1}', '{"name": 1, "age": 1}'),
    ),
    Case("anyOf", {"anyOf": [_INT, _string(maxLength=1)]}, ("1", '"a"', '""'), ('"ab"', "1.5", "null")),
    Case(
        "anyOf beside properties",
        {
            "type": "object",
            "properties": {"a": _INT, "b": _INT},
            "additionalProperties": False,
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ('{"a": 1}', '{"b": 1}', '{"a": 1, "b": 2}'),
        ("{}", '{"c": 1}', "3"),
    ),
    Case("oneOf of types", {"oneOf": [_INT, _string()]}, ("1", '"a"', "0"), ("1.5", "null", "[]")),
    Case(
        "oneOf by a tag",
        {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": _KINDS},
        ('{"kind": "cat", "lives": 9}', '{"kind": "dog", "name": "x"}', '{"kind": "cat", "lives": 1}'),
        ('{"kind": "cat", "name": "x"}', '{"kind": "cow"}', "{}"),
    ),
    Case(
        "oneOf that overlaps",
        {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]},
        ("1", "2.5", "0"),
        ("2", "3", '"a"'),
    ),
    Case("not", {"type": "integer", "not": {"const": 3}}, ("1", "4", "0"), ("3", '"a"', "1.5")),
    Case(
        "if, then, else",
        {
            "type": "object",
            "properties": {"a": _INT, "b": _INT},
            "additionalProperties": False,
            "if": {"required": ["a"]},
            "then": {"required": ["b"]},
        },
        ('{"b": 1}', '{"a": 1, "b": 2}', "{}"),
        ('{"a": 1}', '{"c": 1}', '{"a": "x"}'),
    ),
    Case(
        "$ref", {"$defs": {"a": _string(maxLength=1)}, "$ref": "#/$defs/a"}, ('"a"', '""', '"b"'), ('"ab"', "1", "null")
    ),
    Case(
        "$ref with siblings",
        {"$defs": {"a": _string()}, "$ref": "#/$defs/a", "maxLength": 2},
        ('"ab"', '""', '"b"'),
        ('"abc"', "1", "null"),
    ),
    Case(
        "$ref with an escape",
        {"$defs": {"a/b": _string()}, "$ref": "#/$defs/a~1b"},
        ('"ab"', '""', '"b"'),
        ("1", "null", "[]"),
    ),
    Case(
        "$ref, recursive",
        {"$ref": "#/$defs/n", "$defs": {"n": _TREE}},
        ('{"v": 1}', '{"v": 1, "c": [{"v": 2}]}', '{"v": 1, "c": []}'),
        ("{}", '{"v": 1, "c": [{}]}', '{"v": "x"}'),
    ),
    Case(
        "$dynamicRef",
        {"$dynamicAnchor": "n", **_closed({"v": _INT, "c": {"$dynamicRef": "#n"}}, "v")},
        ('{"v": 1}', '{"v": 1, "c": {"v": 2}}', '{"v": 0}'),
        ("{}", '{"v": 1, "c": 3}', '{"v": 1, "c": {"v": "x"}}'),
    ),
    Case(
        "false for a property",
        _closed({"a": False, "b": _INT}),
        ('{"b": 1}', "{}", '{"b": 2}'),
        ('{"a": 1}', '{"b": "x"}', '{"c": 1}'),
    ),
    Case("keyword without a type", {"minLength": 3}, ('"abc"', "1", "null"), ('"ab"', '""', '"a"')),
    Case(
        "property called title",
        _closed({"a": _TITLED[0], "b": _TITLED[1]}, "a", "b"),
        (
            '{"a": {"title": "x"}, "b": {"title": 1}}',
            '{"a": {"title": ""}, "b": {"title": 0}}',
            '{"a": {"title": "y"}, "b": {"title": 7}}',
        ),
        ('{"a": {"title": "x"}, "b": {"title": "y"}}', '{"a": {"title": 1}, "b": {"title": 1}}', "{}"),
    ),
    Case(
        "integer beyond 2^53",
        {"const": 9007199254740993},
        ("9007199254740993",) * 3,
        ("9007199254740992", "9007199254740994", "1"),
    ),
    *(
        Case(f"tool call of {model}, {choice}: {name}", schema, valid, invalid, (model, choice))
        for name, schema, valid, invalid in TOOLS
        for model, choice in FORMS
    ),
)
