# SPDX-License-Identifier: Apache-2.0
"""The search for the fastest tiles: which are tried, how they are timed, and what becomes of the times.

`python -m vllm_ext.kernels.tune` runs it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import tolerances
from .configurations import CORRECT_SUMS, DECODE_TILE, LARGE_TILE, MIDDLE_TILE, PREFILL_TILE, Tile
from .tuning import Split, Step

if TYPE_CHECKING:
    import torch

    from .trials import Trial

#: A tile must be faster by so much to take the rule's place: less is the spread of two runs.
MARGIN = 0.03
#: How far results of two tiles may be apart: a rounding more in bf16, never the values of a wrong kernel.
LARGEST_ERROR = 3e-2

#: A time is the median of so many.
REPLAYS = 9

#: Every tile that is tried: the rule's, with more and fewer stages, other tokens, and other ways to scale.
CANDIDATES = (
    DECODE_TILE,
    replace(DECODE_TILE, num_stages=3),
    replace(DECODE_TILE, num_stages=6),
    replace(DECODE_TILE, unroll=2),
    replace(DECODE_TILE, scaling=CORRECT_SUMS),
    replace(DECODE_TILE, scaling=CORRECT_SUMS, num_stages=6),
    replace(DECODE_TILE, block_tokens=8),
    # Two warps take 32 rows each, and decode for half as many multiplications: by `mma.sync` on every GPU.
    replace(DECODE_TILE, block_tokens=8, num_warps=2),
    replace(DECODE_TILE, block_tokens=8, num_warps=2, scaling=CORRECT_SUMS),
    replace(DECODE_TILE, block_tokens=8, num_warps=2, num_stages=6),
    replace(DECODE_TILE, block_tokens=32),
    replace(MIDDLE_TILE, block_tokens=32),
    MIDDLE_TILE,
    replace(MIDDLE_TILE, num_stages=4),
    replace(MIDDLE_TILE, block_tokens=128),
    PREFILL_TILE,
    replace(PREFILL_TILE, num_stages=4),
    LARGE_TILE,
    replace(LARGE_TILE, block_tokens=256),
)
SPLITS = (1, 2, 4, 8)


def list_candidates(rule: tuple[Tile, ...], is_dry_run: bool) -> list[tuple[Tile, ...]]:
    """Tiles near the rule's: no fewer tokens than a quarter of its, no more than four times as many.

    The same for both GEMMs of a MoE layer; `find_tiles` varies the second by itself.
    """
    tokens = rule[0].block_tokens
    near = [tile for tile in CANDIDATES if tokens / 4 <= tile.block_tokens <= 4 * tokens]
    return [(tile,) * len(rule) for tile in (near[:2] if is_dry_run else near)]


def find_tiles(
    trials: Sequence[Trial], rule: tuple[Tile, ...], candidates: Sequence[tuple[Tile, ...]], target: torch.device
) -> tuple[Tile, ...]:
    """The fastest of the rule's tiles and the candidates, by the geometric mean over trials."""
    base = _time_tiles(trials, rule, rule, target)
    assert base is not None, "the rule's own tiles run everywhere"
    scores = {rule: base * (1 - MARGIN)}
    for tiles in candidates:
        _add_score(scores, trials, tiles, rule, target)
    best = min(scores, key=lambda tiles: scores[tiles])
    if len(rule) > 1:
        # Of a MoE layer, the second GEMM by itself.
        for tile, *_ in candidates:
            if tile.block_tokens == best[0].block_tokens:
                _add_score(scores, trials, (best[0], tile), rule, target)
        best = min(scores, key=lambda tiles: scores[tiles])
    return best


def _add_score(
    scores: dict[tuple[Tile, ...], float],
    trials: Sequence[Trial],
    tiles: tuple[Tile, ...],
    rule: tuple[Tile, ...],
    target: torch.device,
) -> None:
    if tiles not in scores and (score := _time_tiles(trials, tiles, rule, target)) is not None:
        scores[tiles] = score


def _time_tiles(
    trials: Sequence[Trial], tiles: tuple[Tile, ...], rule: tuple[Tile, ...], target: torch.device
) -> float | None:
    """Seconds of a call; None for tiles that do not fit this GPU, or compute something else than the rule's."""
    from triton.runtime.errors import OutOfResources

    times = []
    for trial in trials:
        try:
            error = tolerances.relative_error(trial.run(0, tiles), trial.run(0, rule))
            # A NaN is no small error, either.
            if not error <= LARGEST_ERROR:
                print(f"{trial.name}: {tiles} is refused, its result is off by {error:.2e}", file=sys.stderr)
                return None
            times.append(_time(trial, tiles, None, target))
        except OutOfResources:
            return None
    return statistics.geometric_mean(times)


def time_splits(trial: Trial, tiles: tuple[Tile, ...], target: torch.device) -> dict[int, float]:
    """Seconds of a call by the number of parts of K."""
    chunks = trial.count_blocks(tiles)[1]
    return {split: _time(trial, tiles, split, target) for split in SPLITS if split <= chunks}


def _time(trial: Trial, tiles: tuple[Tile, ...], split: int | None, target: torch.device) -> float:
    from .trials import Timer

    timer = Timer(lambda index: trial.run(index, tiles, split), trial.copies, target)
    return statistics.median(timer.measure() for _ in range(REPLAYS if target.type == "cuda" else 1))


def fit_split(timed: Sequence[tuple[int, int, dict[int, float]]], num_processors: int) -> Split:
    """The parameters under which the choices are fastest together; of equal ones, those that split least.

    timed: (thread blocks, chunks of K, {split: seconds}) of launches.
    """
    best, least = Split(1, 8, 1), float("inf")
    for largest, blocks, chunks in itertools.product(SPLITS, (1, 2, 4, 8), (8, 4, 2, 1)):
        split = Split(blocks, chunks, largest)
        chosen = (split.choose(num_blocks, K, num_processors) for num_blocks, K, _ in timed)
        # Relative to the launch's best: a long launch weighs no more than a short one.
        score = sum(times[n] / min(times.values()) for n, (_, _, times) in zip(chosen, timed, strict=True))
        if score < least * (1 - 1e-3):
            best, least = split, score
    return best


def join_steps(found: Sequence[tuple[float, tuple[Tile, ...]]], is_complete: bool) -> tuple[Step, ...]:
    """Steps from the best tiles at rising points: a change lies in the geometric middle of two points.

    is_complete: the last tiles hold for any number of rows beyond; else for no more than were measured.
    """
    steps: list[Step] = []
    for place, (point, tiles) in enumerate(found):
        is_last = place == len(found) - 1
        if not is_last and found[place + 1][1] == tiles:
            continue
        if is_last:
            steps.append(Step(None if is_complete else point, tiles))
        else:
            steps.append(Step(round((point * found[place + 1][0]) ** 0.5, 3), tiles))
    return tuple(steps)
