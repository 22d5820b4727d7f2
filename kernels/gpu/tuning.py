# SPDX-License-Identifier: Apache-2.0
"""Tiles and splits that were measured on a kind of GPU: `tuning/<name of the GPU>.json`, read once.

`python -m vllm_ext.kernels.tune` writes such a table on the GPU itself. Folders are looked through in this order:

    $VLLM_EXT_TUNING_DIR    tables of one's own
    tuning/                 tables that come with the pack

A table counts for the minor version of Triton that it was measured with: another one compiles other loops. Where there
is none, the rule in configurations.py chooses, from constants.

    {"version": 1, "gpu": "NVIDIA H200", "triton": "3.6.0",
     "mixed_linear": {"a16": [{"rows": 16, "tile": {"block_n": 64, "block_tokens": 16, ...}}, {"rows": null, ...}]},
     "mixed_moe": {"a16": [{"rows": 16, "gate_up": {...}, "down": {...}}, ...], "a8": [...]},
     "split": {"blocks_per_processor": 2, "fewest_chunks": 4, "largest": 8}}

`rows` is the number of rows of activations per weight up to which a step holds; null: any number. "a8" is for layers
in which a block takes 8-bit activations. What a table leaves out, the rule chooses.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .configurations import LayerTiles, Tile

VERSION = 1
FOLDER = Path(__file__).parent / "tuning"
FOLDER_ENV = "VLLM_EXT_TUNING_DIR"

#: Ops, and the tiles that a step of each names.
OPS = {"mixed_linear": ("tile",), "mixed_moe": ("gate_up", "down")}
ACTIVATIONS = ("a16", "a8")


class Step(NamedTuple):
    """Tiles for up to `rows` rows of activations per weight; None: for any number."""

    rows: float | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Split:
    """When K is divided among thread blocks. configurations.py explains the numbers, in its constants."""

    blocks_per_processor: int
    fewest_chunks: int
    largest: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"split: {name}={value!r} is not a positive integer")

    def choose(self, num_blocks: int, chunks: int, num_processors: int) -> int:
        """Parts for a launch of `num_blocks` thread blocks, each with `chunks` chunks of K."""
        split = 1
        while (
            split < self.largest
            and num_blocks * split < self.blocks_per_processor * num_processors
            and chunks // (2 * split) >= self.fewest_chunks
        ):
            split *= 2
        return split


@dataclass(frozen=True)
class Table:
    """What was measured on one kind of GPU. steps: by (op, "a16" or "a8"), the largest number of rows last."""

    gpu: str
    triton: str
    steps: Mapping[tuple[str, str], tuple[Step, ...]] = field(default_factory=dict)
    split: Split | None = None

    def find_step(self, op: str, int8: bool, num_rows: int, num_weights: int) -> Step | None:
        """The step for a batch; None where the table says nothing of it."""
        per_weight = num_rows / max(num_weights, 1)
        for step in self.steps.get((op, ACTIVATIONS[int8]), ()):
            if step.rows is None or per_weight <= step.rows:
                return step
        return None


def name_file(gpu: str) -> str:
    """The name of a GPU's table: "NVIDIA H200" -> "NVIDIA_H200.json"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu) + ".json"


def find_table(gpu: str) -> Table | None:
    """The table for a GPU, by the name that torch and nvidia-smi give it; None where there is none for this Triton.

    Raises ValueError for a table that cannot be read, naming the file and the entry.
    """
    return _find(gpu, os.environ.get(FOLDER_ENV, "")) if gpu else None


def find_tile(gpu: str, num_rows: int, num_weights: int, int8: bool) -> Tile | None:
    """As `configurations.choose_tile`, from the GPU's table; None where that has nothing for this batch."""
    table = find_table(gpu)
    step = table.find_step("mixed_linear", int8, num_rows, num_weights) if table else None
    return step.tiles[0] if step else None


def find_layer_tiles(gpu: str, num_pairs: int, num_experts: int, int8: bool) -> LayerTiles | None:
    """As `configurations.choose_layer_tiles`, from the GPU's table."""
    table = find_table(gpu)
    step = table.find_step("mixed_moe", int8, num_pairs, num_experts) if table else None
    return LayerTiles(*step.tiles) if step else None


def find_split(gpu: str) -> Split | None:
    """The parameters of `configurations.choose_split` that were measured on a GPU."""
    table = find_table(gpu)
    return table.split if table else None


def list_tiles(gpu: str, int8: bool) -> set[Tile]:
    """Every tile that a GPU's table names for such layers."""
    table = find_table(gpu)
    steps = table.steps.items() if table else ()
    return {
        tile
        for (_, activations), listed in steps
        if activations == ACTIVATIONS[int8]
        for step in listed
        for tile in step.tiles
    }


def list_limits() -> set[float]:
    """Every number of rows per weight at which some table changes tiles."""
    own = os.environ.get(FOLDER_ENV, "")
    tables = [_find(path.stem, own) for folder in _folders(own) for path in folder.glob("*.json")]
    steps = [step for table in tables if table for listed in table.steps.values() for step in listed]
    return {step.rows for step in steps if step.rows is not None}


def find_triton() -> str:
    """The version of the installed Triton, without loading it; "" where it is not installed under its own name."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_table(path: Path) -> Table:
    """Raises ValueError naming the file and what is wrong with it."""
    try:
        return parse_table(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a tuning table: {what}; write it again with vllm_ext.kernels.tune") from error


def parse_table(content: dict[str, Any]) -> Table:
    """A table from its JSON object. Raises ValueError, KeyError or TypeError for anything that it should not have."""
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r} is not {VERSION}")
    if unknown := sorted(content.keys() - {"version", "gpu", "triton", "split", *OPS}):
        raise ValueError(f"unknown entry {unknown[0]!r}")
    steps: dict[tuple[str, str], tuple[Step, ...]] = {}
    for op, names in OPS.items():
        for activations, listed in content.get(op, {}).items():
            if activations not in ACTIVATIONS:
                raise ValueError(f"{op}: {activations!r} is none of {', '.join(ACTIVATIONS)}")
            parsed = tuple(_parse_step(step, names) for step in listed)
            limits = [float("inf") if step.rows is None else step.rows for step in parsed]
            if limits != sorted(set(limits)):
                raise ValueError(f"{op}, {activations}: the numbers of rows {limits} do not rise")
            steps[op, activations] = parsed
    split = Split(**content["split"]) if "split" in content else None
    return Table(str(content["gpu"]), str(content["triton"]), steps, split)


def format_table(table: Table) -> str:
    """The text of a table's file, which `read_table` reads back."""
    content: dict[str, Any] = {"version": VERSION, "gpu": table.gpu, "triton": table.triton}
    for (op, activations), steps in table.steps.items():
        content.setdefault(op, {})[activations] = [
            {"rows": step.rows} | {name: asdict(tile) for name, tile in zip(OPS[op], step.tiles, strict=True)}
            for step in steps
        ]
    if table.split:
        content["split"] = asdict(table.split)
    return json.dumps(content, indent=1) + "\n"


def _parse_step(step: dict[str, Any], names: tuple[str, ...]) -> Step:
    rows = step["rows"]
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int | float) or rows <= 0):
        raise ValueError(f"rows={rows!r} is neither a positive number nor null")
    if unknown := sorted(step.keys() - {"rows", *names}):
        raise ValueError(f"unknown entry {unknown[0]!r} of a step")
    tiles = tuple(Tile(**step[name]) for name in names)
    if len(tiles) > 1:
        # Raises where they do not share the tokens of a tile.
        LayerTiles(*tiles)
    return Step(rows, tiles)


def _folders(own: str) -> list[Path]:
    return [Path(own), FOLDER] if own else [FOLDER]


@functools.cache
def _find(gpu: str, own: str) -> Table | None:
    for folder in _folders(own):
        path = folder / name_file(gpu)
        if path.is_file():
            table = read_table(path)
            if _minor(table.triton) == _minor(find_triton()):
                return table
            warnings.warn(
                f"{path} was measured with triton {table.triton} and is not used: run vllm_ext.kernels.tune again",
                stacklevel=2,
            )
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
