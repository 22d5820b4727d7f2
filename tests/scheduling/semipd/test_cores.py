# SPDX-License-Identifier: Apache-2.0
"""Which cores lanes get, and that their threads stay there."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from vllm_ext.scheduling.phases.controller import Split
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd import cores as lane_cores
from vllm_ext.scheduling.semipd.cores import SHARES, CoreSplit, LaneThreads, find_cores, plan_splits


@given(
    st.lists(st.integers(0, 500), min_size=2, max_size=100, unique=True),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8),
)
def test_every_core_belongs_to_one_lane(cores: list[int], shares: list[float]) -> None:
    splits = plan_splits(cores, shares)
    assert 1 <= len(splits) <= len(shares)
    sizes = [len(split.prefill) for split in splits]
    assert sizes == sorted(set(sizes))
    for split in splits:
        assert split.prefill
        assert split.decode
        assert [*split.prefill, *split.decode] == cores


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


@pytest.fixture
def two_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of four physical cores; cpus 0 to 7 are the first siblings, 8 to 15 the second ones."""
    cpus = [LogicalCPUInfo(cpu, cpu % 8, cpu % 8 // 4) for cpu in range(16)]
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in (lane_cores.BIND, lane_cores.RESERVED):
        monkeypatch.delenv(name, raising=False)
    lane_cores._list_allowed.cache_clear()
    monkeypatch.setattr(lane_cores, "_list_allowed", lane_cores._list_allowed.__wrapped__)


def test_no_two_lanes_on_one_physical_core(two_sockets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # One logical CPU for each physical core of the node of cpu 0.
    assert find_cores() == [8, 9, 10, 11]
    monkeypatch.setenv(lane_cores.RESERVED, "1")
    assert find_cores() == [8, 9, 10]
    monkeypatch.setenv(lane_cores.RESERVED, "0")
    monkeypatch.setenv(lane_cores.BIND, "nobind")
    cores = find_cores()
    assert sorted(cores) == list(range(16))
    for split in plan_splits(cores):
        assert not {cpu % 8 for cpu in split.prefill} & {cpu % 8 for cpu in split.decode}
    half = plan_splits(cores, [0.5])[0]
    assert {cpu % 8 // 4 for cpu in half.prefill} == {0}


def test_cores_that_the_user_names(two_sockets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lane_cores.BIND, "1-3,6")
    assert find_cores() == [1, 2, 3, 6]
    monkeypatch.setenv(lane_cores.RESERVED, "3")
    assert find_cores() == [1]


@pytest.mark.parametrize(
    ("bind", "reserved", "message"),
    [
        ("0-3|4-7", "0", r"='0-3\|4-7' must be cores of one rank"),
        ("all", "0", "='all' must be cores of one rank"),
        ("0-3,77", "0", r"names cores \[77\], which this process may not use"),
        ("0-3", "4", "='4' must be a number below 4"),
        ("0-3", "-1", "='-1' must be a number below 4"),
        ("auto", "half", "='half' must be a number below 4"),
    ],
)
def test_bad_variables_are_named(
    two_sockets: None, monkeypatch: pytest.MonkeyPatch, bind: str, reserved: str, message: str
) -> None:
    monkeypatch.setenv(lane_cores.BIND, bind)
    monkeypatch.setenv(lane_cores.RESERVED, reserved)
    with pytest.raises(ValueError, match=message):
        find_cores()


def test_the_cores_of_this_machine() -> None:
    cores = find_cores()
    assert cores
    assert set(cores) <= os.sched_getaffinity(0)


def test_threads_stay_on_their_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    threads = LaneThreads(cores)

    def look(word: str) -> tuple[str, set[int], int, str]:
        return word, os.sched_getaffinity(0), torch.get_num_threads(), threading.current_thread().name

    try:
        word, seen, count, first = threads.submit(Lane.PREFILL, [cores[0]], look, "a").result()
        assert (word, seen, count) == ("a", {cores[0]}, 1)
        _, seen, _, again = threads.submit(Lane.PREFILL, [cores[0]], look, "b").result()
        assert again == first
        _, seen, count, other = threads.submit(Lane.DECODE, None, look, "c").result()
        assert seen == set(cores)
        assert count == len(cores)
        assert other != first
    finally:
        threads.shut_down()
    assert os.sched_getaffinity(0) == set(cores)
    assert not [one for one in threading.enumerate() if one.name.startswith("vllm-ext-")]


def test_teams_that_spread_are_called_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runtimes of OpenMP than GNU's give a team all cores of the process."""
    cores = sorted(os.sched_getaffinity(0))
    is_over, numbers = threading.Event(), []

    def spread(size: int) -> None:
        os.sched_setaffinity(0, cores)

        def stay() -> None:
            os.sched_setaffinity(0, cores)
            numbers.append(threading.get_native_id())
            assert is_over.wait(10)

        threading.Thread(target=stay).start()
        while not numbers:
            time.sleep(0.001)

    monkeypatch.setattr(lane_cores, "_start_team", spread)
    threads = LaneThreads(cores)
    try:
        assert threads.submit(Lane.DECODE, [cores[-1]], os.sched_getaffinity, 0).result() == {cores[-1]}
        assert os.sched_getaffinity(numbers[0]) == {cores[-1]}
    finally:
        is_over.set()
        threads.shut_down()


def test_a_core_that_cannot_be_had() -> None:
    threads = LaneThreads([max(os.sched_getaffinity(0)) + 1000])
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            threads.submit(Lane.DECODE, None, print)
    finally:
        threads.shut_down()


def test_an_error_comes_back() -> None:
    threads = LaneThreads([min(os.sched_getaffinity(0))])
    try:
        with pytest.raises(ZeroDivisionError):
            threads.submit(Lane.DECODE, None, lambda: 1 // 0).result()
    finally:
        threads.shut_down()


def test_a_batch_keeps_its_number_of_threads() -> None:
    """ATen gives a new thread the number that was set last, by whomever, when it first needs one."""
    before = torch.get_num_threads()
    seen: dict[str, int] = {}

    def run(name: str, count: int, *, settles: bool) -> None:
        if settles:
            lane_cores._set_num_threads(count)
        else:
            torch._C.set_num_threads(count)
        other = threading.Thread(target=lane_cores._set_num_threads, args=(count + 4,))
        other.start()
        other.join()
        seen[name] = torch.get_num_threads()

    for name in ("settled", "not settled"):
        thread = threading.Thread(target=run, args=(name, 3), kwargs={"settles": name == "settled"})
        thread.start()
        thread.join()
    torch._C.set_num_threads(before)
    assert seen == {"settled": 3, "not settled": 7}
