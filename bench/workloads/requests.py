# SPDX-License-Identifier: Apache-2.0
"""The two files that `vllm bench serve` reads: prompts (`custom`) and traces of lengths and times (`timed_trace`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Tokens that share one hash id in a trace; vLLM's default for `--timed-trace-chunk-hash-size`.
CHUNK_TOKENS = 16
#: Fields beside prompt and length that an offline engine obeys, by request, and `vllm bench serve` cannot: the most
#: requests that may be in flight beside this one when it is sent, itself included, and its temperature.
OFFLINE_FIELDS = ("max_concurrency", "temperature")


@dataclass(frozen=True)
class Request:
    """One prompt and the number of tokens to generate. `extra` is written beside them, for whoever checks answers."""

    prompt: str
    output_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace: seconds after the start, lengths in tokens, one id per CHUNK_TOKENS of the prompt.

    Requests whose ids begin alike begin with the same tokens (vLLM draws random tokens by the id).
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """Write `--dataset-name custom` JSONL: `prompt`, `output_tokens` and the extra fields, one object a line.

    Raises ValueError for an empty stream, an empty prompt, fewer than one output token, or an extra field of the same
    name as ours.
    """
    if not requests:
        raise ValueError(f"no requests to write to {path}; ask for at least 1")
    lines = []
    for number, request in enumerate(requests):
        if not request.prompt:
            raise ValueError(f"request {number} has an empty prompt")
        if request.output_tokens < 1:
            raise ValueError(f"request {number} asks for {request.output_tokens} output tokens; at least 1")
        taken = {"prompt", "output_tokens"} & request.extra.keys()
        if taken:
            raise ValueError(f"request {number}: extra field {min(taken)!r} is taken; rename it")
        lines.append({"prompt": request.prompt, "output_tokens": request.output_tokens, **request.extra})
    _write_lines(path, lines)


def write_trace(path: Path, requests: Sequence[TracedRequest]) -> None:
    """Write `--dataset-name timed_trace` JSONL, by time. Raises ValueError for an empty trace, a negative time, a
    length below 1 or fewer hash ids than the prompt's length needs."""
    if not requests:
        raise ValueError(f"no requests to write to {path}; ask for at least 1")
    lines = []
    for number, request in enumerate(sorted(requests, key=lambda request: request.timestamp)):
        if request.timestamp < 0:
            raise ValueError(f"request {number} comes at {request.timestamp} s; times start at 0")
        if request.input_length < 1 or request.output_length < 1:
            raise ValueError(
                f"request {number} has {request.input_length} input and {request.output_length} output tokens; "
                "at least 1 each"
            )
        if len(request.hash_ids) * CHUNK_TOKENS < request.input_length:
            raise ValueError(
                f"request {number} has {len(request.hash_ids)} hash ids of {CHUNK_TOKENS} tokens for "
                f"{request.input_length} input tokens"
            )
        lines.append(
            {
                "timestamp": round(request.timestamp, 6),
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": list(request.hash_ids),
            }
        )
    _write_lines(path, lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises ValueError naming file and line for anything else."""
    objects = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
        objects.append(value)
    return objects


def _write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects), encoding="utf-8")
