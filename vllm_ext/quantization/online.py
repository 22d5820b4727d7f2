# SPDX-License-Identifier: Apache-2.0
"""Online quantization: bf16, fp16 or fp32 experts are rounded and packed as each layer's weights arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.utils import replace_parameter

from vllm_ext.compress.rounding import round_to_nearest
from vllm_ext.kernels.blocks import write_codes, write_full_precision
from vllm_ext.kernels.mixed_moe.layout import Block, plan_arena
from vllm_ext.quantization.cuda_graphs import prepare_experts
from vllm_ext.quantization.default_plan import choose_schemes
from vllm_ext.quantization.moe import (
    ExpertSchemes,
    MxMoEMethodBase,
    check_sizes,
    describe_block,
    list_local_experts,
    measure_storage,
    plan_in_memory,
)
from vllm_ext.quantization.resident import allocate_arena, choose_layout
from vllm_ext.quantization.tensors import describe_missing_weight, list_arrived


class MxMoEOnlineMethod(MxMoEMethodBase, OnlineMoEMethodBase):
    """A given plan or the default one, round-to-nearest, layer by layer.

    `OnlineMoEMethodBase.create_weights` puts the full weights on the meta device; vLLM materialises a layer when
    all of it has been read, and calls `process_weights_after_loading` at once. So the peak is the result plus
    one layer in full precision.
    """

    def __init__(self, moe: FusedMoEConfig, layer_name: str, schemes: Sequence[ExpertSchemes] | None = None) -> None:
        """schemes: of every expert of the layer, by global id; None for `default_plan.choose_schemes`."""
        super().__init__(moe)
        self.layer_name = layer_name
        self.global_schemes = None if schemes is None else list(schemes)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As `OnlineMoEMethodBase`. Raises ValueError, naming expert and value, for sizes a given plan cannot take."""
        if self.global_schemes is not None:
            experts = list_local_experts(layer, len(self.global_schemes))
            self.schemes = [self.global_schemes[expert] for expert in experts]
            tp_size = self.moe.moe_parallel_config.tp_size
            check_sizes(self.layer_name, self.schemes, experts, hidden_size, intermediate_size_per_partition, tp_size)
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        )

    def check_arrived(self, layer: RoutedExperts) -> None:
        """Raise ValueError naming the first tensor of this rank's experts that the checkpoint does not hold.

        vLLM processes a layer that is not complete all the same, with whatever its memory held
        (`reload.layerwise.finalize_layerwise_processing`). Weights that did not come expert by expert are not checked.
        """
        arrived = list_arrived(layer)
        if arrived is None or any("expert_id" not in arguments for arguments in arrived):
            return
        given = {(arguments["expert_id"], arguments["shard_id"]) for arguments in arrived}
        parts = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        for expert in list_local_experts(layer, layer.moe_config.num_logical_experts):
            for shard_id, part in parts.items():
                if (expert, shard_id) not in given:
                    raise ValueError(describe_missing_weight(f"{self.layer_name}.{expert}.{part}.weight"))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Turn `w13_weight` and `w2_weight` into `expert_arena` (uint8) and `expert_table` (int64), and empty them.

        vLLM calls this twice at start-up, and again after a weight reload. A reload keeps the plan of the first
        load: vLLM then copies the new arena into the old one and keeps the old table, so they must agree.
        Raises ValueError, naming layer and expert, for NaN or infinite weights, and for a tensor that did not arrive.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if self.check_plan is not None:
            self.check_plan()
        self.check_arrived(layer)
        self._zero_padding(layer)
        weights = (layer.w13_weight.data, layer.w2_weight.data)
        _, hidden_size, intermediate_size = weights[Block.DOWN].shape
        if self.schemes is None:
            gate_up, down = (
                choose_schemes(weights[block], f"{self.layer_name}, {block.name.lower()}") for block in Block
            )
            self.schemes = [ExpertSchemes(*pair) for pair in zip(gate_up, down, strict=True)]
        dtype, device = weights[Block.GATE_UP].dtype, weights[Block.GATE_UP].device
        formats = [(describe_block(gate_up, dtype), describe_block(down, dtype)) for gate_up, down in self.schemes]
        stored = plan_arena(formats, hidden_size, intermediate_size)
        layout = choose_layout(dtype, device)
        plan = plan_in_memory(formats, hidden_size, intermediate_size, layout)
        arena = allocate_arena(plan.num_bytes, layout, device)
        for expert, rows in enumerate(plan.table.tolist()):
            for block in Block:
                weight, scheme = weights[block][expert], self.schemes[expert][block]
                if scheme.is_quantized:
                    name = f"{self.layer_name}, {block.name.lower()}, expert {expert}"
                    rounded = round_to_nearest(weight, scheme, name)
                    write_codes(arena, rows[block], *rounded, gate_up=block == Block.GATE_UP)
                else:
                    write_full_precision(arena, rows[block], weight)
        self.intermediate_size = intermediate_size
        self.report_storage(measure_storage(self.schemes, stored, hidden_size, intermediate_size, plan.num_bytes))
        replace_parameter(layer, "expert_arena", arena)
        layer.register_buffer("expert_table", plan.table.to(device), persistent=False)
        prepare_experts(layer, layout, dtype, hidden_size, intermediate_size)
        for name in ("w13_weight", "w2_weight"):
            # Emptied, not deleted: under expert parallelism the checkpoint still holds experts of other ranks, whose
            # loader (kept by replace_parameter) looks the parameter up before it turns them away.
            replace_parameter(layer, name, torch.empty(0, dtype=dtype, device=device))
        layer._already_called_process_weights_after_loading = True
