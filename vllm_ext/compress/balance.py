# SPDX-License-Identifier: Apache-2.0
"""Calibration windows chosen so that rare experts see tokens too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_ext.compress.calibration import NUM_WINDOWS, Tokenizer, make_windows
from vllm_ext.compress.hessian import minimum_tokens
from vllm_ext.compress.progress import track
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import LayerStream

#: Windows that are looked at for each one that is used.
POOL_FACTOR = 4


@dataclass(frozen=True)
class BalancedWindows:
    """chosen: int64 [windows], indices in ascending order. fewest_before, fewest: tokens of the rarest expert of any
    layer, in the draw that was begun with and in the choice."""

    chosen: np.ndarray
    fewest_before: int
    fewest: int


def count_routing(source: SourceModel, windows: np.ndarray, *, progress: bool = False) -> np.ndarray:
    """Tokens of each window that each expert gets, int64 [windows, experts of all layers with experts, in order].

    windows: int64 [windows, context]. One layer is in memory at a time.
    """
    stream = LayerStream(source, windows)
    counts: list[np.ndarray] = []
    for layer in track(stream.layers(), "count routing", stream.num_layers, progress):
        if layer.routed is None:
            continue
        ids = layer.routed.ids.reshape(len(windows), -1).cpu().numpy()
        found = np.zeros((len(windows), layer.num_experts), np.int64)
        np.add.at(found, (np.arange(len(windows))[:, None], ids), 1)
        counts.append(found)
    return np.concatenate(counts, axis=1) if counts else np.zeros((len(windows), 0), np.int64)


def choose_balanced(counts: np.ndarray, wanted: int, least: int) -> BalancedWindows:
    """Of a pool of windows, `wanted` that bring as many experts as possible to `least` tokens.

    counts: int64 [pool, experts], see `count_routing`. Begins with the first `wanted` windows, which are a random draw
    where the pool is one, and exchanges one window for another as long as that makes the tokens that are missing to
    `least`, summed over experts, fewer. Where nothing is missing, nothing changes.
    Raises ValueError for a pool smaller than the choice.

    Source: the aim is that of balanced calibration in EAQuant (arXiv:2506.13329) and MoEQuant (arXiv:2505.03804); the
    exchange is ours, and takes text as it is where MoEQuant writes its own.
    """
    if not 1 <= wanted <= len(counts):
        raise ValueError(f"cannot choose {wanted} of {len(counts)} windows")
    inside = np.arange(len(counts)) < wanted
    total = counts[inside].sum(0)
    before = int(total.min()) if total.size else 0
    missing = int(np.maximum(least - total, 0).sum())
    while missing:
        # The window that helps most goes in, then the one that is missed least goes out.
        outside = np.flatnonzero(~inside)
        if not len(outside):
            break
        gains = np.maximum(least - (total + counts[outside]), 0).sum(1)
        entering = int(outside[gains.argmin()])
        with_it = total + counts[entering]
        leaving_from = np.flatnonzero(inside)
        losses = np.maximum(least - (with_it - counts[leaving_from]), 0).sum(1)
        leaving = int(leaving_from[losses.argmin()])
        if losses.min() >= missing:
            break
        inside[entering], inside[leaving] = True, False
        total, missing = with_it - counts[leaving], int(losses.min())
    return BalancedWindows(np.flatnonzero(inside), before, int(total.min()) if total.size else 0)


def make_balanced_windows(
    source: SourceModel,
    calibration: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    num_windows: int = NUM_WINDOWS,
    progress: bool = False,
) -> np.ndarray:
    """The windows of `calibration.make_windows`, some exchanged so that rare experts get their `minimum_tokens`.

    Runs the model over POOL_FACTOR times as many windows, one layer in memory at a time. Returns int64
    [windows, context]. Raises CalibrationError as `make_windows`.
    """
    known = source.config.get("vocab_size")
    draw = make_windows(calibration, tokenizer, seed=seed, num_windows=num_windows, vocab_size=known)
    more = make_windows(calibration, tokenizer, seed=seed, num_windows=POOL_FACTOR * num_windows, vocab_size=known)
    known = {window.tobytes() for window in draw}
    others = [window for window in more if window.tobytes() not in known]
    pool = np.concatenate([draw, np.stack(others)]) if others else draw
    widest = max(block.K for module in source.modules.values() if module.expert is not None for block in module.blocks)
    counts = count_routing(source, pool, progress=progress)
    return pool[choose_balanced(counts, len(draw), minimum_tokens(widest)).chosen]
