# SPDX-License-Identifier: Apache-2.0
"""Arrival times, and traces of lengths and times: made, written, and read from public files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.workloads import traces
from bench.workloads.arrivals import draw_gamma_arrivals, draw_gamma_window
from bench.workloads.requests import CHUNK_TOKENS, TracedRequest, write_trace


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_variation(burstiness: float) -> None:
    times = draw_gamma_arrivals(generator(), 50_001, 5.0, burstiness)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    counts = [len(draw_gamma_window(generator(seed), 10, 5.0, burstiness)) for seed in range(800)]
    assert np.mean(counts) == pytest.approx(50, rel=0.05)


def test_bad_rates_are_named() -> None:
    with pytest.raises(ValueError, match="above 0 and finite, got 0 and 1"):
        draw_gamma_arrivals(generator(), 3, 0, 1)
    with pytest.raises(ValueError, match="above 0 and finite, got 1 and inf"):
        draw_gamma_window(generator(), 3, 1, float("inf"))
    with pytest.raises(ValueError, match="seconds must be above 0"):
        draw_gamma_window(generator(), 0, 1)


def test_shared_prefix_and_nothing_else_is_shared() -> None:
    made = traces.make_bursty(generator(), 20, shared_prefix=40)
    ids = [request.hash_ids for request in made]
    first = ids[0][0]
    assert all(one[: min(2, len(one))] == (first, first + 1)[: len(one)] for one in ids)
    rest = [index for one in ids for index in one[2:]]
    assert len(rest) == len(set(rest))
    assert all(len(one) * CHUNK_TOKENS >= request.input_length for one, request in zip(ids, made, strict=True))


@pytest.mark.parametrize("make", [traces.make_bursty, traces.make_phases])
def test_prompts_of_two_seeds_have_nothing_in_common(make: Any) -> None:
    # The client draws a chunk's tokens from its number alone.
    runs = [{index for one in make(np.random.default_rng(seed), 50) for index in one.hash_ids} for seed in range(10)]
    assert len(set().union(*runs)) == sum(map(len, runs))


def test_phases_follow_each_other_and_begin_again() -> None:
    phases = [
        {"seconds": 10, "mixture": "rag", "rate": 3.0},
        {"seconds": 5, "mixture": "reasoning", "rate": 2.0, "burstiness": 0.5},
    ]
    made = traces.make_phases(generator(), 100, phases=phases, max_model_len=8192)
    assert len(made) == 100
    assert [request.timestamp for request in made] == sorted(request.timestamp for request in made)
    assert made[-1].timestamp > 15
    long_prompts = [request.input_length for request in made if request.timestamp % 15 < 10]
    long_outputs = [request.output_length for request in made if request.timestamp % 15 >= 10]
    assert np.median(long_prompts) > 1000
    assert np.median(long_outputs) > 400


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases is empty"),
        ([{"seconds": 1, "rate": 1}], "a phase has the keys"),
        ([{"seconds": 1, "rate": 1, "mixture": "chat", "speed": 1}], "a phase has the keys"),
        ([{"seconds": 1, "rate": 1, "mixture": "talk"}], "no mixture 'talk'; there are: chat"),
        ([{"seconds": 1, "rate": 1e-9, "mixture": "chat"}], "raise their rates"),
    ],
)
def test_bad_phases_are_named(phases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traces.make_phases(generator(), 5, phases=phases)


def test_our_own_trace_is_read_back_faster(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    made = traces.make_bursty(generator(), 30, max_model_len=1000)
    write_trace(path, made)
    read = traces.read_trace(path, 10, max_model_len=1000, speed=2.0, skip=5)
    for one, other in zip(read, made[5:15], strict=True):
        assert one.timestamp == pytest.approx((other.timestamp - made[5].timestamp) / 2, abs=1e-5)
        assert (one.input_length, one.output_length, one.hash_ids) == (
            other.input_length,
            other.output_length,
            other.hash_ids,
        )
    with pytest.raises(ValueError, match="has 25 requests within 1000 tokens after the first 5; 26 were asked for"):
        traces.read_trace(path, 26, max_model_len=1000, skip=5)


def test_mooncake_traces_have_milliseconds_and_large_chunks(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 3000, "input_length": 100, "output_length": 6, "hash_ids": [7]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = traces.read_trace(path, 2, max_model_len=2000)
    assert (first.timestamp, second.timestamp) == (0, 2)
    assert first.hash_ids[:32] == second.hash_ids == tuple(range(7 * 32, 8 * 32))
    assert len(first.hash_ids) * CHUNK_TOKENS >= 700


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5000000,100,20\n2024-05-10 00:00:02.0,30,4\n",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens\n5.5,ChatGPT,100,20,120\n7,GPT-4,30,4,34\n",
    ],
)
def test_csv_traces(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    first, second = traces.read_trace(path, 2, max_model_len=200)
    assert (first.timestamp, second.timestamp) == (0, pytest.approx(1.5))
    assert (first.input_length, first.output_length, second.input_length) == (100, 20, 30)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b; a trace needs TIMESTAMP"):
        traces.read_trace(path, 1, max_model_len=200)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TracedRequest(-1, 4, 4, (0,)), "comes at -1 s"),
        (TracedRequest(0, 0, 4, (0,)), "has 0 input and 4 output tokens"),
        (TracedRequest(0, 17, 4, (0,)), "1 hash ids of 16 tokens for 17 input tokens"),
    ],
)
def test_bad_traces_are_not_written(request_: TracedRequest, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_trace(tmp_path / "file", [request_])
