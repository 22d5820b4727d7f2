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
from vllm_ext.kernels.gpu.configurations import CORRECT_SUMS, DECODE_TILE, Device, LayerTiles, Tile
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
    (sorting, "place_kernel"),
    (combine, "sum_experts_kernel"),
    (combine, "sum_parts_kernel"),
]


#: By the kernel's name. Listed before the kernels are replaced.
LISTED = {
    described.kernel.__name__: described
    for described in (
        *shipped.list_gemms(DECODE_TILE, shipped.FORMAT_SETS["w4a16,w4a8"]),
        *shipped.list_helpers(),
    )
}


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
    """{kernel: launches} of the ops with everything in them: split K, bias, sums, int8, few and many pairs."""
    found: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    for module, name in PLACES:
        found[name] = []
        monkeypatch.setattr(module, name, Recording(getattr(module, name), found[name]))
    block = BlockFormat(4, 8, 64)
    layer = repack_layer(make_layer([(block, block), (block._replace(act_bits=16),) * 2], 64, 64))
    inputs = make_inputs(2, 64, 2, 2, torch.bfloat16)
    tile = Tile(64, 16, 4, 3, CORRECT_SUMS)
    moe_triton.mixed_moe(
        inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 64, "silu", False,
        tiles=LayerTiles(tile, tile), split=2,
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
    element_types = {
        torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
        torch.int32: "*i32", torch.int64: "*i64",
    }  # fmt: skip
    for name, launches in calls.items():
        assert launches, f"{name} was not launched"
        described = LISTED[name]
        names = list(described.signature)
        for arguments, constants in launches:
            assert set(described.constants) == set(constants) - {"num_warps"}, name
            assert names == [*names[: len(arguments)], *(key for key in names if key in constants)], name
            for argument, value in zip(names, arguments, strict=False):
                kind = described.signature[argument]
                assert kind != "constexpr", (name, argument)
                if isinstance(value, torch.Tensor):
                    # Partial sums of the linear kernel are float32 where K is split; bias is any float.
                    assert kind == element_types[value.dtype] or argument in ("out", "bias"), (name, argument)
                elif value is not None:
                    assert kind == "i32", (name, argument)


def test_tiles_are_listed_for_a_gpu() -> None:
    hopper, ampere = Device((9, 0), 132), Device((8, 0), 108)
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a16"], hopper)) == 4
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a8"], hopper)) == 3
    assert len(shipped.list_tiles(shipped.FORMAT_SETS["w4a16"], ampere)) == 3
