# SPDX-License-Identifier: Apache-2.0
"""The executor of semi-PD: one worker in the engine's process, whose lanes run in threads of their own."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd import setup
from vllm_ext.scheduling.semipd.cores import CoreSplit, LaneThreads, find_cores
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneResult, LaneStep

#: Seconds between two looks at the engine's input while decode runs alone: a prompt that comes in meanwhile need not
#: wait for the step.
POLL = 0.002


class LaneExecutor(UniProcExecutor):
    """Launches a turn's batches and waits until the first of all in flight has run."""

    def _init_executor(self) -> None:
        super()._init_executor()
        self._cores = find_cores()
        self._splits: list[CoreSplit] = setup.plan_device(self.vllm_config)
        self._stays = setup.read_settings(self.vllm_config).mode == "always"
        self._threads = LaneThreads(self._cores)
        self._flights: dict[Lane, tuple[LaneLaunch, float, Future[Any]]] = {}

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """A list of at most one LaneResult, as a future where `non_block`. Raises what a lane's runner raised."""
        if not isinstance(scheduler_output, LaneStep):
            return super().execute_model(scheduler_output, non_block)
        for launch in scheduler_output.launches:
            self._launch(launch, scheduler_output)
        results = self._wait_for_one(scheduler_output.wake)
        if not non_block:
            return results
        future: Future[list[LaneResult]] = Future()
        future.set_result(results)
        return future

    def _launch(self, launch: LaneLaunch, step: LaneStep) -> None:
        lane = launch.batch.lane
        if lane in self._flights:
            raise RuntimeError(f"lane {lane.name} got a batch while one of it is in flight: its depth here is 1")
        # A batch without tokens tells a runner who is over, and needs no cores.
        others = [*step.launches, *(flight for flight, _, _ in self._flights.values())]
        is_alone = not self._stays and all(one.batch.lane is lane for one in others if one.batch.tokens)
        is_alone = is_alone or launch.has_all
        split = self._splits[step.split]
        cores = None if is_alone else split.prefill if lane is Lane.PREFILL else split.decode
        share = 1.0 if cores is None else len(cores) / len(self._cores)
        future = self._threads.submit(lane, cores, self._run, launch)
        self._flights[lane] = (launch, share, future)

    def _run(self, launch: LaneLaunch) -> tuple[Any, float, float]:
        """In a lane's thread."""
        started = time.perf_counter()
        made = self.driver_worker.worker.run_lane(launch.batch.lane, launch.output, launch.grammar)
        return made, started, time.perf_counter()

    def _wait_for_one(self, wake: float | None) -> list[LaneResult]:
        if not self._flights:
            return []
        is_decode_alone = Lane.PREFILL not in self._flights
        futures = [future for *_, future in self._flights.values()]
        until = None if wake is None else max(0.0, wake - time.perf_counter())
        wait(futures, POLL if is_decode_alone else until, FIRST_COMPLETED)
        for lane in (Lane.DECODE, Lane.PREFILL):
            if lane in self._flights and self._flights[lane][2].done():
                launch, share, future = self._flights.pop(lane)
                made, started, finished = future.result()
                return [LaneResult(launch, made, started, finished, share)]
        return []

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, between batches: weights and caches are those of both lanes."""
        wait([future for *_, future in getattr(self, "_flights", {}).values()])
        return super().collective_rpc(*args, **kwargs)

    def shutdown(self) -> None:
        """End both lanes, then the worker."""
        if hasattr(self, "_threads"):
            self._threads.shut_down()
        super().shutdown()

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Lanes overlap already; two steps of one lane do not."""
        return False
