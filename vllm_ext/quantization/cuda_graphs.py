# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs need of a layer once its weights are in place.

    kernels run        everything is compiled and the table is read before the first capture (`warm_up` of the kernels,
                       which also finds out which tiles the GPU has room for)
    reference runs     no graphs at all: it reads the table and counts tokens on the host, which cannot be captured

vLLM decides about graphs from `compilation_config.cudagraph_mode` when the model is loaded: both runners read it again
only then (`v1.worker.gpu_model_runner.GPUModelRunner.load_model`, after the loader has returned;
`v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache`; both workers' `determine_available_memory`). So a layer
may still switch them off here, as vLLM itself does with a warning for attention backends that have no graphs.
"""

from __future__ import annotations

import logging
import time

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from vllm_ext.kernels.arena import Layout
from vllm_ext.quantization.resident import RECORD_DTYPES

logger = logging.getLogger("vllm.vllm_ext")


def prepare_experts(
    layer: RoutedExperts, layout: Layout, dtype: torch.dtype, hidden_size: int, intermediate_size: int
) -> None:
    """Make the calls of a loaded layer (`expert_arena`, `expert_table`) capturable, or switch CUDA graphs off.

    layout: of its codes, from `resident.choose_layout`. dtype: of the model.
    """
    max_tokens = _find_max_tokens(layer.expert_arena, layout, dtype)
    if max_tokens is None:
        return
    # Loads triton.
    from vllm_ext.kernels.mixed_moe import triton

    begin = time.monotonic()
    batches = triton.warm_up(
        layer.expert_arena,
        layer.expert_table,
        hidden_size,
        intermediate_size,
        layer.moe_config.experts_per_token,
        _gather_tokens(max_tokens, layer.moe_config),
        dtype,
        layer.expert_map,
        layer.apply_router_weight_on_input,
    )
    _finish(f"experts of {hidden_size} by {intermediate_size}", layer.expert_arena.device, batches, begin)


def prepare_linear(
    layer: torch.nn.Module, layout: Layout, dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    """As `prepare_experts`, of a layer with `linear_arena` and `linear_table`; sizes are those of this rank."""
    max_tokens = _find_max_tokens(layer.linear_arena, layout, dtype)
    if max_tokens is None:
        return
    from vllm_ext.kernels.mixed_linear import triton

    # With its bias and without: of the ranks that a layer is summed over, one adds it.
    bias = getattr(layer, "bias", None)
    for given in (None,) if bias is None else (None, bias):
        sizes = (in_features, out_features, max_tokens)
        begin = time.monotonic()
        batches = triton.warm_up(layer.linear_arena, layer.linear_table, *sizes, dtype, given)
        _finish(f"linear layers of {in_features} by {out_features}", layer.linear_arena.device, batches, begin)


def _gather_tokens(max_tokens: int, moe: FusedMoEConfig) -> int:
    """Tokens of the largest batch of a MoE layer: vLLM gathers for it those of all data-parallel ranks, and the equal
    parts of sequence-parallel ones (`fused_moe.runner.moe_runner.MoERunner._maybe_dispatch`)."""
    return moe.dp_size * -(-max_tokens // moe.sp_size) * moe.sp_size


def _finish(what: str, device: torch.device, batches: list[int], begin: float) -> None:
    """Say how long compiling took: on a new machine, loading seems to stand still."""
    if not batches:
        return
    if device.type == "cuda":
        # What the largest batches took goes back before the next layer's weights arrive.
        torch.cuda.empty_cache()
    seconds = time.monotonic() - begin
    logger.info("vllm_ext: Triton kernels for %s are ready after %.1f s", what, seconds)


def _find_max_tokens(arena: torch.Tensor, layout: Layout, dtype: torch.dtype) -> int | None:
    """Tokens of the largest batch where kernels have to be compiled for it; None where there is nothing to compile."""
    config = get_current_vllm_config_or_none()
    if arena.device.type == "cpu" or config is None:
        return None
    if layout != Layout.GPU_FRAGMENT:
        switch_graphs_off(dtype, arena.device)
        return None
    return config.scheduler_config.max_num_batched_tokens


def switch_graphs_off(dtype: torch.dtype, device: torch.device) -> None:
    """Run the engine whose model is being loaded without CUDA graphs, and say once in the log why."""
    config = get_current_vllm_config_or_none()
    if config is None or config.compilation_config.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    if dtype in RECORD_DTYPES:
        reason = f"do not serve {device} (an error above says so where they failed their check)"
    else:
        reason = f"do not serve {dtype} models (--dtype bfloat16 does)"
    logger.warning(
        "vllm_ext: the Triton kernels %s, so the float32 reference computes, slowly. It cannot be captured: overriding "
        "cudagraph_mode %s to NONE, as --enforce-eager would",
        reason,
        config.compilation_config.cudagraph_mode.name,
    )
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
