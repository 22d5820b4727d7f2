# SPDX-License-Identifier: Apache-2.0
"""Estimates of what a grammar costs, and limits of its text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.structured import cost
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.patterns import is_plain_pattern


@given(st.text(max_size=40))
def test_estimates_take_any_text(text: str) -> None:
    assert cost.estimate_regex(text) >= 0
    is_plain_pattern(text)


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


def test_levels_are_counted_of_objects_and_arrays_alike() -> None:
    nested = {"a": [{"b": [1]}]}
    cost.check_levels(nested, 4, "schema")
    with pytest.raises(RefusedError, match="the schema nests objects and arrays more than 3 levels deep"):
        cost.check_levels(nested, 3, "schema")
