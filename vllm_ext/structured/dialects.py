# SPDX-License-Identifier: Apache-2.0
"""A normalized schema as each engine is given it: around what they read otherwise than JSON Schema. No vllm import."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_ext.structured.capabilities import split_words
from vllm_ext.structured.patterns import read_beginning

#: Names of an object, and characters of one, up to which a pattern leaves them out.
MOST_NAMES, MOST_CHARACTERS = 400, 60

#: Property names that xgrammar takes for annotations.
_SKIPPED = split_words("title description default examples deprecated readOnly writeOnly $comment $schema")


def write_for_xgrammar(node: Any) -> Any:
    """A normalized schema as xgrammar 0.2.8 needs it.

    Lengths become patterns: beside a length it lets control characters into strings as they are, which is not JSON.
    Equal ones are one definition, because every pattern is compiled anew. Objects with property names that it takes for
    annotations get a number: it knows schemas again by their text without `title`, `description` and the like, wherever
    these stand, and of two objects that differ only in a property with such a name it would compile the first twice.
    Unknown keywords count in that text, and do nothing else.
    """
    lengths: dict[str, Any] = {}
    written = _write_for_xgrammar(node, itertools.count(), lengths)
    return {**written, "$defs": {**written.get("$defs", {}), **lengths}} if lengths else written


def _write_for_xgrammar(node: Any, numbers: Iterator[int], lengths: dict[str, Any]) -> Any:
    """numbers: of objects that need one; lengths: definitions to add, changed in place."""
    if not isinstance(node, dict):
        return node
    if node.get("type") == "string" and {"minLength", "maxLength"} & node.keys():
        least, most = node.get("minLength", 0), node.get("maxLength", "")
        lengths[f"length_{least}_{most}"] = {"type": "string", "pattern": f"^.{{{least},{most}}}$"}
        return {"$ref": f"#/$defs/length_{least}_{most}"}
    written: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "patternProperties", "$defs"):
            written[key] = {name: _write_for_xgrammar(child, numbers, lengths) for name, child in value.items()}
        elif key in ("const", "enum"):
            written[key] = value
        elif isinstance(value, list):
            written[key] = [_write_for_xgrammar(child, numbers, lengths) for child in value]
        else:
            written[key] = _write_for_xgrammar(value, numbers, lengths)
    if node.get("properties", {}).keys() & _SKIPPED or _names_skipped([node.get("const"), node.get("enum")]):
        written["x-vllm-ext"] = next(numbers)
    return written


def write_for_guidance(node: Any, is_merged: bool = False) -> Any:
    """A normalized schema as llguidance 1.7 needs it. is_merged: inside allOf, whose objects llguidance makes one.

    Objects that declare properties and do not say what others may be have no others, as with xgrammar and in stock.

    It takes a name that is written with escapes ("\\u0061", or "\\/") for another one than it is, where other names
    are allowed. So beside patterns no other names are (narrower), and beside declared ones the others are those of a
    pattern that leaves these out: patterns know no such escapes. In allOf, patterns of two schemas would exclude each
    other.
    """
    if isinstance(node, list):
        return [write_for_guidance(each, is_merged) for each in node]
    if not isinstance(node, dict):
        return node
    # A definition that allOf refers to is merged too.
    merges_definitions = "$defs" in node and _refers_in_all_of(node)
    written = {
        key: {name: write_for_guidance(each, key == "$defs" and merges_definitions) for name, each in value.items()}
        if key in ("properties", "patternProperties", "$defs")
        else value
        if key in ("const", "enum")
        else write_for_guidance(value, key == "allOf" or (is_merged and key == "anyOf"))
        for key, value in node.items()
    }
    if node.get("type") != "object" or node.get("additionalProperties") is False:
        return written
    if not is_merged and node.keys() & {"properties", "patternProperties"}:
        # Others are closed below, and a required name has to be possible.
        others = written.get("additionalProperties", True)
        missing = {name: others for name in node.get("required", ()) if not _is_declared(name, node)}
        if missing:
            written["properties"] = {**written.get("properties", {}), **missing}
        if "additionalProperties" not in node:
            written["additionalProperties"] = False
            return written
    names = written.get("properties", {})
    if len(names) > MOST_NAMES or any(len(name) > MOST_CHARACTERS for name in names):
        written["additionalProperties"] = False
    elif "patternProperties" not in node and "properties" in node and not is_merged:
        pattern = f"^({write_complement(list(names))})$"
        written["patternProperties"] = {pattern: written.get("additionalProperties", True)}
    if "patternProperties" in written:
        written["additionalProperties"] = False
    return written


def _is_declared(name: str, node: Mapping[str, Any]) -> bool:
    """Whether a property has a schema of its own, or may have one by its name's pattern.

    Only beginnings are compared: a client's pattern is not searched for here, which could take forever.
    """
    beginnings = map(read_beginning, node.get("patternProperties", {}))
    return name in node.get("properties", {}) or any(name.startswith(each) for each in beginnings)


def _refers_in_all_of(node: Any, is_merged: bool = False) -> bool:
    if isinstance(node, list):
        return any(_refers_in_all_of(each, is_merged) for each in node)
    if not isinstance(node, dict):
        return False
    if is_merged and "$ref" in node:
        return True
    return any(
        _refers_in_all_of(value, key == "allOf" or (is_merged and key == "anyOf")) for key, value in node.items()
    ) or any(
        _refers_in_all_of(list(node.get(key, {}).values())) for key in ("properties", "patternProperties", "$defs")
    )


def write_complement(names: list[str]) -> str:
    """A regular expression of all strings but these, without look-around: down their tree, leaving it somewhere."""
    rest = "[\\s\\S]*"
    heads = sorted({name[0] for name in names if name})
    parts = ["" if "" not in names else None]
    parts += [f"[^{''.join(map(_write_character, heads))}]{rest}" if heads else f"[\\s\\S]{rest}"]
    for head in heads:
        tails = [name[1:] for name in names if name.startswith(head)]
        parts.append(f"{_write_character(head)}(?:{write_complement(tails)})")
    return "|".join(part for part in parts if part is not None)


def _write_character(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):x}}}"


def _names_skipped(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.keys() & _SKIPPED) or any(map(_names_skipped, value.values()))
    return isinstance(value, list) and any(map(_names_skipped, value))
