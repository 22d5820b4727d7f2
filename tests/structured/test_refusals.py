# SPDX-License-Identifier: Apache-2.0
"""Refusals of llguidance's name the place in the schema as it was sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.structured.tool_calls import write_tag
from vllm_ext.structured import refusals
from vllm_ext.structured.normalize import locate, normalize_schema
from vllm_ext.structured.refusals import find_refused

LOOK = {"type": "string", "pattern": "(?=x)y"}


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        (LOOK, "#/pattern"),
        ({"properties": {"a/b": {"items": LOOK}}}, "#/properties/a~1b/items/pattern"),
        ({"definitions": {"q": {**LOOK, "type": ["string", "null"]}}, "items": {"$ref": "#/definitions/q"}},
         "#/definitions/q/pattern"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "#/required"),
        ({"oneOf": [{"type": "null"}, {"type": "array", "items": LOOK}]}, "#/oneOf/1/items/pattern"),
        ({"type": "array", "items": [{"type": "integer"}, LOOK]}, "#/items/1/pattern"),
        ({"type": "object", "patternProperties": {"^a": {"type": "string"}, "b$": {}}}, "#/patternProperties"),
        ({"type": "string", "minLength": 3}, ""),
    ],
)  # fmt: skip
def test_pointers(schema: Any, pointer: str) -> None:
    assert find_refused("json", json.dumps(schema)) == pointer


def test_pointers_into_tags() -> None:
    tag = write_tag("llama", "required", {"type": "object", "properties": {"a": LOOK}})
    expected = "#/format/tags/0/content/json_schema/properties/a/pattern"
    assert find_refused("structural_tag", tag) == expected


def test_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(refusals.engines, "check_guidance", tried.append)
    assert find_refused("json", json.dumps({"anyOf": [{"minLength": i} for i in range(200)]})) == ""
    assert find_refused("json", json.dumps({"const": "x" * refusals.MOST_CHARACTERS})) == ""
    assert find_refused("regex", "(?=x)") == ""
    assert len(tried) <= refusals.MOST_TRIED


def test_normal_forms_are_found_in_the_schema_that_came() -> None:
    schema = {
        "definitions": {"x/y": {"type": ["string", "null"], "maxLength": 3}},
        "properties": {"a": {"$ref": "#/definitions/x~1y", "minLength": 1}, "b": {"items": [{}, {}]}},
    }
    places: dict[str, str] = {}
    normalize_schema(schema, places)
    assert places == {"d0": "/definitions/x~1y"}
    for pointer, expected in (
        ("/$defs/d0/anyOf/0/maxLength", "/definitions/x~1y/maxLength"),
        ("/properties/a/allOf/1/minLength", "/properties/a/minLength"),
        ("/properties/b/prefixItems/1", "/properties/b/items/1"),
        ("/properties/gone/pattern", "/properties"),
        ("", ""),
    ):
        assert locate(schema, pointer, places) == expected
