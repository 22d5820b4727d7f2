# SPDX-License-Identifier: Apache-2.0
"""Who gets the Triton kernels, and that nobody else loads triton."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.child import run_child
from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from tests.kernels.test_mixed_linear import make_linear
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.fallback import warn_no_fast_path
from vllm_ext.kernels.gpu import launch
from vllm_ext.kernels.mixed_linear import op as linear_op
from vllm_ext.kernels.mixed_linear import reference as linear_reference
from vllm_ext.kernels.mixed_moe import op as moe_op
from vllm_ext.kernels.mixed_moe import reference as moe_reference


def test_a_process_without_a_gpu_never_loads_triton() -> None:
    """Not for importing the ops, nor for calling them; torch alone may, and then this proves nothing."""
    child = run_child("""
import json, sys
import torch
before = "triton" in sys.modules
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.gpu import configurations, formats, launch, layout, tables
from vllm_ext.kernels.mixed_linear import mixed_linear
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.kernels.mixed_moe import mixed_moe
plan = plan_linear([(BlockFormat(4, 16, 64, layout=Layout.GPU_FRAGMENT), 64)], 128)
arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
out = mixed_linear(torch.ones(2, 128, dtype=torch.bfloat16), arena, plan.table, 64)
print(json.dumps([before, "triton" in sys.modules, out.abs().sum().item()]))
""")
    assert child.value == [False, False, 0.0], child.stderr


def test_other_tensors_get_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    """What the implementations for CUDA do where the kernels cannot run: here, for there is no GPU."""
    warn_no_fast_path.cache_clear()
    block = BlockFormat(4, 16, 32)
    layer, inputs = make_layer([(block, block)], 64, 32), make_inputs(3, 64, 1, 1, torch.bfloat16)
    arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights, layer.arena, layer.table, None, 32, "silu", False)
    linear, x = make_linear([(block, 16)], 64), torch.randn(2, 64)
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext.kernels"):
        assert torch.equal(moe_op._mixed_moe_cuda(*arguments), moe_reference.mixed_moe(*arguments))
        out = linear_op._mixed_linear_cuda(x, linear.arena, linear.table, 16, None)
        assert torch.equal(out, linear_reference.mixed_linear(x, linear.arena, linear.table, 16, None))
    assert len(caplog.records) == 2


def test_served_tensors() -> None:
    assert not launch.serves(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not launch.serves(torch.zeros(2, 2, dtype=torch.float32))
    assert not launch.serves(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
    assert not launch.is_capturing(torch.device("cpu"))
    assert launch.describe_device(torch.device("cpu")) == launch.INTERPRETED_DEVICE


@pytest.mark.parametrize(("module", "name"), [(moe_op, "mixed_moe"), (linear_op, "mixed_linear")])
def test_kernels_are_launched_on_the_device_of_x(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which need not be that of the tensors."""
    current = []

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    kernels = SimpleNamespace(**{name: lambda x, *_: (x, list(current))})
    monkeypatch.setattr(launch, "serves", lambda x: True)
    monkeypatch.setattr(launch, "use_device", use)
    # In the place of the module that would load triton.
    monkeypatch.setitem(sys.modules, f"vllm_ext.kernels.{name}.triton", kernels)
    monkeypatch.setattr(sys.modules[f"vllm_ext.kernels.{name}"], "triton", kernels, raising=False)
    assert getattr(module, f"_{name}_cuda")(x) == (x, [x.device])
    assert current == []


def test_the_device_of_tensors_on_a_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(device))
    with launch.use_device(torch.device("cuda", 1)) as device:
        assert device == torch.device("cuda", 1)
    with launch.use_device(torch.device("cpu")) as nothing:
        assert nothing is None


@pytest.mark.parametrize("op", ["mixed_moe", "mixed_linear"])
def test_cuda_has_an_implementation_of_its_own(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_ext::{op}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_ext::{op}", "XPU")
