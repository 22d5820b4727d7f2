# SPDX-License-Identifier: Apache-2.0
"""Unquantized linear layers that two lanes may run at once.

vLLM's oneDNN layers keep a call's operands and scratch in their handles, and two lanes in one of them end the process.
Torch's own keep nothing; with weights that are packed once they take as long as vLLM's (8 tokens, 8 layers of 1024
channels, two cores: 4.3 ms against 4.1, and 7.3 with weights as they are; 80 tokens: 19.7, 19.3 and 23.7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Models loaded within get torch's linear layers in place of vLLM's oneDNN ones."""
    from vllm import _custom_ops

    before = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = before


def pack_linear_layers(model: torch.nn.Module) -> int:
    """Pack the weights of a model's unquantized layers that torch computes, as vLLM does for its own; returns how many.

    As there, linear layers keep no weight beside, and a vocabulary does. Layers that vLLM gave other kernels (for small
    weights), and all those of a dtype that this processor has no packed layers for, stay as they are. Not for compiled
    models: packed weights cannot be traced.
    Source: vLLM's `dispatch_cpu_unquantized_gemm`; torch's `mkldnn::_linear_pointwise`, which its inductor uses.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    count = 0
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            continue
        weight = module.weight
        if not is_torch_linear(getattr(module, "cpu_linear", None)) or weight.ndim != 2 or not can_pack(weight.dtype):
            continue
        module.cpu_linear = PackedLinear(weight.detach())
        if isinstance(method, UnquantizedLinearMethod):
            module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        count += 1
    return count


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch has packed linear layers of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def is_torch_linear(function: object) -> bool:
    """Whether it is what vLLM falls back to: torch.nn.functional.linear in a lambda, and nothing that it holds."""
    code = getattr(function, "__code__", None)
    return code is not None and "linear" in code.co_names and not code.co_freevars


class PackedLinear:
    """x @ weight.T + bias, with the weight packed; as `cpu_linear` of vLLM's layers."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [out, in], in a dtype of `can_pack`."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., in]; weight is ignored: it is what vLLM's layers pass, and empty."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
        return result
