# SPDX-License-Identifier: Apache-2.0
"""What a loaded layer does for CUDA graphs. A layer on the meta device stands for one on a GPU."""

from __future__ import annotations

import ast
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config

from vllm_ext.kernels import mixed_linear, mixed_moe
from vllm_ext.kernels.arena import Layout
from vllm_ext.quantization import cuda_graphs

META = torch.device("meta")
MAX_TOKENS = 640


@pytest.fixture(autouse=True)
def config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.scheduler_config.max_num_batched_tokens = MAX_TOKENS
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of `warm_up` of both ops' launchers, which are not there without triton."""
    calls: list[tuple[Any, ...]] = []
    for package in (mixed_moe, mixed_linear):
        launcher = ModuleType(f"{package.__name__}.triton")
        # As of a layer that is the first of its kind.
        launcher.warm_up = lambda *arguments: calls.append(arguments) or [1]  # type: ignore[attr-defined]
        monkeypatch.setattr(package, "triton", launcher, raising=False)
        monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    return calls


def make_experts(device: torch.device = META, dp_size: int = 1, sp_size: int = 1) -> Any:
    return SimpleNamespace(
        expert_arena=torch.empty(64, dtype=torch.uint8, device=device),
        expert_table=torch.empty(2, 2, 7, dtype=torch.int64, device=device),
        expert_map=torch.empty(4, dtype=torch.int32, device=device),
        apply_router_weight_on_input=True,
        moe_config=SimpleNamespace(experts_per_token=3, dp_size=dp_size, sp_size=sp_size),
    )


def make_linear(bias: torch.Tensor | None) -> Any:
    return SimpleNamespace(
        linear_arena=torch.empty(64, dtype=torch.uint8, device=META),
        linear_table=torch.empty(1, 8, dtype=torch.int64, device=META),
        bias=bias,
    )


def test_experts_of_the_kernels_are_warmed_up(
    calls: list[tuple[Any, ...]], config: VllmConfig, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make_experts()
    with caplog.at_level(logging.INFO, logger="vllm.vllm_ext"):
        cuda_graphs.prepare_experts(layer, Layout.GPU_FRAGMENT, torch.bfloat16, 256, 128)
    assert "Triton kernels for experts of 256 by 128 are ready after" in caplog.text
    sizes = (256, 128, 3, MAX_TOKENS, torch.bfloat16)
    assert calls == [(layer.expert_arena, layer.expert_table, *sizes, layer.expert_map, True)]
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.parametrize(("dp_size", "sp_size", "expected"), [(1, 1, 640), (4, 1, 2560), (1, 3, 642), (2, 3, 1284)])
def test_experts_get_the_tokens_of_all_data_parallel_ranks(
    dp_size: int, sp_size: int, expected: int, calls: list[tuple[Any, ...]]
) -> None:
    layer = make_experts(dp_size=dp_size, sp_size=sp_size)
    cuda_graphs.prepare_experts(layer, Layout.GPU_FRAGMENT, torch.bfloat16, 256, 128)
    ((_, _, _, _, _, max_tokens, *_),) = calls
    assert max_tokens == expected


@pytest.mark.parametrize(("device", "batches", "expected"), [("cuda", [1], 1), ("cuda", [], 0), ("meta", [1], 0)])
def test_memory_goes_back_where_something_was_run(
    device: str, batches: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    cuda_graphs._finish("experts", torch.device(device), batches, 0.0)
    assert len(emptied) == expected


def test_a_linear_layer_is_warmed_up_with_its_bias_and_without(calls: list[tuple[Any, ...]]) -> None:
    for bias in (None, torch.empty(96, device=META)):
        calls.clear()
        layer = make_linear(bias)
        cuda_graphs.prepare_linear(layer, Layout.GPU_FRAGMENT, torch.float16, 256, 96)
        expected = (layer.linear_arena, layer.linear_table, 256, 96, MAX_TOKENS, torch.float16)
        assert [call[:-1] for call in calls] == [expected] * (1 if bias is None else 2)
        assert [call[-1] is None for call in calls] == [True, False][: len(calls)]


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.bfloat16, "do not serve meta (an error above says so where they failed their check)"),
        (torch.float32, "do not serve torch.float32 models (--dtype bfloat16 does)"),
    ],
)
def test_the_reference_switches_graphs_off_and_says_why(
    dtype: torch.dtype, reason: str, calls: list[tuple[Any, ...]], config: VllmConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext"):
        cuda_graphs.prepare_experts(make_experts(), Layout.PLAIN_CODES, dtype, 256, 128)
        cuda_graphs.prepare_linear(make_linear(None), Layout.PLAIN_CODES, dtype, 256, 96)
    assert calls == []
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    # Once, not for every layer.
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "overriding cudagraph_mode FULL_AND_PIECEWISE to NONE" in record.getMessage()


def test_an_eager_engine_hears_nothing(config: VllmConfig, caplog: pytest.LogCaptureFixture) -> None:
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext"):
        cuda_graphs.prepare_experts(make_experts(), Layout.PLAIN_CODES, torch.float32, 256, 128)
    assert caplog.records == []


def test_cpus_have_no_graphs(calls: list[tuple[Any, ...]], config: VllmConfig) -> None:
    for layout in (Layout.CPU_RECORD, Layout.PLAIN_CODES):
        cuda_graphs.prepare_experts(make_experts(torch.device("cpu")), layout, torch.bfloat16, 256, 128)
    assert calls == []
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE


def test_a_layer_without_an_engine_is_left_alone(calls: list[tuple[Any, ...]]) -> None:
    with set_current_vllm_config(None):  # type: ignore[arg-type]
        cuda_graphs.prepare_experts(make_experts(), Layout.GPU_FRAGMENT, torch.bfloat16, 256, 128)
    assert calls == []


def find_lines(function: ast.FunctionDef, name: str) -> list[int]:
    """Where a function names an attribute or variable."""
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute | ast.Name))
    return [node.lineno for node in nodes if name == (node.attr if isinstance(node, ast.Attribute) else node.id)]


def read_functions(module: str) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a module, from its source: importing the GPU runners needs triton."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    nodes = ast.walk(ast.parse(Path(spec.origin).read_text()))
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def test_runners_read_the_mode_after_the_model_is_loaded() -> None:
    """What `switch_graphs_off` rests on; another vLLM may read it earlier."""
    functions = read_functions("vllm.v1.worker.gpu_model_runner")
    loaded = min(find_lines(functions["load_model"], "load_model"))
    assert min(find_lines(functions["load_model"], "cudagraph_mode")) > loaded
    # Before that, once: for a list of batch sizes, which nobody asks for without graphs.
    assert len(find_lines(functions["__init__"], "cudagraph_mode")) == 1

    functions = read_functions("vllm.v1.worker.gpu.model_runner")
    for name in ("__init__", "load_model"):
        assert find_lines(functions[name], "cudagraph_mode") == []
    assert find_lines(functions["initialize_kv_cache"], "resolve_cudagraph_mode_and_sizes")
