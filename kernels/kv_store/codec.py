# SPDX-License-Identifier: Apache-2.0
"""Numbers to codes and back, and the changes of coordinates that make groups easy to code. Plain torch, float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..packing import pack_codes, unpack_codes
from ..ternary import pack_ternary, unpack_ternary
from .layout import Codec


class CodecTensors(NamedTuple):
    """What calibration adds to a codec, for K or for V of one layer; None: not used.

    order   int64 [kv heads, D]: stored channel i is channel order[h, i] of the head (SKVQ's reorder, within a head)
    smooth  float32 [kv heads, D], in the head's channel order: stored = (x - shift) / smooth (SmoothAttention)
    shift   float32 [kv heads, D], likewise: what a channel has in every token
    clip    float32 [kv heads, groups]: the one share of a group's range that its levels span, in place of those that
            are tried; per_channel: groups = D, in stored order
    levels  float32 [num_levels], ascending, in steps of the scale; uniform is 0, 1, 2, ... (KVQuant's codebook)
    """

    order: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    levels: torch.Tensor | None = None


class Quantized(NamedTuple):
    """Codes uint8 [..., D]; scales and lows in the stored dtypes [..., D/g]; outliers uint8 and bf16 [..., o]."""

    codes: torch.Tensor
    scales: torch.Tensor
    lows: torch.Tensor
    outlier_channels: torch.Tensor
    outlier_values: torch.Tensor


def to_stored(x: torch.Tensor, tensors: CodecTensors) -> torch.Tensor:
    """float32 of x [..., kv heads, D] in the coordinates that are coded."""
    x = x.float()
    if tensors.shift is not None:
        x = x - tensors.shift
    if tensors.smooth is not None:
        x = x / tensors.smooth
    return x if tensors.order is None else x.gather(-1, tensors.order.expand_as(x))


def from_stored(x: torch.Tensor, tensors: CodecTensors) -> torch.Tensor:
    """Undo `to_stored`, up to the rounding of float32."""
    if tensors.order is not None:
        x = x.gather(-1, tensors.order.argsort(-1).expand_as(x))
    if tensors.smooth is not None:
        x = x * tensors.smooth
    return x if tensors.shift is None else x + tensors.shift


def transform_query(query: torch.Tensor, tensors: CodecTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for keys in stored coordinates: q.k = q'.k' + offset, so that keys are never transformed back.

    query: float32 [..., kv heads, G, D], G query heads per kv head. Returns q' of the same shape and offset [..., kv
    heads, G]. The offset is the same for every key, but full-precision keys beside do not have it, so it must be added.
    """
    offset = query.new_zeros(query.shape[:-1])
    if tensors.shift is not None:
        offset = (query * tensors.shift.unsqueeze(-2)).sum(-1)
    if tensors.smooth is not None:
        query = query * tensors.smooth.unsqueeze(-2)
    if tensors.order is not None:
        query = query.gather(-1, tensors.order.unsqueeze(-2).expand_as(query))
    return query, offset


def quantize(
    x: torch.Tensor, codec: Codec, clips: Sequence[torch.Tensor | float] = (1.0,), levels: torch.Tensor | None = None
) -> Quantized:
    """Code x in groups along its last dimension: value = low + scale * level[code].

    x: float32 [..., D], in stored coordinates. clips: shares of each group's range, around its middle, that the levels
    may span; every group takes the one with the least squared error, the first of equal ones. A share is a float or a
    tensor that broadcasts to [..., D/g]. levels: see `CodecTensors`.
    Scales and lows are rounded to their stored dtypes first, the scale so that the top level meets the range from the
    rounded low, and codes are chosen against what is stored: the reader has no other numbers. A NaN makes its group's
    scale NaN, so it stays visible. Values beyond the dtype's range (448 for fp8) saturate.
    Source: SKVQ section 3, KIVI, KVQuant section 3.5 (one sparse list of fixed length). SKVQ has one share per group
    for all tokens, of min and max each, which cuts one end alone where a group lies off zero. Trying a few costs the
    store little and the reader nothing.
    """
    groups = x.unflatten(-1, (-1, codec.group_size))
    channels, values = _split_outliers(x, codec)
    inside = torch.ones_like(x, dtype=torch.bool).scatter(-1, channels, False).view_as(groups)
    high = groups.masked_fill(~inside, -torch.inf).amax(-1)
    low = groups.masked_fill(~inside, torch.inf).amin(-1)
    best, *others = (_code_groups(groups, (high + low) / 2, (high - low) / 2 * clip, codec, levels) for clip in clips)
    for other in others:
        is_better = _squared_error(groups, other, inside, levels) < _squared_error(groups, best, inside, levels)
        best = tuple(torch.where(is_better.unsqueeze(-1), new, old) for new, old in zip(other, best, strict=True))
    codes, scales, lows = best
    return Quantized(
        codes.to(torch.uint8).flatten(-2),
        scales.squeeze(-1).to(codec.scale_dtype),
        lows.squeeze(-1).to(codec.low_dtype),
        channels.to(torch.uint8),
        values.to(torch.bfloat16),
    )


def dequantize(coded: Quantized, codec: Codec, levels: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [..., D] that the codes stand for, in stored coordinates."""
    groups = coded.codes.unflatten(-1, (-1, codec.group_size))
    steps = groups.float() if levels is None else levels[groups.int()]
    x = (coded.lows.float().unsqueeze(-1) + coded.scales.float().unsqueeze(-1) * steps).flatten(-2)
    return x.scatter(-1, coded.outlier_channels.long(), coded.outlier_values.float())


def list_clips(codec: Codec, tensors: CodecTensors, clips: Sequence[float]) -> Sequence[torch.Tensor | float]:
    """The shares of a group's range that `quantize` tries: a layer's own, or else `clips`."""
    if tensors.clip is None:
        return clips
    return [tensors.clip.unsqueeze(-1) if codec.per_channel else tensors.clip]


def pack_side(codes: torch.Tensor, bits: float) -> torch.Tensor:
    """uint8 [..., D] codes to the bytes of a row."""
    return pack_ternary(codes) if bits == 1.5 else pack_codes(codes, int(bits))


def unpack_side(packed: torch.Tensor, bits: float, head_dim: int) -> torch.Tensor:
    """Undo `pack_side`."""
    return unpack_ternary(packed, head_dim) if bits == 1.5 else unpack_codes(packed, int(bits), head_dim)


def _code_groups(
    groups: torch.Tensor, middle: torch.Tensor, half: torch.Tensor, codec: Codec, levels: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """float32 codes [..., groups, g], scales and lows [..., groups, 1], for levels that span middle +- half."""
    top = codec.num_levels - 1
    info = torch.finfo(codec.scale_dtype)
    low = _round_to(middle - half, codec.low_dtype)
    # The smallest positive number there is: a group of equal values has no range, and a step of 0 has no codes.
    scale = _round_to(((middle + half - low) / top).clamp(min=info.tiny * info.eps), codec.scale_dtype)
    low, scale = low.unsqueeze(-1), scale.unsqueeze(-1)
    steps = (groups - low) / scale
    codes = steps.round() if levels is None else torch.bucketize(steps.contiguous(), (levels[1:] + levels[:-1]) / 2)
    # A NaN has no code; its scale is NaN already.
    return codes.clamp(0, top).nan_to_num(0).float(), scale, low


def _squared_error(
    groups: torch.Tensor, coded: tuple[torch.Tensor, ...], inside: torch.Tensor, levels: torch.Tensor | None
) -> torch.Tensor:
    codes, scale, low = coded
    decoded = low + scale * (codes if levels is None else levels[codes.int()])
    return ((decoded - groups) * inside).square().sum(-1)


def _split_outliers(x: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels (int64) and values [..., o] of the o/2 greatest and o/2 least elements of every row."""
    if not codec.outliers:
        return x.new_empty((*x.shape[:-1], 0), dtype=torch.int64), x[..., :0]
    order = x.argsort(dim=-1, stable=True)
    half = codec.outliers // 2
    channels = torch.cat([order[..., -half:], order[..., :half]], -1)
    return channels, x.gather(-1, channels)


def _round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest value of the dtype, as float32; beyond its range the largest, where a conversion gives NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()
