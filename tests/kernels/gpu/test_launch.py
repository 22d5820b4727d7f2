# SPDX-License-Identifier: Apache-2.0
"""Who gets the Triton kernels, and that nobody else loads triton."""

from __future__ import annotations

import logging

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


@pytest.mark.parametrize("op", ["mixed_moe", "mixed_linear"])
def test_cuda_has_an_implementation_of_its_own(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_ext::{op}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_ext::{op}", "XPU")
