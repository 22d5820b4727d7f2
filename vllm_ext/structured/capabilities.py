# SPDX-License-Identifier: Apache-2.0
"""Which JSON Schema keywords xgrammar 0.2.8 and llguidance 1.7 honour; tests/structured prove every row with an oracle.

"Honoured" means that whatever a grammar accepts is valid, and that it accepts ordinary valid values. Engines may be
narrower than the schema: xgrammar closes objects that do not say otherwise, both want properties in declared order.

xgrammar ignores a keyword that it does not know, or that stands beside one it looks at first, without an error. So
`find_xgrammar_gap` allows what is known to be honoured and nothing else. llguidance refuses what it does not know;
`find_guidance_gap` lists where it accepts more than the schema nevertheless. Both read schemas as
`normalize.normalize_schema` leaves them. No vllm import: tests and workers use this file alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_ext.structured.patterns import allows_most_characters, is_plain_pattern


def split_words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


#: Keywords that say nothing about values (JSON Schema 2020-12, "annotations"), or only name places in a schema.
ANNOTATIONS = split_words(
    "title description default examples deprecated readOnly writeOnly $comment $schema $vocabulary $defs definitions "
    "$id id $anchor $dynamicAnchor contentMediaType contentEncoding contentSchema"
)
#: Keywords that apply to values of one JSON type only.
BY_TYPE: Mapping[str, frozenset[str]] = {
    "string": split_words("minLength maxLength pattern format"),
    "number": split_words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"),
    "array": split_words(
        "items prefixItems additionalItems minItems maxItems uniqueItems contains minContains maxContains "
        "unevaluatedItems"
    ),
    "object": split_words(
        "properties patternProperties additionalProperties required minProperties maxProperties propertyNames "
        "dependentRequired dependentSchemas dependencies unevaluatedProperties"
    ),
    "boolean": frozenset(),
    "null": frozenset(),
}
#: Keywords that apply to every value.
IN_PLACE = split_words("$ref const enum anyOf oneOf allOf not if then else type $dynamicRef $recursiveRef")
KNOWN = IN_PLACE.union(*BY_TYPE.values())

#: Keywords that neither engine honours, and why; `normalize_schema` knows the forms of them that say nothing.
REFUSED: Mapping[str, str] = {
    "not": "neither engine can exclude values",
    "if": "neither engine has conditions",
    "contains": "neither engine can ask for an item among others",
    "uniqueItems": "neither engine compares items (of an array of at most 4 values all forms are written out)",
    "dependentRequired": "neither engine makes one property depend on another",
    "dependentSchemas": "neither engine makes one property depend on another",
    "dependencies": "neither engine makes one property depend on another",
    "unevaluatedItems": "neither engine knows what other keywords evaluated",
    "unevaluatedProperties": "neither engine knows what other keywords evaluated",
    "$dynamicRef": "neither engine has dynamic references",
    "$recursiveRef": "neither engine has dynamic references",
}

#: String formats by the engines that hold them; of two the sounder one. Other formats are refused by name.
FORMATS: Mapping[str, str] = {
    **dict.fromkeys(
        ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"), "guidance"
    ),
    **dict.fromkeys(("uri-template", "uri-reference"), "xgrammar"),
}

#: Formats that neither holds, but a pattern does (RFC 6901, and its relative form).
PATTERN_FORMATS: Mapping[str, str] = {
    "json-pointer": "^(/([^/~]|~[01])*)*$",
    "relative-json-pointer": "^(0|[1-9][0-9]*)(#|(/([^/~]|~[01])*)*)$",
}

#: Integers that a float64 holds exactly; llguidance reads every number of a schema as one.
_EXACT = 2**53
_INT64 = 2**63


@dataclass(frozen=True)
class Gap:
    """What keeps an engine from honouring a schema: where (JSON pointer), which keyword, and why in a few words.

    is_narrow: the engine accepts nothing invalid there, but leaves out ordinary valid values.
    """

    pointer: str
    keyword: str
    reason: str
    is_narrow: bool = False

    def __str__(self) -> str:
        return f"#{self.pointer}: {self.reason}"


def find_xgrammar_gap(node: Any) -> Gap | None:
    """The first place of a normalized schema that xgrammar does not honour, None where there is none.

    A place where it would accept something invalid comes before one where it is only narrow.
    """
    gaps = list(_list_xgrammar_gaps(node, ""))
    return next((gap for gap in gaps if not gap.is_narrow), gaps[0] if gaps else None)


def _list_xgrammar_gaps(node: Any, pointer: str) -> Iterator[Gap]:
    if isinstance(node, bool):
        if not node:
            yield Gap(pointer, "false", "xgrammar has no empty schema")
        return
    keys = set(node) - {"$defs"}
    for name, target in node.get("$defs", {}).items():
        yield from _list_xgrammar_gaps(target, f"{pointer}/$defs/{name}")
    if first := next((key for key in ("$ref", "const", "enum", "anyOf", "allOf") if key in keys), None):
        if others := sorted(keys - {first}):
            yield Gap(f"{pointer}/{others[0]}", others[0], f"xgrammar ignores it beside {first}")
        elif first == "anyOf":
            for i, each in enumerate(node["anyOf"]):
                yield from _list_xgrammar_gaps(each, f"{pointer}/anyOf/{i}")
        elif first == "allOf":
            yield Gap(f"{pointer}/allOf", "allOf", "xgrammar ignores all of several schemas")
        elif first != "$ref":
            values = node["enum"] if first == "enum" else [node["const"]]
            for bad in [value for value in values if _is_hard_constant(value, _INT64)][:1]:
                is_narrow = not isinstance(bad, int)
                yield Gap(f"{pointer}/{first}", first, f"xgrammar writes {bad!r} with digits of its own", is_narrow)
        return
    if not keys:
        return
    kind = node.get("type")
    if not isinstance(kind, str):
        other = sorted(keys)[0]
        yield Gap(f"{pointer}/{other}", other, "xgrammar ignores it where there is no single type")
    elif kind in ("integer", "number"):
        yield from _check_number(node, pointer, kind)
    elif kind == "string":
        yield from _check_string(node, pointer)
    elif kind == "array":
        yield from _check_array(node, pointer)
    elif kind == "object":
        yield from _check_object(node, pointer)


def _check_number(node: Mapping[str, Any], pointer: str, kind: str) -> Iterator[Gap]:
    if "multipleOf" in node:
        yield Gap(f"{pointer}/multipleOf", "multipleOf", "xgrammar ignores it")
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = node.get(key)
        if value is None:
            continue
        if kind == "integer" and (int(value) != value or abs(value) >= _INT64):
            yield Gap(f"{pointer}/{key}", key, "xgrammar wants a whole number of 64 bits")


def _check_string(node: Mapping[str, Any], pointer: str) -> Iterator[Gap]:
    given = sorted(set(node) & BY_TYPE["string"])
    if "format" in given and FORMATS.get(node["format"]) != "xgrammar":
        yield Gap(f"{pointer}/format", "format", f"xgrammar accepts other strings as {node['format']!r}")
    if {"format", "pattern"} & set(given) and len(given) > 1:
        yield Gap(f"{pointer}/{given[0]}", given[0], "xgrammar looks at one of format, pattern and length")
    if "pattern" in given and not is_plain_pattern(node["pattern"]):
        yield Gap(f"{pointer}/pattern", "pattern", "xgrammar reads this pattern otherwise, or leaves escapes out")
    elif "pattern" in given and allows_most_characters(node["pattern"]):
        yield Gap(f"{pointer}/pattern", "pattern", _NO_ESCAPES, is_narrow=True)
    if {"minLength", "maxLength"} & set(given) and node.get("maxLength", SHORT_TEXT + 1) > SHORT_TEXT:
        yield Gap(f"{pointer}/{given[0]}", given[0], _NO_ESCAPES, is_narrow=True)


#: Characters of a text up to which it is served without quotes, backslashes and control characters, as in stock.
SHORT_TEXT = 64
_NO_ESCAPES = "xgrammar leaves escapes out of such strings"


def _check_array(node: Mapping[str, Any], pointer: str) -> Iterator[Gap]:
    prefix = node.get("prefixItems", [])
    if any(isinstance(item, bool) for item in prefix):
        yield Gap(f"{pointer}/prefixItems", "prefixItems", "xgrammar wants a schema for every place", is_narrow=True)
    if node.get("maxItems", len(prefix)) < len(prefix):
        yield Gap(f"{pointer}/maxItems", "maxItems", "xgrammar wants room for every place", is_narrow=True)
    for i, item in enumerate(prefix):
        yield from _list_xgrammar_gaps(item, f"{pointer}/prefixItems/{i}")
    if not isinstance(node.get("items", False), bool):
        yield from _list_xgrammar_gaps(node["items"], f"{pointer}/items")


def _check_object(node: Mapping[str, Any], pointer: str) -> Iterator[Gap]:
    properties = node.get("properties", {})
    others = node.get("additionalProperties")
    if "patternProperties" in node:
        reason = "xgrammar takes a pattern for the whole name"
        yield Gap(f"{pointer}/patternProperties", "patternProperties", reason)
    if missing := [name for name in node.get("required", ()) if name not in properties]:
        yield Gap(f"{pointer}/required", "required", f"xgrammar ignores {missing[0]!r}, which is not in properties")
    if counts := sorted({"minProperties", "maxProperties"} & set(node)):
        if not properties and not isinstance(others, dict):
            yield Gap(f"{pointer}/{counts[0]}", counts[0], "xgrammar leaves such an object empty", is_narrow=True)
        # It allows no others where these are not spoken of.
        if _counts_repeated_names({"additionalProperties": not properties, **node}):
            yield Gap(f"{pointer}/minProperties", "minProperties", _REPEATED)
    if properties and others not in (None, False):
        reason = "xgrammar lets a declared name pass as another one when it is written with escapes"
        yield Gap(f"{pointer}/additionalProperties", "additionalProperties", reason)
    for name, value in properties.items():
        yield from _list_xgrammar_gaps(value, f"{pointer}/properties/{escape(name)}")
    if not isinstance(others, bool) and others is not None:
        yield from _list_xgrammar_gaps(others, f"{pointer}/additionalProperties")


_REPEATED = "a repeated name counts twice, and is one property"


def _counts_repeated_names(node: Mapping[str, Any]) -> bool:
    """Whether two undeclared properties may be needed: no engine makes their names differ."""
    is_open = node.get("additionalProperties", True) is not False or bool(node.get("patternProperties"))
    return is_open and node.get("minProperties", 0) > len(node.get("required", ())) + 1


def find_raw_gap(node: Any) -> Gap | None:
    """The first string of a call's arguments that a value in XML may break, or None.

    xgrammar lets a pattern or a length go on over the end of the value, where a parser cuts it. Told as narrow: where
    llguidance has no form for the tag either, xgrammar serves it, as a model hardly writes such a value.
    """
    if not isinstance(node, dict):
        return None
    definitions = node.get("$defs", {})
    root = definitions.get(str(node.get("$ref")).removeprefix("#/$defs/"), node)
    for name, value in root.get("properties", {}).items():
        target = value if isinstance(value, dict) else {}
        target = definitions.get(str(target.get("$ref")).removeprefix("#/$defs/"), target)
        for option in target.get("anyOf", [target]):
            if key := next((key for key in ("minLength", "pattern") if isinstance(option, dict) and key in option), ""):
                pointer = f"/properties/{escape(name)}/{key}"
                return Gap(pointer, key, "xgrammar lets a value go on over its end in XML", is_narrow=True)
    return None


def find_guidance_gap(node: Any, pointer: str = "") -> Gap | None:
    """The first place of a normalized schema where llguidance accepts more than it should, or None.

    What llguidance does not know it refuses itself, without saying where.
    """
    if isinstance(node, bool):
        return None
    if "format" in node and FORMATS.get(node["format"]) != "guidance":
        return Gap(f"{pointer}/format", "format", f"llguidance does not know the format {node['format']!r}")
    for key in ("const", "enum"):
        values = node.get("enum", []) if key == "enum" else [node[key]] if key in node else []
        if (bad := next((value for value in values if _is_hard_constant(value, _EXACT)), None)) is not None:
            return Gap(f"{pointer}/{key}", key, f"llguidance rounds the number {bad!r}")
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(node.get(key), int | float) and abs(node[key]) > _EXACT:
            return Gap(f"{pointer}/{key}", key, "llguidance rounds numbers beyond 2^53")
    if _counts_repeated_names(node):
        return Gap(f"{pointer}/minProperties", "minProperties", _REPEATED)
    gaps = (find_guidance_gap(child, f"{pointer}/{place}") for place, child in list_children(node))
    return next((gap for gap in gaps if gap is not None), None)


def _is_hard_constant(value: Any, limit: int) -> bool:
    """Whether a constant holds a number that an engine does not write as JSON has it."""
    if isinstance(value, bool):
        return False
    if isinstance(value, float):
        return limit == _INT64 or abs(value) >= limit
    if isinstance(value, int):
        return abs(value) >= limit
    if isinstance(value, dict):
        return any(_is_hard_constant(each, limit) for each in value.values())
    return isinstance(value, list) and any(_is_hard_constant(each, limit) for each in value)


def list_children(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(pointer below the node, schema) of all schemas directly inside a normalized one, booleans included."""
    found: list[tuple[str, Any]] = []
    for key in ("$defs", "properties", "patternProperties"):
        found += [(f"{key}/{escape(name)}", value) for name, value in node.get(key, {}).items()]
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        found += [(f"{key}/{i}", value) for i, value in enumerate(node.get(key, ()))]
    found += [(key, node[key]) for key in ("items", "additionalProperties", "propertyNames") if key in node]
    return found


def escape(name: str) -> str:
    """A property's name as part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def unescape(part: str) -> str:
    """A part of a JSON pointer as a property's name."""
    return part.replace("~1", "/").replace("~0", "~")
