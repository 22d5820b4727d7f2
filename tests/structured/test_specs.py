# SPDX-License-Identifier: Apache-2.0
"""Specifications are measured before they are copied or written as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_ext.structured.cost import MAX_SPEC_BYTES, MOST_LEVELS
from vllm_ext.structured.specs import SMALL_TEXT, is_small, read_spec


def test_equal_specifications_have_one_digest() -> None:
    kind, text, digest = read_spec(StructuredOutputsParams(json={"type": "integer"}))
    assert (kind, json.loads(text)) == ("json", {"type": "integer"})
    assert read_spec(StructuredOutputsParams(json=text))[2] == digest
    assert read_spec(StructuredOutputsParams(regex=text))[2] != digest
    assert read_spec(StructuredOutputsParams(regex="a\ud800"))[0] == "regex"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"enum": ["x" * 1000] * 600}}, f"more than {MAX_SPEC_BYTES} bytes"),
        ({"json": {"enum": json.loads("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1))}}, "levels deep"),
        ({"choice": []}, "empty list"),
        ({"grammar": "  "}, "structured_outputs.grammar is an empty string"),
        ({"json_object": False}, "must be true"),
    ],
)
def test_what_is_too_large_or_empty_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        read_spec(StructuredOutputsParams(**given))


def test_small_specifications_are_told_without_writing_them() -> None:
    assert is_small(StructuredOutputsParams(json={"type": "integer"}))
    assert is_small(StructuredOutputsParams(json_object=True))
    assert not is_small(StructuredOutputsParams(json={"enum": ["x" * SMALL_TEXT]}))
    assert not is_small(StructuredOutputsParams(regex="x" * (SMALL_TEXT + 1)))
