# SPDX-License-Identifier: Apache-2.0
"""Pieces of Lark, compiled by llguidance."""

from __future__ import annotations

import re

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.structured.acceptance import accepts_guidance, make_tokenizer
from vllm_ext.structured.lark import (
    ANY_TEXT,
    Lark,
    escape_regex,
    exclude,
    limit_whitespace,
    quote,
    split_added,
    write_json,
    write_regex,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), max_size=6)


def accepts(body: str, text: str, is_terminal: bool = True) -> bool:
    lark = Lark()
    whole = lark.finish(lark.add_terminal(body) if is_terminal else body)
    matcher = llguidance.LLMatcher(make_tokenizer(), llguidance.grammar_from("grammar", whole), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return accepts_guidance(matcher, text)


@given(TEXTS, TEXTS)
def test_a_text_is_itself_alone(text: str, other: str) -> None:
    for body in (f"/{escape_regex(text)}/" if text else '""', quote(text)):
        assert accepts(body, text)
        assert accepts(body, other) == (other == text)


@given(st.text("ab<>/", max_size=8), st.lists(st.text("ab<>/", min_size=1, max_size=2), max_size=2))
def test_excluded_texts_are_nowhere(text: str, excludes: list[str]) -> None:
    assert accepts(exclude(ANY_TEXT, excludes), text) == (not any(each in text for each in excludes))


@pytest.mark.parametrize(
    "pattern", [r"^a/b\/$", r"\d+", r"[\d/]\w", r"a\s?b", r"[^a\n]", r"a\Db", "x\ny", r"\<a\>", ""]
)
@pytest.mark.parametrize(
    "text", ["a/b/", "12", "\u0663", "/a", "3_", "a b", "a\u00a0b", "ab", "b", "a9b", "x\ny", "<a>", ""]
)
def test_regexes_are_asciis(pattern: str, text: str) -> None:
    expected = re.fullmatch(pattern, text, re.ASCII) is not None
    assert accepts(write_regex(pattern), text) == expected


@given(st.lists(st.sampled_from(["a", "<x>", "<xy>", "<", "x>"]), max_size=6))
def test_splitting_keeps_every_character(parts: list[str]) -> None:
    added = {"<x>": 7, "<xy>": 8}
    texts = {7: "<x>", 8: "<xy>"}
    found = split_added("".join(parts), added)
    assert "".join(part if isinstance(part, str) else texts[part] for part in found) == "".join(parts)
    assert not any(each in part for part in found if isinstance(part, str) for each in added)
    assert "" not in found


def test_whitespace_of_inner_schemas() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    for options, accepted in (({"whitespace_flexible": True}, "1110"), (limit_whitespace(1), "1100")):
        texts = ("[1,2]", "[1, 2]", "[1,  2]", "[1,2] x")
        assert "".join(str(int(accepts(write_json(schema, options), text, False))) for text in texts) == accepted
    assert accepts(write_json(True, {}), '{"a": [null]}', False)
