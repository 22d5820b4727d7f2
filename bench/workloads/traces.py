# SPDX-License-Identifier: Apache-2.0
"""Traces: lengths and arrival times of requests. `vllm bench serve` fills them with random tokens."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.workloads.arrivals import draw_gamma_arrivals, draw_gamma_window
from bench.workloads.lengths import MIXTURES, draw_lengths
from bench.workloads.requests import CHUNK_TOKENS, TracedRequest, read_lines

#: A load that changes its kind: long prompts, long outputs, bursts of chat, quiet. Rates are in requests per second.
PHASES: tuple[dict[str, Any], ...] = (
    {"seconds": 30, "mixture": "rag", "rate": 1.0, "burstiness": 1.0},
    {"seconds": 30, "mixture": "reasoning", "rate": 1.0, "burstiness": 1.0},
    {"seconds": 20, "mixture": "chat", "rate": 4.0, "burstiness": 0.25},
    {"seconds": 20, "mixture": "chat", "rate": 0.5, "burstiness": 1.0},
)
MOONCAKE_CHUNK_TOKENS = 512
#: So many phases of a trace are walked through before it is refused for want of requests.
MAX_PHASES = 10_000
#: Columns of public traces in CSV: (time, input, output).
CSV_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),  # Azure LLM inference traces 2023 and 2024
    ("Timestamp", "Request tokens", "Response tokens"),  # BurstGPT
)


def make_bursty(
    generator: np.random.Generator,
    num_requests: int,
    *,
    rate: float = 2.0,
    burstiness: float = 0.25,
    mixture: str = "chat",
    max_model_len: int = 4096,
    output_tokens: int | None = None,
    scale: float = 1.0,
    shared_prefix: int = 0,
) -> list[TracedRequest]:
    """`num_requests` of one mixture of lengths, arriving with gamma-distributed gaps (`draw_gamma_arrivals`).

    `shared_prefix` tokens, in whole chunks, are the same in all prompts.
    """
    times = draw_gamma_arrivals(generator, num_requests, rate, burstiness)
    lengths = draw_lengths(generator, _find_mixture(mixture), num_requests, max_model_len, output_tokens, scale)
    return _number_chunks(times, lengths, shared_prefix, _draw_first_chunk(generator))


def make_phases(
    generator: np.random.Generator,
    num_requests: int,
    *,
    phases: Sequence[Mapping[str, Any]] = PHASES,
    max_model_len: int = 4096,
    scale: float = 1.0,
    rate_scale: float = 1.0,
) -> list[TracedRequest]:
    """The phases one after the other, again and again until there are `num_requests`.

    A phase is {"seconds", "mixture", "rate"} and, if it is not 1, "burstiness"; `rate_scale` multiplies all rates.
    Raises ValueError for a phase with other keys, and when no phase brings a request.
    """
    if not phases:
        raise ValueError("phases is empty; give at least one")
    for phase in phases:
        if not {"seconds", "mixture", "rate"} <= phase.keys() <= {"seconds", "mixture", "rate", "burstiness"}:
            raise ValueError(f"a phase has the keys seconds, mixture, rate and burstiness; got {dict(phase)}")
        _find_mixture(phase["mixture"])
    times: list[float] = []
    lengths: list[tuple[int, int]] = []
    start = 0.0
    for number, phase in enumerate(itertools.cycle(phases)):
        if len(times) >= num_requests:
            break
        if number >= MAX_PHASES:
            raise ValueError(f"{number} phases bring {len(times)} requests, not {num_requests}; raise their rates")
        window = draw_gamma_window(
            generator, phase["seconds"], phase["rate"] * rate_scale, phase.get("burstiness", 1.0)
        )
        times += [start + time for time in window]
        lengths += draw_lengths(generator, _find_mixture(phase["mixture"]), len(window), max_model_len, None, scale)
        start += phase["seconds"]
    return _number_chunks(times[:num_requests], lengths[:num_requests], 0, _draw_first_chunk(generator))


def read_trace(
    path: Path, num_requests: int, *, max_model_len: int, speed: float = 1.0, skip: int = 0
) -> list[TracedRequest]:
    """`num_requests` of a local trace after the first `skip`, `speed` times as fast, starting at 0.

    JSONL with `timestamp`, `input_length`, `output_length` and `hash_ids`, as `write_trace` writes (seconds, an id for
    CHUNK_TOKENS) or as Mooncake's traces (milliseconds, an id for 512 tokens); or CSV with the columns of Azure's LLM
    inference traces or of BurstGPT. Requests that do not fit `max_model_len` would be refused and are left out.
    Raises ValueError naming what is missing.
    """
    if not 0 < speed < math.inf:
        raise ValueError(f"speed must be above 0 and finite, got {speed}")
    rows = _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)
    kept = [row for row in rows[skip:] if row.input_length + row.output_length <= max_model_len]
    kept = [row for row in kept if row.input_length >= 1 and row.output_length >= 1][:num_requests]
    if len(kept) < num_requests:
        raise ValueError(
            f"{path} has {len(kept)} requests within {max_model_len} tokens after the first {skip}; "
            f"{num_requests} were asked for"
        )
    first = min((row.timestamp for row in kept), default=0.0)
    return [
        TracedRequest((row.timestamp - first) / speed, row.input_length, row.output_length, row.hash_ids)
        for row in kept
    ]


def _find_mixture(name: str) -> Any:
    if name not in MIXTURES:
        raise ValueError(f"no mixture {name!r}; there are: {', '.join(MIXTURES)}")
    return MIXTURES[name]


def _draw_first_chunk(generator: np.random.Generator) -> int:
    """A number from which a run's chunks are counted: the client draws a chunk's tokens from its number alone, so with
    equal numbers the prompts of one run would be in the prefix cache of the next."""
    return int(generator.integers(1 << 40)) << 20


def _number_chunks(
    times: Sequence[float], lengths: Sequence[tuple[int, int]], shared_prefix: int, first: int
) -> list[TracedRequest]:
    shared = shared_prefix // CHUNK_TOKENS
    counter = itertools.count(first + shared)
    requests = []
    for time, (prompt, output) in zip(times, lengths, strict=True):
        chunks = math.ceil(prompt / CHUNK_TOKENS)
        ids = [*range(first, first + min(shared, chunks)), *(next(counter) for _ in range(chunks - shared))]
        requests.append(TracedRequest(time, prompt, output, tuple(ids)))
    return requests


def _read_jsonl(path: Path) -> list[TracedRequest]:
    entries = read_lines(path)
    for number, entry in enumerate(entries, start=1):
        missing = {"timestamp", "input_length", "output_length", "hash_ids"} - entry.keys()
        if missing:
            raise ValueError(f"{path}, request {number}: no field {min(missing)!r}")
    # Where ids of CHUNK_TOKENS do not reach, they are Mooncake's, and its times are milliseconds.
    is_mooncake = any(len(entry["hash_ids"]) * CHUNK_TOKENS < entry["input_length"] for entry in entries)
    parts = MOONCAKE_CHUNK_TOKENS // CHUNK_TOKENS if is_mooncake else 1
    return [
        TracedRequest(
            float(entry["timestamp"]) / (1000 if is_mooncake else 1),
            int(entry["input_length"]),
            int(entry["output_length"]),
            tuple(index * parts + part for index in entry["hash_ids"] for part in range(parts)),
        )
        for entry in entries
    ]


def _read_csv(path: Path) -> list[TracedRequest]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or ()
        columns = next((names for names in CSV_COLUMNS if set(names) <= set(header)), None)
        if columns is None:
            wanted = " or ".join(", ".join(names) for names in CSV_COLUMNS)
            raise ValueError(f"{path} has the columns {', '.join(header)}; a trace needs {wanted}")
        rows = [[row[name] for name in columns] for row in reader]
    return _number_chunks(
        [_read_time(time) for time, _, _ in rows], [(int(prompt), int(output)) for _, prompt, output in rows], 0, 0
    )


def _read_time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Azure writes seven decimals of a second; Python reads six.
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
