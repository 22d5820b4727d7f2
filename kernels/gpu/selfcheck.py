# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton kernels compute on this GPU what the reference does, asked once before a model relies on them.

The kernels rest on the order in which a tensor core's registers hold a tile, which inline PTX cannot state and a new
Triton or GPU may change. A wrong answer would be fluent nonsense, so a small layer of every width is compared at load
time; a fault costs the model its speed and nothing else.
"""

from __future__ import annotations

import functools
import logging

import torch

from .. import tolerances
from ..mixed_moe import reference
from . import launch, samples
from .configurations import DECODE_TILE, PREFILL_TILE, SCALE_WEIGHTS, LayerTiles, Tile
from .layout import STORED_BITS

logger = logging.getLogger("vllm.vllm_ext.kernels")

#: Two chunks of K, so that the loop over K turns, and a last tile of rows that is not full.
HIDDEN_SIZE, INTERMEDIATE_SIZE = 256, 160
NUM_TOKENS, TOP_K = 24, 2


@functools.cache
def is_sound(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers of x's `dtype` on this device can be left to the kernels; says once in the log why not.

    The first call compiles a few kernels, which Triton keeps on disk: half a minute on a new machine.
    """
    if not launch.serves(torch.empty(0, dtype=dtype, device=device)):
        return False
    for act_bits in (16, 8):
        for tile in (DECODE_TILE, PREFILL_TILE):
            if (fault := _find_fault(device, dtype, act_bits, tile)) is not None:
                logger.error(
                    "vllm_ext: the Triton kernels are not used on %s: %s. The float32 reference runs instead, slowly. "
                    "Please report this with the versions of torch and triton",
                    device,
                    fault,
                )
                return False
    return True


def _find_fault(device: torch.device, dtype: torch.dtype, act_bits: int, tile: Tile) -> str | None:
    """What is wrong with one tile, None where nothing is."""
    from ..mixed_moe import triton

    formats = [(samples.make_format(bits, act_bits), samples.make_format(bits, act_bits, 32)) for bits in STORED_BITS]
    layer = samples.make_moe(formats, HIDDEN_SIZE, INTERMEDIATE_SIZE, device)
    x, topk_ids, topk_weights = samples.make_routing(NUM_TOKENS, HIDDEN_SIZE, TOP_K, len(formats), dtype, device)
    arguments = (topk_ids, topk_weights, layer.arena, layer.table, None, INTERMEDIATE_SIZE, "silu", False)
    name = f"w2-8a{act_bits} in tiles of {tile.block_tokens} tokens"
    try:
        found = triton.mixed_moe(x, *arguments, tiles=LayerTiles(tile, tile))
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the model can be served without
        return f"{name}: {type(error).__name__}: {error}"
    if found is None:
        return f"{name}: not in a layout of the kernels"
    expected = reference.mixed_moe(x.float(), *arguments)
    rounds_weights = act_bits == 16 and tile.scaling == SCALE_WEIGHTS
    tolerance = tolerances.GPU_MOE_ROUNDED[dtype] if rounds_weights else tolerances.GPU_MOE[dtype, act_bits]
    distance = tolerances.relative_error(found, expected)
    # Written so that NaN is a fault.
    if not distance <= tolerance.relative:
        return f"{name}: relative error {distance:.2g} against the reference, allowed is {tolerance.relative:.2g}"
    return None
