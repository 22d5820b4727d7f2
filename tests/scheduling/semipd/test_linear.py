# SPDX-License-Identifier: Apache-2.0
"""Linear layers that two lanes run at once: which are packed, what they compute, and that threads do not meet there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from vllm import _custom_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_ext.scheduling.semipd.linear import PackedLinear, can_pack, pack_linear_layers, without_onednn

IN, OUT = 768, 1024


def make_layer(kind: type, dtype: torch.dtype = torch.bfloat16, out: int = OUT) -> Any:
    """A layer as vLLM has loaded it, whose kernel vLLM has chosen."""
    layer: Any = torch.nn.Module()
    layer.quant_method = kind.__new__(kind)
    layer.weight = torch.nn.Parameter(torch.randn(out, IN).to(dtype), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=kind is UnquantizedLinearMethod)
    return layer


def test_onednn_comes_back() -> None:
    before = _custom_ops._supports_onednn

    def fail() -> None:
        with without_onednn():
            assert not _custom_ops._supports_onednn
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _custom_ops._supports_onednn is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_layers_compute_the_same(dtype: torch.dtype, has_bias: bool) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this processor has no packed linear layers of {dtype}")
    weight = torch.randn(OUT, IN).to(dtype)
    bias = torch.randn(OUT).to(dtype) if has_bias else None
    packed = PackedLinear(weight)
    inputs = [torch.randn(shape).to(dtype) for shape in ((1, IN), (17, IN), (2, 5, IN))]
    # The last one is a part of something wider.
    for x in (*inputs, torch.randn(9, 2 * IN).to(dtype)[:, IN:]):
        found = packed(x, torch.empty(0), bias)
        assert found.dtype == dtype
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        # Sums of 768 products of standard normals are some 28 large; the result is rounded once.
        tolerance = 1e-3 if dtype == torch.float32 else 28 * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


def test_which_layers_are_packed() -> None:
    model = torch.nn.Module()
    with without_onednn():
        model.linear, model.vocabulary = make_layer(UnquantizedLinearMethod), make_layer(UnquantizedEmbeddingMethod)
        model.small = make_layer(UnquantizedLinearMethod, out=32)
        model.other = make_layer(object)
    model.skipped = make_layer(UnquantizedLinearMethod)
    model.skipped.cpu_linear = torch.nn.functional.linear
    model.lookup = torch.nn.Module()
    model.lookup.quant_method = UnquantizedEmbeddingMethod.__new__(UnquantizedEmbeddingMethod)
    model.lookup.weight = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    x, weight = torch.randn(3, IN).bfloat16(), model.linear.weight
    expected = torch.nn.functional.linear(x, weight)
    has_kernel = model.small.weight.numel() == 0
    if not can_pack(torch.bfloat16):
        assert pack_linear_layers(model) == 0
        pytest.skip("this processor has no packed linear layers of bf16")
    assert pack_linear_layers(model) == 2 + (not has_kernel)
    torch.testing.assert_close(model.linear.cpu_linear(x, model.linear.weight, None), expected, rtol=0.02, atol=0.2)
    # The weight is there once; what is looked up in must stay.
    assert not model.linear.weight.numel()
    assert model.vocabulary.weight.numel()
    assert isinstance(model.vocabulary.cpu_linear, PackedLinear)
    assert not isinstance(model.other.cpu_linear, PackedLinear)
    # Those made anew are packed again, and the others are not touched.
    packed = model.vocabulary.cpu_linear
    assert pack_linear_layers(model) == 0
    assert model.vocabulary.cpu_linear is packed


def test_threads_do_not_meet() -> None:
    """Calls of other sizes at the same time, as of a prompt and of a step, through layers of one shape."""
    dtype = torch.bfloat16 if can_pack(torch.bfloat16) else torch.float32
    layers = [PackedLinear(torch.randn(OUT, IN).to(dtype)) for _ in range(3)]
    inputs = [torch.randn(rows, IN).to(dtype) for rows in (1, 3, 64, 200)]
    empty = torch.empty(0)
    expected = [[layer(x, empty) for layer in layers] for x in inputs]

    def run(number: int) -> int:
        wrong = 0
        for _ in range(40):
            for layer, right in zip(layers, expected[number], strict=True):
                wrong += not torch.equal(layer(inputs[number], empty), right)
        return wrong

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [0] * 4
