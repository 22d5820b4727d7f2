# SPDX-License-Identifier: Apache-2.0
"""Requests for JSON tool calls: a toolbox drawn by seed, its JSON schema, and prompts that ask for calls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from bench.workloads.corpus import Tokenizer, load_corpus
from bench.workloads.requests import Request

VERBS = ("find", "create", "update", "delete", "list", "send", "convert", "schedule")
NOUNS = ("order", "invoice", "customer", "ticket", "flight", "report", "message", "sensor")
FIELDS = ("name", "city", "date", "amount", "status", "priority", "reference", "comment", "limit", "language")
PREAMBLE = (
    "Tools, as JSON schemas:\n{tools}\n\nAnswer with one JSON object that calls one of them.\nRequest: {text}\nCall: "
)


def make_toolbox(generator: np.random.Generator, num_tools: int) -> list[dict[str, Any]]:
    """`num_tools` tools, each {"name", "parameters": a JSON schema of an object}.

    Parameters are strings, integers with bounds, booleans, enumerations, arrays of strings, and one level of nested
    objects. Raises ValueError for fewer than 1 or more than there are names.
    """
    names = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
    if not 1 <= num_tools <= len(names):
        raise ValueError(f"num_tools must be 1 to {len(names)}, got {num_tools}")
    chosen = generator.choice(names, size=num_tools, replace=False)
    return [{"name": str(name), "parameters": _make_object(generator, depth=1)} for name in chosen]


def make_call_schema(toolbox: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of one call of any tool of the box: {"name": ..., "arguments": {...}}."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": tool["parameters"]},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in toolbox
        ]
    }


def make_tool_calls(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 4096,
    output_tokens: int = 96,
    num_tools: int = 6,
) -> tuple[list[Request], dict[str, Any]]:
    """Prompts that show the toolbox and ask for a call; and the request body that constrains the answer to its schema.

    The body, {"structured_outputs": {"json": schema}}, goes with every request (`vllm bench serve --extra-body`).
    Raises ValueError when the toolbox alone does not fit `max_model_len`.
    """
    toolbox = make_toolbox(generator, num_tools)
    corpus = load_corpus("kjv", tokenizer)
    listing = "\n".join(json.dumps(tool, separators=(",", ":")) for tool in toolbox)
    requests = []
    for _ in range(num_requests):
        text = corpus.slice(generator, int(generator.integers(8, 48))).replace("\n", " ")
        prompt = PREAMBLE.format(tools=listing, text=text)
        if (length := corpus.count(prompt)) + output_tokens > max_model_len:
            raise ValueError(
                f"{num_tools} tools make a prompt of {length} tokens, which with an output of {output_tokens} does not "
                f"fit max_model_len {max_model_len}; take fewer tools"
            )
        requests.append(Request(prompt, output_tokens))
    return requests, {"structured_outputs": {"json": make_call_schema(toolbox)}}


def _make_object(generator: np.random.Generator, depth: int) -> dict[str, Any]:
    fields = generator.choice(FIELDS, size=int(generator.integers(2, 5)), replace=False)
    properties = {str(name): _make_value(generator, depth) for name in fields}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _make_value(generator: np.random.Generator, depth: int) -> dict[str, Any]:
    kind = generator.integers(6 if depth else 5)
    if kind == 0:
        return {"type": "string", "maxLength": 24}
    if kind == 1:
        return {"type": "integer", "minimum": 0, "maximum": 9999}
    if kind == 2:
        return {"type": "boolean"}
    if kind == 3:
        return {"enum": ["low", "medium", "high"]}
    if kind == 4:
        return {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3}
    return _make_object(generator, depth - 1)
