# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.vllm_ext.mixed_moe`: schema, dispatch, torch.compile, and the two hooks beside it."""

import importlib
import logging

import pytest
import torch

from tests.kernels.mixed_moe_cases import make_inputs, make_layer
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.fallback import warn_no_fast_path
from vllm_ext.kernels.mixed_moe import cpu, mixed_moe, op, reference

FORMATS = [
    (BlockFormat(3, 16, 32), BlockFormat(4, 8, -1)),
    (BlockFormat(8, 8, 64, symmetric=True), BlockFormat(2, 16, 8)),
    (BlockFormat.full_precision(torch.bfloat16), BlockFormat(5, 16, 8)),
]


def make_arguments(dtype: torch.dtype = torch.bfloat16, num_tokens: int = 5) -> tuple[object, ...]:
    layer, inputs = make_layer(FORMATS, 64, 24), make_inputs(num_tokens, 64, 2, 3, dtype)
    return (
        inputs.x,
        inputs.topk_ids,
        inputs.topk_weights,
        layer.arena,
        layer.table,
        torch.arange(3, dtype=torch.int32),
        24,
        "silu",
        False,
    )


def test_schema_is_the_one_of_the_design() -> None:
    assert str(torch.ops.vllm_ext.mixed_moe.default._schema) == (
        "vllm_ext::mixed_moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor arena, Tensor table, "
        "Tensor? expert_map, int intermediate_size, str activation, bool weight_on_input) -> Tensor"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = make_arguments(dtype)
    torch.library.opcheck(torch.ops.vllm_ext.mixed_moe.default, arguments)
    torch.library.opcheck(torch.ops.vllm_ext.mixed_moe.default, (*arguments[:5], None, *arguments[6:]))


def test_cpu_tensors_take_the_cpu_path() -> None:
    arguments = make_arguments()
    assert torch.equal(mixed_moe(*arguments), cpu.mixed_moe(*arguments))


def test_compiled_equals_eager_at_several_batch_sizes() -> None:
    def layer(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return torch.ops.vllm_ext.mixed_moe(x * 2, *rest) + x

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (1, 5, 8):
        arguments = make_arguments(torch.float32, num_tokens)
        assert tolerances.relative_error(compiled(*arguments), layer(*arguments)) < 1e-6


def test_observer_counts_the_pairs_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(op, "call_observer", counted.append)
    arguments = list(make_arguments())
    arguments[1] = torch.tensor([[0, 1], [2, -1], [1, 1], [-1, -1], [0, 2]], dtype=torch.int32)
    mixed_moe(*arguments)
    arguments[5] = torch.tensor([-1, 0, -1], dtype=torch.int32)
    mixed_moe(*arguments)
    assert counted == [7, 3]


def test_without_a_fast_path_the_reference_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_no_fast_path.cache_clear()
    arguments = make_arguments()
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext.kernels"):
        # What every device but the CPU dispatches to.
        for _ in range(3):
            out = op._mixed_moe_reference(*arguments)
    assert torch.equal(out, reference.mixed_moe(*arguments))
    assert len(caplog.records) == 1
    assert "no fast path for device 'cpu': the float32 reference runs" in caplog.records[0].getMessage()
    for key in ("CUDA", "XPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("vllm_ext::mixed_moe", key)


def test_importing_the_module_again_keeps_the_op() -> None:
    arguments = make_arguments()
    expected = mixed_moe(*arguments)
    importlib.reload(op)
    assert torch.equal(mixed_moe(*arguments), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_tensors_take_the_reference() -> None:
    arguments = make_arguments()
    on_gpu = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected = reference.mixed_moe(*arguments)
    assert tolerances.relative_error(mixed_moe(*on_gpu).cpu(), expected) < 1e-2
