# SPDX-License-Identifier: Apache-2.0
"""How the lanes share a processor: a set of cores for each, and threads that stay on theirs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from vllm_ext.scheduling.phases.controller import Split
from vllm_ext.scheduling.phases.view import Lane

#: Shares of the prefill lane that are offered where the user names none.
SHARES = (0.25, 0.5, 0.75)

#: vLLM's variables for the cores of its CPU workers.
BIND, RESERVED = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"


class CoreSplit(NamedTuple):
    """Cores of both lanes; the same ones for both where there is only one."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    def measure_shares(self, num_cores: int) -> Split:
        """Parts of the cores."""
        return Split(len(self.prefill) / num_cores, len(self.decode) / num_cores)


def find_cores() -> list[int]:
    """Cores for the lanes, neighbours next to each other.

    Those that vLLM gives to a CPU worker of its own: one logical CPU of each physical core of the NUMA node where the
    KV cache is, since two lanes on one physical core would not be apart; what VLLM_CPU_OMP_THREADS_BIND lists; or, with
    "nobind", all that this process may use. The last VLLM_CPU_NUM_OF_RESERVED_CPU of them are left free; unlike vLLM's,
    none where that is not set.

    Raises ValueError for a list that cannot be read or names cores that this process may not use, and where all cores
    are reserved.
    Source: vllm.utils.ompmultiprocessing.OMPProcessManager, which only vLLM's multi-process executor asks.
    """
    from vllm.utils.cpu_resource_utils import parse_id_list

    allowed = _list_allowed(frozenset(os.sched_getaffinity(0)))
    wanted, reserved = os.environ.get(BIND, "auto"), os.environ.get(RESERVED) or "0"
    if wanted == "nobind":
        cores = [cpu.id for cpu in allowed]
    elif wanted == "auto":
        node = min(allowed, key=lambda cpu: cpu.id).numa_node
        # The last of the siblings stays: vLLM takes that one too.
        by_core = {cpu.physical_core: cpu.id for cpu in allowed if cpu.numa_node == node}
        cores = list(by_core.values())
    else:
        try:
            cores = parse_id_list(wanted)
        except ValueError as error:
            raise ValueError(
                f"{BIND}={wanted!r} must be cores of one rank such as '0-3,8', 'auto' or 'nobind'"
            ) from error
        if strangers := sorted(set(cores) - {cpu.id for cpu in allowed}):
            raise ValueError(f"{BIND}={wanted!r} names cores {strangers}, which this process may not use: drop them")
    if not reserved.isdecimal() or int(reserved) >= len(cores):
        raise ValueError(f"{RESERVED}={reserved!r} must be a number below {len(cores)}, the cores there are")
    return cores[: len(cores) - int(reserved)]


@functools.cache
def _list_allowed(cores: frozenset[int]) -> list[Any]:
    """vLLM's description of these cores, siblings of a core and cores of a node next to each other."""
    from vllm.utils import cpu_resource_utils

    # It starts a program each time.
    allowed = [cpu for cpu in cpu_resource_utils.get_allowed_cpu_list() if cpu.id in cores]
    return sorted(allowed, key=lambda cpu: (cpu.numa_node, cpu.physical_core, cpu.id))


def plan_splits(cores: Sequence[int], shares: Sequence[float] = SHARES) -> list[CoreSplit]:
    """Splits of these cores, in their order, by the share of the prefill lane, without repetition; at least one core
    each.

    Raises ValueError for no core, or a share that is not between 0 and 1.
    """
    if not cores or not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares {list(shares)} of cores {list(cores)}: need cores, and shares between 0 and 1")
    if len(cores) == 1:
        return [CoreSplit((cores[0],), (cores[0],))]
    counts = sorted({min(max(1, round(share * len(cores))), len(cores) - 1) for share in shares})
    return [CoreSplit(tuple(cores[:count]), tuple(cores[count:])) for count in counts]


class LaneThreads:
    """A thread for each lane and set of cores, made when it is first used. A lane's work runs in order.

    A thread's OpenMP team inherits its cores when it is made, so threads are never moved: a lane that gets other cores
    gets another thread.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        """cores: all that lanes may use."""
        self._cores = tuple(cores)
        self._pools: dict[tuple[Lane, tuple[int, ...]], ThreadPoolExecutor] = {}

    def submit(self, lane: Lane, cores: Sequence[int] | None, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run work(*arguments) in the lane's thread on these cores; None: on all. Raises OSError where the system does
        not let a thread have them.
        """
        wanted = self._cores if cores is None else tuple(cores)
        pool = self._pools.get((lane, wanted))
        if pool is None:
            pool = ThreadPoolExecutor(1, f"vllm-ext-{lane.name.lower()}-{len(wanted)}")
            # Waited for, so that its errors come out here.
            pool.submit(_settle, wanted).result()
            self._pools[lane, wanted] = pool
        return pool.submit(work, *arguments)

    def shut_down(self) -> None:
        """End the threads once what runs has run."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()


def _settle(cores: tuple[int, ...]) -> None:
    # On Linux this is the calling thread alone, and every thread that it starts from here on.
    os.sched_setaffinity(0, cores)
    _set_num_threads(len(cores))
    before = set(os.listdir("/proc/self/task"))
    _start_team(len(cores))
    # Intel's and LLVM's OpenMP put a team, and who starts it, on all cores of the process, once.
    for thread in (0, *map(int, set(os.listdir("/proc/self/task")) - before)):
        with contextlib.suppress(ProcessLookupError):  # another one, which is over
            os.sched_setaffinity(thread, cores)


def _start_team(size: int) -> None:
    # ATen gives a thread 2^15 elements at least.
    torch.zeros(size << 16).add_(1)


def _set_num_threads(count: int) -> None:
    """The number of OpenMP's and MKL's threads for all that this thread runs."""
    # A new thread takes its number from whoever set one last, when it first needs one: that is now, and not in the
    # middle of a batch.
    torch.get_num_threads()
    # vLLM's CPU worker replaces torch.set_num_threads by a warning.
    torch._C.set_num_threads(count)
