# SPDX-License-Identifier: Apache-2.0
"""Regular expressions as xgrammar reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.structured.patterns import allows_most_characters, find_regex_gap, is_plain_pattern, read_beginning


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
    assert is_plain_pattern(pattern) is is_plain


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("^.+$", True), ("^[.]$", False), ("^\\.$", False), ("^[^a]$", True), ("^\\W$", True), ("^[a-z\\d]+$", False)],
)
def test_patterns_that_allow_quotes_among_others(pattern: str, expected: bool) -> None:
    assert allows_most_characters(pattern) is expected


@pytest.mark.parametrize(
    ("pattern", "beginning"),
    [("^S_", "S_"), ("^a\\.b", "a.b"), ("^ab?", "a"), ("^a{2}", ""), ("b", ""), ("^a|b", ""), ("^[a]", "")],
)
def test_beginnings(pattern: str, beginning: str) -> None:
    assert read_beginning(pattern) == beginning


def test_regexes_that_xgrammar_reads_otherwise() -> None:
    assert [bool(find_regex_gap(text)) for text in ("a^b", "^a$", "\\Aa", "[[:alpha:]]", "[:;]")] == [1, 0, 1, 1, 0]


@given(st.text(max_size=40))
def test_any_text_is_read(text: str) -> None:
    is_plain_pattern(text)
    allows_most_characters(text)
    read_beginning(text)
