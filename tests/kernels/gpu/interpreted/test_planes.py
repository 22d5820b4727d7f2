# SPDX-License-Identifier: Apache-2.0
"""What kernels do for Triton before 3.9, whichever is installed: planes, and scales and sums in one load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from tests.kernels.gpu.fragment_cases import check_moe
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu import accumulate, scaling
from vllm_ext.kernels.gpu.configurations import CORRECT_SUMS, SCALE_PRODUCTS, SCALE_WEIGHTS, Tile

SCALINGS = (SCALE_PRODUCTS, CORRECT_SUMS, SCALE_WEIGHTS)


@pytest.fixture(autouse=True)
def plane_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bits of the weights that go through planes, call by call."""
    monkeypatch.setattr(scaling, "JOINT_FACTORS", tl.constexpr(True))
    monkeypatch.setattr(accumulate, "PLANE_TOKENS", tl.constexpr(8))
    calls: list[int] = []
    original = accumulate.multiply_planes

    def multiply(*arguments: Any) -> Any:
        calls.append(int(arguments[6]))
        return original(*arguments)

    monkeypatch.setattr(accumulate, "multiply_planes", multiply)
    return calls


@pytest.mark.parametrize(
    ("scaling", "dtype"),
    [
        (SCALE_PRODUCTS, torch.bfloat16),
        *(pytest.param(scaling, torch.float16, marks=pytest.mark.slow) for scaling in SCALINGS),
        pytest.param(CORRECT_SUMS, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_tiles_of_eight_tokens(plane_calls: list[int], scaling: int, dtype: torch.dtype) -> None:
    blocks = [
        (BlockFormat(2, 16, 128), BlockFormat(4, 8, -1)),
        (BlockFormat(4, 16, -1), BlockFormat(8, 16, -1, symmetric=True)),
        (BlockFormat(2, 8, 128), BlockFormat(2, 16, -1)),
        (BlockFormat(3, 16, 128), BlockFormat(8, 8, -1)),
        (BlockFormat(4, 8, 64), BlockFormat(6, 8, -1)),
    ]
    # A K that is no multiple of 128 with one of the ways to scale.
    layer = make_layer(blocks, 256, 72 if scaling == CORRECT_SUMS else 128)
    inputs = make_inputs(11, 256, 2, len(blocks), dtype)
    check_moe(layer, inputs, Tile(64, 8, num_warps=4, num_stages=3, scaling=scaling), split=2 if scaling else None)
    # 3 and 6 bits are two planes of bits, and int8 needs no decoding; weights are scaled only where all are there.
    assert set(plane_calls) == ({2, 4} if scaling == SCALE_WEIGHTS else {2, 4, 8})


def test_tiles_of_sixteen_tokens_take_whole_chunks(plane_calls: list[int]) -> None:
    block = BlockFormat(4, 16, 128)
    layer = make_layer([(block, block)], 128, 128)
    check_moe(layer, make_inputs(3, 128, 1, 1, torch.bfloat16), Tile(64, 16, 4, 3, scaling=SCALE_PRODUCTS))
    assert plane_calls == []
