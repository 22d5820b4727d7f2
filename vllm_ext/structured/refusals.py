# SPDX-License-Identifier: Apache-2.0
"""Where in a client's schema the place is that an engine does not take: JSON pointers of what was sent.

Engines are given rewritten schemas (normalize.py), and llguidance says what it does not take, not where. So its parts
are tried by themselves. No vllm import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_ext.structured import engines
from vllm_ext.structured.capabilities import escape, list_children
from vllm_ext.structured.dialects import write_for_guidance
from vllm_ext.structured.errors import GrammarError, SchemaError
from vllm_ext.structured.normalize import locate, normalize_schema
from vllm_ext.structured.routing import Kind, Plan
from vllm_ext.structured.tags import is_schema

#: Parts of a specification that are tried, and characters of one that is looked into.
MOST_TRIED, MOST_CHARACTERS = 60, 8192


def find_refused(kind: Kind, text: str) -> str:
    """The pointer ("#/...") of what llguidance does not take in a schema or a tag; empty where no part is at fault."""
    if len(text) > MOST_CHARACTERS or kind not in ("json", "structural_tag"):
        return ""
    tries = iter(range(MOST_TRIED))
    spec = json.loads(text)
    for where, schema in [("", spec)] if kind == "json" else _list_schemas(spec, ""):
        places: dict[str, str] = {}
        try:
            node = normalize_schema(schema, places)
        except SchemaError:
            continue
        definitions = node.get("$defs", {}) if isinstance(node, dict) else {}
        if _is_refused(node, definitions, tries):
            return f"#{where}{locate(schema, _descend(node, definitions, '', tries), places)}"
    return ""


def _list_schemas(each: Any, pointer: str) -> Iterator[tuple[str, Any]]:
    """(pointer, schema) of all schemas in a structural tag."""
    if isinstance(each, list):
        for i, child in enumerate(each):
            yield from _list_schemas(child, f"{pointer}/{i}")
    elif isinstance(each, dict):
        for key, value in each.items():
            where = f"{pointer}/{escape(key)}"
            if is_schema(key, value):
                yield where, value
            else:
                yield from _list_schemas(value, where)


def _descend(node: Any, definitions: Mapping[str, Any], pointer: str, tries: Iterator[int]) -> str:
    """The pointer of the deepest part of a refused schema that is refused by itself."""
    if not isinstance(node, dict):
        return pointer
    children = list_children(node)
    for place, child in children:
        if _is_refused(child, definitions, tries):
            return _descend(child, definitions, f"{pointer}/{place}", tries)
    inside = {place.split("/")[0] for place, _ in children}
    kind = {"type": node["type"]} if "type" in node else {}
    own = [key for key in node if key not in ("type", "$defs", "$ref")]
    for key in own:
        if key not in inside and _is_refused({**kind, key: node[key]}, definitions, tries):
            return f"{pointer}/{key}"
    # Several together: one is named without which the others are taken.
    for key in own:
        rest = {name: value for name, value in node.items() if name != key}
        if rest.keys() - {"$defs"} and next(tries, None) is not None and _is_taken(rest, definitions):
            return f"{pointer}/{key}"
    return f"{pointer}/{own[0]}" if len(own) == 1 else pointer


def _is_refused(node: Any, definitions: Mapping[str, Any], tries: Iterator[int]) -> bool:
    """Whether llguidance refuses a schema; False once enough were tried."""
    return isinstance(node, dict) and next(tries, None) is not None and not _is_taken(node, definitions)


def _is_taken(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> bool:
    whole = write_for_guidance({**node, "$defs": dict(definitions)} if definitions else node)
    try:
        engines.check_guidance(Plan("json", "guidance", json.dumps(whole), 0))
    except GrammarError:
        return False
    return True
