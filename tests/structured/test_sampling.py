# SPDX-License-Identifier: Apache-2.0
"""Whatever a random model writes under the masks of a generated schema is valid, or not finished."""

from __future__ import annotations

import json
import os
import random
import re
from typing import Any

import jsonschema
import numpy as np
import xgrammar as xgr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.structured.acceptance import END, find_plan
from vllm_ext.structured.errors import RefusedError

NAMES = st.sampled_from(["a", "b", "title", "description", "k/1", 'q"'])
WORDS = st.sampled_from(["", "red", "x y", "\u00e9", '"', "\\", "a/b"])
SCALARS = st.one_of(st.integers(-30, 30), WORDS, st.booleans(), st.none())
PATTERNS = st.sampled_from(
    ["^[a-c]+$", "b", "^x", "^.{1,3}$", '^[^x]"$', "^(ab|c){1,2}$", "\\d", "^\\s*$", "^a|b$", '^["\\\\]+$']
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
SCHEMAS = st.recursive(LEAVES, extend, max_leaves=5)


def sample(grammar: Any, engine: str, generator: random.Random, most: int = 160) -> str | None:
    """A text of uniformly random bytes under the masks; None where it is not finished in time.

    In the second half what closes is preferred, or random strings would hardly ever end.
    """
    written: list[int] = []
    is_guided = engine == "guidance"
    matcher = grammar.deep_copy() if is_guided else xgr.GrammarMatcher(grammar)
    mask = xgr.allocate_token_bitmask(1, END + 1)
    for step in range(most):
        if is_guided:
            if matcher.is_stopped():
                return bytes(written).decode()
            allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        else:
            matcher.fill_next_token_bitmask(mask, 0)
            allowed = mask.numpy().view(np.uint8)[0]
        tokens = np.flatnonzero(np.unpackbits(allowed, bitorder="little")[: END + 1])
        if not len(tokens):
            return None
        # Bytes that belong to longer characters come in any order from a random model, which is no text.
        tokens = np.array([token for token in tokens if token < 128 or token == END] or tokens)
        closing = [token for token in tokens if token == END or token in b'"}]']
        token = int(generator.choice(closing if closing and step > most // 2 else list(tokens)))
        if token == END:
            return bytes(written).decode()
        written.append(token)
        accepted = matcher.consume_token(token) if is_guided else matcher.accept_token(token)
        assert accepted, f"a token that the mask allows is not taken after {bytes(written)!r}"
    return None


@settings(max_examples=400 if os.environ.get("VLLM_EXT_EXAMPLES") == "explore" else 40)
@given(SCHEMAS, st.integers(0, 2**32))
def test_finished_outputs_validate(schema: Any, seed: int) -> None:
    try:
        plan, grammar = find_plan(schema)
    except RefusedError:
        assume(False)
    generator = random.Random(seed)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for _ in range(4):
        text = sample(grammar, plan.engine, generator)
        # Numbers beyond a float's digits or range: JSON has them, Python's floats and the oracle do not.
        if text is None or re.search(r"\d{15}|\d\.\d{12}|[eE][+-]?\d{2}", text):
            continue
        value = json.loads(text)
        assert validator.is_valid(value), (plan.engine, text, [error.message for error in validator.iter_errors(value)])
