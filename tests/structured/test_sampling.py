# SPDX-License-Identifier: Apache-2.0
"""Whatever a random model writes under the masks of a generated schema is valid, or not finished."""

from __future__ import annotations

import functools
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import jsonschema
import llguidance.hf
import numpy as np
import xgrammar as xgr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.conftest import REPOSITORY
from vllm_ext.structured import engines
from vllm_ext.structured.errors import GrammarError, RefusedError
from vllm_ext.structured.forced_length import forces_little
from vllm_ext.structured.grammar_states import StateMaker
from vllm_ext.structured.lookahead import find_forced_tokens
from vllm_ext.structured.routing import Plan, plan_spec
from vllm_ext.structured.spellings import Spellings

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "bench" / "models" / "tiny_moe")
SIZE, END = 4096, TOKENIZER.eos_token_id
MOST_DRAFTS = 6
EXAMPLES = 400 if os.environ.get("VLLM_EXT_EXAMPLES") == "explore" else 40

NAMES = st.sampled_from(["a", "b", "title", "description", "k/1", 'q"', "größe", "\u65e5"])
WORDS = st.sampled_from(["", "red", "x y", "\u00e9", '"', "\\", "a/b", "\u65e5\u672c", "\U0001f600!"])
SCALARS = st.one_of(st.integers(-30, 30), WORDS, st.booleans(), st.none())
PATTERNS = st.sampled_from(
    [
        "^[a-c]+$",
        "b",
        "^x",
        "^.{1,3}$",
        '^[^x]"$',
        "^(ab|c){1,2}$",
        "\\d",
        "^\\s*$",
        "^a|b$",
        '^["\\\\]+$',
        "^[\u00e0-\u00fc]{1,2}$",
        "^\u65e5.$",
        "^[^\U0001f600]{2}$",
    ]
)
FORMATS = st.sampled_from(["date", "date-time", "time", "ipv4", "uuid", "email", "json-pointer", "uri-reference"])


def some(**keywords: Any) -> Any:
    return st.fixed_dictionaries({}, optional=keywords)


def merge(*parts: Any) -> Any:
    return st.tuples(*parts).map(lambda given: {key: value for part in given for key, value in part.items()})


def extend(child: Any) -> Any:
    """Schemas one level deeper than `child`."""
    small = st.integers(0, 3)
    maps = st.dictionaries(NAMES, child, max_size=3)
    names = st.lists(NAMES, max_size=2, unique=True)
    objects = merge(
        st.just({"type": "object"}),
        some(
            properties=maps,
            required=names,
            additionalProperties=st.one_of(st.booleans(), child),
            minProperties=small,
            maxProperties=small,
            patternProperties=st.dictionaries(PATTERNS, child, max_size=1),
            propertyNames=st.one_of(st.just({"pattern": "^[a-z]+$"}), st.just({"maxLength": 2})),
        ),
    )
    arrays = merge(
        st.just({"type": "array"}),
        some(items=child, prefixItems=st.lists(child, max_size=2), minItems=small, maxItems=small),
    )
    options = st.lists(child, min_size=1, max_size=3)
    mixed = st.one_of(
        st.fixed_dictionaries({"anyOf": options}),
        st.fixed_dictionaries({"oneOf": options}),
        st.fixed_dictionaries({"allOf": st.lists(child, min_size=1, max_size=2)}),
        merge(st.fixed_dictionaries({"anyOf": options}), objects),
    )
    return st.one_of(objects, objects, arrays, mixed)


NUMBERS = st.one_of(st.integers(-40, 40), st.sampled_from([0.5, -1.25, 3.75, 10.1]))
LEAVES = st.one_of(
    st.just({}),
    st.just({"type": ["string", "null"]}),
    merge(
        st.just({"type": "string"}),
        some(minLength=st.integers(0, 3), maxLength=st.integers(0, 4), pattern=PATTERNS, format=FORMATS),
    ),
    some(minLength=st.integers(1, 2), maximum=NUMBERS, pattern=PATTERNS),
    merge(
        st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": ["integer", "boolean"]}]),
        some(minimum=NUMBERS, maximum=NUMBERS, exclusiveMinimum=NUMBERS, multipleOf=st.sampled_from([1, 3, 0.5])),
    ),
    st.fixed_dictionaries({"enum": st.lists(SCALARS, min_size=1, max_size=3)}),
    merge(st.fixed_dictionaries({"const": SCALARS}), some(type=st.sampled_from(["string", "integer", "null"]))),
)
REFERENCES = st.sampled_from([{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y~1z"}, {"$ref": "#"}])
PARTS = st.recursive(st.one_of(LEAVES, LEAVES, LEAVES, REFERENCES), extend, max_leaves=5)
SCHEMAS = st.one_of(
    st.recursive(LEAVES, extend, max_leaves=5),
    st.tuples(PARTS, PARTS, PARTS).map(lambda parts: {**parts[0], "$defs": {"x": parts[1], "y/z": parts[2]}}),
)


#: Where any is allowed, a random model writes little else.
WHITESPACE = st.sampled_from(["compact", "compact", 1, "any"])


@functools.cache
def make_compiler() -> Any:
    """xgrammar's, for the shipped model's vocabulary."""
    return xgr.GrammarCompiler(xgr.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=SIZE, stop_token_ids=[END]))


@functools.cache
def make_tokenizer() -> Any:
    """llguidance's, of the shipped model."""
    return llguidance.hf.from_tokenizer(TOKENIZER, SIZE)


@functools.cache
def list_pieces() -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """(bytes of every token, which of them close something, which of them are not ASCII)."""
    pieces = [make_tokenizer().decode_bytes([token]) for token in range(SIZE)]
    closing = np.array([bool(piece) and not piece.strip(b'"}]</a>') for piece in pieces])
    closing[END] = True
    return pieces, closing, np.array([any(byte > 127 for byte in piece) for piece in pieces])


def compile_spec(kind: Any, text: str, whitespace: str | int) -> tuple[Plan, Any]:
    """The pack's plan of a specification and its grammar, with what vLLM's grammars hold. Raises RefusedError."""
    plan: Plan | None = plan_spec(kind, text)
    refusal = ""
    while plan is not None:
        try:
            if plan.engine == "guidance":
                matcher = engines.compile_guidance(make_tokenizer(), plan, whitespace)
                return plan, SimpleNamespace(ll_matcher=matcher, ll_tokenizer=make_tokenizer())
            compiled = engines.compile_xgrammar(make_compiler(), plan, whitespace)
            little = forces_little(str(compiled.grammar))
            return plan, SimpleNamespace(ctx=compiled, vocab_size=SIZE, forces_little=little)
        except GrammarError as error:
            refusal = str(error)
        plan = plan.fallback
    raise RefusedError(refusal)


class Writer:
    """A random model at temperature 1 under the masks of a grammar, with forced tokens drafted and verified."""

    def __init__(self, grammar: Any, generator: np.random.Generator) -> None:
        self.generator = generator
        self.spellings = Spellings(lambda text: list(TOKENIZER.encode(text, add_special_tokens=False)))
        if hasattr(grammar, "ll_matcher"):
            self.guided = grammar.ll_matcher.deep_copy()
            self.matcher = None
            started = SimpleNamespace(ll_matcher=self.guided, ll_tokenizer=grammar.ll_tokenizer)
        else:
            self.guided, self.matcher = None, xgr.GrammarMatcher(grammar.ctx)
            started = SimpleNamespace(**vars(grammar), matcher=self.matcher)
        self.row = xgr.allocate_token_bitmask(1, SIZE)
        self.state = StateMaker().make(started, END)
        self.written: list[int] = []
        self.num_accepted = 0

    def list_allowed(self) -> np.ndarray:
        """Tokens of the mask."""
        if self.guided is not None:
            if self.guided.is_stopped():
                return np.array([END])
            words = self.row.numpy()
            self.guided.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        else:
            self.matcher.fill_next_token_bitmask(self.row, 0)
        return np.flatnonzero(np.unpackbits(self.row.numpy().view(np.uint8), bitorder="little"))

    def draw(self, allowed: np.ndarray, closes: bool) -> int:
        """A token; what closes is preferred where it is said, or random strings would hardly ever end."""
        _, closing, foreign = list_pieces()
        if closes and closing[allowed].any():
            allowed = allowed[closing[allowed]]
        elif foreign[allowed].any() and self.generator.random() < 0.2:
            # Hardly any of the shipped model's tokens are letters of others.
            allowed = allowed[foreign[allowed]]
        logits = self.generator.normal(0, 2, len(allowed)) + self.generator.gumbel(size=len(allowed))
        return int(allowed[logits.argmax()])

    def write(self, most: int = 120) -> str | None:
        """A text, None where it is not finished in time."""
        while len(self.written) < most:
            drafts = self.find_drafts()
            for draft in [*drafts, None]:
                allowed = self.list_allowed()
                if not len(allowed):
                    return None
                token = self.draw(allowed, len(self.written) > most // 2)
                if token == END:
                    # Both engines have halves of surrogate pairs among their characters, in three bytes like others.
                    return b"".join(list_pieces()[0][token] for token in self.written).decode("utf-8", "surrogatepass")
                accepted = self.guided.consume_token(token) if self.guided else self.matcher.accept_token(token)
                assert accepted, f"token {token} of the mask is not taken after {self.written}"
                self.written.append(token)
                if token != draft:
                    break
                self.num_accepted += 1
        return None

    def find_drafts(self) -> list[int]:
        """Forced tokens; those that are certain are the only ones that their masks allow, and nothing has moved."""
        if self.state is None:
            return []
        before = self.list_allowed()
        forced = find_forced_tokens(self.state, MOST_DRAFTS, self.spellings)
        assert np.array_equal(self.list_allowed(), before)
        if forced.num_certain:
            assert before.tolist() == forced.tokens[:1]
        return forced.tokens


def check(validator: Any, text: str, plan: Plan) -> None:
    # Numbers beyond a float's digits or range: JSON has them, Python's floats and the oracle do not.
    if re.search(r"\d{15}|\d\.\d{12}|[eE][+-]?\d{2}", text):
        return
    value = json.loads(text)
    try:
        is_valid = validator.is_valid(value)
    except RecursionError:
        # A schema that has itself as an alternative, which the oracle follows for ever.
        return
    assert is_valid, (plan.engine, text, [error.message for error in validator.iter_errors(value)])


def compile_or_assume(kind: str, text: str, whitespace: str | int) -> tuple[Plan, Any]:
    try:
        return compile_spec(kind, text, whitespace)
    except RefusedError:
        assume(False)
        raise


def write_texts(grammar: Any, seed: int) -> list[str]:
    """What finished of three texts."""
    generator = np.random.default_rng(seed)
    texts = [Writer(grammar, generator).write() for _ in range(3)]
    return [text for text in texts if text is not None]


def make_validator(schema: Any) -> Any:
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())


@settings(max_examples=EXAMPLES)
@given(SCHEMAS, WHITESPACE, st.integers(0, 2**32))
def test_finished_outputs_validate(schema: Any, whitespace: str | int, seed: int) -> None:
    plan, grammar = compile_or_assume("json", json.dumps(schema), whitespace)
    for text in write_texts(grammar, seed):
        check(make_validator(schema), text, plan)


@settings(max_examples=EXAMPLES // 2)
@given(SCHEMAS, WHITESPACE, st.integers(0, 2**32))
def test_finished_tags_validate(schema: Any, whitespace: str | int, seed: int) -> None:
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}}
    plan, grammar = compile_or_assume("structural_tag", json.dumps(tag), whitespace)
    for text in write_texts(grammar, seed):
        assert text.startswith("<a>")
        assert text.endswith("</a>")
        check(make_validator(schema), text.removeprefix("<a>").removesuffix("</a>"), plan)


def test_the_random_model_is_drafted_for_and_finishes() -> None:
    """What the properties above look at is there: finished texts, accepted drafts, letters beyond ASCII."""
    schema = {
        "type": "object",
        "properties": {"größe": {"enum": ["groß", "klein"]}, "name": {"type": "string"}, "next": {"$ref": "#"}},
        "required": ["größe", "name"],
        "additionalProperties": False,
    }
    _, grammar = compile_spec("json", json.dumps(schema), "compact")
    generator = np.random.default_rng(1)
    writers = [Writer(grammar, generator) for _ in range(10)]
    texts = [writer.write() for writer in writers]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= 5
    assert sum(writer.num_accepted for writer in writers) >= 10
    assert any(not json.loads(text)["name"].isascii() for text in finished)
