# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the GEMM kernels: the ones that ship, and the rule that picks one for a batch.

Where somebody measured a kind of GPU, its table goes before the rule: tuning.py.

The rule knows what the host knows: sizes, the number of tokens, the GPU. How tokens spread over the experts is only
known on the device. Nothing here needs triton or a GPU.

Why these shapes (notes on registers and shared memory: docs/gpu-kernels.md):

    16 weight rows per warp is what one `wgmma` takes from registers; twice as many cost waits and registers.
    16 tokens are the smallest tile that Triton 3.6 multiplies by `wgmma`; on sm_80 both sizes are `mma.sync`.
    Few tokens: memory is the bound, so scales are applied to products, where fewest instructions are spent per weight.
    Many tokens: the tensor core is the bound, so scales are applied to weights, and it sums all of K without a pause.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .layout import DEPTH, ROWS

#: How scales and zero points of 16-bit activations are applied: accumulate.py.
SCALE_WEIGHTS, SCALE_PRODUCTS, CORRECT_SUMS = 0, 1, 2

#: Threads of a warp on every NVIDIA GPU.
WARP_SIZE = 32

#: What a tile can have: sizes of tensors are powers of two in Triton, and so are warps.
BLOCK_ROWS = (ROWS, 2 * ROWS, 4 * ROWS)
BLOCK_TOKENS = (8, 16, 32, 64, 128, 256)
NUM_WARPS = (1, 2, 4, 8, 16)

#: GPUs whose tensor core takes whole tiles (`wgmma`, `tcgen05`) and whose thread blocks have 227 KiB of shared memory:
#: sm_90 up to, without it, sm_120, which multiplies by `mma.sync` and has 99 KiB again, as sm_89 does.
WIDE_CAPABILITIES = (9, 0), (12, 0)


@dataclass(frozen=True)
class Tile:
    """One shape of a GEMM kernel.

    block_n: rows of the weight (of gate_up, half as many outputs); block_tokens: rows of activations. num_warps,
    num_stages: as Triton means them. scaling: SCALE_WEIGHTS, SCALE_PRODUCTS or CORRECT_SUMS. unroll: chunks of K per
    iteration. Raises ValueError for a value that is no integer, and for a shape that the kernels do not have.
    """

    block_n: int
    block_tokens: int
    num_warps: int
    num_stages: int
    scaling: int
    unroll: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            # A table of JSON may hold anything; a bool is an int to Python.
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not an integer")
        if self.block_n not in BLOCK_ROWS:
            raise ValueError(
                f"block_n={self.block_n} is not one of {_join(BLOCK_ROWS)}: the layout's row tile, doubled or not"
            )
        if self.block_tokens not in BLOCK_TOKENS:
            raise ValueError(f"block_tokens={self.block_tokens} is not a power of two from 8 to 256")
        if self.num_warps not in NUM_WARPS:
            raise ValueError(f"num_warps={self.num_warps} is not one of {_join(NUM_WARPS)}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} is less than 1")
        if self.scaling not in (SCALE_WEIGHTS, SCALE_PRODUCTS, CORRECT_SUMS):
            raise ValueError(f"scaling={self.scaling} is not SCALE_WEIGHTS, SCALE_PRODUCTS or CORRECT_SUMS")
        if self.unroll < 1:
            raise ValueError(f"unroll={self.unroll} is less than 1")


@dataclass(frozen=True)
class Device:
    """What the rule knows of a GPU. name: as torch gives it, for its tuning table; "" for none."""

    capability: tuple[int, int]
    num_processors: int
    name: str = ""

    @property
    def has_wide_units(self) -> bool:
        """Whether it is one of WIDE_CAPABILITIES."""
        first, end = WIDE_CAPABILITIES
        return first <= self.capability < end


@dataclass(frozen=True)
class LayerTiles:
    """The tiles of both GEMMs of a MoE layer. They share the tokens of a tile, since these are sorted once.

    Raises ValueError where they do not.
    """

    gate_up: Tile
    down: Tile

    def __post_init__(self) -> None:
        if self.gate_up.block_tokens != self.down.block_tokens:
            raise ValueError(
                f"gate_up has tiles of {self.gate_up.block_tokens} tokens and down of {self.down.block_tokens}: "
                f"both must have the same"
            )

    @property
    def block_tokens(self) -> int:
        """Tokens of a tile."""
        return self.gate_up.block_tokens


#: Few tokens per expert, and then more of them.
DECODE_TILE = Tile(64, 16, num_warps=4, num_stages=4, scaling=SCALE_PRODUCTS)
MIDDLE_TILE = Tile(64, 64, num_warps=4, num_stages=3, scaling=SCALE_WEIGHTS)
PREFILL_TILE = Tile(128, 64, num_warps=8, num_stages=3, scaling=SCALE_WEIGHTS)
LARGE_TILE = Tile(128, 128, num_warps=8, num_stages=3, scaling=SCALE_WEIGHTS)

#: Every tile that `choose_tile` can return, smallest first.
SHIPPED_TILES = (DECODE_TILE, MIDDLE_TILE, PREFILL_TILE, LARGE_TILE)

#: Rows of activations per weight up to which a tile is chosen; the last has no limit.
TILE_LIMITS = (16, 64, 128)

#: Thread blocks per processor below which K is divided among more of them.
BLOCKS_PER_PROCESSOR = 2

#: Chunks of K that one thread block keeps at least: fewer, and filling its pipeline is most of its work.
FEWEST_CHUNKS = 4
LARGEST_SPLIT = 8


def choose_tile(num_rows: int, num_weights: int, int8: bool, device: Device) -> Tile:
    """The tile for `num_rows` rows of activations, spread over `num_weights` weights (1 for a linear layer).

    int8: whether some block takes 8-bit activations.
    """
    # Reads the tiles defined here.
    from . import tuning

    return tuning.find_tile(device.name, num_rows, num_weights, int8) or _apply_rule(
        num_rows, num_weights, int8, device
    )


def _apply_rule(num_rows: int, num_weights: int, int8: bool, device: Device) -> Tile:
    per_weight = num_rows / max(num_weights, 1)
    place = sum(per_weight > limit for limit in TILE_LIMITS)
    tile = SHIPPED_TILES[place]
    # Scaling integer products takes registers of its own, and mma.sync keeps its accumulators beside the decoded
    # weights: 128 by 128 does not fit then.
    if tile == LARGE_TILE and (int8 or not device.has_wide_units):
        return PREFILL_TILE
    return tile


def list_choices(int8: bool, device: Device) -> list[Tile]:
    """Every tile that `choose_tile` and `choose_layer_tiles` can return for a GPU, smallest first.

    int8: as in `choose_tile`.
    """
    from . import tuning

    ruled = {_apply_rule(rows, 1, int8, device) for rows in (1, *(limit + 1 for limit in TILE_LIMITS))}
    chosen = ruled | tuning.list_tiles(device.name, int8)
    return sorted(chosen, key=lambda tile: (tile.block_tokens, *asdict(tile).values()))


def choose_layer_tiles(num_pairs: int, num_experts: int, int8: bool, device: Device) -> LayerTiles:
    """The tiles of a MoE layer for `num_pairs` pairs of a token and an expert. int8: as in `choose_tile`."""
    from . import tuning

    tile = _apply_rule(num_pairs, num_experts, int8, device)
    return tuning.find_layer_tiles(device.name, num_pairs, num_experts, int8) or LayerTiles(tile, tile)


def choose_split(num_blocks: int, K: int, device: Device) -> int:
    """Parts into which K is divided among thread blocks, where `num_blocks` of them would leave processors idle."""
    from . import tuning

    limits = tuning.find_split(device.name) or tuning.Split(BLOCKS_PER_PROCESSOR, FEWEST_CHUNKS, LARGEST_SPLIT)
    return limits.choose(num_blocks, -(-K // DEPTH), device.num_processors)


def list_batch_sizes(max_rows: int, num_weights: int) -> list[int]:
    """Numbers of rows of activations, up to `max_rows`, that together get every tile: for compiling ahead."""
    from . import tuning

    limits = {*TILE_LIMITS, *tuning.list_limits()}
    borders = [1, *sorted(int(limit * num_weights) + 1 for limit in limits)]
    return [rows for rows in borders if rows <= max_rows]


def bound_tiles(num_pairs: int, num_experts: int, block_tokens: int) -> int:
    """The most tiles of `block_tokens` rows that `num_pairs` pairs can need, however they spread over the experts."""
    reached = min(num_pairs, num_experts)
    return reached + (num_pairs - reached) // block_tokens


def _join(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
