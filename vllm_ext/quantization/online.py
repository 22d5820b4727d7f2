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
from vllm_ext.kernels.arena import write_codes, write_full_precision
from vllm_ext.kernels.mixed_moe.layout import Block, plan_arena
from vllm_ext.quantization.default_plan import choose_schemes
from vllm_ext.quantization.moe import (
    ExpertSchemes,
    MxMoEMethodBase,
    check_sizes,
    describe_block,
    list_local_experts,
    measure_storage,
)


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

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Turn `w13_weight` and `w2_weight` into `expert_arena` (uint8) and `expert_table` (int64), and empty them.

        vLLM calls this twice at start-up, and again after a weight reload. A reload keeps the plan of the first
        load: vLLM then copies the new arena into the old one and keeps the old table, so they must agree.
        Raises ValueError, naming layer and expert, for NaN or infinite weights.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if self.check_plan is not None:
            self.check_plan()
        self._zero_padding(layer)
        weights = (layer.w13_weight.data, layer.w2_weight.data)
        _, hidden_size, intermediate_size = weights[Block.DOWN].shape
        if self.schemes is None:
            gate_up, down = (
                choose_schemes(weights[block], f"{self.layer_name}, {block.name.lower()}") for block in Block
            )
            self.schemes = [ExpertSchemes(*pair) for pair in zip(gate_up, down, strict=True)]
        dtype, device = weights[Block.GATE_UP].dtype, weights[Block.GATE_UP].device
        plan = plan_arena(
            [(describe_block(gate_up, dtype), describe_block(down, dtype)) for gate_up, down in self.schemes],
            hidden_size,
            intermediate_size,
        )
        arena = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device)
        for expert, rows in enumerate(plan.table.tolist()):
            for block in Block:
                weight, scheme = weights[block][expert], self.schemes[expert][block]
                if scheme.is_quantized:
                    name = f"{self.layer_name}, {block.name.lower()}, expert {expert}"
                    write_codes(arena, rows[block], *round_to_nearest(weight, scheme, name))
                else:
                    write_full_precision(arena, rows[block], weight)
        self.intermediate_size = intermediate_size
        self.report_storage(measure_storage(self.schemes, plan, hidden_size, intermediate_size))
        replace_parameter(layer, "expert_arena", arena)
        layer.register_buffer("expert_table", plan.table.to(device), persistent=False)
        for name in ("w13_weight", "w2_weight"):
            # Emptied, not deleted: under expert parallelism the checkpoint still holds experts of other ranks, whose
            # loader (kept by replace_parameter) looks the parameter up before it turns them away.
            replace_parameter(layer, name, torch.empty(0, dtype=dtype, device=device))
        layer._already_called_process_weights_after_loading = True
