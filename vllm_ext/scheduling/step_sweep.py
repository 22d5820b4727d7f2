# SPDX-License-Identifier: Apache-2.0
"""The start-up sweep of smartspec: how long forward passes take on this machine, measured once and stored."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
from scipy.optimize import nnls

from vllm_ext.scheduling import goodput_setup
from vllm_ext.speculation.step_time import DEFAULT_PRIOR, load_prior, store_prior

logger = logging.getLogger("vllm.vllm_ext")

#: Tokens of the passes that are measured, as far as the engine allows them in one step.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
#: Timed passes of each size, after one that is not timed.
ROUNDS = 5


def store_measured_prior(executor: Any) -> None:
    """Measure step times through the workers of `executor` unless an earlier engine stored them.

    A failure to store costs the next engine the same sweep; this one then starts from a guess.
    """
    vllm_config = executor.vllm_config
    path = goodput_setup.find_prior_path(vllm_config)
    if load_prior(path) is not None:
        return
    most = vllm_config.scheduler_config.max_num_batched_tokens
    started = time.perf_counter()
    by_worker = executor.collective_rpc(measure_passes, args=([size for size in SIZES if size <= most],))
    # The slowest rank is what a step waits for.
    milliseconds = {size: max(times[size] for times in by_worker) for size in by_worker[0]}
    try:
        store_prior(path, fit_prior(milliseconds))
    except OSError as error:
        logger.warning("smartspec cannot keep its step times in %s: %s", path.parent, error)
        return
    logger.info("smartspec measured %d step sizes in %.1f s", len(milliseconds), time.perf_counter() - started)


def measure_passes(worker: Any, sizes: list[int]) -> dict[int, float]:
    """Median milliseconds of a forward pass by tokens, in a worker. All ranks run the same passes."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from torch.accelerator import synchronize
    else:

        def synchronize() -> None:
            pass

    run = worker.model_runner._dummy_run
    measured: dict[int, float] = {}
    for size in sizes:
        run(size)
        synchronize()
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run(size)
            synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        measured[size] = float(np.median(times))
    return measured


def fit_prior(milliseconds: dict[int, float]) -> dict[str, float]:
    """Coefficients of the step-time model from milliseconds by tokens.

    The passes show the fixed part and that of a token. Attention, requests and drafting are not in them: these keep
    their guessed shares of a step, which serving replaces. Raises ValueError for fewer than two sizes.
    """
    if len(milliseconds) < 2:
        raise ValueError(f"need two sizes to tell a token's time from a step's, got {sorted(milliseconds)}")
    sizes, times = np.array(list(milliseconds), float), np.array(list(milliseconds.values()))
    # Relative errors, as in the online fit: small steps are what decoding does.
    step, token = nnls(np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None], np.ones_like(times))[0]
    scale = (step + token) / (DEFAULT_PRIOR["step"] + DEFAULT_PRIOR["tokens"])
    guessed = {name: value * scale for name, value in DEFAULT_PRIOR.items()}
    return {**guessed, "step": float(step), "tokens": float(token)}
