# SPDX-License-Identifier: Apache-2.0
"""What each scheme of a block takes in time: measured tables where there are, else the roofline of a device.

A mix of batches says what is served: {tokens of a batch: its share}. Experts are used unevenly: in a batch of M
tokens an expert that a token chooses with probability f is needed at all with probability 1 - (1 - f)**M, and then
for M * f / that many tokens on average. An expert that is not needed costs nothing.

Measured tables are JSON files, made by a benchmark of the kernel on the device they name:

    {"format": 1, "device": "NVIDIA H200", "op": "mixed_moe",
     "rows": [{"scheme": "w4a16_g128", "tile": "64x128", "N": 1536, "K": 2048, "tokens": 16, "microseconds": 8.1}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vllm_ext.compress.families import Block
from vllm_ext.quantization.scheme import Scheme

TABLE_FORMAT = 1

#: Batches of a server that decodes 32 streams and now and then prefills, used where none are given.
DEFAULT_BATCHES = {1: 0.1, 8: 0.2, 32: 0.5, 128: 0.1, 512: 0.1}


class TimeModelError(ValueError):
    """A device, table or mix of batches that cannot be used; the message names the value and the fix."""


@dataclass(frozen=True)
class Device:
    """Peak rates. bandwidth: bytes/s of main memory. rates: {activation bits: operations/s}, a multiply-add is 2.

    tiles: rows of a tile that a kernel may have. It computes whole tiles, and reads the weights once for each.
    """

    name: str
    bandwidth: float
    rates: Mapping[int, float]
    tiles: tuple[int, ...] = (16, 32, 64, 128)


#: The makers' data sheets (dense rates); the CPU is one socket of 16 cores with VNNI and two channels of DDR5.
DEVICES = {
    "cpu": Device("cpu", 60e9, {16: 1.5e12, 8: 3e12}, (1, 4, 16, 64)),
    "a100": Device("a100", 2.0e12, {16: 312e12, 8: 624e12}),
    "h100": Device("h100", 3.35e12, {16: 989e12, 8: 1979e12}),
    "h200": Device("h200", 4.8e12, {16: 989e12, 8: 1979e12}),
    "b200": Device("b200", 8.0e12, {16: 2250e12, 8: 4500e12}),
}


class TimeModel(Protocol):
    """Time of one block's product."""

    @property
    def tiles(self) -> tuple[str, ...]:
        """Names of the tiles a kernel can be built with; all its blocks then share one."""

    def predict(self, block: Block, scheme: Scheme, tokens: np.ndarray, tile: str) -> np.ndarray:
        """Microseconds for each number of tokens, float64, at least 1 token each; inf where there is no such kernel."""


@dataclass(frozen=True)
class Roofline:
    """Time as the larger of the memory's and the arithmetic's, at the device's peak rates.

    Source: the roofline model of Williams, Waterman and Patterson; whole tiles as in MxMoE (arXiv:2505.05799,
    section 4.2), which fits the time of a tile to measurements.
    """

    device: Device

    @property
    def tiles(self) -> tuple[str, ...]:
        """Rows of a tile."""
        return tuple(map(str, self.device.tiles))

    def predict(self, block: Block, scheme: Scheme, tokens: np.ndarray, tile: str) -> np.ndarray:
        """Microseconds, see `TimeModel`. 16-bit weights and activations are two bytes."""
        rows = int(tile)
        # Tokens of a batch are computed: one token may come out as 1.0000000000000002, which is not two tiles.
        num_tiles = np.ceil(np.asarray(tokens, np.float64) / rows - 1e-9)
        activations = tokens * (block.K * (scheme.act_bits / 8) + block.N * 2)
        traffic = num_tiles * scheme.in_memory.stored_bytes(block.N, block.K) + activations
        operations = 2.0 * num_tiles * rows * block.num_weights
        return 1e6 * np.maximum(traffic / self.device.bandwidth, operations / self.device.rates[scheme.act_bits])


class _Curve(NamedTuple):
    """Measured times of one (scheme, tile, N, K): tokens ascending."""

    tokens: np.ndarray
    microseconds: np.ndarray


class MeasuredTimes:
    """Times interpolated from the tables of one device.

    Between two measured numbers of tokens the time is linear, below the first it is the first, above the last it
    grows in proportion. A shape that was not measured takes the curve of the nearest in weights, scaled by theirs.
    Raises TimeModelError for a damaged table and for rows without a positive time.
    """

    def __init__(self, tables: Sequence[Mapping[str, Any]]) -> None:
        rows: dict[tuple[str, str], dict[tuple[int, int], dict[int, float]]] = {}
        for table in tables:
            for row in table.get("rows", ()):
                try:
                    key = str(Scheme.parse(row["scheme"])), str(row["tile"])
                    shape = int(row["N"]), int(row["K"])
                    tokens, time = int(row["tokens"]), float(row["microseconds"])
                except (KeyError, TypeError, ValueError) as error:
                    raise TimeModelError(f"a tuning table has a bad row {row!r} ({error}): measure again") from error
                if not (np.isfinite(time) and time > 0 and tokens > 0 and min(shape) > 0):
                    raise TimeModelError(f"a tuning table has a row without positive numbers, {row!r}: measure again")
                rows.setdefault(key, {}).setdefault(shape, {})[tokens] = time
        if not rows:
            raise TimeModelError("the tuning tables have no rows: measure the kernel on this device")
        self._curves = {
            key: {
                shape: _Curve(np.array(sorted(times), np.float64), np.array([times[m] for m in sorted(times)]))
                for shape, times in shapes.items()
            }
            for key, shapes in rows.items()
        }

    @property
    def tiles(self) -> tuple[str, ...]:
        """Names of the tiles in the tables."""
        return tuple(sorted({tile for _, tile in self._curves}))

    def predict(self, block: Block, scheme: Scheme, tokens: np.ndarray, tile: str) -> np.ndarray:
        """Microseconds, see `TimeModel`."""
        shapes = self._curves.get((str(scheme.in_memory), tile))
        tokens = np.asarray(tokens, np.float64)
        if shapes is None:
            return np.full(tokens.shape, np.inf)
        weights = block.num_weights
        shape = min(shapes, key=lambda s: (abs(np.log(s[0] * s[1] / weights)), abs(s[1] - block.K), s))
        curve = shapes[shape]
        times = np.interp(tokens, curve.tokens, curve.microseconds)
        beyond = tokens > curve.tokens[-1]
        times = np.where(beyond, curve.microseconds[-1] * tokens / curve.tokens[-1], times)
        return times * weights / (shape[0] * shape[1])


def load_tables(folder: Path, device: str) -> list[dict[str, Any]]:
    """The tuning tables of a folder that were measured on `device`, whatever the case of its name.

    Raises TimeModelError for a file that is not such a table.
    """
    tables = []
    for path in sorted(folder.glob("*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            found, number = str(table["device"]), table["format"]
            rows = table["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TimeModelError(f"{path} is not a tuning table ({error!r}): measure again") from error
        if number != TABLE_FORMAT or not isinstance(rows, list):
            raise TimeModelError(f"{path} has format {number!r}, this release reads {TABLE_FORMAT}: measure again")
        if device.lower() in found.lower():
            tables.append(table)
    return tables


def open_time_model(device: str, tables: Path | None = None) -> TimeModel:
    """The measured times of a device where `tables` has any, else its roofline.

    Raises TimeModelError for a device that is neither measured nor among DEVICES.
    """
    if tables is not None and (found := load_tables(tables, device)):
        return MeasuredTimes(found)
    if device.lower() not in DEVICES:
        raise TimeModelError(
            f"device {device!r} has no tuning table and is not one of {', '.join(DEVICES)}: measure it, or name one"
        )
    return Roofline(DEVICES[device.lower()])


def parse_batches(text: str) -> dict[int, float]:
    """A mix of batches, "32:0.8,512:0.2" -> {32: 0.8, 512: 0.2}; shares are scaled to a sum of one.

    Raises TimeModelError naming the part that is no such pair.
    """
    batches: dict[int, float] = {}
    for part in text.split(","):
        tokens, _, share = part.partition(":")
        try:
            size, weight = int(tokens), float(share or 1)
        except ValueError as error:
            raise TimeModelError(f"batch {part!r} is not TOKENS:SHARE, for example 32:0.8") from error
        if size < 1 or not (np.isfinite(weight) and weight > 0):
            raise TimeModelError(f"batch {part!r} needs at least one token and a positive share")
        batches[size] = batches.get(size, 0.0) + weight
    total = sum(batches.values())
    return {size: weight / total for size, weight in batches.items()}


def predict_times(
    model: TimeModel,
    blocks: Sequence[Block],
    options: Sequence[Sequence[Scheme | None]],
    shares: np.ndarray,
    batches: Mapping[int, float],
) -> np.ndarray:
    """Expected microseconds a batch spends in each block, float64 [tiles, units, options].

    options: schemes of each unit, None where one does not fit (time inf). shares: float64 [units], the probability
    that a token passes the unit, 1 for what every token passes. batches: {tokens: share of the batches}.
    """
    shares = np.asarray(shares, np.float64)
    if shares.shape != (len(blocks),) or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"shares must be in (0, 1] for each of {len(blocks)} units")
    sizes = np.array(sorted(batches), np.float64)
    weights = np.array([batches[int(size)] for size in sizes])
    times = np.full((len(model.tiles), len(blocks), max(map(len, options))), np.inf)
    for row, (block, schemes, share) in enumerate(zip(blocks, options, shares, strict=True)):
        needed = -np.expm1(sizes * np.log1p(-share)) if share < 1 else np.ones_like(sizes)
        tokens = sizes * share / needed
        for column, scheme in enumerate(schemes):
            if scheme is None:
                continue
            for layer, tile in enumerate(model.tiles):
                times[layer, row, column] = float(weights @ (needed * model.predict(block, scheme, tokens, tile)))
    return times
