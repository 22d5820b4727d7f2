# SPDX-License-Identifier: Apache-2.0
"""The start-up sweep of smartspec: how long forward passes take on this machine, measured once and stored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm_ext.scheduling import step_times
from vllm_ext.scheduling.drafters import describe_drafter
from vllm_ext.speculation.prior import fit_prior

logger = logging.getLogger("vllm.vllm_ext")

#: Tokens of the passes that are measured, as far as the engine allows them in one step.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
#: Timed passes of each size, after one that is not timed.
ROUNDS = 5


def store_measured_prior(executor: Any) -> None:
    """Measure step times through the workers of `executor` unless they are known.

    This engine's scheduler gets them whether or not they can be stored. An engine of a single step size, or with times
    that show nothing, starts from a guess.
    """
    vllm_config = executor.vllm_config
    most = vllm_config.scheduler_config.max_num_batched_tokens
    sizes = [size for size in SIZES if size <= most]
    if len(sizes) < 2 or step_times.find_step_times(vllm_config) is not None:
        return
    started = time.perf_counter()
    by_worker = executor.collective_rpc(measure_passes, args=(sizes,))
    # The slowest rank is what a step waits for.
    target = {size: max(times[size][0] for times in by_worker) for size in sizes}
    drafter = {size: max(times[size][1] for times in by_worker) for size in sizes}
    passes = describe_drafter(vllm_config).passes[-1]
    is_timed = passes > 0 and min(drafter.values()) > 0
    try:
        prior = fit_prior(target, {size: time / passes for size, time in drafter.items()} if is_timed else None)
    except ValueError as error:
        logger.warning("smartspec starts from guessed step times: %s", error)
        return
    step_times.keep_step_times(vllm_config, prior)
    logger.info("smartspec measured %d step sizes in %.1f s", len(sizes), time.perf_counter() - started)


def measure_passes(worker: Any, sizes: list[int]) -> dict[int, tuple[float, float]]:
    """By tokens: median milliseconds of a forward pass of the target model, and of all that the drafter does beside it.

    Runs in a worker; all ranks run the same passes.
    """
    synchronize = _find_synchronize()
    run, watch = worker.model_runner._dummy_run, Stopwatch(synchronize)
    measured: dict[int, tuple[float, float]] = {}
    with time_drafter(worker.model_runner, watch):
        for size in sizes:
            run(size)
            synchronize()
            times = []
            for _ in range(ROUNDS):
                watch.milliseconds = 0.0
                started = time.perf_counter()
                run(size)
                synchronize()
                times.append(((time.perf_counter() - started) * 1e3 - watch.milliseconds, watch.milliseconds))
            target, drafter = np.median(times, axis=0).tolist()
            measured[size] = target, drafter
    return measured


class Stopwatch:
    """Milliseconds spent in the calls that it is wound around."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """synchronize: waits for the device."""
        self.milliseconds = 0.0
        self._synchronize = synchronize

    def wind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._synchronize()
            self.milliseconds += (time.perf_counter() - started) * 1e3
            return result

        return timed


@contextmanager
def time_drafter(model_runner: Any, watch: Stopwatch) -> Iterator[None]:
    """Within this, the drafter's part of a dummy run goes to `watch`: `dummy_run` of V1's, `propose` of V2's.

    vLLM's dummy runs include it where the drafter is a model.
    """
    speculator = getattr(model_runner, "speculator", None)
    drafter, name = speculator, "propose"
    if speculator is None:
        drafter, name = getattr(model_runner, "drafter", None), "dummy_run"
    if not hasattr(drafter, name):
        yield
        return
    setattr(drafter, name, watch.wind(getattr(drafter, name)))
    try:
        yield
    finally:
        # Of the object, not of its class.
        delattr(drafter, name)


def _find_synchronize() -> Callable[[], None]:
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from torch.accelerator import synchronize

        return synchronize
    return lambda: None
