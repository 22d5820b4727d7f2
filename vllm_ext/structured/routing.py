# SPDX-License-Identifier: Apache-2.0
"""Which engine serves a specification, in what form, and whether a try has to come first. Pure: no vllm import.

kind            xgrammar                              llguidance
json            where the table says it honours all   where it does not, or where xgrammar would be slow
json_object     always                                -
regex, choice   unless it costs too much              inner anchors, large lists
grammar         EBNF and Lark                         what xgrammar does not parse
structural_tag  schemas inside checked as above       -
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_ext.structured import capabilities, cost
from vllm_ext.structured.errors import RefusedError, SchemaError
from vllm_ext.structured.normalize import normalize_schema

#: Levels of objects and arrays, as vLLM limits them, and what a structural tag may wrap around a schema.
MOST_LEVELS = 64
TAG_LEVELS = 16
#: Names of an object, and characters of one, up to which a pattern leaves them out.
MOST_NAMES, MOST_CHARACTERS = 400, 60

Engine = Literal["xgrammar", "guidance"]
Kind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]


@dataclass(frozen=True)
class Plan:
    """How one specification is served.

    text: what the engine is given. states: the estimate of cost.py. fallback: the plan if the first engine refuses the
    text. reason: why it is not xgrammar, for logs.
    """

    kind: Kind
    engine: Engine
    text: str
    states: int
    reason: str = ""
    fallback: Plan | None = None

    @property
    def is_budgeted(self) -> bool:
        """Whether its masks and moves are timed: of what is written by hand, a short text can be slow."""
        return self.states > cost.PLAIN_STATES or self.kind not in ("json", "choice")

    @property
    def is_plain(self) -> bool:
        """Whether it compiles in a bounded short time, by the estimate."""
        limit = cost.PLAIN_STATES if self.engine == "xgrammar" else cost.PLAIN_GUIDANCE_STATES
        return self.states <= limit


def plan_spec(kind: Kind, text: str, has_guidance: bool = True) -> Plan:
    """Choose the engine for a specification as vLLM names and writes it (`get_structured_output_key`).

    has_guidance: whether llguidance knows this tokenizer. Raises RefusedError.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RefusedError(f"the {kind} specification holds half a surrogate pair at {error.start}") from error
    if size > cost.MAX_SPEC_BYTES:
        raise RefusedError(f"the {kind} specification has {size} bytes, more than {cost.MAX_SPEC_BYTES}")
    if kind == "json":
        plan = _plan_json(text)
    elif kind == "json_object":
        plan = Plan("json", "xgrammar", '{"type": "object"}', 1)
    elif kind == "regex":
        plan = _plan_regex(text)
    elif kind == "choice":
        plan = _plan_choice(text)
    elif kind == "grammar":
        states = cost.estimate_text(text)
        plan = Plan(kind, "xgrammar", text, states, fallback=Plan(kind, "guidance", text, states, "not xgrammar's"))
    else:
        written, states = check_tag(text)
        plan = Plan(kind, "xgrammar", json.dumps(written), states)
    return _limit(plan, has_guidance)


def _limit(plan: Plan, has_guidance: bool) -> Plan:
    """Without engines that are missing or that the estimate rules out; raises RefusedError where none is left."""
    fallback = None
    if plan.fallback is not None and (has_guidance or plan.fallback.engine == "xgrammar"):
        with contextlib.suppress(RefusedError):
            fallback = _limit(plan.fallback, has_guidance)
    if plan.engine == "guidance" and not has_guidance:
        if fallback is not None:
            return fallback
        raise RefusedError(f"{plan.reason}, and llguidance does not know this tokenizer")
    limit = cost.MAX_STATES if plan.engine == "xgrammar" else cost.MAX_GUIDANCE_STATES
    if plan.states <= limit:
        return replace(plan, fallback=fallback)
    if fallback is None:
        raise RefusedError(
            f"the {plan.kind} specification is too large: about {plan.states} states, more than {limit}; "
            "use smaller bounds, shorter lists, or several requests"
        )
    return fallback


def _plan_json(text: str) -> Plan:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the schema is not JSON: {error}") from error
    _check_levels(schema, MOST_LEVELS, "schema")
    try:
        node = normalize_schema(schema)
    except SchemaError as error:
        raise RefusedError(str(error)) from error
    if node is False:
        raise RefusedError("the schema false allows no value")
    states = cost.estimate_schema(node)
    xgrammar_gap = capabilities.find_xgrammar_gap(node)
    guidance_gap = capabilities.find_guidance_gap(node)
    text = json.dumps(write_for_guidance(node))
    reason = str(xgrammar_gap) if xgrammar_gap else ""
    guidance = None if guidance_gap else Plan("json", "guidance", text, states, reason)
    xgrammar = Plan("json", "xgrammar", json.dumps(write_for_xgrammar(node)), states)
    if xgrammar_gap is None and (guidance is None or xgrammar.is_plain):
        return replace(xgrammar, fallback=guidance)
    if guidance is not None and (xgrammar_gap is None or xgrammar_gap.is_narrow):
        return replace(guidance, fallback=xgrammar)
    if xgrammar_gap is None or xgrammar_gap.is_narrow:
        return xgrammar
    if guidance is None:
        raise RefusedError(
            f"no engine honours JSON schema keyword {xgrammar_gap.keyword!r} at {xgrammar_gap.pointer or '#'} "
            f"({xgrammar_gap.reason}; {guidance_gap})"
        )
    return guidance


def _check_levels(value: Any, most: int, what: str) -> None:
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


def write_for_xgrammar(node: Any) -> Any:
    """A normalized schema as xgrammar 0.2.8 needs it.

    Lengths become patterns: beside a length it lets control characters into strings as they are, which is not JSON.
    Equal ones are one definition, because every pattern is compiled anew. Objects with property names that it takes for
    annotations get a number: it knows schemas again by their text without `title`, `description` and the like, wherever
    these stand, and of two objects that differ only in a property with such a name it would compile the first twice.
    Unknown keywords count in that text, and do nothing else.
    """
    numbers = iter(range(10**9))
    lengths: dict[str, Any] = {}

    def write(each: Any) -> Any:
        if not isinstance(each, dict):
            return each
        if each.get("type") == "string" and {"minLength", "maxLength"} & each.keys():
            least, most = each.get("minLength", 0), each.get("maxLength", "")
            lengths[f"length_{least}_{most}"] = {"type": "string", "pattern": f"^.{{{least},{most}}}$"}
            return {"$ref": f"#/$defs/length_{least}_{most}"}
        written: dict[str, Any] = {}
        for key, value in each.items():
            if key in ("properties", "patternProperties", "$defs"):
                written[key] = {name: write(child) for name, child in value.items()}
            elif key in ("const", "enum"):
                written[key] = value
            elif isinstance(value, list):
                written[key] = [write(child) for child in value]
            else:
                written[key] = write(value)
        if each.get("properties", {}).keys() & _SKIPPED or _names_skipped([each.get("const"), each.get("enum")]):
            written["x-vllm-ext"] = next(numbers)
        return written

    written = write(node)
    return {**written, "$defs": {**written.get("$defs", {}), **lengths}} if lengths else written


def write_for_guidance(node: Any, is_merged: bool = False) -> Any:
    """A normalized schema as llguidance 1.7 needs it. is_merged: inside allOf, whose objects llguidance makes one.

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
    names = node.get("properties", {})
    if len(names) > MOST_NAMES or any(len(name) > MOST_CHARACTERS for name in names):
        written["additionalProperties"] = False
    elif "patternProperties" not in node and "properties" in node and not is_merged:
        pattern = f"^({write_complement(list(node['properties']))})$"
        written["patternProperties"] = {pattern: written.get("additionalProperties", True)}
    if "patternProperties" in written:
        written["additionalProperties"] = False
    return written


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


_SKIPPED = capabilities.split_words("title default description examples deprecated readOnly writeOnly $comment $schema")


def _names_skipped(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.keys() & _SKIPPED) or any(map(_names_skipped, value.values()))
    return isinstance(value, list) and any(map(_names_skipped, value))


def _plan_regex(text: str) -> Plan:
    if "\0" in text:
        raise RefusedError("the regex holds a NUL character")
    states = cost.estimate_regex(text)
    if reason := find_regex_gap(text):
        return Plan("regex", "guidance", text, states, reason)
    return Plan(
        "regex",
        "xgrammar",
        text,
        states,
        fallback=Plan("regex", "guidance", text, states, "xgrammar does not parse it"),
    )


#: Escapes that are places or classes elsewhere, and letters in xgrammar.
_OTHER_ESCAPES = frozenset("AZzhHKGbBRX")


def find_regex_gap(text: str) -> str:
    """What xgrammar 0.2.8 reads otherwise in a regular expression, in a few words; empty where it does not."""
    inner = capabilities.hide_classes(text)
    if "^" in inner[1:] or "$" in inner[:-1]:
        return "xgrammar ignores ^ and $ inside a regex"
    if other := sorted(_OTHER_ESCAPES.intersection(re.findall(r"\\(.)", text, re.DOTALL))):
        return f"xgrammar takes \\{other[0]} for a letter"
    return "xgrammar has no classes by name, as [:alpha:]" if re.search(r"\[:\^?[a-z]+:\]", text) else ""


def _plan_choice(text: str) -> Plan:
    choices = json.loads(text)
    states = cost.estimate_choices(choices)
    # A list of strings is the enum of a JSON schema without its quotes: both engines have it as alternatives.
    return Plan(
        "choice", "xgrammar", text, states, fallback=Plan("choice", "guidance", text, states, "xgrammar would be slow")
    )


def check_tag(text: str) -> tuple[Any, int]:
    """The structural tag with its schemas as xgrammar honours them, and its states (cost.py).

    Raises RefusedError with the pointer.
    """
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the structural tag is not JSON: {error}") from error
    _check_levels(tag, MOST_LEVELS + TAG_LEVELS, "structural tag")
    return _rewrite_tag(tag, "")


def _rewrite_tag(each: Any, pointer: str) -> tuple[Any, int]:
    if isinstance(each, str):
        return each, len(each)
    if isinstance(each, list):
        parts = [_rewrite_tag(child, f"{pointer}/{i}") for i, child in enumerate(each)]
        return [part for part, _ in parts], sum(states for _, states in parts)
    if not isinstance(each, dict):
        return each, 1
    written, total = {}, 0
    for key, value in each.items():
        where = f"{pointer}/{capabilities.escape(key)}"
        if key in ("json_schema", "schema") and isinstance(value, dict | bool):
            written[key], states = _check_inner(value, where)
        elif key in ("pattern", "grammar") and isinstance(value, str):
            written[key], states = value, cost.estimate_regex(value)
            if key == "pattern" and (reason := find_regex_gap(value)):
                raise RefusedError(f"structural tag at {where}: {reason}, and no other engine has tags")
        else:
            written[key], states = _rewrite_tag(value, where)
        total += states
    if each.get("type") == "repeat":
        total *= max(1, *(each[key] for key in ("min", "max") if isinstance(each.get(key), int)), 1)
    return written, min(total, 2**53)


def _check_inner(schema: Any, pointer: str) -> tuple[Any, int]:
    try:
        node = normalize_schema(schema)
    except SchemaError as error:
        raise RefusedError(f"structural tag at {pointer}: {error}") from error
    gap = capabilities.find_xgrammar_gap(node)
    if gap is not None and not gap.is_narrow:
        raise RefusedError(
            f"structural tag at {pointer}: no engine honours {gap.keyword!r} at {gap.pointer or '#'} inside of a tag "
            f"({gap.reason})"
        )
    return write_for_xgrammar(node), cost.estimate_schema(node)
