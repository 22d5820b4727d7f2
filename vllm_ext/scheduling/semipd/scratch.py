# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU operators that keep scratch in one buffer of the process: one lane at a time.

Attention, its plan and fused experts each write where the process-wide `ScratchPadManager` of csrc/cpu points, and move
it when they need more. Two threads in them end the process, so what calls them is given one lock, by object: other
models of the process, and operators with memory of their own (mxmoe's experts), are left alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def guard_scratch(model: torch.nn.Module, runners: Iterable[Any]) -> int:
    """Let one thread at a time into the attention and the stock experts of a model, and the attention plans of its
    runners, whose KV cache must be initialized. Returns how many objects got the lock.
    """
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

    lock = threading.Lock()
    guarded: list[tuple[Any, str]] = []
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.impl, CPUAttentionBackendImpl):
            guarded.append((module.impl, "forward"))
        for holder in (module, getattr(module, "quant_method", None)):
            kernel = getattr(getattr(holder, "moe_kernel", None), "impl", None)
            experts = getattr(kernel, "fused_experts", None)
            if experts is not None:
                guarded.append((experts, "apply"))
    for runner in runners:
        for group in (group for groups in runner.attn_groups for group in groups):
            for builder in group.metadata_builders:
                if isinstance(builder, CPUAttentionMetadataBuilder):
                    guarded.append((builder, "build"))
    for owner, name in {(id(owner), name): (owner, name) for owner, name in guarded}.values():
        setattr(owner, name, _hold(lock, getattr(owner, name)))
    return len(guarded)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Models loaded within get torch's linear layers: vLLM's oneDNN ones keep scratch in their handles, and two lanes
    in one of them end the process.
    """
    from vllm import _custom_ops

    before = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = before


def _hold(lock: threading.Lock, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return original(*args, **kwargs)

    return call
