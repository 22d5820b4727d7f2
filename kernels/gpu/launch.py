# SPDX-License-Identifier: Apache-2.0
"""Which tensors the Triton kernels serve, and what a launcher has to know of the process and the device.

Imports no triton, so that an op can ask before anything is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from .configurations import Device, Tile

#: Whether triton runs kernels in its interpreter, on CPU tensors. Read when triton is imported, as triton does.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

#: Element types of x that the kernels multiply. A float32 model keeps float32 arithmetic, in the reference.
DTYPES = (torch.bfloat16, torch.float16)

#: The first GPUs with bf16 in their tensor cores.
OLDEST_CAPABILITY = (8, 0)

#: What tiles are chosen for where there is no GPU, in the interpreter: an H200.
INTERPRETED_DEVICE = Device(capability=(9, 0), num_processors=132)


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels run for this x: its element type, an NVIDIA GPU of sm_80 or newer, and triton installed."""
    return x.dtype in DTYPES and _serves_device(x.device)


@functools.cache
def describe_device(device: torch.device) -> Device:
    """What the choice of tiles goes by."""
    if device.type != "cuda":
        return INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count, properties.name)


def use_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on this device: it takes the current one, whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device, in which nothing can be read from it."""
    if device.type != "cuda":
        return False
    # torch answers for the current device.
    with use_device(device):
        return torch.cuda.is_current_stream_capturing()


def tile_options(tile: Tile) -> dict[str, object]:
    """A tile as the GEMM kernels take it: their constants, and Triton's own options."""
    return {
        "SCALING": tile.scaling,
        "BLOCK_N": tile.block_n,
        "BLOCK_TOKENS": tile.block_tokens,
        "STAGES": tile.num_stages,
        "UNROLL": tile.unroll,
        "USE_ASM": not IS_INTERPRETED,
        "num_warps": tile.num_warps,
    }


@functools.cache
def _serves_device(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return IS_INTERPRETED
    # The inline PTX is NVIDIA's; torch calls AMD's GPUs "cuda", too.
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
