# SPDX-License-Identifier: Apache-2.0
"""A structural tag as one Lark grammar for llguidance, whose `%json` honours what xgrammar does not.

llguidance splits text into lexemes as it comes and never goes back. So free text is one lexeme with what ends it, and
lazy: it stops where the first end or trigger does. Tokens that a tokenizer adds ("<tool_call>" in many) are no text
to llguidance: they are named by their number, beside the same characters spelled out where a trigger begins.

No vllm import. Source of the forms: xgrammar 0.2.8, structural_tag.py; a form that has no Lark is refused by pointer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.lark import (
    ANY_TEXT,
    Lark,
    exclude,
    limit_whitespace,
    quote,
    split_added,
    write_json,
    write_regex,
)
from vllm_ext.structured.xml_arguments import write_arguments


def write_tag_grammar(
    tag: Mapping[str, Any], json_options: Mapping[str, Any] | None = None, added: Mapping[str, int] | None = None
) -> str:
    """Lark of a structural tag, as xgrammar has it or in the older form with `structures` and `triggers`.

    tag: its schemas as `dialects.write_for_guidance` leaves them. json_options: llguidance's `x-guidance` for them.
    added: ids of the tokens that the tokenizer adds, by their text. Raises RefusedError with the JSON pointer of what
    llguidance cannot be told.
    """
    writer = _Writer(json_options or {}, added or {})
    try:
        if "structures" in tag:
            body = writer.write(read_older_form(tag), "", ())
        else:
            body = writer.write(tag["format"], "/format", ())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(f"the structural tag is none of xgrammar's: {type(error).__name__} {error}") from error
    written = writer.lark.finish(body)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        raise RefusedError("the structural tag holds half a surrogate pair") from error
    return written


def read_older_form(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The `triggered_tags` that a tag with `structures` and `triggers` equals."""
    return {
        "type": "triggered_tags",
        "triggers": tag["triggers"],
        "tags": [
            {
                "begin": each["begin"],
                "content": {"type": "json_schema", "json_schema": each["schema"]},
                "end": each["end"],
            }
            for each in tag["structures"]
        ],
    }


#: What directly follows a part: one of these texts; `()` at the end of the output. None: what is no text follows.
Ends = tuple[str, ...] | None


class _Writer:
    """Each `write` gives an expression of its part and of one of the texts that follow it."""

    def __init__(self, json_options: Mapping[str, Any], added: Mapping[str, int]) -> None:
        self._json_options, self._added = json_options, added
        self.lark = Lark()

    def write(self, node: Any, pointer: str, ends: Ends) -> str:
        method = _METHODS.get(node["type"])
        if method is None:
            raise RefusedError(f"{pointer}: llguidance is not given {node['type']!r}")
        return method(self, node, pointer, ends)

    def _then(self, body: str, ends: Ends) -> str:
        return _chain(body, self._write_ends(ends)) if ends else body

    def _write_ends(self, ends: tuple[str, ...]) -> str:
        return _write_any([self._write_text(end) for end in ends])

    def _write_text(self, text: str) -> str:
        """A constant text; its added tokens by number, as a model writes them."""
        return self._write_parts(split_added(text, self._added))

    @staticmethod
    def _write_parts(parts: Sequence[str | int]) -> str:
        return " ".join(f"<[{part}]>" if isinstance(part, int) else quote(part) for part in parts)

    def _split_at_added(self, text: str) -> tuple[str, str] | None:
        """(characters before the first added token, expression of it and the rest); None where a text has none."""
        parts = split_added(text, self._added)
        place = next((i for i, part in enumerate(parts) if isinstance(part, int)), None)
        if place is None:
            return None
        return "".join(str(part) for part in parts[:place]), self._write_parts(parts[place:])

    def write_const(self, node: Any, pointer: str, ends: Ends) -> str:
        return self._then(self._write_text(node["value"]), ends)

    def write_any_text(self, node: Any, pointer: str, ends: Ends) -> str:
        """Free text up to the first end, which is spelled out or begins with an added token."""
        if node.get("max_tokens") is not None:
            raise RefusedError(f"{pointer}/max_tokens: llguidance is not given it")
        if ends is None or not all(ends):
            raise RefusedError(f"{pointer}: llguidance would not see where the text ends")
        most = node.get("max_chars")
        text = ANY_TEXT if most is None else f"/(?s:.{{0,{int(most)}}})/"
        text = self.lark.add_terminal(exclude(text, node.get("excludes", ())))
        if not ends:
            return text
        options = []
        for end in ends:
            options.append(self.lark.add_rule(f"{text} {quote(end)}", is_lazy=True))
            if (found := self._split_at_added(end)) is not None:
                options.append(self._join(self.lark.add_terminal(exclude(text, ends)), *found))
        return _write_any(options)

    def _join(self, text: str, head: str, tail: str) -> str:
        """Free text, characters and an added token: greedy text would take the characters, so both are one lexeme."""
        return f"{self.lark.add_terminal(f'{text} {quote(head)}') if head else text} {tail}"

    def write_json_schema(self, node: Any, pointer: str, ends: Ends) -> str:
        for key in ("any_order", "excludes"):
            if node.get(key):
                raise RefusedError(f"{pointer}/{key}: llguidance is not given it")
        style, options = node.get("style") or "json", dict(self._json_options)
        if (most := node.get("max_whitespace_cnt")) is not None:
            options |= limit_whitespace(int(most))
        if style == "json":
            return self._then(self.lark.add_rule(write_json(node["json_schema"], options)), ends)
        body = write_arguments(self.lark, node["json_schema"], style, options, self._added, f"{pointer}/json_schema")
        return self._then(body, ends)

    def write_qwen(self, node: Any, pointer: str, ends: Ends) -> str:
        return self.write_json_schema({**node, "style": "qwen_xml"}, pointer, ends)

    def write_regex(self, node: Any, pointer: str, ends: Ends) -> str:
        terminal = self.lark.add_terminal(write_regex(node["pattern"]))
        if not ends or not all(ends) or any(self._split_at_added(end) for end in ends):
            return self._then(terminal, ends)
        # As one lexeme: a regex that can go on over its end would never stop.
        return _write_any([self.lark.add_rule(f"{terminal} {quote(end)}", is_lazy=True) for end in ends])

    def write_sequence(self, node: Any, pointer: str, ends: Ends) -> str:
        written: list[str] = []
        for i, element in reversed(list(enumerate(node["elements"]))):
            if element["type"] == "const_string":
                # What comes before it writes it, as its end.
                ends = tuple(element["value"] + end for end in ends or ("",))
                continue
            written.insert(0, self.write(element, f"{pointer}/elements/{i}", ends))
            ends = None
        if ends:
            written.insert(0, self._write_ends(ends))
        return _chain(*written)

    def write_or(self, node: Any, pointer: str, ends: Ends) -> str:
        elements = enumerate(node["elements"])
        return _write_any([self.write(each, f"{pointer}/elements/{i}", ends) for i, each in elements])

    def write_repeated(self, node: Any, pointer: str, ends: Ends) -> str:
        suffix = {"optional": "?", "plus": "+", "star": "*"}.get(node["type"])
        if suffix is None:
            least, most = int(node["min"]), int(node["max"])
            suffix = f"{{{least},{'' if most < 0 else most}}}"
        return self._then(f"({self.write(node['content'], f'{pointer}/content', None)}){suffix}", ends)

    def write_tag(self, node: Any, pointer: str, ends: Ends) -> str:
        begin = self._write_text(_read_text(node, "begin", pointer))
        return _chain(begin, self._write_inside(node, pointer, ends))

    def _write_inside(self, node: Any, pointer: str, ends: Ends) -> str:
        """A tag behind its begin."""
        given = node["end"]
        if isinstance(given, list):
            own = tuple(_read_text({"end": end}, "end", pointer) for end in given)
        else:
            own = (_read_text(node, "end", pointer),)
        if own == ("",):
            return self.write(node["content"], f"{pointer}/content", ends)
        return self._then(self.write(node["content"], f"{pointer}/content", own), ends)

    def write_separated(self, node: Any, pointer: str, ends: Ends) -> str:
        tags = [self.write_tag(tag, f"{pointer}/tags/{i}", None) for i, tag in enumerate(node["tags"])]
        body = item = self.lark.add_rule(_write_any(tags))
        if not node.get("stop_after_first"):
            body = f"{item} ({_chain(self._write_text(node['separator']), item)})*"
        return self._then(body if node.get("at_least_one") else f"({body})?", ends)

    def write_triggered(self, node: Any, pointer: str, ends: Ends) -> str:
        if ends != ():
            raise RefusedError(f"{pointer}: llguidance would not see where the text ends")
        triggers: list[str] = node["triggers"]
        text = self.lark.add_terminal(exclude(ANY_TEXT, node.get("excludes", ())))
        free = self.lark.add_terminal(exclude(text, triggers))
        direct, found = [], []
        for i, tag in enumerate(node["tags"]):
            where = f"{pointer}/tags/{i}"
            begin = _read_text(tag, "begin", where)
            trigger = next((each for each in triggers if each and begin.startswith(each)), None)
            if trigger is None:
                raise RefusedError(f"{where}/begin: none of the triggers begins it")
            inside = self.lark.add_rule(self._write_inside(tag, where, None))
            direct.append(_chain(self._write_text(begin), inside))
            head = self.lark.add_rule(f"{text} {quote(trigger)}", is_lazy=True)
            found.append(_chain(head, self._write_text(begin[len(trigger) :]), inside))
            split = self._split_at_added(begin)
            if split is not None and len(split[0]) < len(trigger):
                found.append(f"{self._join(free, *split)} {inside}")
        call = self.lark.add_rule(_write_any(found))
        if not node.get("at_least_one"):
            return f"({call} | {free})" if node.get("stop_after_first") else f"{call}* {free}"
        first = self.lark.add_rule(_write_any(direct))
        return first if node.get("stop_after_first") else f"{first} {call}* {free}"


_METHODS: Mapping[str, Callable[[_Writer, Any, str, Ends], str]] = {
    "const_string": _Writer.write_const,
    "any_text": _Writer.write_any_text,
    "json_schema": _Writer.write_json_schema,
    "qwen_xml_parameter": _Writer.write_qwen,
    "regex": _Writer.write_regex,
    "sequence": _Writer.write_sequence,
    "or": _Writer.write_or,
    **dict.fromkeys(("optional", "plus", "star", "repeat"), _Writer.write_repeated),
    "tag": _Writer.write_tag,
    "tags_with_separator": _Writer.write_separated,
    "triggered_tags": _Writer.write_triggered,
}


def _chain(*parts: str) -> str:
    """One part behind the other; empty ones say nothing."""
    return " ".join(filter(None, parts))


def _write_any(options: Sequence[str]) -> str:
    written = [option or '""' for option in options]
    return options[0] if len(options) == 1 else f"({' | '.join(written)})"


def _read_text(node: Mapping[str, Any], key: str, pointer: str) -> str:
    if not isinstance(node[key], str):
        raise RefusedError(f"{pointer}/{key}: llguidance is given tokens by their text only")
    text: str = node[key]
    return text
