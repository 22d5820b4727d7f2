# SPDX-License-Identifier: Apache-2.0
"""A vLLM plugin that makes an engine slower by a known fraction, to see whether the benchmark finds it.

`write_plugin` makes the metadata of a distribution with the entry point; a process with its folder in PYTHONPATH, with
`VLLM_PLUGINS=bench_slowdown` and with `BENCH_SLOWDOWN=0.1` loads it and has every engine step take 10 % longer.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

from bench.records import ROOT

NAME = "bench_slowdown"
FRACTION = "BENCH_SLOWDOWN"
#: A longer gap between two steps is an idle engine, which is not made slower.
IDLE_SECONDS = 0.25


def write_plugin(folder: Path) -> None:
    """Write the metadata that lets vLLM find `register` when `folder` is in PYTHONPATH."""
    place = folder / f"{NAME}-0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n", encoding="utf-8")
    (place / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{NAME} = bench.slowdown:register\n", encoding="utf-8"
    )


def make_environment(folder: Path, fraction: float) -> dict[str, str]:
    """The environment of a server that is slower by `fraction`; `folder` is that of `write_plugin`."""
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "VLLM_PLUGINS": NAME, FRACTION: str(fraction)}


def register() -> None:
    """Entry point: wrap the worker's step. Raises ValueError for a fraction that is not a positive number."""
    from vllm.v1.worker.gpu_worker import Worker

    fraction = float(os.environ.get(FRACTION, "nan"))
    if not fraction > 0:
        raise ValueError(f"{FRACTION} is {os.environ.get(FRACTION)!r}, expected a positive fraction, as 0.1")
    if getattr(Worker.execute_model, "_is_slowed", False):
        return  # vLLM loads plugins in every process, and may do so twice in one
    # CPUWorker and the GPU's worker both run this one.
    Worker.execute_model = slow_down(Worker.execute_model, fraction)


def slow_down(step: Any, fraction: float) -> Any:
    """`step` with real work after it, on all threads of the engine, for `fraction` of the time since the last step."""
    last_end = 0.0

    @functools.wraps(step)
    def slowed(*args: Any, **kwargs: Any) -> Any:
        nonlocal last_end
        result = step(*args, **kwargs)
        now = time.perf_counter()
        if now - last_end < IDLE_SECONDS:
            # Scheduling, sampling and messages of the step lie in this time too, so the whole step becomes slower.
            work_until(now + fraction * (now - last_end))
        last_end = time.perf_counter()
        return result

    slowed._is_slowed = True  # type: ignore[attr-defined]
    return slowed


def work_until(deadline: float) -> None:
    """Multiply matrices until `deadline` of time.perf_counter."""
    import torch

    matrix = torch.ones(128, 128)
    while time.perf_counter() < deadline:
        torch.mm(matrix, matrix)
