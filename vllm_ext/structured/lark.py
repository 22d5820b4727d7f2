# SPDX-License-Identifier: Apache-2.0
"""Pieces of llguidance's Lark: names for terminals and rules, texts that leave others out, regexes, JSON schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Any text, as a terminal.
ANY_TEXT = "/(?s:.*)/"
_NOTHING = '""'


class Lark:
    """A grammar that is being written; equal parts get one name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._lines: list[str] = []

    def add_terminal(self, body: str) -> str:
        """The name of a terminal, which is one lexeme."""
        return self._add(f": {body}", "T")

    def add_rule(self, body: str, is_lazy: bool = False) -> str:
        """The name of a rule. is_lazy: its body is one lexeme, that ends where it first can."""
        return self._add(f"[lazy]: {body}" if is_lazy else f": {body or _NOTHING}", "r")

    def _add(self, text: str, prefix: str) -> str:
        if text not in self._names:
            self._names[text] = f"{prefix}{len(self._names)}"
            self._lines.append(self._names[text] + text)
        return self._names[text]

    def finish(self, body: str) -> str:
        """The whole grammar, whose texts are those of `body`."""
        return "\n".join(["%llguidance {}", f"start: {body or _NOTHING}", *self._lines, ""])


def exclude(text: str, excludes: Iterable[str]) -> str:
    """A terminal's body: a text without these in it. Empty ones are left out, as every text has them."""
    found = "|".join(escape_regex(each) for each in dict.fromkeys(excludes) if each)
    return f"{text} & ~/(?s:.*)({found})(?s:.*)/" if found else text


def split_added(text: str, added: Mapping[str, int]) -> list[str | int]:
    """A text as its parts: characters, and ids of added tokens, the longest first where several begin in a place."""
    # Only those that are there: a search for hundreds would take long in a text that only begins like them.
    found = sorted((each for each in added if each in text), key=len, reverse=True)
    if not found:
        return [text] if text else []
    parts = re.split(f"({'|'.join(map(re.escape, found))})", text)
    return [added.get(part, part) for part in parts if part]


def escape_regex(text: str) -> str:
    """A regular expression of exactly this text, which may stand between slashes."""
    return "".join(each if each.isalnum() and each.isascii() else f"\\x{{{ord(each):x}}}" for each in text)


def write_regex(pattern: str) -> str:
    """A regular expression as a terminal's body. Anchors at its ends say what a terminal is anyway."""
    if pattern.startswith("^"):
        pattern = pattern[1:]
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern = pattern[:-1]
    return f"/{write_ascii_classes(pattern)}/" if pattern else '""'


def write_ascii_classes(pattern: str) -> str:
    """A regular expression as xgrammar reads it, for between slashes: `\\d`, `\\w` and `\\s` are ASCII's."""
    kinds = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\x0b\x0c"}
    written, is_inside = [], False
    for found in re.finditer(r"\\(.)|\[\^?|\]|/|.", pattern, re.DOTALL):
        text, letter = found[0], found[1] or ""
        if letter in kinds:
            text = kinds[letter] if is_inside else f"[{kinds[letter]}]"
        elif letter in ("D", "W") and not is_inside:
            text = f"[^{kinds[letter.lower()]}]"
        elif text[0] == "[":
            is_inside = True
        elif text == "]":
            is_inside = False
        elif letter and letter in "#:,;=!%&~<>_@":
            text = f"\\x{{{ord(letter):x}}}"
        elif text in "/\n":
            # Both would end it.
            text = "\\/" if text == "/" else "\\n"
        written.append(text)
    return "".join(written)


def quote(text: str) -> str:
    """A text in Lark."""
    # As in JSON, but for one control character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_json(schema: Any, options: Mapping[str, Any]) -> str:
    """A JSON schema in Lark. options: llguidance's `x-guidance`, which it reads at the top of a schema."""
    node = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    return f"%json {json.dumps({'x-guidance': dict(options), **node})}"


def limit_whitespace(most: int) -> dict[str, Any]:
    """`x-guidance` for so many characters of whitespace behind commas and colons, and none elsewhere."""
    # As a pattern to skip, it could follow itself (1.7): so it is part of the separators.
    space = f"[\\x20\\x0A\\x0D\\x09]{{0,{most}}}"
    return {"whitespace_flexible": False, "item_separator": f",{space}", "key_separator": f":{space}"}
