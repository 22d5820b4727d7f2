# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tiles for this GPU and write its table (gpu/tuning.py).

    python -m vllm_ext.kernels.tune [--output DIR] [--ops mixed_moe,mixed_linear] [--activations a16,a8] [--bits 2,4]
        [--layers 128x8x2048x768,60x4x2048x1408] [--linears 4096x4096] [--minutes 20] [--dry-run]

Tiles are tried on random layers of these sizes (experts x top k x hidden x intermediate; inputs x outputs), at growing
numbers of tokens; the time of a tile is its geometric mean over layers and widths. The rule's own tile stays where
nothing is faster by more than 3 %, and tiles whose results differ from its results are refused. A table holds for the
GPU and the version of Triton that it was measured with. `--dry-run` goes through everything at tiny sizes in Triton's
interpreter, on a CPU, and writes no table. Where time is over before all numbers of tokens were tried, the table holds
for those that were, and the rule chooses beyond; a second run finds compiled kernels in Triton's cache and comes
further.

Exit codes: 0 ok, 1 no GPU or nothing measured, 2 bad usage.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .gpu import tuning
from .gpu.configurations import DECODE_TILE, Device, Tile, choose_layer_tiles, choose_tile
from .gpu.search import find_tiles, fit_split, join_steps, list_candidates, time_splits
from .gpu.tuning import ACTIVATIONS, OPS, Step, Table

if TYPE_CHECKING:
    import torch

    from .gpu.trials import Trial

#: Rows of activations per weight at which tiles are tried.
POINTS = {
    "mixed_linear": (1, 4, 16, 32, 64, 128, 256, 1024),
    "mixed_moe": (1 / 16, 1 / 2, 2, 8, 16, 32, 64, 128, 256),
}

#: Qwen3-30B-A3B, Qwen1.5-MoE-A2.7B, Mixtral-8x7B; and linear layers of such models.
DEFAULT_LAYERS = [(128, 8, 2048, 768), (60, 4, 2048, 1408), (8, 2, 4096, 14336)]
DEFAULT_LINEARS = [(2048, 2560), (4096, 6144), (4096, 4096)]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    options = _parse(argv)
    if options.dry_run:
        # Triton reads it when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from .gpu import launch

    if options.dry_run != launch.IS_INTERPRETED:
        print("a dry run needs triton's interpreter, and nothing else does: TRITON_INTERPRET", file=sys.stderr)
        return 1
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no CUDA GPU here; --dry-run goes through everything on a CPU", file=sys.stderr)
        return 1
    target = torch.device("cpu" if options.dry_run else "cuda")
    table = tune(options, target, launch.describe_device(target))
    if not any(table.steps.values()):
        print("nothing was measured: give more --minutes", file=sys.stderr)
        return 1
    if options.dry_run:
        print(f"dry run: {sum(map(len, table.steps.values()))} steps, no table written", file=sys.stderr)
        return 0
    folder = options.output or Path(os.environ.get(tuning.FOLDER_ENV) or tuning.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tuning.name_file(table.gpu)
    path.write_text(tuning.format_table(table), encoding="utf-8")
    print(path)
    return 0


def tune(options: argparse.Namespace, target: torch.device, device: Device) -> Table:
    """The table of a device. options: of the command line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    end = time.monotonic() + 60 * options.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    steps: dict[tuple[str, str], tuple[Step, ...]] = {}
    timed_splits: list[tuple[int, int, dict[int, float]]] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        work = list(itertools.product(options.ops, options.activations))
        for place, (op, activations) in enumerate(work):
            # Each has an equal share of the time that is left.
            deadline = time.monotonic() + (end - time.monotonic()) / (len(work) - place)
            int8 = activations == "a8"
            points = POINTS[op][: 2 if options.dry_run else None]
            task = progress.add_task(f"{op} {activations}", total=len(points))
            found: list[tuple[float, tuple[Tile, ...]]] = []
            for point in points:
                if time.monotonic() > deadline:
                    break
                trials = list(make_trials(options, op, int8, point, target))
                rule = _ask_rule(op, int8, point, device)
                tiles = find_tiles(trials, rule, list_candidates(rule, options.dry_run), target)
                found.append((point, tiles))
                if not int8 and max(tile.block_tokens for tile in tiles) <= DECODE_TILE.block_tokens:
                    timed_splits += [
                        (*trial.count_blocks(tiles), time_splits(trial, tiles, target)) for trial in trials
                    ]
                progress.advance(task)
            steps[op, activations] = join_steps(found, is_complete=len(found) == len(points))
    split = fit_split(timed_splits, device.num_processors) if timed_splits else None
    return Table(device.name or "dry run", tuning.find_triton(), steps, split)


def make_trials(
    options: argparse.Namespace, op: str, int8: bool, point: float, target: torch.device
) -> Iterator[Trial]:
    """Layers of every size and width, with inputs for `point` rows of activations per weight."""
    import torch

    from .gpu.samples import make_format
    from .gpu.trials import COLD_BYTES, LinearTrial, MoeTrial

    cold_bytes = 0 if target.type == "cpu" else COLD_BYTES
    rest = (torch.bfloat16, target, cold_bytes)
    for bits in options.bits:
        block = make_format(bits, 8 if int8 else 16)
        if op == "mixed_moe":
            for experts, top_k, hidden, intermediate in options.layers:
                num_tokens = max(1, round(point * experts / top_k))
                yield MoeTrial([(block, block)] * experts, hidden, intermediate, num_tokens, top_k, *rest)
        else:
            for K, out_features in options.linears:
                yield LinearTrial(block, K, out_features, round(point), *rest)


def _ask_rule(op: str, int8: bool, point: float, device: Device) -> tuple[Tile, ...]:
    # Without a name, for an older table of this GPU must not stand in for the rule.
    nameless = replace(device, name="")
    # The same ratio in whole numbers.
    rows, weights = round(16 * point), 16
    if op == "mixed_linear":
        return (choose_tile(rows, weights, int8, nameless),)
    tiles = choose_layer_tiles(rows, weights, int8, nameless)
    return tiles.gate_up, tiles.down


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ext.kernels.tune", description="Find the fastest tiles for this GPU and write its table."
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: ${tuning.FOLDER_ENV}, else the package")
    parser.add_argument("--ops", type=_list_of(OPS), default=list(OPS), metavar="OP,...")
    parser.add_argument("--activations", type=_list_of(ACTIVATIONS), default=list(ACTIVATIONS), metavar="A,...")
    parser.add_argument("--bits", type=_numbers, metavar="BITS,...", help="default: 2,4,8")
    parser.add_argument(
        "--layers", type=_sizes(4), metavar="ExTxHxI,...", help="experts x top k x hidden x intermediate"
    )
    parser.add_argument("--linears", type=_sizes(2), metavar="KxN,...", help="inputs x outputs")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop searching after so long; default: 20")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU; no table")
    options = parser.parse_args(argv)
    options.bits = options.bits or ([4] if options.dry_run else [2, 4, 8])
    options.layers = options.layers or [(2, 1, 128, 128)] if options.dry_run else options.layers or DEFAULT_LAYERS
    options.linears = options.linears or [(128, 64)] if options.dry_run else options.linears or DEFAULT_LINEARS
    return options


def _list_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sizes(count: int) -> Callable[[str], list[tuple[int, ...]]]:
    def parse(text: str) -> list[tuple[int, ...]]:
        parsed = [tuple(int(part) for part in size.split("x")) for size in text.split(",")]
        if wrong := [size for size in parsed if len(size) != count or min(size) < 1]:
            raise argparse.ArgumentTypeError(f"{'x'.join(map(str, wrong[0]))!r} is not {count} sizes joined by x")
        return parsed

    return parse


if __name__ == "__main__":
    sys.exit(main())
