# SPDX-License-Identifier: Apache-2.0
"""The two grammar engines behind one call each: parse, and compile. No vllm import: compile workers use this file.

Options of JSON: `whitespace` is "any" (as vLLM has it), "compact" (none), or the most characters between two elements.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from vllm_ext.structured.errors import GrammarError, shorten
from vllm_ext.structured.lark import limit_whitespace
from vllm_ext.structured.routing import Plan
from vllm_ext.structured.tag_grammars import write_tag_grammar

Whitespace = str | int


#: Ways in which llguidance may go on at one place (its default, 2,000, is less than 60 objects of 20 optional
#: properties need); such masks take some ten milliseconds, which budgets.py counts.
MOST_ITEMS = 20_000


def parse_xgrammar(plan: Plan, whitespace: Whitespace = "any") -> Any:
    """xgrammar's Grammar of a plan, without a vocabulary. Raises GrammarError."""
    import xgrammar as xgr

    try:
        if plan.kind == "json":
            return xgr.Grammar.from_json_schema(plan.text, **json_options(whitespace))
        if plan.kind == "regex":
            return xgr.Grammar.from_regex(plan.text)
        if plan.kind == "choice":
            return xgr.Grammar.from_ebnf(write_choices(json.loads(plan.text)))
        if plan.kind == "grammar":
            return xgr.Grammar.from_lark(plan.text) if is_lark(plan.text) else xgr.Grammar.from_ebnf(plan.text)
        tag = json.loads(plan.text)
        if "structures" in tag:
            items = [
                xgr.StructuralTagItem(begin=each["begin"], schema=json.dumps(each["schema"]), end=each["end"])
                for each in tag["structures"]
            ]
            return xgr.Grammar.from_structural_tag(items, tag["triggers"])
        return xgr.Grammar.from_structural_tag(plan.text)
    except (RuntimeError, ValueError, KeyError, TypeError, xgr.InvalidJSONError) as error:
        raise GrammarError(_shorten(error)) from error


def compile_xgrammar(compiler: Any, plan: Plan, whitespace: Whitespace = "any") -> Any:
    """xgrammar's CompiledGrammar of a plan. compiler: a GrammarCompiler. Raises GrammarError."""
    import xgrammar as xgr

    try:
        if plan.kind == "json":
            return compiler.compile_json_schema(plan.text, **json_options(whitespace))
        if plan.kind == "regex":
            return compiler.compile_regex(plan.text)
        if plan.kind == "structural_tag" and "structures" not in json.loads(plan.text):
            return compiler.compile_structural_tag(plan.text)
        return compiler.compile_grammar(parse_xgrammar(plan, whitespace))
    except (RuntimeError, ValueError, KeyError, TypeError, xgr.InvalidJSONError) as error:
        raise GrammarError(_shorten(error)) from error


def read_vocabulary(compiler: Any) -> Any:
    """The TokenizerInfo that a GrammarCompiler was made with, which it does not show itself."""
    return compiler.compile_grammar('root ::= "a"').tokenizer_info


def json_options(whitespace: Whitespace) -> dict[str, Any]:
    """Arguments of xgrammar's JSON functions, as vLLM gives them for "any" and "compact"."""
    if whitespace == "compact":
        return {"any_whitespace": False, "separators": (",", ":")}
    return {"any_whitespace": True, "max_whitespace_cnt": None if whitespace == "any" else int(whitespace)}


def write_guidance(plan: Plan, whitespace: Whitespace = "any", added: Mapping[str, int] | None = None) -> str:
    """llguidance's text of a plan. added: `list_added` of the tokenizer, for tags. Raises GrammarError."""
    import llguidance

    options: Any = {"whitespace_flexible": whitespace == "any"}
    if isinstance(whitespace, int):
        options = limit_whitespace(whitespace)
    try:
        if plan.kind == "json":
            schema = plan.text if plan.text.startswith("{") else json.dumps({"allOf": [json.loads(plan.text)]})
            return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)
        if plan.kind == "structural_tag":
            return llguidance.grammar_from("grammar", write_tag_grammar(json.loads(plan.text), options, added))
        if plan.kind == "choice":
            # Alternatives of a regex: as a choice llguidance makes a rule of each, which takes seconds for thousands.
            return llguidance.grammar_from("regex", "|".join(map(_escape_regex, json.loads(plan.text))))
        return llguidance.grammar_from("regex" if plan.kind == "regex" else "grammar", plan.text)
    except (ValueError, TypeError, KeyError) as error:
        raise GrammarError(_shorten(error)) from error


@functools.lru_cache(4)
def list_added(tokenizer: Any) -> Mapping[str, int]:
    """Ids of the tokens that are no text to llguidance, by their text; without those that end an output.

    tokenizer: an LLTokenizer.
    """
    ends = {tokenizer.eos_token, *tokenizer.eos_tokens}
    found = [token for token in range(tokenizer.vocab_size) if tokenizer.is_special_token(token) and token not in ends]
    texts = ((tokenizer.decode_bytes([token]).decode("utf-8", "replace"), token) for token in found)
    return {text: token for text, token in texts if len(text) > 1}


def check_guidance(plan: Plan, whitespace: Whitespace = "any", tokenizer: Any = None) -> None:
    """Raises GrammarError where llguidance does not take a plan. tokenizer: an LLTokenizer, which Lark may need."""
    import llguidance

    if error := llguidance.LLMatcher.validate_grammar(write_guidance(plan, whitespace), tokenizer):
        raise GrammarError(_shorten(error))


def compile_guidance(tokenizer: Any, plan: Plan, whitespace: Whitespace = "any") -> Any:
    """A new LLMatcher of a plan. tokenizer: an LLTokenizer. Raises GrammarError."""
    import llguidance

    limits = llguidance.LLParserLimits(max_items_in_row=MOST_ITEMS)
    added = list_added(tokenizer) if plan.kind == "structural_tag" else None
    matcher = llguidance.LLMatcher(tokenizer, write_guidance(plan, whitespace, added), log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(_shorten(matcher.get_error()))
    return matcher


def write_choices(choices: list[str]) -> str:
    """EBNF of a list of strings, every character that is not plain ASCII written by its number."""
    return "root ::= " + " | ".join(f'"{_quote(choice)}"' for choice in choices)


def _quote(text: str) -> str:
    plain = [
        each if " " <= each <= "~" and each not in '"\\' else f"\\U{ord(each):08x}" if each > "\uffff" else None
        for each in text
    ]
    return "".join(each if each is not None else f"\\u{ord(text[i]):04x}" for i, each in enumerate(plain))


def _escape_regex(text: str) -> str:
    return "".join("\\" + each if each in "\\.+*?()|[]{}^$#&-~" else each for each in text)


def is_lark(text: str) -> bool:
    """Whether a grammar is in Lark's syntax: no line, comments aside, has EBNF's `::=`."""
    return not any("::=" in line.split("#")[0].split("//")[0] for line in text.split("\n"))


def _shorten(error: object, length: int = 400) -> str:
    return shorten(" ".join(str(error)[: 4 * length].split()), length)
