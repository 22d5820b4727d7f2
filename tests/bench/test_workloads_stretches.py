# SPDX-License-Identifier: Apache-2.0
"""Streams that change their kind and load: stretches in order, what goes with requests, who obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.case import Workload, parse_case
from bench.client import RunFailed, prepare_load, prepare_requests
from bench.serve.offline import generate_in_turn
from bench.workloads.requests import Request
from bench.workloads.stretches import make_changing
from tests.bench.test_workloads_parts import Words

STRETCHES = [{"kind": "chat", "share": 2, "max_concurrency": 4, "temperature": 1}, "repetitive"]


def make(num_requests: int, **options: Any) -> list[Request]:
    return make_changing(
        np.random.default_rng(0), Words(), num_requests, max_model_len=1024, output_tokens=16, **options
    )


def list_repetitive(made: list[Request]) -> list[bool]:
    # A fresh corpus slice repeats itself nowhere; lines of a repetitive prompt are numbered.
    return [request.prompt.startswith("1. ") for request in made]


def test_stretches_are_equal_and_in_order() -> None:
    made = make(10)
    assert list_repetitive(made) == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 3
    assert {request.output_tokens for request in made} <= set(range(1, 17))
    assert not any(request.extra for request in made)


def test_a_stretch_has_its_share_and_its_load() -> None:
    made = make(9, stretches=STRETCHES)
    assert list_repetitive(made) == [False] * 6 + [True] * 3
    assert [request.extra for request in made] == [{"max_concurrency": 4, "temperature": 1}] * 6 + [{}] * 3


@given(st.integers(1, 40), st.lists(st.sampled_from([1, 2, 0.1, 7.5]), min_size=1, max_size=5))
def test_no_request_is_lost(num_requests: int, shares: list[float]) -> None:
    stretches = [{"kind": "repetitive", "share": share} for share in shares]
    assert len(make(num_requests, stretches=stretches)) == num_requests


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        ("prose", "a stretch is of 'prose', expected one of chat, code, repetitive"),
        (5, "a stretch is of 5"),
        ({"kind": ["chat"]}, "a stretch is of \\['chat'\\]"),
        ({"kind": "chat", "share": float("inf")}, "share of a stretch of chat is inf"),
        ({"kind": "chat", "temperature": float("nan")}, "temperature of a stretch of chat is nan"),
        ({"share": 1}, "a stretch is of None"),
        ({"kind": "chat", "share": 0}, "share of a stretch of chat is 0, expected a number above 0"),
        ({"kind": "chat", "rate": 1}, "a stretch of chat has no 'rate'; it has: kind, share, max_concurrency, temp"),
        ({"kind": "chat", "max_concurrency": 0}, "max_concurrency of a stretch of chat is 0, expected at least 1"),
        ({"kind": "chat", "temperature": -1}, "temperature of a stretch of chat is -1, expected at least 0"),
    ],
)
def test_a_stretch_that_is_none(stretch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(4, stretches=[stretch])


@pytest.mark.parametrize("stretches", [[], "chat"])
def test_stretches_are_a_list(stretches: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of chat, code, repetitive"):
        make(4, stretches=stretches)


def make_workload(mode: str) -> Workload:
    options = {"max_model_len": 512, "output_tokens": 8, "stretches": STRETCHES}
    workload = {"name": "changing", "num_requests": 3, "options": options}
    return parse_case({"model": "none", "mode": mode, "workload": workload}, "trial").workload


def test_only_offline_engines_are_told(tiny_moe: str, tmp_path: Path) -> None:
    requests = prepare_requests(make_workload("offline"), tiny_moe, 1, tmp_path).requests
    assert [one.get("temperature") for one in requests] == [1, 1, None]
    assert [one.get("max_concurrency") for one in requests] == [4, 4, None]
    with pytest.raises(RunFailed, match="changing: only an offline engine obeys max_concurrency of single requests"):
        prepare_load(make_workload("server"), tiny_moe, 1, tmp_path)


class Output:
    """A request that ends with the step after it was sent."""

    finished = True

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


class OneStepEngine:
    """Ends the request that waits longest with every step; keeps how many were there before."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.loads: list[int] = []

    def add_request(self, request_id: str, prompt: Any, asked: Any) -> None:
        self.waiting.append(request_id)

    def step(self) -> list[Output]:
        self.loads.append(len(self.waiting))
        return [Output(self.waiting.pop(0))]


def test_the_next_request_says_how_many_may_be_there() -> None:
    engine = OneStepEngine()
    limits = [3, 3, 3, 3, 1, 1, 2, 2]
    assert len(generate_in_turn(engine, [None] * 8, [None] * 8, limits)) == 8
    # Three at a time until the fifth is next, which waits until nobody is there.
    assert engine.loads == [3, 3, 2, 1, 1, 2, 2, 1]
