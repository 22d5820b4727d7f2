# SPDX-License-Identifier: Apache-2.0
"""What every way of loading mixed-precision experts shares: the op call, the refusals, the byte count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.platforms import current_platform

from vllm_ext import observability
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.mixed_moe import op
from vllm_ext.kernels.mixed_moe.layout import ArenaPlan, Block, block_shape, plan_arena
from vllm_ext.quantization.plan import ExpertSchemes
from vllm_ext.quantization.resident import place_in_memory
from vllm_ext.quantization.scheme import Scheme
from vllm_ext.quantization.tensors import check_split

# Importing `op` registers torch.ops.vllm_ext.mixed_moe; here its work is also counted.
op.call_observer = functools.partial(observability.add, "vllm_ext:mxmoe_routed_pairs_total")


@dataclass(frozen=True)
class LayerStorage:
    """What the weights of one layer on one rank take as they are stored, alignment included; 16-bit blocks apart.

    resident_bytes: of all of them in memory, where the CPU kernels have them in another layout.
    """

    quantized_bytes: int
    quantized_weights: int
    unquantized_bytes: int
    unquantized_weights: int
    resident_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """True bits of the quantized weights: codes, scales, zero points and padding. NaN where there are none."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else float("nan")


class MxMoEMethodBase(FusedMoEMethodBase):
    """Applies `vllm_ext::mixed_moe` to `layer.expert_arena` and `layer.expert_table`.

    `moe_kernel` stays None, so vLLM's runner routes, runs shared experts, and reduces over ranks
    (`vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner._apply_quant_method`).
    """

    layer_name: str
    intermediate_size: int
    #: Raises where the plan names modules that the model does not have; set by the configuration.
    check_plan: Callable[[], None] | None = None
    #: One entry per local expert, and what the layer takes; None until the weights are loaded.
    schemes: list[ExpertSchemes] | None = None
    storage: LayerStorage | None = None

    @property
    def supports_eplb(self) -> bool:
        """EPLB moves experts as rows of equal size, which an arena of mixed widths does not have."""
        return False

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """An empty configuration: vLLM asks again in every forward pass for as long as it gets None."""
        return FusedMoEQuantConfig.make()

    def report_storage(self, storage: LayerStorage) -> None:
        """Keep what the loaded layer takes, and count it once in the metrics (a reload changes nothing in it)."""
        if self.storage is None:
            parallel = self.moe.moe_parallel_config
            engine_index = parallel.dp_rank
            is_first_rank = parallel.tp_rank == 0 and parallel.ep_rank == 0
            observability.add("vllm_ext:mxmoe_layer_count", float(is_first_rank), engine_index)
            observability.add("vllm_ext:mxmoe_weight_bytes", storage.quantized_bytes, engine_index)
            observability.add("vllm_ext:mxmoe_weight_count", storage.quantized_weights, engine_index)
            observability.add("vllm_ext:mxmoe_resident_bytes", storage.resident_bytes, engine_index)
        self.storage = storage

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Partial sum of this rank's experts, [tokens, hidden] in x's dtype. The runner adds shared experts.

        On the CPU, Dynamo traces this: it stays one op call.
        """
        return torch.ops.vllm_ext.mixed_moe(
            x,
            topk_ids,
            topk_weights,
            layer.expert_arena,
            layer.expert_table,
            layer.expert_map,
            self.intermediate_size,
            layer.activation.value,
            layer.apply_router_weight_on_input,
        )


def check_layer(layer: RoutedExperts, layer_name: str) -> None:
    """Refuse, by ValueError naming layer and value, what `mixed_moe` would silently compute wrongly."""
    moe = layer.moe_config
    refused = None
    if layer.activation != MoEActivation.SILU:
        refused = f"activation {layer.activation.value!r} (supported: {MoEActivation.SILU.value!r})"
    elif moe.has_bias:
        refused = "experts with bias (has_bias=True)"
    elif moe.moe_parallel_config.enable_eplb:
        refused = "expert load balancing (enable_eplb=True)"
    else:
        for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            value = getattr(layer, name)
            if value is not None:
                refused = f"a modified SwiGLU ({name}={value})"
                break
    if refused is not None:
        raise ValueError(f"{layer_name}: --quantization mxmoe does not support {refused}; serve this model without it")


def crashes_unquantized(layer: RoutedExperts) -> bool:
    """Whether vLLM's own method dies on this layer: vLLM 0.32 on CPUs does at the first request of an unquantized MoE
    layer under expert parallelism (`cpu_fused_moe` indexes by global expert ids). Ours then serves it as w16a16."""
    return current_platform.is_cpu() and layer.moe_config.moe_parallel_config.use_ep


def list_local_experts(layer: RoutedExperts, num_experts: int) -> list[int]:
    """Global ids of the experts that live on this rank, in the order of their local ids."""
    local_ids = {expert: layer._map_global_expert_id_to_local_expert_id(expert) for expert in range(num_experts)}
    return sorted((expert for expert, local in local_ids.items() if local != -1), key=local_ids.__getitem__)


def check_sizes(
    layer_name: str,
    schemes: Sequence[ExpertSchemes],
    experts: Sequence[int],
    hidden_size: int,
    intermediate_size: int,
    tp_size: int,
) -> None:
    """Raise ValueError, naming expert, block and value, for a scheme that the layer's sizes cannot take.

    experts: global ids of `schemes`. intermediate_size: of this rank.
    """
    for expert, pair in zip(experts, schemes, strict=True):
        check_split(f"{layer_name}.{expert}, gate_up", pair.gate_up, hidden_size, 1)
        check_split(f"{layer_name}.{expert}, down", pair.down, intermediate_size * tp_size, tp_size)


def describe_block(scheme: Scheme, dtype: torch.dtype) -> BlockFormat:
    """The arena format of a scheme; `dtype` is the checkpoint's, for blocks that stay as they are."""
    if not scheme.is_quantized:
        return BlockFormat.full_precision(dtype)
    if scheme.is_ternary:
        return BlockFormat.ternary(scheme.act_bits, scheme.group_size)
    return BlockFormat(scheme.code_bits, scheme.act_bits, scheme.group_size, scheme.symmetric)


def plan_in_memory(
    formats: Sequence[tuple[BlockFormat, BlockFormat]], hidden_size: int, intermediate_size: int, layout: Layout
) -> ArenaPlan:
    """The arena of a layer whose codes lie in `layout`. formats: as stored."""
    placed = [(place_in_memory(gate_up, layout), place_in_memory(down, layout)) for gate_up, down in formats]
    return plan_arena(placed, hidden_size, intermediate_size)


def measure_storage(
    schemes: Sequence[ExpertSchemes],
    plan: ArenaPlan,
    hidden_size: int,
    intermediate_size: int,
    resident_bytes: int,
) -> LayerStorage:
    """Count the bytes and weights of a planned layer. plan: as stored; resident_bytes: of its arena in memory."""
    counts = {True: [0, 0], False: [0, 0]}
    for expert_schemes, expert_bytes in zip(schemes, plan.block_bytes, strict=True):
        for block, scheme, num_bytes in zip(Block, expert_schemes, expert_bytes, strict=True):
            N, K = block_shape(block, hidden_size, intermediate_size)
            counts[scheme.is_quantized][0] += num_bytes
            counts[scheme.is_quantized][1] += N * K
    quantized, unquantized = counts[True], counts[False]
    return LayerStorage(quantized[0], quantized[1], unquantized[0], unquantized[1], resident_bytes)


def list_storage(model: torch.nn.Module) -> dict[str, LayerStorage]:
    """{layer name: what it takes} of every quantized layer (experts, linear layers) of a loaded model, on this rank.

    A plain function of the model, so that vLLM can send it to its workers: `llm.apply_model(list_storage)`.
    """
    found = {}
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        storage = getattr(method, "storage", None)
        if isinstance(storage, LayerStorage):
            found[method.layer_name] = storage
    return found
