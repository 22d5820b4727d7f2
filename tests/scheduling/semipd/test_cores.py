# SPDX-License-Identifier: Apache-2.0
"""Which cores lanes get, and that their threads stay there."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.controller import Split
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.cores import SHARES, CoreSplit, LaneThreads, plan_splits


@given(
    st.sets(st.integers(0, 500), min_size=2, max_size=100),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8),
)
def test_every_core_belongs_to_one_lane(cores: set[int], shares: list[float]) -> None:
    splits = plan_splits(sorted(cores), shares)
    assert 1 <= len(splits) <= len(shares)
    sizes = [len(split.prefill) for split in splits]
    assert sizes == sorted(set(sizes))
    for split in splits:
        assert split.prefill
        assert split.decode
        assert sorted(split.prefill + split.decode) == sorted(cores)


def test_few_cores() -> None:
    assert plan_splits([7]) == [CoreSplit((7,), (7,))]
    assert plan_splits([0, 1]) == [CoreSplit((0,), (1,))]
    assert [split.measure_shares(4) for split in plan_splits(range(4))] == [
        Split(0.25, 0.75),
        Split(0.5, 0.5),
        Split(0.75, 0.25),
    ]
    assert len(plan_splits(range(64), SHARES)) == len(SHARES)


@pytest.mark.parametrize(("cores", "shares"), [([], [0.5]), ([0, 1], []), ([0, 1], [1.0]), ([0, 1], [0.0])])
def test_bad_shares_are_named(cores: list[int], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="need cores, and shares between 0 and 1"):
        plan_splits(cores, shares)


def test_threads_stay_on_their_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    threads = LaneThreads(cores)

    def look(word: str) -> tuple[str, set[int], str]:
        return word, os.sched_getaffinity(0), threading.current_thread().name

    try:
        word, seen, first = threads.submit(Lane.PREFILL, [cores[0]], look, "a").result()
        assert (word, seen) == ("a", {cores[0]})
        _, seen, again = threads.submit(Lane.PREFILL, [cores[0]], look, "b").result()
        assert again == first
        _, seen, other = threads.submit(Lane.DECODE, None, look, "c").result()
        assert seen == set(cores)
        assert other != first
    finally:
        threads.shut_down()
    assert os.sched_getaffinity(0) == set(cores)
    assert not [one for one in threading.enumerate() if one.name.startswith("vllm-ext-")]


def test_an_error_comes_back() -> None:
    threads = LaneThreads([min(os.sched_getaffinity(0))])
    try:
        with pytest.raises(ZeroDivisionError):
            threads.submit(Lane.DECODE, None, lambda: 1 // 0).result()
    finally:
        threads.shut_down()
