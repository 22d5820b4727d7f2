# SPDX-License-Identifier: Apache-2.0
"""Which engine serves a specification, in what form, and whether a try has to come first. Pure: no vllm import.

kind            xgrammar                              llguidance
json            where the table says it honours all   where it does not, or where xgrammar would be slow
json_object     always                                -
regex, choice   unless it costs too much              inner anchors, large lists
grammar         EBNF and Lark                         what xgrammar does not parse
structural_tag  where it honours all schemas inside   where it does not, in the forms of tag_grammars.py
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from typing import Literal

from vllm_ext.structured import capabilities, cost
from vllm_ext.structured.dialects import write_for_guidance, write_for_xgrammar
from vllm_ext.structured.errors import RefusedError, SchemaError
from vllm_ext.structured.normalize import locate, normalize_schema
from vllm_ext.structured.patterns import find_regex_gap
from vllm_ext.structured.tags import read_tag

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
        plan = _plan_tag(text)
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
    cost.check_levels(schema, cost.MOST_LEVELS, "schema")
    places: dict[str, str] = {}
    try:
        node = normalize_schema(schema, places)
    except SchemaError as error:
        raise RefusedError(str(error)) from error
    if node is False:
        raise RefusedError("the schema false allows no value")
    states = cost.estimate_schema(node)
    xgrammar_gap, guidance_gap = (
        gap and replace(gap, pointer=locate(schema, gap.pointer, places))
        for gap in (capabilities.find_xgrammar_gap(node), capabilities.find_guidance_gap(node))
    )
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
            f"no engine honours JSON schema keyword {xgrammar_gap.keyword!r} at #{xgrammar_gap.pointer} "
            f"({xgrammar_gap.reason}; {guidance_gap})"
        )
    return guidance


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


def _plan_choice(text: str) -> Plan:
    choices = json.loads(text)
    states = cost.estimate_choices(choices)
    # A list of strings is the enum of a JSON schema without its quotes: both engines have it as alternatives.
    return Plan(
        "choice", "xgrammar", text, states, fallback=Plan("choice", "guidance", text, states, "xgrammar would be slow")
    )


def _plan_tag(text: str) -> Plan:
    reading = read_tag(text)
    xgrammar = Plan("structural_tag", "xgrammar", reading.xgrammar, reading.states)
    if not reading.gap or reading.obstacle:
        return xgrammar
    # Free text costs llguidance more: it is asked only where xgrammar would be wrong, or leave out what is ordinary.
    fallback = xgrammar if reading.is_narrow else None
    return Plan("structural_tag", "guidance", reading.guidance, reading.states, reading.gap, fallback)
