# SPDX-License-Identifier: Apache-2.0
"""Linear layers that the plan names, from a packed checkpoint or rounded while they load."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from vllm_ext import observability
from vllm_ext.compress.rounding import round_to_nearest
from vllm_ext.kernels.blocks import write_codes
from vllm_ext.kernels.mixed_linear import op  # noqa: F401 - registers torch.ops.vllm_ext.mixed_linear
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.quantization.cuda_graphs import prepare_linear
from vllm_ext.quantization.moe import LayerStorage, describe_block
from vllm_ext.quantization.resident import allocate_arena, choose_layout, find_engine_index, place_in_memory
from vllm_ext.quantization.scheme import Scheme
from vllm_ext.quantization.tensors import (
    check_linear_arrived,
    check_split,
    check_tensor,
    describe_missing,
    is_dummy_load,
)

#: vLLM's shard ids of a fused q/k/v layer, in the order of its parts; other fused layers count from 0.
QKV_SHARDS = ("q", "k", "v")

#: What a checkpoint tensor holds of a fused layer: one part, several, or (None) the whole.
ShardId = str | int | tuple[int, ...] | None


class MxMoELinearBase(LinearMethodBase):
    """Applies `vllm_ext::mixed_linear` to `layer.linear_arena` and `layer.linear_table`."""

    scheme: Scheme
    #: Module path in vLLM, for messages; and the parts it is fused from, by their own paths.
    layer_name: str
    part_names: list[str]
    #: Raises where the plan names modules that the model does not have; set by the configuration.
    check_plan: Callable[[], None] | None = None
    out_features: int
    #: Read by vLLM's fusions; int8 activations are rounded inside our op.
    activation_quant_key = None
    #: What the layer takes on this rank; None until the weights are loaded.
    storage: LayerStorage | None = None

    def set_names(self, layer_name: str, shards: Sequence[str]) -> None:
        """shards: names of the parts that vLLM fuses into this layer; its own name alone where it fuses none."""
        self.layer_name = layer_name
        parent, _, _ = layer_name.rpartition(".")
        self.part_names = [f"{parent}.{shard}" if parent else shard for shard in shards]

    def set_weight(
        self,
        layer: torch.nn.Module,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Give the layer its arena and table, and note what it takes.

        codes: uint8 [N, K], one code an element; scales, zeros as the scheme has them; dtype: of the model.
        """
        N, K = codes.shape
        stored = describe_block(self.scheme, dtype)
        layout = choose_layout(dtype, codes.device)
        plan = plan_linear([(place_in_memory(stored, layout), N)], K)
        arena = allocate_arena(plan.num_bytes, layout, codes.device)
        write_codes(arena, plan.table[0].tolist(), codes, scales, zeros)
        replace_parameter(layer, "linear_arena", arena)
        layer.register_buffer("linear_table", plan.table.to(arena.device), persistent=False)
        prepare_linear(layer, layout, dtype, K, N)
        self.report_storage(LayerStorage(plan_linear([(stored, N)], K).num_bytes, N * K, 0, 0, plan.num_bytes))

    def report_storage(self, storage: LayerStorage) -> None:
        """Keep what the loaded layer takes, and count it once in the metrics (a reload changes nothing in it)."""
        if self.storage is None:
            engine_index = find_engine_index()
            observability.add("vllm_ext:mxmoe_linear_weight_bytes", storage.quantized_bytes, engine_index)
            observability.add("vllm_ext:mxmoe_linear_weight_count", storage.quantized_weights, engine_index)
            observability.add("vllm_ext:mxmoe_linear_resident_bytes", storage.resident_bytes, engine_index)
        self.storage = storage

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., K] -> [..., outputs of this rank] in x's dtype."""
        return torch.ops.vllm_ext.mixed_linear(x, layer.linear_arena, layer.linear_table, self.out_features, bias)


class MxMoELinearMethod(MxMoELinearBase):
    """A packed checkpoint's linear layer.

    Codes are packed along K and rows stay rows, so `qweight`, `scales` and `zeros` are plain parameters: vLLM's own
    loaders fuse q/k/v and gate/up, repeat k and v for grouped queries, and split for tensor parallelism by their
    `input_dim` and `output_dim` alone.
    """

    def __init__(self, scheme: Scheme, layer_name: str, shards: Sequence[str]) -> None:
        self.scheme = scheme
        self.set_names(layer_name, shards)
        #: (suffix, part) of every tensor that arrived.
        self.loaded: set[tuple[str, int]] = set()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register one parameter per tensor of the scheme.

        Raises ValueError, naming layer, K, ranks and group, where K cannot be split as the layer is.
        """
        check_split(self.layer_name, self.scheme, input_size, input_size // input_size_per_partition)
        self.out_features, self.K = sum(output_partition_sizes), input_size_per_partition
        self.params_dtype = params_dtype
        self.is_dummy = is_dummy_load()
        # The layer's own loader, the v1 one: our class is not in vLLM's WEIGHT_LOADER_V2_SUPPORTED.
        extra_weight_attrs.pop("weight_loader")
        for suffix, spec in self.scheme.tensors.items():
            shape = spec.shape(self.out_features, self.K)
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=spec.dtype), requires_grad=False)
            output_dim, input_dim = spec.split_dims
            attributes: dict[str, Any] = {"output_dim": output_dim}
            if input_dim is not None:
                attributes["input_dim"] = input_dim
            attributes["weight_loader"] = self.make_loader(layer, suffix, input_size)
            set_weight_attrs(parameter, attributes | extra_weight_attrs)
            layer.register_parameter(suffix, parameter)

    def make_loader(self, layer: torch.nn.Module, suffix: str, input_size: int) -> Callable[..., None]:
        """The layer's own loader behind a check of type and shape, which vLLM would not make or not explain."""
        # vLLM keeps a parameter's attributes for reloading; a strong reference there would keep the layer alive.
        layer_ref = weakref.ref(layer)

        def load_linear_tensor(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None
        ) -> None:
            layer = layer_ref()
            assert layer is not None
            parts = list_parts(loaded_shard_id, self.part_names)
            name = self.part_names[parts[0]] if len(parts) == 1 else self.layer_name
            spec = self.scheme.tensors[suffix]
            shape = spec.shape(count_rows(layer, loaded_shard_id), input_size)
            check_tensor(f"{name}.{suffix}", loaded_weight, spec, shape)
            if loaded_shard_id is None:
                layer.weight_loader(param, loaded_weight)
            else:
                layer.weight_loader(param, loaded_weight, loaded_shard_id)
            self.loaded.update((suffix, part) for part in parts)

        return load_linear_tensor

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Move the tensors into an arena. Raises ValueError naming the first one that did not arrive."""
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if self.check_plan is not None:
            self.check_plan()
        missing = [
            f"{name}.{suffix}"
            for part, name in enumerate(self.part_names)
            for suffix in self.scheme.tensors
            if (suffix, part) not in self.loaded
        ]
        if missing and not self.is_dummy:
            raise ValueError(describe_missing(missing, self.scheme))
        self.loaded.clear()
        tensors = {suffix: getattr(layer, suffix).data for suffix in self.scheme.tensors}
        codes = self.scheme.unpack_codes(tensors["qweight"])
        self.set_weight(layer, codes, tensors["scales"], tensors.get("zeros"), self.params_dtype)
        for suffix, tensor in tensors.items():
            replace_parameter(layer, suffix, torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        layer._already_called_process_weights_after_loading = True


class MxMoEOnlineLinearMethod(MxMoELinearBase, OnlineLinearBase):
    """A bf16, fp16 or fp32 checkpoint's linear layer, rounded to nearest as soon as it has been read.

    Under tensor parallelism each rank rounds its own part. That is what a packed checkpoint of the same plan holds,
    except for groups of -1 along a divided K, where each rank has a scale of its own.
    """

    def __init__(self, scheme: Scheme, layer_name: str, shards: Sequence[str]) -> None:
        super().__init__()
        self.scheme = scheme
        self.set_names(layer_name, shards)
        self.layer_ref: weakref.ref[torch.nn.Module] | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As `OnlineLinearBase`: the full weight stays on the meta device until it is read. Raises as when packed."""
        check_split(self.layer_name, self.scheme, input_size, input_size // input_size_per_partition)
        self.out_features = sum(output_partition_sizes)
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.layer_ref = weakref.ref(layer)

    def await_bias(self) -> None:
        """Let vLLM wait for the bias too; to be called when the model stands, and before its first weight is read.

        A layer registers its bias after `create_weights`, and vLLM notices it with the layer's first weight
        (`reload.layerwise.make_online_process_loader`): a bias that comes earlier, as names sort, is not counted, and
        the layer never counts as complete. It would then be rounded only when all others are, all of it in memory.
        """
        layer = None if self.layer_ref is None else self.layer_ref()
        if layer is not None and getattr(layer, "bias", None) is not None:
            layerwise.initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turn `weight` into `linear_arena` and `linear_table`, and empty it.

        Raises ValueError, naming the layer, for NaN or infinite weights, and where not all of it arrived.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        if self.check_plan is not None:
            self.check_plan()
        check_linear_arrived(layer, self.layer_name)
        weight = layer.weight.data
        rounded = round_to_nearest(weight, self.scheme, self.layer_name)
        self.set_weight(layer, *rounded, weight.dtype)
        replace_parameter(layer, "weight", torch.empty(0, dtype=weight.dtype, device=weight.device))
        layer._already_called_process_weights_after_loading = True


def list_parts(shard_id: ShardId, part_names: Sequence[str]) -> list[int]:
    """Positions, among a fused layer's parts, of what one checkpoint tensor holds; all where it has no shard id.

    Raises ValueError for a shard that this vLLM fuses in a way of its own.
    """
    if shard_id is None:
        return list(range(len(part_names)))
    if isinstance(shard_id, tuple):
        return list(shard_id)
    if isinstance(shard_id, int):
        return [shard_id]
    if shard_id not in QKV_SHARDS:
        raise ValueError(f"mxmoe does not know shard {shard_id!r} of the layer fused from {', '.join(part_names)}")
    return [QKV_SHARDS.index(shard_id)]


def count_rows(layer: torch.nn.Module, shard_id: ShardId) -> int:
    """Rows of the checkpoint tensor with this shard id, before it is split over ranks."""
    if isinstance(layer, QKVParallelLinear):
        sizes = [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    else:
        sizes = getattr(layer, "output_sizes", [layer.output_size])
    return sum(sizes) if shard_id is None else sum(sizes[part] for part in list_parts(shard_id, []))
