# SPDX-License-Identifier: Apache-2.0
"""What compiling a grammar will cost, estimated from its text alone: no engine sees what is hopeless.

The unit is a state of xgrammar's automaton, about one for each character that a grammar spells out. A state that takes
most characters costs as much as WIDE others, because all tokens are looked at (15 ms of a core with 128,000 tokens,
measured). The estimate is not exact and need not be. Up to PLAIN_STATES a grammar compiles where the request is served;
above, a killable process tries first (compile_worker.py), and above MAX_STATES xgrammar is not asked. No vllm import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_ext.structured.capabilities import list_children
from vllm_ext.structured.errors import RefusedError

#: Longest text of a specification, in bytes. Larger ones are refused before they are parsed.
MAX_SPEC_BYTES = 2**19
#: Levels of objects and arrays, as vLLM limits them, and what a structural tag may wrap around a schema.
MOST_LEVELS = 64
TAG_LEVELS = 16

#: Compiles in about a second at most with a vocabulary of 128k, mostly in tens of milliseconds, without a try.
PLAIN_STATES = 2_000
#: States that a character class, or a place of a string of limited length, counts for.
WIDE = 20
#: Longest repeat that xgrammar writes out; longer ones it counts.
_UNROLLED = 128
#: llguidance compiles as it goes, so what it is given costs less at the start.
PLAIN_GUIDANCE_STATES = 20_000
#: Above it xgrammar takes seconds; the request goes to llguidance, or is refused.
MAX_STATES = 40_000
MAX_GUIDANCE_STATES = 2_000_000

#: One state for a number, a free string and the like.
_SCALAR = 8


def estimate_schema(node: Any) -> int:
    """States of a normalized JSON schema; nested bounded arrays multiply. Definitions and equal lengths count once.

    Optional properties count by pairs, as any may follow any that is before it.
    """
    return _estimate(node, set())


def _estimate(node: Any, lengths: set[tuple[int, int]]) -> int:
    """`lengths` holds the limits that were counted before."""
    if isinstance(node, bool):
        return _SCALAR
    total = _SCALAR
    for value in [*node.get("enum", ()), *([node["const"]] if "const" in node else ())]:
        total += _measure(value)
    if "pattern" in node:
        total += estimate_regex(node["pattern"])
    limits = (node.get("minLength", 0), node.get("maxLength", 0))
    if limits not in lengths:
        lengths.add(limits)
        total += WIDE * min(max(limits), _UNROLLED) + max(limits) // 10
    required = set(node.get("required", ()))
    properties: Mapping[str, Any] = node.get("properties", {})
    optional = len(properties) - len(required & properties.keys())
    total += sum(map(len, properties)) + optional * optional // 2
    total += sum(estimate_regex(pattern) for pattern in node.get("patternProperties", {}))
    for place, child in list_children(node):
        size = _estimate(child, lengths)
        if place == "items":
            size *= max(1, node.get("maxItems", node.get("minItems", 1)))
        total = min(total + size, 2**53)
    return total


def _measure(value: Any) -> int:
    """Characters that a constant is written with, without writing it."""
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, dict):
        return sum(len(name) + 4 + _measure(each) for name, each in value.items())
    if isinstance(value, list):
        return sum(1 + _measure(each) for each in value)
    return 8


_CLASSES = frozenset((".", "\\d", "\\D", "\\w", "\\W", "\\s", "\\S"))


def estimate_regex(pattern: str) -> int:
    """States of a regular expression: repeats with counts multiply what they repeat, nested ones each other.

    Reads any text; what is no regular expression is estimated like one. The search below can read nothing in two
    ways: going back far would take quadratic time, in one call that no other thread can interrupt. (Possessive parts
    would say so, but Python 3.11 before 3.11.5 misreads them.)
    """
    stack: list[list[int]] = [[0, 0]]  # states of the open groups, and of the last item of each
    for token in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)|\{(\d*)(?:(,)(\d*))?\}|.", pattern, re.DOTALL):
        text = token[0]
        if text == "(":
            stack.append([0, 0])
        elif text == ")" and len(stack) > 1:
            size = sum(stack.pop())
            stack[-1] = [sum(stack[-1]), size]
        elif text[0] == "{" and (token[1] or token[3]):
            times = int(token[3] or token[1] or 1) if len(token[3] or token[1]) < 10 else 10**9
            stack[-1][1] = min(stack[-1][1] * max(1, times), 2**53)
        elif text not in "*+?|":
            is_wide = text in _CLASSES or text[0] == "["
            stack[-1] = [sum(stack[-1]), WIDE if is_wide else 1]
    return min(sum(map(sum, stack)), 2**53)


def estimate_text(text: str) -> int:
    """States of a grammar in EBNF or Lark: its characters, repeated as counts in it say."""
    return estimate_regex(text)


def estimate_choices(choices: list[str]) -> int:
    """States of a list of alternatives."""
    return sum(len(choice) + 1 for choice in choices)


def check_levels(value: Any, most: int, what: str) -> None:
    """Refuse JSON that is nested deeper than so many objects and arrays. Raises RefusedError."""
    level = [value]
    for _ in range(most + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise RefusedError(f"the {what} nests objects and arrays more than {most} levels deep")
