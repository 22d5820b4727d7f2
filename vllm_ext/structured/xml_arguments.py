# SPDX-License-Identifier: Apache-2.0
"""Arguments of a tool call in XML, as Qwen3-Coder and others write them, in Lark: strings raw, other values as JSON.

    <parameter=name>value</parameter>

A raw string ends where its parser (vllm/parser/qwen3.py) sees an end, and the parser takes one newline off both sides.
So constrained strings have neither inside. A value is raw or JSON: llguidance cannot keep both open in one place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vllm_ext.structured.capabilities import escape
from vllm_ext.structured.dialects import write_for_guidance
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.keywords import LEAP_DAY
from vllm_ext.structured.lark import ANY_TEXT, Lark, escape_regex, split_added, write_ascii_classes, write_json
from vllm_ext.structured.patterns import has_alternatives, hide_classes, is_plain_pattern

#: (before a name, behind it, behind a value) by the styles that llguidance is given.
STYLES: Mapping[str, tuple[str, str, str]] = {
    "qwen_xml": ("<parameter=", ">", "</parameter>"),
    "minimax_xml": ('<parameter name="', '">', "</parameter>"),
}
#: What ends a value or a call for the parser, wherever it stands.
_BREAKS = r"<[ \n\t\r]*\/?[ \n\t\r]*parameter|<\/function>|<\/invoke>"
_SPACE = r"[ \n\t\r]*"
#: Names that need no escapes.
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")

_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
#: Formats as regular expressions (RFC 3339, 4122, 2673): no narrower than most are written, and not wider.
FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])",
    "email": r"[A-Za-z0-9_+\-]+(?:\.[A-Za-z0-9_+\-]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
    r"(?:\.[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)+",
}
#: Values without keywords as regular expressions, which may be told from raw strings.
_PLAIN_TYPES: Mapping[str, str] = {
    "null": "null",
    "boolean": "true|false",
    "integer": "-?(?:0|[1-9][0-9]*)",
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+\-]?[0-9]+)?",
}


def write_arguments(
    lark: Lark, schema: Any, style: str, options: Mapping[str, Any], added: Mapping[str, int], pointer: str
) -> str:
    """The expression of a call's arguments, in declared order.

    schema: of `normalize.normalize_schema`'s dialect. options: `x-guidance` of the values that are JSON. added: tokens
    that the tokenizer adds, by text. Raises RefusedError by the JSON pointer.
    """
    if style not in STYLES:
        raise RefusedError(f"{pointer}: llguidance is not given the style {style!r}")
    if any(isinstance(part, int) for text in STYLES[style] for part in split_added(text, added)):
        raise RefusedError(f"{pointer}: {style} has tokens of their own in this tokenizer")
    return _Arguments(lark, schema, STYLES[style], options, pointer).write()


class _Arguments:
    def __init__(
        self, lark: Lark, schema: Any, marks: tuple[str, str, str], options: Mapping[str, Any], pointer: str
    ) -> None:
        self._lark, self._schema, self._marks, self._options, self._pointer = lark, schema, marks, options, pointer
        self._definitions: Mapping[str, Any] = schema.get("$defs", {}) if isinstance(schema, dict) else {}

    def write(self) -> str:
        node = self._follow(self._schema)
        if node in (True, {}):
            node = {"type": "object"}
        if other := sorted(set(node) - {"type", "properties", "required", "additionalProperties", "$defs"}):
            self._refuse("", f"llguidance is not given {other[0]!r} for arguments in XML")
        if node.get("type") != "object":
            self._refuse("", "arguments in XML are an object")
        # As elsewhere: what declares properties and does not speak of others has no others.
        required, others = node.get("required", ()), node.get("additionalProperties", "properties" not in node)
        properties = {**node.get("properties", {})}
        for name in required:
            properties.setdefault(name, node.get("additionalProperties", True))
        written = []
        for name, value in properties.items():
            where = f"/properties/{escape(name)}"
            if not _NAME.fullmatch(name):
                self._refuse(where, "llguidance is not given such a name in XML")
            if value is False and name not in required:
                continue
            argument = self._write_argument(escape_regex(name), value, where)
            written.append(argument if name in required else f"({argument})?")
        if others is not False:
            # No declared name: as another one, its value would be under another schema.
            declared = "|".join(map(escape_regex, properties))
            name = self._lark.add_terminal("/[A-Za-z_][A-Za-z0-9_]*/" + (f" & ~/({declared})/" if declared else ""))
            written.append(f"({self._write_argument(name, others, '/additionalProperties', is_name=True)})*")
        return " ".join(written) or '""'

    def _write_argument(self, name: str, value: Any, where: str, is_name: bool = False) -> str:
        """name: a regular expression, or with is_name that of a terminal."""
        before, behind, end = map(escape_regex, self._marks)
        # A newline at both sides is no part of the value; spaces that follow greedily are one lexeme with the mark.
        if is_name:
            begin = self._lark.add_terminal(f"/{_SPACE}{before}/ {name} /{behind}\\n?/")
        else:
            begin = self._lark.add_terminal(f"/{_SPACE}{before}{name}{behind}\\n?/")
        raw, schemas = self._list_values(value, where, 0)
        if raw and schemas:
            self._refuse(where, "llguidance cannot tell a raw string from JSON there")
        if raw:
            texts = self._lark.add_terminal(" | ".join(f"({each})" for each in dict.fromkeys(raw)))
            value = self._lark.add_rule(f"{texts} /\\n?{end}/", is_lazy=True)
            return f"{begin} {value}"
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        node = {**schema, "$defs": self._definitions} if self._definitions else schema
        close = self._lark.add_terminal(f"/\\n?{end}/")
        return f"{begin} {self._lark.add_rule(write_json(write_for_guidance(node), self._options))} {close}"

    def _list_values(self, node: Any, where: str, depth: int) -> tuple[list[str], list[Any]]:
        """(terminals of raw values, schemas of values in JSON) that a schema allows."""
        given, node = node, self._follow(node)
        if depth > 8:
            self._refuse(where, "references go too deep")
        if node in (True, {}):
            return [exclude_breaks(ANY_TEXT)], []
        if node is False:
            self._refuse(where, "it allows no value")
        if "anyOf" in node and not set(node) - {"anyOf", "$defs"}:
            found = [self._list_values(each, where, depth + 1) for each in node["anyOf"]]
            raw, schemas = ([each for part in parts for each in part] for parts in zip(*found, strict=True))
            if exclude_breaks(ANY_TEXT) in raw:
                return [exclude_breaks(ANY_TEXT)], []
            if raw and schemas:
                plain = [_PLAIN_TYPES.get(each.get("type", "")) for each in schemas if set(each) == {"type"}]
                if len(plain) == len(schemas) and None not in plain:
                    return [*raw, *(f"/{each}/" for each in plain)], []
            return raw, schemas
        if "const" in node or "enum" in node:
            values = node["enum"] if "enum" in node else [node["const"]]
            if not any(isinstance(value, str) for value in values):
                return [], [given]
            return [self._write_constant(value, where) for value in values], []
        if node.get("type") == "string":
            return [self._write_string(node, where)], []
        if "allOf" in node or "type" not in node:
            self._refuse(where, "llguidance is not told whether it is a string, which is raw in XML")
        return [], [given]

    def _write_constant(self, value: Any, where: str) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if re.search(_BREAKS, text) or text[:1] == "\n" or text[-1:] == "\n":
            self._refuse(where, "a constant holds what ends it in XML")
        return f"/{escape_regex(text)}/" if text else '""'

    def _write_string(self, node: Mapping[str, Any], where: str) -> str:
        parts = [ANY_TEXT]
        if "minLength" in node or "maxLength" in node:
            parts.append(f"/(?s:.{{{node.get('minLength', 0)},{node.get('maxLength', '')}}})/")
        # The days of leap years are in the formats here.
        if node.get("pattern", LEAP_DAY) != LEAP_DAY:
            parts.append(f"/{self._write_pattern(node['pattern'], where)}/")
        if (name := node.get("format")) is not None:
            if name not in FORMATS:
                self._refuse(f"{where}/format", f"llguidance is not given the format {name!r} in XML")
            parts.append(f"/{FORMATS[name]}/")
        if len(parts) == 1:
            return exclude_breaks(ANY_TEXT)
        return exclude_breaks(" & ".join(parts)) + r" & ~/\n(?s:.*)|(?s:.*)\n/"

    def _write_pattern(self, pattern: str, where: str) -> str:
        """A pattern of JSON Schema, which may hold anywhere in a string, as one for all of it."""
        inner = hide_classes(pattern)
        starts, ends = inner.startswith("^"), inner.endswith("$")
        bare = pattern[starts : len(pattern) - ends]
        if not is_plain_pattern(f"^(?:{bare})$") or ((starts or ends) and has_alternatives(pattern)):
            self._refuse(f"{where}/pattern", "llguidance is not given this pattern in XML")
        return f"{'' if starts else '(?s:.*)'}(?:{write_ascii_classes(bare)}){'' if ends else '(?s:.*)'}"

    def _follow(self, node: Any) -> Any:
        for _ in range(16):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            node = self._definitions[node["$ref"].removeprefix("#/$defs/")]
        return self._refuse("", "references go too deep")

    def _refuse(self, where: str, reason: str) -> Any:
        raise RefusedError(f"{self._pointer}{where}: {reason}")


def exclude_breaks(text: str) -> str:
    """A terminal's body: a text in which a parser sees no end."""
    return f"{text} & ~/(?s:.*)({_BREAKS})(?s:.*)/"
