# SPDX-License-Identifier: Apache-2.0
"""What a codec can know of a layer before it serves: channel order, smooth scales, shifts, clips, codebooks.

Pure functions of keys or values, float [tokens, kv heads, D], as they are stored: keys after RoPE, or before it for a
preset with pre_rope. Every function is deterministic for its seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from vllm_ext.kernels.kv_store.codec import CodecTensors, dequantize, list_clips, quantize, to_stored
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.presets import Preset

#: Shares of a group's range that are tried; SKVQ recommends .91 to .97, of least and greatest.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
#: An ingredient is kept when the error falls by this share at least.
WORTHWHILE = 0.01
#: Exponents of smooth scales that are tried; QServe's is one half.
SMOOTH_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Rounds of Lloyd's iteration, as KVQuant's.
CODEBOOK_ROUNDS = 50
#: A channel that is zero on all calibration tokens still divides by this.
SMALLEST_SCALE = 1e-4


def calibrate_layer(
    key: torch.Tensor, value: torch.Tensor, preset: Preset, query: torch.Tensor | None = None, seed: int = 0
) -> tuple[CodecTensors, CodecTensors]:
    """Everything below for one layer: (tensors of K, tensors of V), float32 and int64 on the CPU.

    key, value: float [tokens, kv heads, D]. query: float [tokens, heads, D], in the same coordinates as key; it
    weights the channels of K by what queries make of them. preset: fitted to the head size or not. Raises ValueError
    for shapes that do not fit, non-finite numbers, and fewer tokens than a codebook has levels.
    """
    _check(key, "key")
    _check(value, "value")
    fitted = preset.fit(key.shape[-1])
    weights = None
    if query is not None:
        if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[2]:
            raise ValueError(f"query {list(query.shape)} does not fit keys {list(key.shape)}")
        weights = query.float().unflatten(1, (key.shape[1], -1)).square().mean((0, 2))
    return (
        calibrate_side(key, fitted.key, preset.clips, weights, seed, preset.codebook),
        calibrate_side(value, fitted.value, preset.clips, None, seed, preset.codebook),
    )


def calibrate_side(
    x: torch.Tensor,
    codec: Codec,
    clips: Sequence[float] = (1.0,),
    weights: torch.Tensor | None = None,
    seed: int = 0,
    codebook: bool = False,
) -> CodecTensors:
    """The tensors of one codec for x, float [tokens, kv heads, D].

    clips: what the preset tries for every group. weights: float32 [kv heads, D], what a squared error of each channel
    costs; None for 1. codebook: whether levels are chosen, too. Shift, smooth scales, order, clips, codebook are found
    in this order, and each is kept only where it takes `WORTHWHILE` of the error away: what does not help here would
    only fit these tokens.
    """

    def improve(tensors: CodecTensors, **found: torch.Tensor) -> CodecTensors:
        changed = tensors._replace(**found)
        before, after = (measure_error(x, codec, each, clips, weights) for each in (tensors, changed))
        return changed if after < before * (1 - WORTHWHILE) else tensors

    tensors = CodecTensors()
    tensors = improve(tensors, shift=find_shift(x))
    tensors = improve(tensors, smooth=search_smooth(x, codec, tensors, clips, weights))
    if not codec.per_channel and codec.group_size < x.shape[-1]:
        tensors = improve(tensors, order=order_channels(to_stored(x, tensors), codec.group_size, seed))
    tensors = improve(tensors, clip=search_clip(x, codec, tensors, weights))
    if codebook and 2 < codec.num_levels < 16:
        tensors = improve(tensors, levels=fit_codebook(x, codec, tensors, clips, weights))
    return tensors


def find_shift(x: torch.Tensor) -> torch.Tensor:
    """What every token has in a channel, float32 [kv heads, D]: the middle of its usual range.

    The middle of the 1st and 99th percentiles: a few strange tokens (sinks) do not move it. Source: KVQuant's zero
    point of a channel; a bias of K (Qwen2.5) goes with it.
    """
    return _quantiles(x.float(), (0.01, 0.99)).mean(0)


def smooth_scales(x: torch.Tensor, power: float) -> torch.Tensor:
    """SmoothAttention's scales, float32 [kv heads, D]: (greatest absolute value of the channel) ** power, divided by
    the head's geometric mean so that scores keep their size.

    Source: QServe section 4.2; its scales are equal for the two channels of a rotary pair because they are folded
    into weights before RoPE, ours apply to what is stored.
    """
    scales = x.float().abs().amax(0).clamp(min=SMALLEST_SCALE) ** power
    return scales / scales.log().mean(-1, keepdim=True).exp()


def search_smooth(
    x: torch.Tensor,
    codec: Codec,
    tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best of `SMOOTH_POWERS` for every head, at a size of values where fp8 scales are accurate.

    tensors: those found before; their shift is taken off first.
    """
    centred = x.float() if tensors.shift is None else x.float() - tensors.shift
    candidates = [smooth_scales(centred, power) * _unit(centred) for power in SMOOTH_POWERS]
    errors = torch.stack(
        [head_errors(x, codec, tensors._replace(smooth=smooth), clips, weights) for smooth in candidates]
    )
    best = errors.argmin(0)
    return torch.stack(candidates)[best, torch.arange(best.numel())]


def order_channels(x: torch.Tensor, group_size: int, seed: int = 0) -> torch.Tensor:
    """An order of each head's channels in which groups hold similar ones, int64 [kv heads, D].

    x: float [tokens, kv heads, D], shifted and smoothed. Channels are points (least, greatest value); k-means finds
    D / group_size clusters, which are laid out by the width of their centre, their channels likewise.
    Source: SKVQ section 3.2, whose groups then vary in size and span all heads; here every group is group_size
    channels of one head, so that cells of a head stay its own under tensor parallelism.
    """
    clusters = x.shape[-1] // group_size
    points = torch.stack([x.amin(0), x.amax(0)], -1).double().numpy()
    return torch.from_numpy(np.stack([_order_head(head, clusters, seed) for head in points]))


def search_clip(
    x: torch.Tensor,
    codec: Codec,
    tensors: CodecTensors,
    weights: torch.Tensor | None = None,
    clips: Sequence[float] = CLIPS,
) -> torch.Tensor:
    """The one share of each group's range that loses least, float32 [kv heads, groups] (per_channel: [kv heads, D]).

    Loss: squared error of values, times weights. Source: SKVQ section 3.3, which takes the error of attention. It
    serves where weights tell channels of a group apart, which the store's own search by group does not know.
    """
    stored, cost = _to_groups(x, codec, tensors, weights)
    errors = []
    for clip in clips:
        decoded = dequantize(quantize(stored, codec, [clip], tensors.levels), codec, tensors.levels)
        squared = (decoded - stored).square() * cost
        errors.append(squared.unflatten(-1, (-1, codec.group_size)).sum((0, -1)))
    best = torch.tensor(clips)[torch.stack(errors).argmin(0)]
    return best.squeeze(-1) if codec.per_channel else best


def fit_codebook(
    x: torch.Tensor,
    codec: Codec,
    tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Levels of least squared error for the layer's normalized values, float32 [num_levels], ascending.

    Lloyd's iteration in one dimension, started at the uniform levels and weighted by what a value's error costs: its
    group's scale squared times its channel's weight. Source: KVQuant section 3.3 (k-means weighted by Fisher
    information). Raises ValueError for fewer tokens than levels.
    """
    if x.shape[0] < codec.num_levels:
        raise ValueError(f"{x.shape[0]} tokens do not determine {codec.num_levels} levels: give more calibration text")
    stored, cost = _to_groups(x, codec, tensors, weights)
    coded = quantize(stored, codec, list_clips(codec, tensors, clips))
    scales = coded.scales.float().unsqueeze(-1)
    groups = stored.unflatten(-1, (-1, codec.group_size))
    values = (groups - coded.lows.float().unsqueeze(-1)) / scales
    mass = (cost.expand_as(stored).unflatten(-1, (-1, codec.group_size)) * scales.square()).flatten().double()
    # Outliers, and what was clipped, would pull the end levels beyond where anything else is.
    values = values.clamp(0, codec.num_levels - 1).flatten().double()
    # Sums over sorted values: every round is then a look-up of the boundaries.
    values, order = values.sort()
    sums = torch.stack([mass[order], mass[order] * values]).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    levels = torch.arange(codec.num_levels, dtype=torch.float64)
    for _ in range(CODEBOOK_ROUNDS):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([values.numel()])])
        of_level, total = sums[:, ends].diff(dim=1)
        moved = torch.where(of_level > 0, total / of_level.clamp(min=1e-300), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float()


def measure_error(
    x: torch.Tensor,
    codec: Codec,
    tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
    weights: torch.Tensor | None = None,
) -> float:
    """Weighted squared error of what is read back, over that of zeros, in the model's coordinates."""
    norm = (x.float().square() * (1.0 if weights is None else weights)).sum()
    return float(head_errors(x, codec, tensors, clips, weights).sum() / norm)


def head_errors(
    x: torch.Tensor,
    codec: Codec,
    tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted squared error of each head, float32 [kv heads]. clips: tried where the tensors have none."""
    stored, cost = _to_groups(x, codec, tensors, weights)
    coded = quantize(stored, codec, list_clips(codec, tensors, clips), tensors.levels)
    squared = (dequantize(coded, codec, tensors.levels) - stored).square() * cost
    return squared.transpose(0, 1).flatten(1).sum(-1)


def _to_groups(
    x: torch.Tensor, codec: Codec, tensors: CodecTensors, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in stored coordinates, what a squared error of them costs), groups along the last dimension.

    Per token [tokens, heads, D] and [heads, D]; per channel [groups of tokens, heads, D, group_size] and [heads, D, 1].
    """
    cost = torch.ones(x.shape[1:]) if weights is None else weights.float()
    if tensors.smooth is not None:
        cost = cost * tensors.smooth.square()
    if tensors.order is not None:
        cost = cost.gather(-1, tensors.order)
    stored = to_stored(x, tensors)
    if not codec.per_channel:
        return stored, cost
    whole = x.shape[0] // codec.group_size * codec.group_size
    if whole == 0:
        raise ValueError(f"{x.shape[0]} tokens do not fill a group of {codec.group_size}: give more calibration text")
    return stored[:whole].unflatten(0, (-1, codec.group_size)).permute(0, 2, 3, 1), cost.unsqueeze(-1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """A power of two per head, [kv heads, 1], that brings typical values to 8: scales lie amid fp8's normal range."""
    typical = x.abs().amax(-1).median(0).values.clamp(min=1e-20)
    return torch.exp2((typical / 8).log2().round()).unsqueeze(-1)


def _order_head(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    centres, labels = kmeans2(points, clusters, minit="++", rng=np.random.default_rng(seed), missing="warn")
    centre_width = (centres[:, 1] - centres[:, 0])[labels]
    return np.lexsort((points[:, 1] - points[:, 0], labels, centre_width))


def _quantiles(x: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """[shares, kv heads, D]; torch.quantile refuses large tensors, so by sorting."""
    ordered = x.sort(0).values
    return ordered[[round(share * (x.shape[0] - 1)) for share in shares]]


def _check(x: torch.Tensor, name: str) -> None:
    if x.dim() != 3 or x.shape[0] == 0 or not x.is_floating_point():
        raise ValueError(f"{name} must be float [tokens, kv heads, head_dim], got {x.dtype} {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: the model's activations are damaged")
