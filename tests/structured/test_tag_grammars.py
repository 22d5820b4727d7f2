# SPDX-License-Identifier: Apache-2.0
"""Tags as llguidance's grammars accept what xgrammar's own accept, form by form; and tokens that a tokenizer adds."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.structured.acceptance import accepts_guidance, accepts_xgrammar, make_compiler, make_tokenizer
from tests.conftest import REPOSITORY
from vllm_ext.structured import engines
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.routing import Plan
from vllm_ext.structured.tag_grammars import write_tag_grammar

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
TEXT = {"type": "any_text"}


def const(value: str) -> Any:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: Any, end: Any) -> Any:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def list_of(kind: str, *elements: Any) -> Any:
    return {"type": kind, "elements": list(elements)}


CALL, OTHER = tag("<a>", INTEGER, "</a>"), tag("<ab ", INTEGER, "</ab>")
FORMS: dict[str, Any] = {
    "const": const('x"\\\n'),
    "sequence": list_of("sequence", const("x"), INTEGER, const(";"), INTEGER),
    "or": list_of("or", const("x"), CALL, const("1")),
    "any text": TEXT,
    "any text up to an end": tag("<t>", TEXT, "</t>"),
    "any text up to one of several": tag("", TEXT, ["</t>", ";"]),
    "any text without": {"type": "any_text", "excludes": ["<a>", "x"]},
    "any text of a length": {"type": "any_text", "max_chars": 3},
    "any text, then a call": list_of("sequence", tag("", TEXT, "</t>"), CALL),
    "regex": list_of("sequence", {"type": "regex", "pattern": "^\\d+[^\\s/]$"}, const(";")),
    "optional": list_of("sequence", {"type": "optional", "content": CALL}, const(";")),
    "plus": {"type": "plus", "content": CALL},
    "star": {"type": "star", "content": CALL},
    "repeat": {"type": "repeat", "min": 1, "max": 2, "content": CALL},
    "repeat without end": {"type": "repeat", "min": 2, "max": -1, "content": CALL},
    **{
        f"separated {least} {first}": {
            "type": "tags_with_separator", "tags": [CALL, OTHER], "separator": ",", "at_least_one": least,
            "stop_after_first": first,
        }
        for least in (False, True)
        for first in (False, True)
    },
    **{
        f"triggered {least} {first}": {
            "type": "triggered_tags", "triggers": ["<a"], "tags": [CALL, OTHER], "at_least_one": least,
            "stop_after_first": first, "excludes": ["x"],
        }
        for least in (False, True)
        for first in (False, True)
    },
}  # fmt: skip
PARTS = ["<a>", "</a>", "<ab ", "</ab>", "<t>", "</t>", "1", "-20", ",", ";", "x", "y ", "<", "a", '"', "\\", "\n", "é"]


def compile_forms(form: Any) -> tuple[Any, Any]:
    text = json.dumps({"type": "structural_tag", "format": form})
    plan = Plan("structural_tag", "guidance", text, 1)
    return make_compiler().compile_structural_tag(text), engines.compile_guidance(make_tokenizer(), plan)


COMPILED: dict[str, tuple[Any, Any]] = {}


@pytest.mark.parametrize("name", FORMS)
@given(st.lists(st.sampled_from([*PARTS, "<a>1</a>", "<ab 1</ab>", "<t>y ", 'x"\\\n']), max_size=7).map("".join))
def test_both_engines_accept_the_same(name: str, text: str) -> None:
    if name not in COMPILED:
        COMPILED[name] = compile_forms(FORMS[name])
    compiled, matcher = COMPILED[name]
    # xgrammar does not end behind the beginning of a trigger.
    if not (name.startswith("triggered") and text.endswith("<a")):
        assert accepts_guidance(matcher, text) == accepts_xgrammar(compiled, text)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "grammar", "grammar": ""}, "/format: llguidance is not given 'grammar'"),
        (list_of("sequence", TEXT, INTEGER), "/format/elements/0: llguidance would not see where the text ends"),
        ({"type": "star", "content": TEXT}, "/format/content: llguidance would not see"),
        (tag("<t>", {"type": "triggered_tags", "triggers": ["<a"], "tags": [CALL]}, "</t>"), "/format/content: "),
        ({"type": "triggered_tags", "triggers": ["<b"], "tags": [CALL]}, "/format/tags/0/begin: none of the triggers"),
        ({"type": "any_text", "max_tokens": 3}, "/format/max_tokens"),
        ({**INTEGER, "any_order": True}, "/format/any_order"),
        (tag("<t>", {**INTEGER, "style": "glm_xml"}, ""), "/format/content/json_schema: .* style 'glm_xml'"),
        ({"type": "tag", "begin": {"type": "token", "token": 3}, "content": INTEGER, "end": ""}, "/format/begin"),
        (const("\ud800"), "half a surrogate pair"),
        ({"type": "or"}, "none of xgrammar's: KeyError 'elements'"),
    ],
)
def test_what_has_no_form_is_refused_by_pointer(form: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        write_tag_grammar({"format": form})


def make_added() -> Any:
    """llguidance's tokenizer of the shipped model with two more tokens, as in tokenizers of chat models."""
    tokenizer = json.loads((REPOSITORY / "bench" / "models" / "tiny_moe" / "tokenizer.json").read_text())
    for i, text in enumerate(("<call>", "</call>")):
        added = {"id": 4096 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**added, "normalized": False, "special": False})
    return llguidance.LLTokenizer(json.dumps(tokenizer))


def test_added_tokens_and_their_texts_begin_a_call() -> None:
    tokenizer = make_added()
    added = engines.list_added(tokenizer)
    assert (added["<call>"], added["</call>"]) == (4096, 4097)
    assert tokenizer.eos_token not in added.values()
    spelled = tokenizer.tokenize_str("<call")  # ">" follows: characters, not the token
    call = {
        "type": "tag",
        "begin": "<call>\n",
        "content": {**INTEGER, "json_schema": {"multipleOf": 7}},
        "end": "\n</call>",
    }
    form = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [call]}
    text = json.dumps({"type": "structural_tag", "format": form})
    matcher = engines.compile_guidance(tokenizer, Plan("structural_tag", "guidance", text, 1))

    def accepts(*parts: Any) -> bool:
        copy = matcher.deep_copy()
        tokens: list[int] = []
        for part in parts:
            tokens += (
                part if isinstance(part, list) else [part] if isinstance(part, int) else tokenizer.tokenize_str(part)
            )
        return bool(copy.consume_tokens(tokens) and copy.is_accepting())

    assert accepts("hello")
    assert accepts("hello ", 4096, "\n", "14", "\n", 4097, " bye")
    assert accepts("hello ", spelled, ">", "\n", "14", "\n", 4097)
    assert not accepts("hello ", 4096, "\n", "15", "\n", 4097)
    assert not accepts("hello ", spelled, ">", "\n", "15", "\n", 4097)
    assert not accepts("hello ", 4097)
    assert not accepts("hello ", 4096)
