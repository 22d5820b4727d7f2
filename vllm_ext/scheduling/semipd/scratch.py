# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU kernels that keep scratch in one buffer of the process: one lane at a time.

Attention, its plan, experts and quantized linear layers write where the process-wide `ScratchPadManager` of csrc/cpu
points, and move it when they need more; oneDNN's handlers keep the operands of a call as well. Two threads in them end
the process, or mix their numbers. So what calls them takes one lock, by object: other models of the process, torch's
linear layers, and kernels with memory of their own (mxmoe's) are left alone. A lock around the operators themselves, at
torch's dispatcher, would hold Python's as well (`call_boxed` of torch 2.13), and lanes would not overlap at all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: The buffer is the process's, so its lock is.
_LOCK = threading.Lock()


def lock_scratch(model: torch.nn.Module, runners: Iterable[Any], *, is_compiled: bool) -> int:
    """Let one thread at a time into the attention, the stock experts and the stock quantized layers of a model, and the
    attention plans of its runners, whose KV cache must be initialized. Returns how many objects have the lock.

    To be called again where layers were made anew; who has the lock keeps it. Attention is never compiled; raises
    ValueError where anything else would be.
    """
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

    found: list[tuple[Any, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention) and isinstance(module.impl, CPUAttentionBackendImpl):
            found.append((module.impl, "forward"))
        layers = list_kernels(module)
        if layers and is_compiled:
            raise ValueError(
                f"semipd does not run {type(module.quant_method).__name__} ({name}) in a compiled engine: its kernel "
                f"serves one thread at a time, and the lock for that cannot be compiled. Add --enforce-eager"
            )
        found += layers
    for runner in runners:
        for group in (group for groups in runner.attn_groups for group in groups):
            found += [(one, "build") for one in group.metadata_builders if isinstance(one, CPUAttentionMetadataBuilder)]
    owned = {(id(owner), name): (owner, name) for owner, name in found}
    for owner, name in owned.values():
        if not hasattr(getattr(owner, name), "_vllm_ext_original"):
            setattr(owner, name, _hold(getattr(owner, name)))
    return len(owned)


def list_kernels(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """(object, method) that a layer computes with, where that is not known to be safe: experts by their kernel, all
    other layers as a whole.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(module, "quant_method", None)
    # Unquantized layers are torch's (`linear.without_onednn`); those of attention are scales alone.
    safe = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod, BaseKVCacheMethod)
    if isinstance(method, safe) or type(method).__module__.startswith("vllm_ext."):
        return []
    if isinstance(method, FusedMoEMethodBase):
        kernel = getattr(method.moe_kernel, "impl", None)
        if (experts := getattr(kernel, "fused_experts", None)) is not None:
            return [(experts, "apply")]
    return [(method, name) for name in ("apply", "apply_monolithic") if hasattr(method, name)]


def _hold(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            return original(*args, **kwargs)

    call._vllm_ext_original = original  # type: ignore[attr-defined]
    return call
