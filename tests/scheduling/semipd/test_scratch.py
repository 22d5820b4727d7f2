# SPDX-License-Identifier: Apache-2.0
"""Kernels that two threads must not be in at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from vllm_ext.quantization.linear import MxMoELinearMethod
from vllm_ext.scheduling.semipd.scratch import list_kernels, lock_scratch


class Visitors:
    """How many threads were in its calls at a time."""

    def __init__(self) -> None:
        self.now = self.most = self.calls = 0
        self._lock = threading.Lock()

    def visit(self, number: int = 0) -> int:
        with self._lock:
            self.now += 1
            self.calls += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        if number < 0:
            raise ZeroDivisionError
        return number + 1


def make_layer(method: Any) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.quant_method = method
    return layer


def make_method(kind: type, visitors: Visitors, **fields: Any) -> Any:
    method = kind.__new__(kind)
    for name, value in {"apply": visitors.visit, **fields}.items():
        setattr(method, name, value)
    return method


def make_attention(visitors: Visitors) -> torch.nn.Module:
    attention = Attention.__new__(Attention)
    torch.nn.Module.__init__(attention)
    attention.impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    attention.impl.forward = visitors.visit
    return attention


class StockExperts(FusedMoEMethodBase):
    """Named as vLLM's, whose constructors want a configuration."""

    create_weights = get_fused_moe_quant_config = apply = None  # type: ignore[assignment]


def make_experts(visitors: Visitors) -> torch.nn.Module:
    StockExperts.__module__ = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    experts = SimpleNamespace(apply=visitors.visit)
    return make_layer(
        make_method(StockExperts, visitors, moe_kernel=SimpleNamespace(impl=SimpleNamespace(fused_experts=experts)))
    )


def make_runner(visitors: Visitors) -> Any:
    builder = CPUAttentionMetadataBuilder.__new__(CPUAttentionMetadataBuilder)
    builder.build = visitors.visit
    return SimpleNamespace(attn_groups=[[SimpleNamespace(metadata_builders=[builder])]])


@pytest.fixture
def visitors() -> Visitors:
    return Visitors()


@pytest.fixture
def model(visitors: Visitors) -> Any:
    """One layer of each kind that shares the buffer."""
    made = torch.nn.Module()
    made.attention, made.experts = make_attention(visitors), make_experts(visitors)
    made.quantized = make_layer(make_method(CompressedTensorsLinearMethod, visitors))
    return made


def run_in_threads(*calls: Any) -> None:
    """Each of the calls from two threads, all at once."""
    start = threading.Barrier(2 * len(calls))

    def run(call: Any) -> None:
        start.wait(10)
        for number in range(4):
            assert call(number) == number + 1

    with ThreadPoolExecutor(2 * len(calls)) as threads:
        list(threads.map(run, [*calls, *calls]))


def list_calls(model: Any, runners: list[Any]) -> list[Any]:
    return [
        lambda number: model.attention.impl.forward(number),
        lambda number: model.experts.quant_method.moe_kernel.impl.fused_experts.apply(number),
        lambda number: model.quantized.quant_method.apply(number),
        *(lambda number, one=one: one.attn_groups[0][0].metadata_builders[0].build(number) for one in runners),
    ]


def test_one_thread_at_a_time_in_all_of_them(model: Any, visitors: Visitors) -> None:
    runners = [make_runner(visitors), make_runner(visitors)]
    calls = list_calls(model, runners)
    run_in_threads(*calls)
    assert visitors.most > 1, "nothing to lock: these threads never meet"
    visitors.most = visitors.calls = 0
    assert lock_scratch(model, runners, is_compiled=False) == 5
    run_in_threads(*calls)
    assert (visitors.most, visitors.calls) == (1, 2 * 4 * len(calls))


def test_locks_are_not_put_around_locks(model: Any, visitors: Visitors) -> None:
    """A lock inside itself never opens. What is new since has it too."""
    lock_scratch(model, [], is_compiled=False)
    model.experts = make_experts(visitors)
    assert lock_scratch(model, [], is_compiled=False) == 3
    assert not hasattr(model.attention.impl.forward._vllm_ext_original, "_vllm_ext_original")
    visitors.most = 0
    run_in_threads(*list_calls(model, []))
    assert visitors.most == 1


def test_errors_open_the_lock(model: Any) -> None:
    lock_scratch(model, [], is_compiled=False)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model.attention.impl.forward(-1)
    assert model.attention.impl.forward(1) == 2


def test_what_is_safe_needs_no_lock(visitors: Visitors) -> None:
    assert not list_kernels(torch.nn.Module())
    for kind in (UnquantizedLinearMethod, MxMoELinearMethod):
        assert not list_kernels(make_layer(make_method(kind, visitors)))


def test_what_is_not_known_is_locked(visitors: Visitors) -> None:
    class Unheard(LinearMethodBase):
        create_weights = apply = None  # type: ignore[assignment]

    Unheard.__module__ = "somewhere.else"
    method = make_method(Unheard, visitors)
    assert list_kernels(make_layer(method)) == [(method, "apply")]
    # Experts without the kernel that vLLM's have.
    experts = make_experts(visitors).quant_method
    experts.moe_kernel = None
    names = [name for _, name in list_kernels(make_layer(experts))]
    assert "apply" in names


def test_compiled_layers_are_refused(model: Any, visitors: Visitors) -> None:
    with pytest.raises(ValueError, match=r"StockExperts \(experts\) in a compiled engine.*--enforce-eager"):
        lock_scratch(model, [], is_compiled=True)
    dense = torch.nn.Module()
    dense.attention = make_attention(visitors)
    dense.linear = make_layer(make_method(UnquantizedLinearMethod, visitors))
    assert lock_scratch(dense, [], is_compiled=True) == 1
