# SPDX-License-Identifier: Apache-2.0
"""Public data sets from local files: ShareGPT, LongBench, JSONSchemaBench. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.workloads.corpus import Tokenizer, fit_tokens
from bench.workloads.prompts import RESERVED_TOKENS
from bench.workloads.requests import Request, read_lines

LONGBENCH_FIELDS = ("context", "input", "answers")


def read_sharegpt(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    path: str,
    max_model_len: int = 4096,
    output_tokens: int | None = None,
) -> list[Request]:
    """First message and length of the first answer of random conversations in a ShareGPT file.

    The file is a JSON list of {"conversations": [{"from", "value"}, ...]}. Conversations that do not fit
    `max_model_len`, or have fewer than 4 tokens on a side (as in vLLM's own reader), are passed over.
    Raises ValueError when the file has another form or too few conversations.
    """
    data = _read_json(Path(path))
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a JSON list of conversations, got {type(data).__name__}")
    requests: list[Request] = []
    for index in generator.permutation(len(data)):
        if len(requests) == num_requests:
            break
        turns = data[index].get("conversations") if isinstance(data[index], dict) else None
        if not turns or len(turns) < 2:
            continue
        prompt, answer = (turn["value"] for turn in turns[:2])
        answer_tokens = len(tokenizer.encode(answer, add_special_tokens=False))
        output = answer_tokens if output_tokens is None else output_tokens
        length = len(tokenizer.encode(prompt, add_special_tokens=False))
        if min(length, output) >= 4 and length + output + RESERVED_TOKENS <= max_model_len:
            requests.append(Request(prompt, output))
    return _require(requests, num_requests, path, f"conversations within {max_model_len} tokens")


def read_longbench(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    path: str,
    max_model_len: int = 32768,
    output_tokens: int = 64,
) -> list[Request]:
    """Random questions of one LongBench task, a JSONL file with `context`, `input` and `answers`.

    A context that is too long is cut in the middle, as LongBench's own script does. The answers are written beside the
    prompt. Raises ValueError for a missing field or too few questions.
    """
    entries = read_lines(Path(path))
    requests = []
    for index in generator.permutation(len(entries))[:num_requests]:
        entry = entries[index]
        missing = [name for name in LONGBENCH_FIELDS if name not in entry]
        if missing:
            raise ValueError(f"{path}, entry {index + 1}: no field {missing[0]!r}; LongBench has {LONGBENCH_FIELDS}")
        question = f"\n\nQuestion: {entry['input']}\nAnswer:"
        room = max_model_len - output_tokens - RESERVED_TOKENS
        room -= len(tokenizer.encode(question, add_special_tokens=False))
        if room < 2:
            raise ValueError(
                f"{path}, entry {index + 1}: the question alone does not fit max_model_len {max_model_len}"
            )
        context = _cut_middle(entry["context"], tokenizer, room)
        requests.append(Request(context + question, output_tokens, {"answers": entry["answers"]}))
    return _require(requests, num_requests, path, "questions")


def read_schemas(path: Path) -> dict[str, dict[str, Any]]:
    """JSON schemas by name: every `*.json` below a folder (JSONSchemaBench's repository), or a JSONL file with
    `json_schema` and `unique_id` (its data set). Raises ValueError when there is none."""
    if path.is_dir():
        schemas = {str(file.relative_to(path)): _read_json(file) for file in sorted(path.rglob("*.json"))}
    else:
        schemas = {}
        for number, entry in enumerate(read_lines(path), start=1):
            if "json_schema" not in entry:
                raise ValueError(f"{path}, line {number}: no field 'json_schema'")
            schema = entry["json_schema"]
            schemas[str(entry.get("unique_id", number))] = json.loads(schema) if isinstance(schema, str) else schema
    if not schemas:
        raise ValueError(f"{path} holds no JSON schema; give a folder of .json files or a JSONL file")
    return schemas


def read_json_schema(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    path: str,
    schema: str | None = None,
    max_model_len: int = 4096,
    output_tokens: int = 128,
) -> tuple[list[Request], dict[str, Any]]:
    """Prompts that ask for an instance of one schema of JSONSchemaBench, and the body that constrains the answers.

    `vllm bench serve` sends one body with all requests, so there is one schema: the one called `schema`, or a random
    one. Raises ValueError for a name that is not there, and a schema that does not fit.
    """
    schemas = read_schemas(Path(path))
    names = list(schemas)
    name = names[int(generator.integers(len(names)))] if schema is None else schema
    if name not in schemas:
        raise ValueError(f"{path} has no schema {name!r}; the first of {len(names)} is {names[0]!r}")
    text = json.dumps(schemas[name], separators=(",", ":"))
    requests = []
    for number in range(1, num_requests + 1):
        prompt = f"Write example {number} of a JSON value for this schema.\n{text}\n"
        length = len(tokenizer.encode(prompt, add_special_tokens=False))
        if length + output_tokens + RESERVED_TOKENS > max_model_len:
            raise ValueError(
                f"schema {name!r} makes a prompt of {length} tokens, too long for max_model_len {max_model_len}"
            )
        requests.append(Request(prompt, output_tokens, {"schema": name}))
    return requests, {"structured_outputs": {"json": schemas[name]}}


def _cut_middle(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) <= tokens:
        return text
    half = tokens // 2
    cut = tokenizer.decode(token_ids[:half]) + tokenizer.decode(token_ids[len(token_ids) - (tokens - half) :])
    return fit_tokens(cut, tokenizer, tokens)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _require(requests: list[Request], wanted: int, path: str, what: str) -> list[Request]:
    if len(requests) < wanted:
        raise ValueError(f"{path} has {len(requests)} {what}; {wanted} were asked for")
    return requests
