# SPDX-License-Identifier: Apache-2.0
"""Numbers that fp8 scales and lows cannot hold: counted, and said once, since they spoil answers and stop nothing."""

from __future__ import annotations

import logging

import torch

from vllm_ext import observability
from vllm_ext.kernels.kv_store.codec import CodecTensors, to_stored
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.presets import Preset

logger = logging.getLogger("vllm.vllm_ext")

#: Tokens of a step from which it is looked at: prompts, of which the look is a small part, and no decoding.
LEAST_TOKENS = 16
#: Steps of a group below this are a few of the smallest numbers of fp8 (2**-9), and rounded by a fifth.
LEAST_STEP = 2.0**-8
#: Share of groups with such steps from which a warning is due: a few tokens, such as a model's own sinks, may well have
#: values near zero.
LEAST_SHARE = 0.05

_reported: set[str] = set()


def count_lost_groups(preset: Preset, sides: tuple[CodecTensors, CodecTensors], key: torch.Tensor,
                      value: torch.Tensor, layer_name: str, engine_index: int = 0) -> None:  # fmt: skip
    """Add a step's groups that fp8 scales and lows lose to the counters; log one warning per process and side.

    key, value: [tokens, kv heads, D], as they are stored. A step of fewer than LEAST_TOKENS tokens is not looked at.
    """
    if len(key) < LEAST_TOKENS:
        return
    for side, codec, tensors, x in (("keys", preset.key, sides[0], key), ("values", preset.value, sides[1], value)):
        # Presets with fp16 scales have nothing to lose.
        if codec.scale_dtype != torch.float8_e4m3fn:
            continue
        low, step = find_ranges(codec, to_stored(x, tensors))
        saturated, underflowing = mark_lost(codec, low, step)
        cut, small = int(saturated.sum()), int(underflowing.sum())
        for kind, count in (("saturated", cut), ("underflow", small)):
            if count:
                observability.add(f"vllm_ext:kv_cache_{kind}_groups_total", count, engine_index)
        if side in _reported or not (cut or small > LEAST_SHARE * low.numel()):
            continue
        _reported.add(side)
        logger.warning(
            "KV-cache preset %s: %d of %d groups of %s of %s %s. Answers suffer: use kv4, whose scales are fp16, or "
            "calibrate (vllm-ext calibrate-kv)", preset.name, cut or small, low.numel(), side, layer_name,
            describe_lost(codec, low, step, bool(cut)),
        )  # fmt: skip


def find_ranges(codec: Codec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, step between levels) of every group of x, float32 [tokens, kv heads, D] in stored coordinates.

    Per-channel keys: of every channel over all tokens of the step. Outliers, which are stored beside, do not count.
    """
    if half := codec.outliers // 2:
        order = x.argsort(-1)
        beside = torch.cat([order[..., :half], order[..., -half:]], -1)
        x = x.scatter(-1, beside, x.median(-1, keepdim=True).values.expand_as(beside))
    groups = x.movedim(0, -1) if codec.per_channel else x.unflatten(-1, (-1, codec.group_size))
    low, high = groups.aminmax(dim=-1)
    return low, (high - low) / (codec.num_levels - 1)


def mark_lost(codec: Codec, low: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups that begin or spread beyond the stored dtypes, groups whose levels fp8 hardly tells apart), bool.

    Groups of one value are stored as they are.
    """
    saturated = (low.abs() > torch.finfo(codec.low_dtype).max) | (step > torch.finfo(codec.scale_dtype).max)
    return saturated, (step > 0) & (step < LEAST_STEP) & ~saturated


def describe_lost(codec: Codec, low: torch.Tensor, step: torch.Tensor, is_cut: bool) -> str:
    """What the worst of the groups have, in words."""
    if is_cut:
        most = max(float(low.abs().max()), float((low + step * (codec.num_levels - 1)).abs().max()))
        return f"reach {most:.4g}, and what begins beyond {torch.finfo(codec.low_dtype).max:g} is cut off"
    return (
        f"differ by {float(step[step > 0].median()):.2g} a level, and fp8 has no numbers between multiples of "
        f"{2.0**-9:.2g}"
    )
