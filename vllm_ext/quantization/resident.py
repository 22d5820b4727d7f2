# SPDX-License-Identifier: Apache-2.0
"""How packed weights lie in memory once they are loaded: as stored, or repacked for the kernels of their device."""

from __future__ import annotations

import functools
import os

import torch
from vllm.config import get_current_vllm_config_or_none

from vllm_ext import config
from vllm_ext.kernels.arena import REPACKED_CODES, STORED_CODES, BlockFormat, Layout
from vllm_ext.kernels.gpu import selfcheck
from vllm_ext.kernels.native.load import ISA_ENV, load_ops

#: Model dtypes of the kernels. A float32 model keeps the plain layout, and float32 arithmetic.
RECORD_DTYPES = (torch.bfloat16, torch.float16)

#: Instruction set of the kernels that is there for any machine, and slower than torch's own operators.
SLOW_ISA = "scalar"


def choose_layout(dtype: torch.dtype, device: torch.device) -> Layout:
    """Layout of quantized blocks in a model of this dtype; the first call in a process may compile the kernels.

    Those of the CPU are kept below `vllm_ext.cache_dir`, where the current vLLM configuration gives one.
    """
    if device.type == "cuda" and dtype in RECORD_DTYPES:
        return Layout.GPU_FRAGMENT if is_sound_on_all_ranks(device, dtype) else Layout.PLAIN_CODES
    if device.type != "cpu" or dtype not in RECORD_DTYPES:
        return Layout.PLAIN_CODES
    ops = load_ops(find_cache_dir())
    if ops is None or (ops.isa() == SLOW_ISA and os.environ.get(ISA_ENV) != SLOW_ISA):
        return Layout.PLAIN_CODES
    return Layout.CPU_RECORD


@functools.cache
def is_sound_on_all_ranks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GPU kernels passed their check here and on the other ranks of this tensor-parallel group.

    Ranks of one layer must agree: one that computes by the reference has no CUDA graphs, and others would pad their
    batches to the sizes of theirs. Every rank asks for the first time at its first quantized layer.
    """
    is_sound = False
    try:
        is_sound = selfcheck.is_sound(device, dtype)
    finally:
        # Also where the check raised: the others wait for this rank's vote.
        is_sound = _vote(is_sound)
    return is_sound


def _vote(is_sound: bool) -> bool:
    """Whether all ranks of this tensor-parallel group vote yes; each has to call it."""
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    if not model_parallel_is_initialized() or get_tp_group().world_size == 1:
        return is_sound
    # Loaders make the GPU torch's default device, and this group's backend takes tensors of the CPU alone.
    votes = torch.tensor([is_sound], dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(votes.item())


def find_cache_dir() -> str | None:
    """`vllm_ext.cache_dir` of the engine whose model is being loaded, where it was given."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return None
    return config.read_settings(vllm_config).cache_dir


def find_engine_index() -> int:
    """vLLM's data-parallel rank, by which metrics tell engines apart; 0 where no engine is being made."""
    vllm_config = get_current_vllm_config_or_none()
    return 0 if vllm_config is None else vllm_config.parallel_config.data_parallel_index


def place_in_memory(block: BlockFormat, layout: Layout) -> BlockFormat:
    """A block's format in memory: as stored, but codes repacked where `layout` is one that kernels read."""
    is_repacked = layout in REPACKED_CODES and block.layout in STORED_CODES
    return block._replace(layout=layout) if is_repacked else block


def allocate_arena(num_bytes: int, layout: Layout, device: torch.device) -> torch.Tensor:
    """A uint8 arena of zeros; in 2 MiB pages where the compiled kernels read it, as much of their speed is there."""
    ops = load_ops() if layout == Layout.CPU_RECORD else None
    if ops is None:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return ops.empty_huge(num_bytes)
