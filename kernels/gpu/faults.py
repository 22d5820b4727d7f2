# SPDX-License-Identifier: Apache-2.0
"""Small layers by the Triton kernels beside the reference: every tile that the rule or a table can choose here.

    python -m vllm_ext.kernels.gpu.faults cuda:0 bfloat16

Prints {"fault": null} or what is wrong as the last line. selfcheck.py runs it in a process of its own before a model is
loaded, so few kernels are compiled: each with one width, and the widths in turn over the tiles. Tests and
`bench.kernels.gpu --part reference` have every combination.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from .. import tolerances
from ..arena import BlockFormat
from ..mixed_linear import reference as linear_reference
from ..mixed_moe import reference as moe_reference
from . import launch, samples
from .configurations import Device, LayerTiles, Tile, list_choices
from .samples import make_format
from .selfcheck import NO_DEVICE

#: Two chunks of K, so that the loop over K turns; of down, two whole ones or a ragged one.
HIDDEN_SIZE, INTERMEDIATE_SIZE, RAGGED_SIZE = 256, 256, 160
TOP_K = 2
#: Tokens past a full tile.
MORE_TOKENS = 9

#: Formats of (gate_up, down), a pair for each tile in turn: every width, every group size, a block kept in bf16.
HALF_BLOCKS = (
    (make_format(4), make_format(2, group_size=-1)),
    (make_format(3), make_format(16)),
    (make_format(6, group_size=64), make_format(8)),
    (make_format(2, group_size=32), make_format(4)),
)
INT8_BLOCKS = (
    (make_format(4, 8), make_format(2, 8)),
    (make_format(8, 8), make_format(3, 8, 32)),
    (make_format(6, 8, -1), make_format(4, 8, 64)),
)

#: Of four experts everywhere, this rank has two.
EXPERT_MAP = (1, -1, 0, -1)


class Check(NamedTuple):
    """measure: (device, dtype of x) -> (error, largest accepted error). must_fit: whether nothing else serves where the
    GPU has not what its tile needs; for others fitting.py takes a smaller one."""

    name: str
    measure: Callable[[torch.device, torch.dtype], tuple[float, float]]
    must_fit: bool = True


def find_fault(device: torch.device, dtype: torch.dtype, checks: Sequence[Check] | None = None) -> str | None:
    """What is wrong with the kernels on a device, None where nothing is. checks: all of `list_checks` by default."""
    from triton.runtime.errors import OutOfResources

    with launch.use_device(device), _usual_settings():
        for check in list_checks(launch.describe_device(device)) if checks is None else checks:
            try:
                error, limit = check.measure(device, dtype)
            except OutOfResources as raised:
                if check.must_fit:
                    return f"{check.name}: {raised}"
                continue
            except Exception as raised:  # noqa: BLE001 - whatever a compiler or driver raises, a model can do without
                return f"{check.name}: {type(raised).__name__}: {raised}"
            # Written so that NaN is a fault.
            if not error <= limit:
                return f"{check.name}: error {error:.2g} against the reference, allowed is {limit:.2g}"
    return None


def list_checks(device: Device) -> list[Check]:
    """What is compared on a GPU."""
    checks = [Check("the sort of many pairs", _measure_sort)]
    smallest = list_choices(False, device)[0]
    name = f"{_name_tile(smallest)}, a linear layer in two parts of K"
    checks.append(Check(name, partial(_measure_linear, smallest)))
    for int8, blocks in ((False, HALF_BLOCKS), (True, INT8_BLOCKS)):
        for place, (tile, pair) in enumerate(zip(list_choices(int8, device), itertools.cycle(blocks), strict=False)):
            widths = " and ".join(f"w{block.weight_bits}a{block.act_bits}_g{block.group_size}" for block in pair)
            name = f"{_name_tile(tile)}, {widths}"
            is_first = place == 0
            checks.append(Check(name, partial(_measure_moe, tile, pair, not int8 and is_first), is_first))
    return checks


def _name_tile(tile: Tile) -> str:
    return f"tiles of {tile.block_n} by {tile.block_tokens} tokens"


def _measure_moe(
    tile: Tile, pair: tuple[BlockFormat, BlockFormat], has_map: bool, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    from ..mixed_moe import triton

    down = pair[1]
    intermediate = INTERMEDIATE_SIZE if down.group_size in (64, 128) else RAGGED_SIZE
    layer = samples.make_moe([pair, pair], HIDDEN_SIZE, intermediate, "cpu")
    expert_map = torch.tensor(EXPERT_MAP, dtype=torch.int32) if has_map else None
    num_global = 2 if expert_map is None else len(EXPERT_MAP)
    routed = samples.make_routing(tile.block_tokens + MORE_TOKENS, HIDDEN_SIZE, TOP_K, num_global, dtype, "cpu")
    found = triton.mixed_moe(
        routed.x.to(device),
        routed.topk_ids.to(device),
        routed.topk_weights.to(device),
        layer.arena.to(device),
        layer.table.to(device),
        None if expert_map is None else expert_map.to(device),
        intermediate,
        "silu",
        False,
        tiles=LayerTiles(tile, tile),
    )
    # On the CPU: what a GPU may round its float32 products to plays no part there.
    expected = moe_reference.mixed_moe(
        routed.x.float(), *routed[1:], layer.arena, layer.table, expert_map, intermediate, "silu", False
    )
    act_bits = min(block.act_bits for block in pair)
    return _compare(found, expected), tolerances.choose_gpu_moe(dtype, act_bits, tile.scaling).relative


def _measure_linear(tile: Tile, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    from ..mixed_linear import triton

    K, out_features = 4 * HIDDEN_SIZE, 200
    layer = samples.make_linear([(make_format(4), out_features)], K, "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tile.block_tokens + MORE_TOKENS, K, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator)
    arena, table = layer.arena.to(device), layer.table.to(device)
    found = triton.mixed_linear(x.to(device), arena, table, out_features, bias.to(device), tile=tile, split=2)
    expected = linear_reference.mixed_linear(x.float(), layer.arena, layer.table, out_features, bias)
    return _compare(found, expected), tolerances.choose_gpu_linear(dtype, 16, tile.scaling).relative


def _measure_sort(device: torch.device, _: torch.dtype) -> tuple[float, float]:
    """The error is the number of pairs and tiles in other places than where the sort of few pairs has them."""
    from .sorting import sort_pairs

    ids = torch.randint(-1, 6, (300, TOP_K), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    few, many = (sort_pairs(ids.to(device), None, 5, 16, few_pairs=limit) for limit in (ids.numel(), 0))
    num_pairs, num_tiles = int(few.segment_ends[-1]), int(few.num_tiles)
    valid = {"pairs": num_pairs, "experts": num_pairs, "tile_experts": num_tiles, "tile_starts": num_tiles}
    wrong = int(many.num_tiles != few.num_tiles) + int((many.segment_ends != few.segment_ends).sum())
    for name, count in valid.items():
        wrong += int((getattr(many, name)[:count] != getattr(few, name)[:count]).sum())
    return wrong, 0


def _compare(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    if found is None:
        raise RuntimeError("the kernels do not read the layout")
    # Waits for the kernels, so a fault of theirs comes up here.
    return tolerances.relative_error(found.cpu(), expected)


@contextmanager
def _usual_settings() -> Iterator[None]:
    """torch as it starts: float32 products in float32, which a process may have given up for speed, on CPUs, too; and
    new tensors in float32 on the CPU, where a loader has its model's type and device."""
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)


def main(arguments: Sequence[str]) -> int:
    """Command line: a device and the name of an element type."""
    device, dtype = torch.device(arguments[0]), getattr(torch, arguments[1])
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return NO_DEVICE
    print(json.dumps({"fault": find_fault(device, dtype)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
