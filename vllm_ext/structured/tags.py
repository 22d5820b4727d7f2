# SPDX-License-Identifier: Apache-2.0
"""Structural tags: every schema inside is checked as one of its own is, and written for each engine.

xgrammar serves a tag where it honours all schemas; where it does not, llguidance is given the tag as one grammar
(tag_grammars.py), if it honours them all and has a form for what is around them. No vllm import.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm_ext.structured import capabilities, cost
from vllm_ext.structured.dialects import write_for_guidance, write_for_xgrammar
from vllm_ext.structured.errors import RefusedError, SchemaError
from vllm_ext.structured.normalize import locate, normalize_schema
from vllm_ext.structured.patterns import find_regex_gap
from vllm_ext.structured.tag_grammars import write_tag_grammar


@dataclass(frozen=True)
class TagReading:
    """A structural tag as each engine is given it, in JSON, and its states (cost.py).

    gap: why xgrammar does not honour it, empty where it does. is_narrow: it only leaves out valid values.
    obstacle: why llguidance does not, in the words of a refusal; known where there is a gap only.
    """

    xgrammar: str
    guidance: str
    states: int
    gap: str = ""
    is_narrow: bool = False
    obstacle: str = ""


def read_tag(text: str) -> TagReading:
    """Raises RefusedError with the pointer of what no engine honours, and where the text is no tag."""
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the structural tag is not JSON: {error}") from error
    cost.check_levels(tag, cost.MOST_LEVELS + cost.TAG_LEVELS, "structural tag")
    if not isinstance(tag, dict):
        raise RefusedError("a structural tag is an object")
    reader = _Reader()
    for_xgrammar, states = reader.rewrite(tag, "")
    written = json.dumps(for_xgrammar)
    if not reader.gaps:
        return TagReading(written, "", states)
    where, gap = next((each for each in reader.gaps if not each[1].is_narrow), reader.gaps[0])
    for_guidance = _replace(tag, "", reader.nodes.__getitem__)
    reason = f"keyword {gap.keyword!r} at #{gap.pointer} ({gap.reason})"
    obstacle = reader.obstacle
    if not obstacle:
        try:
            write_tag_grammar(for_guidance)
        except RefusedError as error:
            obstacle = str(error)
    if obstacle and not gap.is_narrow:
        raise RefusedError(f"structural tag at {where}: no engine honours {reason}; {obstacle}")
    return TagReading(written, json.dumps(for_guidance), states, f"{where}: {reason}", gap.is_narrow, obstacle)


class _Reader:
    def __init__(self) -> None:
        #: What xgrammar does not honour, each with the pointer of its schema.
        self.gaps: list[tuple[str, capabilities.Gap]] = []
        self.obstacle = ""
        #: Schemas as llguidance is given them, by their pointers.
        self.nodes: dict[str, Any] = {}

    def rewrite(self, each: Any, pointer: str) -> tuple[Any, int]:
        """A part of a tag for xgrammar, and its states."""
        if isinstance(each, str):
            return each, len(each)
        if isinstance(each, list):
            parts = [self.rewrite(child, f"{pointer}/{i}") for i, child in enumerate(each)]
            return [part for part, _ in parts], sum(states for _, states in parts)
        if not isinstance(each, dict):
            return each, 1
        written, total = {}, 0
        for key, value in each.items():
            where = f"{pointer}/{capabilities.escape(key)}"
            if is_schema(key, value):
                is_raw = each.get("style", "json") != "json" or each.get("type") == "qwen_xml_parameter"
                written[key], states = self._read_schema(value, where, is_raw)
            elif key in ("pattern", "grammar") and isinstance(value, str):
                written[key], states = value, cost.estimate_regex(value)
                if key == "pattern" and (reason := find_regex_gap(value)):
                    raise RefusedError(f"structural tag at {where}: {reason}, and no other engine has it in tags")
            else:
                written[key], states = self.rewrite(value, where)
            total += states
        if isinstance(most := each.get("max_chars"), int):
            total += cost.WIDE * min(max(most, 0), 128) + max(most, 0) // 10
        if each.get("type") == "repeat":
            total *= max(1, *(each[key] for key in ("min", "max") if isinstance(each.get(key), int)), 1)
        return written, min(total, 2**53)

    def _read_schema(self, schema: Any, pointer: str, is_raw: bool) -> tuple[Any, int]:
        """A schema for xgrammar, and its states. is_raw: its strings are written without quotes, as in XML."""
        places: dict[str, str] = {}
        try:
            node = normalize_schema(schema, places)
        except SchemaError as error:
            raise RefusedError(f"structural tag at {pointer}: {error}") from error
        gap = capabilities.find_xgrammar_gap(node)
        if gap is None and is_raw:
            gap = capabilities.find_raw_gap(node)
        if gap is not None:
            self.gaps.append((pointer, replace(gap, pointer=locate(schema, gap.pointer, places))))
        if not self.obstacle and (other := capabilities.find_guidance_gap(node)):
            self.obstacle = f"{pointer}{other}"
        self.nodes[pointer] = node if is_raw else write_for_guidance(node)
        return write_for_xgrammar(node), cost.estimate_schema(node)


def is_schema(key: str, value: Any) -> bool:
    """Whether an entry of a structural tag is a schema of its content."""
    return key in ("json_schema", "schema") and isinstance(value, dict | bool)


def _replace(each: Any, pointer: str, find: Callable[[str], Any]) -> Any:
    """A tag with other schemas: `find` has them by their pointers."""
    if isinstance(each, list):
        return [_replace(child, f"{pointer}/{i}", find) for i, child in enumerate(each)]
    if not isinstance(each, dict):
        return each
    places = {key: f"{pointer}/{capabilities.escape(key)}" for key in each}
    return {
        key: find(places[key]) if is_schema(key, value) else _replace(value, places[key], find)
        for key, value in each.items()
    }
