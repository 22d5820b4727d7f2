# SPDX-License-Identifier: Apache-2.0
"""How long a forced text can get, from xgrammar's own print of a grammar: it has no limit of its own.

`find_jump_forward_string` (xgrammar 0.2.8) follows a grammar as long as there is one way, in one call: of
`root ::= "a" root`, or of a schema that needs itself, it never returns. A text that is forced begins every text of the
language, so it is no longer than the shortest of them. No vllm import.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict

#: Characters that a rule of a grammar may force; the scheduler does not look at grammars with more.
MOST_FORCED = 4096
#: Longest print that is read; it takes some tens of milliseconds.
_MOST_PRINTED = 200_000

_RULE = re.compile(r"^(\S+) ::= ", re.MULTILINE)
_PART = re.compile(
    r'"(?P<text>(?:\\.|[^"\\])*)"|(?P<set>\[(?:\\.|[^\]\\])*\])(?P<star>\*?)'
    r"|(?P<look>\(=)|(?P<name>[\w.\-]+)(?:\{(?P<times>\d+),[^}]*\})?|(?P<bar>\|)",
    re.DOTALL,
)


def forces_little(printed: str) -> bool:
    """Whether no rule of a grammar can force more than MOST_FORCED characters. printed: str(xgrammar.Grammar)."""
    return len(printed) <= _MOST_PRINTED and max(find_shortest(printed).values(), default=0) <= MOST_FORCED


def find_shortest(printed: str) -> dict[str, float]:
    """Length of the shortest text of every rule of a grammar; infinite where a rule has none.

    Source: Knuth, A generalization of Dijkstra's algorithm (1977), for grammars.
    """
    heads = list(_RULE.finditer(printed))
    alternatives: list[tuple[str, float, dict[str, int]]] = []
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = printed[head.end() : following.start() if following else len(printed)]
        alternatives += [(head[1], *alternative) for alternative in _read_alternatives(body)]
    shortest = dict.fromkeys((head[1] for head in heads), math.inf)
    users = defaultdict(list)
    missing, sizes, queue = [], [], []
    for place, (rule, size, uses) in enumerate(alternatives):
        missing.append(len(uses))
        sizes.append(size)
        for name in uses:
            users[name].append(place)
        if not uses:
            queue.append((size, rule))
    heapq.heapify(queue)
    while queue:
        size, rule = heapq.heappop(queue)
        if shortest.get(rule, 0.0) <= size:
            continue
        shortest[rule] = size
        for place in users[rule]:
            user, _, uses = alternatives[place]
            sizes[place] += size * uses[rule]
            missing[place] -= 1
            if not missing[place]:
                heapq.heappush(queue, (sizes[place], user))
    return shortest


def _read_alternatives(body: str) -> list[tuple[float, dict[str, int]]]:
    """(characters, times of each rule) of the ways of a rule; what is no list of these has texts of any length."""
    if body.startswith("TagDispatch("):
        return [(0.0, {})]
    if body.startswith("Regex("):
        # Counts in it may multiply; the estimate of its cost (cost.py) has refused what is large.
        return [(0.0, {})]
    found: list[tuple[float, dict[str, int]]] = []
    size, uses = 0.0, dict[str, int]()
    for part in _PART.finditer(body):
        if part["look"]:
            break
        if part["bar"]:
            found.append((size, uses))
            size, uses = 0.0, {}
        elif part["text"] is not None:
            size += len(part["text"])
        elif part["set"]:
            size += not part["star"]
        elif (times := int(part["times"] or 1)) > 0:
            uses[part["name"]] = uses.get(part["name"], 0) + times
    return [*found, (size, uses)]
