# SPDX-License-Identifier: Apache-2.0
"""Normalized schemas as the engines need them."""

from __future__ import annotations

import json
from typing import Any

from bench.structured.acceptance import accepts_guidance, find_plan
from vllm_ext.structured.dialects import write_for_guidance, write_for_xgrammar
from vllm_ext.structured.normalize import normalize_schema


def test_lengths_and_numbered_objects_for_xgrammar() -> None:
    schema: Any = {"type": "object", "properties": {"title": {"type": "string", "maxLength": 3}}}
    schema = write_for_xgrammar(normalize_schema(schema))
    assert schema["properties"]["title"] == {"$ref": "#/$defs/length_0_3"}
    assert schema["$defs"] == {"length_0_3": {"type": "string", "pattern": "^.{0,3}$"}}
    assert "x-vllm-ext" in schema


def test_objects_for_llguidance_are_closed_where_they_declare_properties() -> None:
    for given, expected in (
        ({"properties": {"a": {}}}, {"additionalProperties": False}),
        ({}, {}),
        ({"patternProperties": {"^S": {}}, "required": ["a", "S_b"]}, {"properties": {"a": True}}),
        ({"properties": {"a": {}}, "required": ["b"]}, {"properties": {"a": {}, "b": True}}),
    ):
        written = write_for_guidance(normalize_schema({"type": "object", **given}))
        assert {key: written[key] for key in expected} == expected
        assert ("additionalProperties" in written) == bool(given)
    merged = write_for_guidance(normalize_schema({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}))
    assert all(part.get("additionalProperties") is not False for part in merged["allOf"])


def test_open_objects_leave_declared_names_to_their_schemas() -> None:
    schema = {"type": "object", "properties": {"ab": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    plan, grammar = find_plan("json", json.dumps(schema))
    assert plan.engine == "guidance"
    for text, expected in (
        ('{"ab":"x","a":1,"abc":2}', True),
        ('{"b":1,"":2}', True),
        ('{"ab":1}', False),
        ('{"a":1,"ab":1}', False),
        ('{"a\\u0062":1}', False),
    ):
        assert accepts_guidance(grammar, text) == expected, text
