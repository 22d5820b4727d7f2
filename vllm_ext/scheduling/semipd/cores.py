# SPDX-License-Identifier: Apache-2.0
"""How the lanes share a processor: a set of cores for each, and threads that stay on theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from vllm_ext.scheduling.phases.controller import Split
from vllm_ext.scheduling.phases.view import Lane

#: Shares of the prefill lane that are offered where the user names none.
SHARES = (0.25, 0.5, 0.75)


class CoreSplit(NamedTuple):
    """Cores of both lanes; the same ones for both where there is only one."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    def measure_shares(self, num_cores: int) -> Split:
        """Parts of the cores."""
        return Split(len(self.prefill) / num_cores, len(self.decode) / num_cores)


def plan_splits(cores: Sequence[int], shares: Sequence[float] = SHARES) -> list[CoreSplit]:
    """Splits of these cores, by the share of the prefill lane, without repetition; at least one core each.

    Raises ValueError for no core, or a share that is not between 0 and 1.
    """
    ordered = sorted(cores)
    if not ordered or not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares {list(shares)} of cores {ordered}: need cores, and shares between 0 and 1")
    if len(ordered) == 1:
        return [CoreSplit((ordered[0],), (ordered[0],))]
    counts = sorted({min(max(1, round(share * len(ordered))), len(ordered) - 1) for share in shares})
    return [CoreSplit(tuple(ordered[:count]), tuple(ordered[count:])) for count in counts]


class LaneThreads:
    """A thread for each lane and set of cores, made when it is first used. A lane's work runs in order.

    A thread's OpenMP team inherits its cores when it is made, so threads are never moved: a lane that gets other cores
    gets another thread.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        """cores: all that the process may use."""
        self._cores = tuple(sorted(cores))
        self._pools: dict[tuple[Lane, tuple[int, ...]], ThreadPoolExecutor] = {}

    def submit(self, lane: Lane, cores: Sequence[int] | None, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run work(*arguments) in the lane's thread on these cores; None: on all."""
        wanted = self._cores if cores is None else tuple(cores)
        pool = self._pools.get((lane, wanted))
        if pool is None:
            pool = ThreadPoolExecutor(
                1, f"vllm-ext-{lane.name.lower()}-{len(wanted)}", initializer=_stay_on, initargs=(wanted,)
            )
            self._pools[lane, wanted] = pool
        return pool.submit(_run_on, len(wanted), work, arguments)

    def shut_down(self) -> None:
        """End the threads once what runs has run."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()


def _stay_on(cores: tuple[int, ...]) -> None:
    # On Linux this is the calling thread alone, and every thread that it starts from here on.
    os.sched_setaffinity(0, cores)


def _run_on(num_threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    # vLLM's CPU worker replaces torch.set_num_threads by a warning. OpenMP keeps the number by thread; MKL for the
    # process, so it is set again before every batch.
    torch._C.set_num_threads(num_threads)
    return work(*arguments)
