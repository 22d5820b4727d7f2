# SPDX-License-Identifier: Apache-2.0
"""Schemas that share no value."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext.structured.disjoint import are_disjoint


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
