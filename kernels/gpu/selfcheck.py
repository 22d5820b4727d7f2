# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels compute on this GPU what the reference does, asked once before a model relies on them.

The kernels rest on the order in which a tensor core's registers hold a tile, which inline PTX cannot state and a new
Triton or GPU may change. A wrong answer would be fluent nonsense, so small layers are compared (faults.py).

A process of its own compares them: after a fault in a kernel every further call of CUDA fails, and a kernel that hangs
never returns. Either costs the model its speed and nothing else.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import time

import torch

from . import launch

logger = logging.getLogger("vllm.vllm_ext.kernels")

#: What the other process runs; its arguments are a device and the name of an element type.
COMMAND = (sys.executable, "-m", "vllm_ext.kernels.gpu.faults")

#: Seconds that it may take. Nearly all of them go to compiling some twenty kernels, which Triton keeps on disk.
TIMEOUT = 300.0

#: Its exit code where it cannot have the GPU: in exclusive mode, or with too little memory left.
NO_DEVICE = 3

#: Characters of what it last wrote, for the message.
TAIL = 500


@functools.cache
def is_sound(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers of x's `dtype` on this device can be left to the kernels; says once in the log why not.

    Takes a minute on a new machine and some seconds after that, never more than TIMEOUT, and raises nothing.
    """
    if not launch.serves(torch.empty(0, dtype=dtype, device=device)):
        return False
    logger.info("vllm_ext: comparing the Triton kernels on %s with the reference: a minute the first time", device)
    start = time.monotonic()
    fault = ask_child(device, dtype)
    if fault is None:
        logger.info("vllm_ext: the Triton kernels agree with the reference (%.0f s)", time.monotonic() - start)
        return True
    logger.error(
        "vllm_ext: the Triton kernels are not used on %s: %s. The float32 reference runs instead, slowly. "
        "Please report this with the versions of torch and triton",
        device,
        fault,
    )
    return False


def ask_child(device: torch.device, dtype: torch.dtype) -> str | None:
    """What another process finds wrong with the kernels, None where nothing is.

    Where it cannot have the GPU beside this process, this one compares, and a fault that CUDA does not survive ends it.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # It must find what this process imports, however that came to be importable.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [*COMMAND, str(device), str(dtype).removeprefix("torch.")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (
            f"comparing them took longer than {TIMEOUT:.0f} s: a kernel hangs, or compiling is slow here (what was "
            f"compiled is kept, so another start comes further)"
        )
    except OSError as error:
        return f"the process that compares them did not start: {error}"
    if done.returncode == NO_DEVICE:
        from . import faults

        return faults.find_fault(device, dtype)
    return _read_answer(done)


def _read_answer(done: subprocess.CompletedProcess[str]) -> str | None:
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            fault = json.loads(lines[-1])["fault"]
        except (ValueError, TypeError, KeyError):
            return f"the process that compares them answered {lines[-1][-TAIL:]!r}"
        return None if fault is None else str(fault)
    return f"the process that compares them ended with code {done.returncode}: {done.stderr.strip()[-TAIL:]}"
