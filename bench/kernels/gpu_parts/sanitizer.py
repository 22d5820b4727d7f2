# SPDX-License-Identifier: Apache-2.0
"""The kernels at small sizes under each tool of compute-sanitizer.

    python -m bench.kernels.gpu_parts.sanitizer      the small run by itself, which the tools watch

A dry run does that run in the interpreter and lists the tools.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import torch

from bench.kernels.gpu_parts.common import Context, Result
from bench.records import ROOT, Metric
from vllm_ext.kernels.gpu import launch
from vllm_ext.kernels.gpu.configurations import SHIPPED_TILES
from vllm_ext.kernels.gpu.samples import make_format
from vllm_ext.kernels.gpu.trials import LinearTrial, MoeTrial

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
#: Seconds for one tool, where the part has so many left; racecheck is the slowest, at hundreds of times the usual time.
TIMEOUT = 170.0


def run(context: Context) -> Result:
    """Errors that each tool counts."""
    result = Result("sanitizer", "errors", limit=0.5)
    _watch(context, result, "plain", [])
    for tool in TOOLS:
        if context.is_dry_run:
            result.needs_cuda.append(tool)
        elif not context.has_time():
            result.left_out.append(tool)
        elif shutil.which("compute-sanitizer") is None:
            result.add("small", tool, {}, error="compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
        else:
            # A wrong exit code of its own, to tell its findings from the program's failure.
            _watch(context, result, tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"])
    return result


def _watch(context: Context, result: Result, arm: str, prefix: list[str]) -> None:
    command = [*prefix, sys.executable, "-m", "bench.kernels.gpu_parts.sanitizer"]
    # What the part is given is all that it may take: whoever started it ends it then, with all results.
    timeout = min(TIMEOUT, max(1.0, context.deadline - time.monotonic()))
    try:
        # Freed memory that torch keeps would hide accesses past the end of a tensor.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        result.add("small", arm, {}, error=f"took longer than {timeout:.0f} s")
        return
    counts = [int(first or second) for first, second in SUMMARY.findall(done.stdout + done.stderr)]
    if prefix and not counts:
        result.add("small", arm, {}, error=f"no summary: {(done.stdout + done.stderr)[-400:]}")
        return
    errors = sum(counts)
    text = f"exit code {done.returncode}, {errors} errors: {(done.stdout + done.stderr)[-400:]}"
    metrics = {"errors": Metric(errors, "errors", "lower")}
    result.add("small", arm, metrics, error=text if errors or done.returncode else None)


def run_small() -> None:
    """Every tile once, widths with one and two planes, both kinds of activations, edges in every direction."""
    device = torch.device("cpu" if launch.IS_INTERPRETED else "cuda")
    tiles = SHIPPED_TILES[:1] if launch.IS_INTERPRETED else SHIPPED_TILES
    blocks = [make_format(4), make_format(3, 16, 32), make_format(8, 8)]
    for tile in tiles:
        num_tokens = 3 if tile == tiles[0] else tile.block_tokens + 5
        formats = [(blocks[expert % 3], blocks[(expert + 1) % 3]) for expert in range(3)]
        MoeTrial(formats, 128, 128, num_tokens, 2, torch.bfloat16, device, 0).run(0, (tile, tile), 2)
        LinearTrial(make_format(6, 16, -1), 200, 72, num_tokens, torch.float16, device, 0).run(0, (tile,))
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_small()
