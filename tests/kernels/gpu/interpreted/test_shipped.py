# SPDX-License-Identifier: Apache-2.0
"""The list that compile checks go by names the constants and arguments that the launchers pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.gpu.fragment_cases import repack_layer, repack_linear
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from tests.kernels.test_mixed_linear import make_linear
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu import activations, combine, shipped, sorting
from vllm_ext.kernels.gpu.configurations import CORRECT_SUMS, DECODE_TILE, MIDDLE_TILE, Device, LayerTiles, Tile
from vllm_ext.kernels.mixed_linear import triton as linear_triton
from vllm_ext.kernels.mixed_moe import triton as moe_triton

PLACES = [
    (moe_triton, "gate_up_kernel"),
    (moe_triton, "down_kernel"),
    (linear_triton, "linear_kernel"),
    (activations, "prepare_kernel"),
    (sorting, "sort_few_kernel"),
    (sorting, "count_kernel"),
    (sorting, "scan_kernel"),
    (sorting, "tiles_kernel"),
    (sorting, "place_kernel"),
    (combine, "sum_experts_kernel"),
    (combine, "sum_parts_kernel"),
]


#: By the kernel's name. Listed before the kernels are replaced.
LISTED: dict[str, list[shipped.Shipped]] = {}
for described in (
    *shipped.list_gemms(DECODE_TILE, shipped.FORMAT_SETS["w4a16,w4a8"]),
    *shipped.list_gemms(MIDDLE_TILE, shipped.FORMAT_SETS["w4a16,w4a8"]),
    *shipped.list_helpers(),
):
    LISTED.setdefault(described.kernel.__name__, []).append(described)

ELEMENT_TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Recording:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.calls.append((arguments, constants))
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """{kernel: launches} of the ops with everything in them: split K, bias, sums, int8, few and many pairs, tokens."""
    found: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    for module, name in PLACES:
        found[name] = []
        monkeypatch.setattr(module, name, Recording(getattr(module, name), found[name]))
    block = BlockFormat(4, 8, 64)
    layer = repack_layer(make_layer([(block, block), (block._replace(act_bits=16),) * 2], 64, 64))
    inputs = make_inputs(2, 64, 2, 2, torch.bfloat16)
    for tile, split in ((Tile(64, 16, 4, 3, CORRECT_SUMS), 2), (MIDDLE_TILE, 1)):
        moe_triton.mixed_moe(
            inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 64, "silu", False,
            tiles=LayerTiles(tile, tile), split=split,
        )  # fmt: skip
    sorting.sort_pairs(inputs.topk_ids, None, 2, 16, few_pairs=0)
    linear = repack_linear(make_linear([(block, 40)], 128), 128)
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    linear_triton.mixed_linear(x, linear.arena, linear.table, 40, torch.ones(40).bfloat16(), split=2)
    return found


def test_constants_and_types_are_those_of_the_launchers(
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]],
) -> None:
    assert set(LISTED) == set(calls)
    for name, launches in calls.items():
        assert launches, f"{name} was not launched"
        for arguments, constants in launches:
            compared = [compare(described, arguments, constants) for described in LISTED[name]]
            assert [] in compared, (name, compared)


def compare(described: shipped.Shipped, arguments: tuple[Any, ...], constants: dict[str, Any]) -> list[str]:
    """What of a launch is not as it is listed."""
    found = [name for name in set(described.constants) ^ (set(constants) - {"num_warps"})]
    names = list(described.signature)
    if names != [*names[: len(arguments)], *(key for key in names if key in constants)]:
        found.append("order of arguments")
    # With a tile goes the type of the experts' results.
    for name in ("BLOCK_TOKENS", "BLOCK_COLUMNS"):
        if constants.get(name) != described.constants.get(name):
            found.append(name)
    for argument, value in zip(names, arguments, strict=False):
        kind = described.signature[argument]
        # Partial sums of the linear kernel are float32 where K is split; bias is any float.
        if isinstance(value, torch.Tensor) and argument not in ("out", "bias"):
            found += [] if kind == ELEMENT_TYPES[value.dtype] else [f"{argument}: {kind}"]
        elif isinstance(value, int):
            found += [] if kind == "i32" else [f"{argument}: {kind}"]
    return found


def test_tiles_are_listed_for_a_gpu() -> None:
    hopper, ampere = Device((9, 0), 132), Device((8, 0), 108)
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a16"], hopper)) == 4
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a8"], hopper)) == 3
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a16"], ampere)) == 3
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a16"], Device((12, 0), 170))) == 3
