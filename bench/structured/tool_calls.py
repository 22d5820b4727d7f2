# SPDX-License-Identifier: Apache-2.0
"""Strict tool calls in the forms of vLLM's tool parsers: the structural tag of a tool, and a call of it as a text.

Sources: vllm/tool_parsers/structural_tag_registry.py and xgrammar's builtin_structural_tag.py, which make the tags;
texts are as the chat templates of these models write calls.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag

#: The tool's name in every call.
NAME = "use_it"
Choice = Literal["auto", "required"]
#: Forms that are judged, of each choice two: (model, tool choice).
FORMS: tuple[tuple[str, Choice], ...] = (
    ("hermes", "auto"),
    ("llama", "required"),
    ("kimi", "required"),
    ("qwen_3_coder", "auto"),
)


def _closed(name: str, schema: Any, **others: Any) -> dict[str, Any]:
    """An object that needs one property and may have others."""
    properties = {name: schema, **others}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


#: Ordinary schemas of tools: (name, schema, valid arguments, invalid arguments), three of each.
TOOLS: tuple[tuple[str, dict[str, Any], tuple[str, str, str], tuple[str, str, str]], ...] = (
    (
        "bounds",
        _closed("city", {"type": "string"}, days={"type": "integer", "minimum": 1, "maximum": 9}),
        ('{"city": "Bonn"}', '{"city": "", "days": 9}', '{"city": "a b", "days": 1}'),
        ('{"city": "Bonn", "days": 0}', '{"days": 3}', '{"city": "Bonn", "town": "x"}'),
    ),
    (
        "format date",
        {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"]},
        ('{"when": "2024-02-29"}', '{"when": "1999-12-31"}', '{"when": "2000-02-29"}'),
        ('{"when": "2023-02-29"}', '{"when": "soon"}', '{"when": "2024-1-1"}'),
    ),
    (
        "pattern, not anchored",
        _closed("code", {"type": "string", "pattern": "b[0-9]"}),
        ('{"code": "b1"}', '{"code": "a b2 c"}', '{"code": "bb9"}'),
        ('{"code": "b"}', '{"code": ""}', '{"code": "B1"}'),
    ),
    (
        "additionalProperties",
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "integer"}},
        ('{"a": 1}', '{"a": 1, "b": 2}', '{"b": 2}'),
        ('{"a": "x"}', '{"a": 1, "b": "x"}', '{"b": null}'),
    ),
    (
        "minLength",
        _closed("text", {"type": "string", "minLength": 3}),
        ('{"text": "abc"}', '{"text": "say \\"hi\\"\\nto all"}', '{"text": "h\\u00e9 h\\u00e9"}'),
        ('{"text": "ab"}', '{"text": ""}', "{}"),
    ),
    (
        "uniqueItems",
        _closed("tags", {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True}),
        ('{"tags": ["b", "a"]}', '{"tags": []}', '{"tags": ["c"]}'),
        ('{"tags": ["a", "a"]}', '{"tags": ["d"]}', '{"tags": ["a", "b", "a"]}'),
    ),
)


@functools.cache
def _write_tag(model: str, choice: Choice, schema: str) -> str:
    function = {"name": NAME, "parameters": json.loads(schema), "strict": True}
    tool = ChatCompletionToolsParam(type="function", function=function)
    tag = get_model_structural_tag(model, [tool], choice, reasoning=False)
    assert tag is not None
    return json.dumps(tag.model_dump())


def write_tag(model: str, choice: Choice, schema: Any) -> str:
    """The structural tag of one strict tool, as vLLM sends it to an engine. model: of vLLM's registry."""
    return _write_tag(model, choice, json.dumps(schema))


def write_call(model: str, arguments: Mapping[str, Any]) -> str:
    """An output that calls the tool with these arguments."""
    return _CALLS[model](arguments)


def _dump(value: Any) -> str:
    # As models write it: other letters as they are.
    return json.dumps(value, ensure_ascii=False)


def _write_hermes(arguments: Mapping[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{NAME}", "arguments": {_dump(arguments)}}}\n</tool_call>'


def _write_llama(arguments: Mapping[str, Any]) -> str:
    return f'{{"name": "{NAME}", "parameters": {_dump(arguments)}}}'


def _write_kimi(arguments: Mapping[str, Any]) -> str:
    call = f"functions.{NAME}:0<|tool_call_argument_begin|>{_dump(arguments)}"
    return f"<|tool_calls_section_begin|><|tool_call_begin|>{call}<|tool_call_end|><|tool_calls_section_end|>"


def _write_qwen_coder(arguments: Mapping[str, Any]) -> str:
    values = {name: value if isinstance(value, str) else _dump(value) for name, value in arguments.items()}
    parts = [f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items()]
    return f"<tool_call>\n<function={NAME}>\n{''.join(parts).removesuffix(chr(10))}\n</function>\n</tool_call>"


_CALLS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "hermes": _write_hermes,
    "llama": _write_llama,
    "kimi": _write_kimi,
    "qwen_3_coder": _write_qwen_coder,
}
