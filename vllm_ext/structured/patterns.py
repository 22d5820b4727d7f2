# SPDX-License-Identifier: Apache-2.0
"""Regular expressions as xgrammar 0.2.8 reads them: which patterns mean the same to it as to JSON Schema.

All searches here can read nothing in two ways: going back far would take quadratic time, in one call that no other
thread can interrupt. (Possessive parts would say so, but Python 3.11 before 3.11.5 misreads them.) No vllm import.
"""

from __future__ import annotations

import re

#: What patterns of xgrammar's may consist of, between ^ and $: no quote, no backslash as a character, no control
#: character (it would write them into JSON as they are), no look-around, no anchor inside, no class by property. Not
#: \S, nor \s left out: the spaces of xgrammar are ASCII's.
_PLAIN = re.compile(
    r"\^(?:[^\\\[\](){}^$\"\x00-\x1f\x7f]|\\[dDwWs.\-/+*?()\[\]{}|^$@#:,;=!%&~<>_]|\{\d*(?:,\d*)?\}|\(\?:|\((?!\?)|\)"
    r"|\[(?:[^\\\]\[\"^\x00-\x1f\x7f]|\\[dDwWs.\-/+*?()\[\]{}|^$@#:,;=!%&~<>_])+\]"
    r"|\[\^(?:[^\\\]\[\"\x00-\x1f\x7f]|\\[dDwW.\-/+*?()\[\]{}|^$@#:,;=!%&~<>_])+\])*\$"
)


def hide_classes(pattern: str) -> str:
    """A regular expression with x for its escapes and character classes; one that is not closed goes to the end."""
    return re.sub(r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)", "x", pattern, flags=re.DOTALL)


def is_plain_pattern(pattern: str) -> bool:
    """Whether xgrammar reads a pattern as JSON Schema does: `^...$`, of plain parts, the anchors for all of it."""
    return _PLAIN.fullmatch(pattern) is not None and not has_alternatives(pattern)


def has_alternatives(pattern: str) -> bool:
    """Whether a regular expression as a whole is one of several, so that an anchor is of one of these alone."""
    depth = 0
    for character in hide_classes(pattern):
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            return True
    return False


def allows_most_characters(pattern: str) -> bool:
    """Whether a pattern names what it leaves out, or nothing: then quotes and backslashes are among what it allows."""
    found = re.findall(r"\\.|\[\^?|.", pattern, re.DOTALL)
    is_inside = False
    for text in found:
        if text[0] == "[":
            is_inside = True
            if text == "[^":
                return True
        elif text == "]":
            is_inside = False
        elif text in ("\\D", "\\W", "\\S") or (text == "." and not is_inside):
            return True
    return False


#: Characters that stand for themselves at the start of a pattern, and those that say how often one comes.
_LITERAL = re.compile(r"\^((?:[A-Za-z0-9 _@#:,;=!%&~<>/'-]|\\[.\-/+*?()\[\]{}|^$])*)([*?{+]?)")


def read_beginning(pattern: str) -> str:
    """Characters with which all strings of a pattern begin; empty where its text does not show it."""
    found = _LITERAL.match(pattern)
    if found is None or has_alternatives(pattern):
        return ""
    text = re.sub(r"\\(.)", r"\1", found[1])
    # The last one may be repeated, or be missing.
    return text[:-1] if found[2] else text


#: Escapes that are places or classes elsewhere, and letters in xgrammar.
_OTHER_ESCAPES = frozenset("AZzhHKGbBRX")


def find_regex_gap(text: str) -> str:
    """What xgrammar 0.2.8 reads otherwise in a regular expression, in a few words; empty where it does not."""
    inner = hide_classes(text)
    if "^" in inner[1:] or "$" in inner[:-1]:
        return "xgrammar ignores ^ and $ inside a regex"
    if other := sorted(_OTHER_ESCAPES.intersection(re.findall(r"\\(.)", text, re.DOTALL))):
        return f"xgrammar takes \\{other[0]} for a letter"
    return "xgrammar has no classes by name, as [:alpha:]" if re.search(r"\[:\^?[a-z]+:\]", text) else ""
