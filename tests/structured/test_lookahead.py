# SPDX-License-Identifier: Apache-2.0
"""Forced tokens of both grammar engines, over random walks through real grammars."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import pytest
import torch
import xgrammar as xgr
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.conftest import REPOSITORY
from vllm_ext.structured.grammar_states import StateMaker, TokenSizes
from vllm_ext.structured.lookahead import ForcedTokens, GrammarState, find_forced_tokens
from vllm_ext.structured.spellings import LONGEST_TEXT, SpellingObserver, Spellings

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "bench" / "models" / "tiny_moe")
SIZE = 4096
END = TOKENIZER.eos_token_id
K = 10


def make_record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, Any] = {
    "call": make_record(
        name={"const": "set_thermostat"},
        arguments=make_record(room={"enum": ["kitchen", "kitten", "office"]}, is_on={"type": "boolean"}),
    ),
    "list": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": make_record(value={"type": "integer", "minimum": 0, "maximum": 99}, unit={"enum": ["m", "mm"]}),
    },
    "unicode": make_record(größe={"enum": ["groß", "größer"]}, 名前={"type": "string", "maxLength": 3}),
    "recursive": {
        "$defs": {"node": make_record(
            label={"enum": ["leaf", "root"]},
            children={"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/node"}})},
        "$ref": "#/$defs/node",
    },
}  # fmt: skip
REGEXES = {"word": "(alpha|alpine) beta", "optional": "yes( please)?", "single": "Q"}
ENGINES = ("xgrammar", "guidance")


@pytest.fixture(scope="module")
def compilers() -> dict[str, Any]:
    info = xgr.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=SIZE, stop_token_ids=[END])
    return {"xgrammar": xgr.GrammarCompiler(info), "guidance": llguidance.hf.from_tokenizer(TOKENIZER, SIZE)}


def make_grammar(compilers: dict[str, Any], engine: str, name: str) -> Any:
    """What vLLM's grammars hold."""
    schema = json.dumps(SCHEMAS[name]) if name in SCHEMAS else None
    compiler = compilers[engine]
    if engine == "guidance":
        grammar = (
            llguidance.LLMatcher.grammar_from_regex(REGEXES[name])
            if schema is None
            else llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        )
        return SimpleNamespace(ll_matcher=llguidance.LLMatcher(compiler, grammar), ll_tokenizer=compiler)
    compiled = (
        compiler.compile_regex(REGEXES[name])
        if schema is None
        else compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
    )
    return SimpleNamespace(matcher=xgr.GrammarMatcher(compiled), ctx=compiled, vocab_size=SIZE)


def read_mask(grammar: Any) -> list[int]:
    """Tokens that may come next, by the engine itself."""
    row = torch.zeros((1, SIZE // 32), dtype=torch.int32)
    if hasattr(grammar, "matcher"):
        grammar.matcher.fill_next_token_bitmask(row, 0)
    else:
        words = row.numpy()
        grammar.ll_matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.flatnonzero(np.unpackbits(row.numpy().view(np.uint8), bitorder="little")).tolist()


def spell_by_tokenizer() -> Spellings:
    return Spellings(lambda text: list(TOKENIZER.encode(text, add_special_tokens=False)))


def check_state(grammar: Any, state: GrammarState, spellings: Spellings, limit: int) -> ForcedTokens:
    """Forced tokens of a state: legal one after the other, certain where said, and the state as before."""
    before = read_mask(grammar), state.find_text()
    forced = find_forced_tokens(state, limit, spellings)
    assert (read_mask(grammar), state.find_text()) == before
    assert len(forced.tokens) <= limit
    assert 0 <= forced.num_certain <= len(forced.tokens)
    spelled = b""
    for place, token in enumerate(forced.tokens):
        allowed = read_mask(grammar)
        # A guess may be outside of the mask: xgrammar 0.2.8 takes some tokens that its masks leave out.
        if place <= forced.num_certain:
            assert (allowed == [token]) == (place < forced.num_certain)
        for text, start in forced.texts:
            if start == place:
                spelled = text.encode()
        if token != END:
            piece = TOKENIZER.decode([token]).encode()
            if b"\xef\xbf\xbd" not in piece:
                assert spelled.startswith(piece) or piece.startswith(spelled)
                spelled = spelled[len(piece) :]
            else:
                spelled = spelled[state.measure(token) :]
        assert state.accept(token)
    if forced.tokens:
        state.rollback(len(forced.tokens))
    assert (read_mask(grammar), state.find_text()) == before
    return forced


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*SCHEMAS, *REGEXES])
def test_forced_tokens_along_a_random_walk(engine: str, name: str, compilers: dict[str, Any]) -> None:
    generator = np.random.default_rng(len(name))
    states, spellings, lengths = StateMaker(), spell_by_tokenizer(), []
    for _ in range(4):
        grammar = make_grammar(compilers, engine, name)
        state = states.make(grammar, END)
        assert state is not None
        for _ in range(60):
            forced = check_state(grammar, state, spellings, int(generator.integers(1, K)))
            lengths.append(len(forced.tokens))
            # Often the forced way, else any.
            ways = forced.tokens[:1] if forced.tokens and generator.random() < 0.6 else read_mask(grammar)
            token = int(generator.choice(ways))
            assert state.accept(token)
            if state.is_terminated():
                assert find_forced_tokens(state, K, spellings) == ForcedTokens([], 0, [])
                break
        else:
            continue
    assert max(lengths) > 1 or name in ("single", "optional")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_call_is_mostly_forced(engine: str, compilers: dict[str, Any]) -> None:
    grammar = make_grammar(compilers, engine, "call")
    state, spellings = StateMaker().make(grammar, END), spell_by_tokenizer()
    assert state is not None
    text, steps = "", 0
    while not state.is_terminated():
        tokens = find_forced_tokens(state, 100, spellings).tokens or [read_mask(grammar)[0]]
        for token in tokens:
            assert state.accept(token)
        text += TOKENIZER.decode([token for token in tokens if token != END])
        steps += 1
    assert steps <= 8
    assert json.loads(text)["name"] == "set_thermostat"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_end_is_certain_where_nothing_else_may_come(engine: str, compilers: dict[str, Any]) -> None:
    for name, text, ends in (("single", "Q", True), ("optional", "yes", False), ("optional", "yes please", True)):
        grammar = make_grammar(compilers, engine, name)
        state = StateMaker().make(grammar, END)
        assert state is not None
        for token in TOKENIZER.encode(text, add_special_tokens=False):
            assert state.accept(token)
        forced = find_forced_tokens(state, K, spell_by_tokenizer())
        assert forced == (ForcedTokens([END], 1, []) if ends else ForcedTokens([], 0, []))


def test_of_several_end_tokens_the_models_own_is_a_guess() -> None:
    info = xgr.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=SIZE, stop_token_ids=[END])
    compiled = xgr.GrammarCompiler(info).compile_regex("Q")
    for others, certain in (([7, END], 0), ([END], 1)):
        matcher = xgr.GrammarMatcher(compiled, override_stop_tokens=others)
        assert matcher.accept_string("Q")
        state = StateMaker().make(SimpleNamespace(matcher=matcher, ctx=compiled, vocab_size=SIZE), END)
        assert state is not None
        assert find_forced_tokens(state, K, spell_by_tokenizer()) == ForcedTokens([END], certain, [])


def test_other_grammars_force_nothing() -> None:
    assert StateMaker().make(SimpleNamespace(), END) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_goes_with_its_request(compilers: dict[str, Any], engine: str) -> None:
    """In a ring of objects it would keep its matcher, some megabytes, until a full garbage collection."""
    state = StateMaker().make(make_grammar(compilers, engine, "call"), END)
    assert state is not None
    gc.collect()
    gc.disable()
    try:
        last = weakref.ref(state)
        del state
        assert last() is None
    finally:
        gc.enable()


def test_a_guess_that_the_grammar_forbids_ends_the_draft(compilers: dict[str, Any]) -> None:
    grammar = make_grammar(compilers, "xgrammar", "word")
    state = StateMaker().make(grammar, END)
    assert state is not None
    alp, other = TOKENIZER.encode("al", add_special_tokens=False), TOKENIZER.encode("zz", add_special_tokens=False)
    forced = find_forced_tokens(state, K, Spellings(lambda text: [*alp, *other]))
    assert (forced.tokens, forced.num_certain) == (alp, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tokenizer_may_know_tokens_that_masks_have_no_place_for(engine: str, compilers: dict[str, Any]) -> None:
    """Found inside of schedule(), where an error ends the engine."""
    grammar = make_grammar(compilers, engine, "word")
    state = StateMaker().make(grammar, END)
    assert state is not None
    alp = TOKENIZER.encode("al", add_special_tokens=False)
    for beyond in (SIZE, SIZE + 8, 70_000, 2**31 - 1, -1):
        for guess, drafts in (([beyond], []), ([*alp, beyond], alp)):
            forced = find_forced_tokens(state, K, Spellings(lambda text, guess=guess: guess))  # type: ignore[misc]
            assert forced.tokens == drafts or engine == "guidance"
            assert max(forced.tokens, default=0) < SIZE


# --- spellings ---------------------------------------------------------------------------------------------


def encode_letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_what_the_model_wrote_replaces_the_tokenizers_spelling() -> None:
    spellings = Spellings(encode_letters)
    assert spellings.spell("ab").tokens == [97, 98]
    spellings.learn("ab", [300])
    assert spellings.spell("ab").tokens == [300]
    # Written twice like this: one deviation is not enough to replace it, two are.
    spellings.learn("ab", [300])
    spellings.learn("ab", [97, 98])
    assert spellings.spell("ab").tokens == [300]
    spellings.learn("ab", [97, 98])
    assert spellings.spell("ab").tokens == [97, 98]
    spellings.learn("never asked for", [1])
    assert len(spellings) == 1


def test_a_text_that_is_never_written_alike_is_left_alone() -> None:
    spellings = Spellings(encode_letters)
    for number in range(20):
        spellings.spell("ab")
        spellings.learn("ab", [400 + number])
    assert spellings.spell("ab").tokens == []
    for _ in range(3):
        spellings.learn("ab", [500])
    assert spellings.spell("ab").tokens == [500]


def test_memory_is_bounded() -> None:
    spellings = Spellings(encode_letters, max_texts=8)
    for number in range(100):
        spellings.spell(str(number))
    assert len(spellings) == 8
    spellings.spell("x" * (LONGEST_TEXT + 1))
    assert len(spellings) == 8


def test_sizes_of_tokens() -> None:
    sizes = TokenSizes([bytes([value]) for value in range(256)] + [b"abc", b""])
    assert sizes.has_all_bytes
    assert [sizes.measure(token) for token in (0, 256, 257, 258)] == [1, 3, 0, 0]
    assert not TokenSizes([b"a", b"b"]).has_all_bytes


def measure_text(token: int) -> int:
    """Bytes of a token of these tests: letters, and 300 for "ab"."""
    return 2 if token == 300 else 1


class Writer:
    """A model that writes forced texts in its own way, and an observer of it."""

    def __init__(self) -> None:
        self.spellings = Spellings(encode_letters)
        self.observer = SpellingObserver(self.spellings, measure_text)
        self.output: list[int] = []

    def step(self, texts: Sequence[tuple[str, int]], drafts: list[int], written: list[int]) -> None:
        """The texts that were found behind the output, what was drafted, and what the model put out."""
        self.observer.read(self.output)
        for text, _ in texts:
            self.spellings.spell(text)
        self.observer.expect(ForcedTokens(drafts, 0, list(texts)), len(self.output))
        self.output += written
        self.observer.read(self.output)


def test_a_spelling_is_learned_when_the_output_covers_the_text() -> None:
    writer = Writer()
    # "abc" is forced; the model writes "ab" in one token, then "c" one step later.
    writer.step([("abc", 0)], [97, 98, 99], [300])
    assert writer.spellings.spell("abc").tokens == [97, 98, 99]
    writer.step([("c", 0)], [99], [99, 120])
    assert writer.spellings.spell("abc").tokens == [300, 99]
    assert writer.spellings.spell("c").tokens == [99]


def test_a_text_behind_drafts_counts_only_if_they_were_accepted() -> None:
    writer = Writer()
    writer.step([("ab", 0), ("ab", 2)], [97, 98], [97, 98, 300, 120])
    # What the second of the two showed.
    assert writer.spellings.spell("ab").tokens == [97, 98]
    writer.step([("cab", 0), ("xab", 3)], [99, 97, 98], [99, 300])
    assert writer.spellings.spell("cab").tokens == [99, 300]
    assert writer.spellings.spell("xab").tokens == [120, 97, 98]


@given(st.lists(st.lists(st.sampled_from([97, 98, 300]), min_size=1, max_size=3), min_size=1, max_size=12))
def test_learned_spellings_cover_their_text(steps: list[list[int]]) -> None:
    """Whatever the model does: a spelling has as many bytes as its text, but for its last token."""
    writer = Writer()
    for written in steps:
        writer.step([("ab", 0), ("aab", 1)], [97], written)
        for text in ("ab", "aab"):
            tokens = writer.spellings.spell(text).tokens
            if tokens:
                assert sum(map(measure_text, tokens[:-1])) < len(text) <= sum(map(measure_text, tokens))
