# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints: expert tensors go from the files straight to their place in the layer's arena.

    <layer>.experts.3.gate_proj.qweight   ->  w13_qweight.weight_loader(shard_id="w1", expert_id=3)
    <layer>.experts.3.up_proj.scales      ->  w13_scales.weight_loader(shard_id="w3", expert_id=3)
    <layer>.experts.3.down_proj.zeros     ->  w2_zeros.weight_loader(shard_id="w2", expert_id=3)

vLLM looks up a parameter by name and calls its loader, whatever the parameter's shape
(`vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts.load_weights`). Ours are empty and carry only
the loader, so experts of one layer can have tensors of different shapes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.utils import replace_parameter

from vllm_ext.kernels.arena import Layout, view_block
from vllm_ext.kernels.mixed_moe.layout import ArenaPlan, Block, block_shape, copy_arena, plan_arena
from vllm_ext.quantization.cuda_graphs import prepare_experts
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
from vllm_ext.quantization.tensors import (
    check_tensor,
    describe_missing,
    find_spec,
    is_dummy_load,
    narrow_to_rank,
)

#: vLLM's names of an expert's parts: gate, up, down.
SHARDS = {"w1": Block.GATE_UP, "w3": Block.GATE_UP, "w2": Block.DOWN}

#: Suffixes of every scheme's tensors.
SUFFIXES = ("qweight", "scales", "zeros", "weight")

_PARAMETER_PREFIXES = {Block.GATE_UP: "w13", Block.DOWN: "w2"}


class MxMoEPackedMethod(MxMoEMethodBase):
    """The routed experts of one layer of a packed checkpoint, under tensor or expert parallelism."""

    def __init__(self, moe: FusedMoEConfig, layer_name: str, schemes: Sequence[ExpertSchemes]) -> None:
        """schemes: of every expert of the layer, by global id."""
        super().__init__(moe)
        self.layer_name = layer_name
        self.global_schemes = list(schemes)
        #: (local expert, shard, suffix) of every tensor that arrived.
        self.loaded: set[tuple[int, str, str]] = set()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Lay out the arena `expert_arena` and register the empty parameters that carry the loaders.

        Raises ValueError, naming layer and value, for sizes that the schemes or the ranks cannot take.
        """
        self.local_experts = list_local_experts(layer, len(self.global_schemes))
        self.schemes = [self.global_schemes[expert] for expert in self.local_experts]
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size_per_partition
        tp_size = self.moe.moe_parallel_config.tp_size
        self.check_padding()
        check_sizes(self.layer_name, self.schemes, self.local_experts, hidden_size, self.intermediate_size, tp_size)
        self.params_dtype = params_dtype
        self.formats = [
            (describe_block(pair[0], params_dtype), describe_block(pair[1], params_dtype)) for pair in self.schemes
        ]
        self.plan: ArenaPlan = plan_arena(self.formats, hidden_size, self.intermediate_size)
        self.rows = self.plan.table.tolist()
        self.is_dummy = is_dummy_load()
        # Zeros: `--load-format dummy` leaves integer tensors as they are.
        arena = torch.nn.Parameter(torch.zeros(self.plan.num_bytes, dtype=torch.uint8), requires_grad=False)
        # A reload waits until as many elements have been copied as the parameters announce. The arena is filled
        # through the others.
        arena.weight_loader_numel = 0
        layer.register_parameter("expert_arena", arena)
        for block, prefix in _PARAMETER_PREFIXES.items():
            for suffix in SUFFIXES:
                placeholder = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                placeholder.weight_loader = self.make_loader(layer, suffix)
                placeholder.weight_loader_numel = self.count_elements(block, suffix)
                layer.register_parameter(f"{prefix}_{suffix}", placeholder)

    def check_padding(self) -> None:
        """Raise ValueError where vLLM has rounded a size up: the tensors of the checkpoint have no padding."""
        for name in ("hidden_dim", "intermediate_size_per_partition"):
            padded, size = getattr(self.moe, name), getattr(self.moe, f"{name}_unpadded")
            if padded != size:
                raise ValueError(
                    f"{self.layer_name}: vLLM pads {name} from {size} to {padded} in this configuration, which packed "
                    f"mxmoe checkpoints cannot be; use another number of ranks or all-to-all backend"
                )

    def count_elements(self, block: Block, suffix: str) -> int:
        """Elements of all tensors `suffix` of a block that this rank keeps."""
        N, K = block_shape(block, self.hidden_size, self.intermediate_size)
        specs = (pair[block].tensors.get(suffix) for pair in self.schemes or ())
        return sum(math.prod(spec.shape(N, K)) for spec in specs if spec is not None)

    def make_loader(self, layer: RoutedExperts, suffix: str) -> Callable[..., bool | None]:
        """The function that vLLM calls with each expert tensor named `suffix`."""
        # vLLM keeps a parameter's attributes for reloading; a strong reference there would keep the layer alive.
        layer_ref = weakref.ref(layer)

        def load_expert_tensor(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            layer = layer_ref()
            assert layer is not None
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert != -1:
                self.write_tensor(layer, expert, shard_id, suffix, loaded_weight)
            return expert != -1 if return_success else None

        # Asked for by models with their own load_weights, such as Llama 4.
        load_expert_tensor.supports_moe_loading = True  # type: ignore[attr-defined]
        return load_expert_tensor

    def write_tensor(self, layer: RoutedExperts, expert: int, shard_id: str, suffix: str, tensor: torch.Tensor) -> None:
        """Put this rank's part of one checkpoint tensor [rows, columns] into the arena.

        Raises ValueError, naming the tensor, for one that the plan does not know, or of another type or shape.
        """
        assert self.schemes is not None
        block = SHARDS[shard_id]
        scheme, name = self.schemes[expert][block], self.name_tensor(layer, expert, shard_id, suffix)
        spec = find_spec(name, scheme, suffix)
        tp_size = self.moe.moe_parallel_config.tp_size
        whole = self.intermediate_size * tp_size
        check_tensor(
            name,
            tensor,
            spec,
            spec.shape(*((self.hidden_size, whole) if block == Block.DOWN else (whole, self.hidden_size))),
        )
        # The intermediate size is divided: outputs of gate and up, inputs of down.
        part = narrow_to_rank(tensor, spec.split_dims[block], self.moe.moe_parallel_config.tp_rank, tp_size)
        shape = block_shape(block, self.hidden_size, self.intermediate_size)
        place = view_block(layer.expert_arena.data, self.rows[expert][block], *shape)[suffix]
        if block == Block.GATE_UP:
            place = place.chunk(2)[0 if shard_id == "w1" else 1]
        place.copy_(part)
        self.loaded.add((expert, shard_id, suffix))

    def name_tensor(self, layer: RoutedExperts, expert: int, shard_id: str, suffix: str) -> str:
        """The tensor's name in the checkpoint, under vLLM's name of the layer."""
        part = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        return f"{self.layer_name}.{self.local_experts[expert]}.{part[shard_id]}.{suffix}"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Bring the arena into the layout of this device's kernels, and complete `expert_table`.

        The loaded layers are repacked one by one, so the peak is the result plus one layer. Raises ValueError naming
        the first tensor that did not arrive.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        assert self.schemes is not None
        if self.check_plan is not None:
            self.check_plan()
        missing = [
            (expert, shard_id, suffix)
            for expert, pair in enumerate(self.schemes)
            for shard_id, block in SHARDS.items()
            for suffix in pair[block].tensors
            if (expert, shard_id, suffix) not in self.loaded
        ]
        if missing and not self.is_dummy:
            expert, shard_id, _ = missing[0]
            names = [self.name_tensor(layer, *key) for key in missing]
            raise ValueError(describe_missing(names, self.schemes[expert][SHARDS[shard_id]]))
        self.loaded.clear()
        device, sizes = layer.expert_arena.device, (self.hidden_size, self.intermediate_size)
        layout = choose_layout(self.params_dtype, device)
        plan = self.plan if layout == Layout.PLAIN_CODES else plan_in_memory(self.formats, *sizes, layout)
        if plan is not self.plan:
            arena = allocate_arena(plan.num_bytes, layout, device)
            copy_arena(layer.expert_arena.data, self.plan.table, arena, plan.table, *sizes)
            replace_parameter(layer, "expert_arena", arena)
        layer.register_buffer("expert_table", plan.table.to(device), persistent=False)
        prepare_experts(layer, layout, self.params_dtype, *sizes)
        self.report_storage(measure_storage(self.schemes, self.plan, *sizes, plan.num_bytes))
        layer._already_called_process_weights_after_loading = True
