# SPDX-License-Identifier: Apache-2.0
"""Numbers that fp8 scales and lows cannot hold: said once, since they spoil answers and stop nothing."""

from __future__ import annotations

import logging

import torch

from vllm_ext.kernels.kv_store.codec import CodecTensors, to_stored
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.presets import Preset

logger = logging.getLogger("vllm.vllm_ext")

#: Tokens of a step from which it is looked at: prompts, of which the look is a small part, and no decoding.
LEAST_TOKENS = 16
#: Steps of a group below this are a few of the smallest numbers of fp8 (2**-9), and rounded by a fifth.
LEAST_STEP = 2.0**-8

_reported: set[str] = set()


def warn_of_lost_range(preset: Preset, sides: tuple[CodecTensors, CodecTensors], key: torch.Tensor,
                       value: torch.Tensor, layer_name: str) -> None:  # fmt: skip
    """Log one warning per process and side where a step's keys or values are beyond fp8's range, or too small for it.

    key, value: [tokens, kv heads, D], as they are stored. A step of fewer than LEAST_TOKENS tokens is not looked at.
    """
    for side, codec, tensors, x in (("keys", preset.key, sides[0], key), ("values", preset.value, sides[1], value)):
        if side in _reported or len(x) < LEAST_TOKENS:
            continue
        if lost := find_lost_range(codec, to_stored(x, tensors)):
            _reported.add(side)
            logger.warning(
                "KV-cache preset %s: %s of %s %s. Answers suffer: use kv4, whose scales are fp16, or calibrate "
                "(vllm-ext calibrate-kv)", preset.name, side, layer_name, lost,
            )  # fmt: skip


def find_lost_range(codec: Codec, x: torch.Tensor) -> str | None:
    """What of x, float32 [tokens, kv heads, D] in stored coordinates, a codec's scales and lows lose; None: nothing."""
    if codec.scale_dtype != torch.float8_e4m3fn:
        return None
    limit, most = torch.finfo(codec.low_dtype).max, float(x.abs().max())
    if most > limit:
        return f"reach {most:.4g}, and beyond {limit:g} they are cut off"
    groups = x.movedim(0, -1) if codec.per_channel else x.unflatten(-1, (-1, codec.group_size))
    step = float((groups.amax(-1) - groups.amin(-1)).mean()) / (codec.num_levels - 1)
    # All zeros are stored as they are.
    if 0 < step < LEAST_STEP:
        return f"differ by {step:.2g} a level, and fp8 has no numbers between multiples of {2.0**-9:.2g}"
    return None
