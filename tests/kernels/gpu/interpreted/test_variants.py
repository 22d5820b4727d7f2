# SPDX-License-Identifier: Apache-2.0
"""bench/kernels/compile_variants.py computes what it says, so that its instructions are those of a real loop."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.compile_variants import fragment_kernel
from vllm_ext.kernels.act_quant.reference import act_quant
from vllm_ext.kernels.gpu.layout import pack_fragments

N, K, TOKENS = 128, 256, 11


#: Only 8-bit activations have scales.
CASES = [
    ("fp8", 8, 3),
    ("token", 8, 4),
    *(pytest.param("fragment", act_bits, bits, marks=pytest.mark.slow) for act_bits in (16, 8) for bits in (2, 3, 4)),
    *(pytest.param("fp8", 8, bits, marks=pytest.mark.slow) for bits in (2, 4)),
    *(pytest.param("token", 8, bits, marks=pytest.mark.slow) for bits in (2, 3)),
]


@pytest.mark.parametrize(("kind", "act_bits", "bits"), CASES)
def test_a_loop_that_does_not_ship(kind: str, act_bits: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    scales = torch.rand(N, K // 128, generator=generator).half() + 0.5
    zeros = torch.randint(0, 2**bits, (N, K // 128), generator=generator, dtype=torch.uint8)
    packed, words = pack_fragments(codes, scales, zeros, bits, act_bits, 128)
    weight = ((codes.view(N, -1, 128).float() - zeros[..., None].float()) * scales[..., None].float()).view(N, K)
    x = torch.randn(TOKENS, K, generator=generator)
    if kind == "fp8":
        groups = x.view(TOKENS, -1, 128)
        x_scales = groups.abs().amax(-1) / 448
        values = (groups / x_scales[..., None]).to(torch.float8_e4m3fn).view(TOKENS, K)
        exact = values.float().view(TOKENS, -1, 128)
        expected = (exact * x_scales[..., None]).view(TOKENS, K) @ weight.T
        # A code is an e4m3 number times 2**-9.
        exact, x_scales = exact / 512, x_scales * 512
    elif act_bits == 8:
        values, x_scales = act_quant(x, -1 if kind == "token" else 128)
        exact = values.view(TOKENS, -1, 128).float()
        expected = (exact * x_scales[..., None].expand(-1, K // 128, 1)).view(TOKENS, K) @ weight.T
        x_scales = x_scales.expand(-1, K // 128).contiguous()
    else:
        values, x_scales = x.bfloat16(), torch.ones(TOKENS, K // 128)
        exact = values.view(TOKENS, -1, 128).float()
        expected = values.float() @ weight.T
    sums = exact.sum(-1)
    typed = packed.view(torch.int8 if act_bits == 8 else torch.int16)
    # The high plane of 3 bits follows the low one.
    high = typed[len(typed) * 2 // 3 :]
    out = torch.full((TOKENS, N), torch.nan)
    common = {"BITS": bits, "ACT_BITS": act_bits, "BLOCK_N": 64, "BLOCK_TOKENS": 16, "STAGES": 2, "USE_ASM": False}
    rest = (words, values, x_scales, sums, out, N, K, TOKENS)
    options = {"FP8": kind == "fp8", "BY_TOKEN": kind == "token"}
    fragment_kernel[(N // 64, 1)](typed, high, *rest, **options, **common)
    assert torch.allclose(out, expected, rtol=1e-3, atol=1e-2)
