# SPDX-License-Identifier: Apache-2.0
"""A turn of the executor: what is launched, on which cores, and whose output comes first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.scheduling.phases.lanes import LaneBatch
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.cores import CoreSplit, LaneThreads
from vllm_ext.scheduling.semipd.executor import LaneExecutor
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneStep


class FakeWorker:
    """Runs a batch until it is told to end it."""

    def __init__(self) -> None:
        self.ends = {lane: threading.Event() for lane in Lane}
        self.cores: dict[Lane, set[int]] = {}

    def run_lane(self, lane: Lane, output: Any, grammar: Any) -> Any:
        self.cores[lane] = os.sched_getaffinity(0)
        if isinstance(output, Exception):
            raise output
        assert self.ends[lane].wait(10)
        return output


@pytest.fixture
def executor() -> Iterator[LaneExecutor]:
    """An executor as `_init_executor` leaves it, on two cores, which may be one and the same."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = allowed[:2]
    made = object.__new__(LaneExecutor)
    made._cores, made._splits = cores, [CoreSplit((cores[0],), (cores[-1],))]
    made._stays, made._threads, made._flights = False, LaneThreads(cores), {}
    made.driver_worker = SimpleNamespace(worker=FakeWorker())
    yield made
    for end in made.driver_worker.worker.ends.values():
        end.set()
    made._threads.shut_down()


def make_launch(lane: Lane, output: Any = "made", tokens: int = 1) -> LaneLaunch:
    return LaneLaunch(LaneBatch(lane, {"r": tokens} if tokens else {}, frozenset()), output, None)


def take_turn(executor: LaneExecutor, *launches: LaneLaunch) -> list[Any]:
    step = LaneStep.make_empty()
    step.launches.extend(launches)
    return executor.execute_model(step, non_block=True).result()


def test_decode_passes_a_prompt(executor: LaneExecutor) -> None:
    worker: Any = executor.driver_worker.worker
    worker.ends[Lane.DECODE].set()
    prompt = make_launch(Lane.PREFILL, "prompt")
    [result] = take_turn(executor, make_launch(Lane.DECODE, "step 1"), prompt)
    assert (result.made, result.share) == ("step 1", 1 / len(executor._cores))
    [result] = take_turn(executor, make_launch(Lane.DECODE, "step 2"))
    assert result.made == "step 2"
    assert result.started <= result.finished
    worker.ends[Lane.PREFILL].set()
    [result] = take_turn(executor)
    assert (result.made, result.launch) == ("prompt", prompt)
    assert worker.cores == {Lane.PREFILL: {executor._cores[0]}, Lane.DECODE: {executor._cores[-1]}}
    assert take_turn(executor) == []


def test_the_engine_looks_up_while_decode_runs_alone(executor: LaneExecutor) -> None:
    started = time.perf_counter()
    assert take_turn(executor, make_launch(Lane.DECODE)) == []
    assert time.perf_counter() - started < 5
    executor.driver_worker.worker.ends[Lane.DECODE].set()
    while not (results := take_turn(executor)):
        pass
    assert results[0].share == 1
    assert executor.driver_worker.worker.cores[Lane.DECODE] == set(executor._cores)


def test_the_engine_is_woken_for_decode_that_waits(executor: LaneExecutor) -> None:
    """Prompts have all cores meanwhile, and keep them beside the step."""
    worker: Any = executor.driver_worker.worker
    worker.ends[Lane.DECODE].set()
    step, started = LaneStep.make_empty(), time.perf_counter()
    step.launches.append(make_launch(Lane.PREFILL)._replace(has_all=True))
    step.wake = started + 0.05
    assert executor.execute_model(step) == []
    assert 0.045 < time.perf_counter() - started < 5
    [result] = take_turn(executor, make_launch(Lane.DECODE))
    assert result.share == 1 / len(executor._cores)
    worker.ends[Lane.PREFILL].set()
    # One that is due already is no reason to wait, nor to miss what has run.
    step.launches, step.wake = [], started
    while not (results := executor.execute_model(step)):
        pass
    assert results[0].share == 1
    assert worker.cores == {Lane.PREFILL: set(executor._cores), Lane.DECODE: {executor._cores[-1]}}


def test_telling_who_is_over_takes_no_cores(executor: LaneExecutor) -> None:
    worker: Any = executor.driver_worker.worker
    for end in worker.ends.values():
        end.set()
    take_turn(executor, make_launch(Lane.DECODE), make_launch(Lane.PREFILL, tokens=0))
    take_turn(executor)
    assert worker.cores[Lane.DECODE] == set(executor._cores)


def test_lanes_may_have_to_stay_on_their_cores(executor: LaneExecutor) -> None:
    executor._stays = True
    executor.driver_worker.worker.ends[Lane.PREFILL].set()
    [result] = take_turn(executor, make_launch(Lane.PREFILL))
    assert executor.driver_worker.worker.cores[Lane.PREFILL] == {executor._cores[0]}
    assert result.share == 1 / len(executor._cores)


def test_errors_of_a_lane_reach_the_engine(executor: LaneExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        take_turn(executor, make_launch(Lane.PREFILL, ZeroDivisionError()))
    # Shutting down still works, with nothing in flight.
    assert not executor._flights


def test_a_lane_has_one_batch(executor: LaneExecutor) -> None:
    take_turn(executor, make_launch(Lane.DECODE))
    with pytest.raises(RuntimeError, match="lane DECODE got a batch while one of it is in flight"):
        take_turn(executor, make_launch(Lane.DECODE))


def test_calls_to_the_worker_wait_for_both_lanes(executor: LaneExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = executor.driver_worker.worker
    take_turn(executor, make_launch(Lane.DECODE))
    seen: list[bool] = []
    worker.look = lambda: seen.append(all(future.done() for *_, future in executor._flights.values()))
    executor.driver_worker.look = worker.look
    timer = threading.Timer(0.1, worker.ends[Lane.DECODE].set)
    timer.start()
    executor.collective_rpc("look")
    assert seen == [True]
    [result] = take_turn(executor)
    assert result.made == "made"
