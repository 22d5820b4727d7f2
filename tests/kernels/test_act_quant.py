# SPDX-License-Identifier: Apache-2.0
"""int8 activations against a float64 loop, and the op around them."""

import numpy as np
import pytest
import torch

from vllm_ext.kernels.act_quant import act_quant, reference

SHAPES = [(1, 8, 8), (7, 136, 8), (33, 192, 64), (5, 40, -1), (0, 64, 32)]


def quantize_by_loop(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One token and one group at a time, in float64; codes are left unrounded."""
    size = x.shape[1] if group_size == -1 else group_size
    exact, scales = np.zeros(x.shape), np.zeros((x.shape[0], x.shape[1] // size))
    for token in range(x.shape[0]):
        for group in range(scales.shape[1]):
            part = slice(group * size, (group + 1) * size)
            largest = np.abs(x[token, part]).max()
            scales[token, group] = largest / 127
            if largest > 0:
                exact[token, part] = x[token, part] * 127 / largest
    return exact, scales


@pytest.mark.parametrize(("tokens", "K", "group_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_the_formula(tokens: int, K: int, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(K)
    x = (torch.randn(tokens, K) * torch.rand(tokens, 1) * 10).to(dtype)
    codes, scales = act_quant(x, group_size)
    exact, expected_scales = quantize_by_loop(x.double().numpy(), group_size)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert scales.shape == expected_scales.shape
    assert np.allclose(scales.numpy(), expected_scales, rtol=1e-6, atol=0)
    # Nearest, up to a tie that float32 sees and float64 does not.
    assert np.abs(codes.double().numpy() - exact).max(initial=0) <= 0.5 + 1e-4
    assert codes.abs().max(dim=-1).values.eq(127).all() if tokens else codes.numel() == 0


def test_ties_go_to_even_and_zero_groups_stay_zero() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0]])
    codes, scales = act_quant(x, 4)
    assert codes.tolist() == [[127, 0, 2, -2, 0, 0, 0, 0]]
    assert scales.tolist() == [[1.0, 0.0]]


def test_round_activations_is_codes_times_scales() -> None:
    x = torch.randn(9, 96)
    for group_size in (8, 32, -1):
        codes, scales = act_quant(x, group_size)
        size = 96 if group_size == -1 else group_size
        expected = codes.float() * scales.repeat_interleave(size, dim=-1)
        assert torch.equal(reference.round_activations(x, group_size), expected)


@pytest.mark.parametrize(
    ("x", "group_size", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 8, r"x must be \[tokens, K\] .* got torch.float64 \[2, 8\]"),
        (torch.zeros(8), 8, r"x must be \[tokens, K\] .* got torch.float32 \[8\]"),
        (torch.zeros(2, 24), 16, "group_size=16 does not divide K=24"),
    ],
)
def test_bad_arguments_are_named(x: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act_quant(x, group_size)


def test_op_schema_opcheck_and_compile() -> None:
    op = torch.ops.vllm_ext.act_quant.default
    assert str(op._schema) == "vllm_ext::act_quant(Tensor x, int group_size) -> (Tensor, Tensor)"
    torch.library.opcheck(op, (torch.randn(5, 64).bfloat16(), 32))
    torch.library.opcheck(op, (torch.randn(3, 40), -1))
    compiled = torch.compile(lambda x: act_quant(x + 1, 32), fullgraph=True, dynamic=True)
    for tokens in (1, 6):
        x = torch.randn(tokens, 64)
        for got, expected in zip(compiled(x), act_quant(x + 1, 32), strict=True):
            assert torch.equal(got, expected)
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("vllm_ext::act_quant", key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_gives_the_same_codes() -> None:
    x = torch.randn(33, 192)
    for got, expected in zip(act_quant(x.cuda(), 64), act_quant(x, 64), strict=True):
        assert torch.equal(got.cpu(), expected)
