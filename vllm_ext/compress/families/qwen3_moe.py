# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (model_type qwen3_moe): Qwen3-30B-A3B, Qwen3-235B-A22B, and the shipped small model.

Source: names and shapes as in the published checkpoints and in transformers' `Qwen3MoeForCausalLM`; fused layers as
in `packed_modules_mapping` of vLLM's qwen3_moe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_ext.compress.families.decoder import Decoder, Residual, RoutedTokens
from vllm_ext.compress.families.structure import Block, Kind, Module
from vllm_ext.quantization.checkpoint import count_experts, read_size
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo, TensorReader, suggest

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_KINDS = {
    "self_attn.q_proj": Kind.ATTENTION,
    "self_attn.k_proj": Kind.ATTENTION,
    "self_attn.v_proj": Kind.ATTENTION,
    "self_attn.o_proj": Kind.ATTENTION,
    "mlp.gate_proj": Kind.LINEAR,
    "mlp.up_proj": Kind.LINEAR,
    "mlp.down_proj": Kind.LINEAR,
    "mlp.gate": Kind.ROUTER,
}


class Qwen3Moe:
    """The checkpoint adapter of Qwen3-MoE; members as in `families.Family`."""

    model_types = ("qwen3_moe",)
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    linear_order = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

    def list_modules(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> list[Module]:
        """Every module with a 2-D weight, layer by layer, experts in their order.

        Raises CheckpointError for experts stored as fused 3-D tensors, and for an expert that is missing, incomplete
        or of another shape than config.json says.
        """
        modules: list[Module] = []
        experts: dict[int, dict[int, set[str]]] = {}
        for name, info in infos.items():
            path, _, suffix = name.rpartition(".")
            match = _LAYER.fullmatch(path)
            layer, inner = (int(match[1]), match[2]) if match else (None, path)
            if len(info.shape) == 3 and ".mlp.experts." in name:
                raise CheckpointError(
                    f"{name} is {info}: experts fused into one tensor; save the model with transformers' "
                    f"save_pretrained, which writes one tensor per expert"
                )
            if suffix != "weight" or len(info.shape) != 2:
                continue
            expert = _EXPERT.fullmatch(inner)
            if expert is not None and layer is not None:
                experts.setdefault(layer, {}).setdefault(int(expert[1]), set()).add(expert[2])
                continue
            block = Block("weight", (path,), ((info.shape[0], info.shape[1]),), info.dtype.itemsize)
            modules.append(Module(path, _KINDS.get(inner, Kind.OTHER), layer, (block,)))
        modules += self._list_experts(config, infos, experts)
        _check_layers(config, modules)
        # Outside the layers first; a stable order, whatever the order of the files.
        return sorted(
            modules, key=lambda m: (-1 if m.layer is None else m.layer, m.expert is not None, m.expert or 0, m.path)
        )

    def find_routers(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """{path of a layer's experts in the checkpoint: its router} of a transformers model."""
        return {
            f"{name.removesuffix('.gate')}.experts": module
            for name, module in model.named_modules()
            if _LAYER.fullmatch(name) and name.endswith(".mlp.gate")
        }

    def read_routing(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert ids int64 [tokens, top k], routing weights [tokens, top k]) of a router's output."""
        _, weights, ids = output
        return ids, weights

    def find_decoder(self, model: torch.nn.Module) -> Decoder:
        """The parts of a transformers model, real or on the meta device."""
        base: Any = model.model
        return Decoder(base, base.embed_tokens, base.layers, base.norm, model.lm_head)

    def layer_prefix(self, layer: int) -> str:
        """What the names of a decoder layer's tensors begin with in the checkpoint."""
        return f"model.layers.{layer}."

    def read_layer(
        self, reader: TensorReader, layer: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """State of transformers' decoder layer, experts stacked as it keeps them: [experts, N, K]."""
        prefix = self.layer_prefix(layer)
        state: dict[str, torch.Tensor] = {}
        experts: dict[int, dict[str, str]] = {}
        for name in reader.infos:
            inner = name.removeprefix(prefix)
            if inner == name:
                continue
            match = _EXPERT.fullmatch(inner.removesuffix(".weight"))
            if match is None:
                state[inner] = reader.read(name).to(device, dtype)
            else:
                experts.setdefault(int(match[1]), {})[match[2]] = name
        if experts:
            intermediate, hidden = reader.infos[experts[0]["gate_proj"]].shape
            # Filled in place: a stack of parts would hold the layer twice.
            gate_up = torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype, device=device)
            down = torch.empty(len(experts), hidden, intermediate, dtype=dtype, device=device)
            for expert, names in experts.items():
                gate_up[expert, :intermediate].copy_(reader.read(names["gate_proj"]))
                gate_up[expert, intermediate:].copy_(reader.read(names["up_proj"]))
                down[expert].copy_(reader.read(names["down_proj"]))
            state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"] = gate_up, down
        return state

    def find_experts(self, layer: torch.nn.Module) -> torch.nn.Module | None:
        """The module of a decoder layer that holds its routed experts; None for a dense layer."""
        return getattr(layer.mlp, "experts", None)

    def replace_experts(self, layer: torch.nn.Module, experts: torch.nn.Module) -> None:
        """Put a module with the same forward(hidden, ids, weights) in the place of a layer's routed experts."""
        layer.mlp.experts = experts

    def read_expert_inputs(self, arguments: tuple[Any, ...]) -> RoutedTokens:
        """What the module of `find_experts` was called with."""
        hidden, ids, weights = arguments
        return RoutedTokens(hidden, ids, weights)

    def expert_weight(self, experts: torch.nn.Module, expert: int, block: str) -> torch.Tensor:
        """Weight [N, K] of a block: gate stacked over up for "gate_up"."""
        stacked = experts.gate_up_proj if block == "gate_up" else experts.down_proj
        return stacked[expert]

    def describe_residual(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Residual:
        """How every tensor meets the residual stream; q_norm and k_norm act inside a head and do not."""
        readers: dict[str, str] = {}
        writers: list[str] = []
        gains = [_NORM]
        for name in infos:
            match = _LAYER.fullmatch(name.rpartition(".")[0])
            if match is None:
                continue
            inner, prefix = match[2], f"model.layers.{match[1]}."
            last = inner.rpartition(".")[2]
            if inner in ("input_layernorm", "post_attention_layernorm"):
                gains.append(name)
            elif last in ("o_proj", "down_proj"):
                writers.append(name)
            elif name.endswith(".weight") and last in ("q_proj", "k_proj", "v_proj"):
                readers[name] = f"{prefix}input_layernorm.weight"
            elif name.endswith(".weight") and last in ("gate_proj", "up_proj", "gate"):
                readers[name] = f"{prefix}post_attention_layernorm.weight"
        head = _HEAD if _HEAD in infos else _EMBEDDING
        return Residual(_EMBEDDING, head, _NORM, _HEAD, readers, tuple(writers), tuple(gains))

    def _list_experts(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], experts: Mapping[int, Mapping[int, set[str]]]
    ) -> list[Module]:
        num_experts = count_experts(config)
        if num_experts is None:
            raise CheckpointError("config.json of a qwen3_moe model needs num_experts: copy it again")
        hidden, intermediate = (read_size(config, key) for key in ("hidden_size", "moe_intermediate_size"))
        expected = {
            "gate_proj": (intermediate, hidden),
            "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }
        modules = []
        for layer, found in experts.items():
            for expert in range(max(num_experts, max(found) + 1)):
                path = f"model.layers.{layer}.mlp.experts.{expert}"
                if expert >= num_experts:
                    raise CheckpointError(f"the checkpoint holds {path}, config.json says {num_experts} experts")
                for projection, shape in expected.items():
                    name = f"{path}.{projection}.weight"
                    if name not in infos:
                        raise CheckpointError(f"{name} is missing{suggest(name, infos)}: copy the checkpoint again")
                    if infos[name].shape != shape:
                        raise CheckpointError(f"{name} is {infos[name]}, config.json says {list(shape)}")
                gate_up = Block(
                    "gate_up",
                    (f"{path}.gate_proj", f"{path}.up_proj"),
                    (expected["gate_proj"], expected["up_proj"]),
                    infos[f"{path}.gate_proj.weight"].dtype.itemsize,
                )
                itemsize = infos[f"{path}.down_proj.weight"].dtype.itemsize
                down = Block("down", (f"{path}.down_proj",), (expected["down_proj"],), itemsize)
                modules.append(Module(path, Kind.EXPERT, layer, (gate_up, down), expert))
        return modules


def _check_layers(config: Mapping[str, Any], modules: Sequence[Module]) -> None:
    """Raise CheckpointError for a layer without attention or without an MLP: some of the files are not there."""
    parts = {(module.layer, "mlp" if ".mlp." in module.path else "self_attn") for module in modules}
    for layer in range(read_size(config, "num_hidden_layers")):
        for part in ("self_attn", "mlp"):
            if (layer, part) not in parts:
                raise CheckpointError(
                    f"config.json says {config['num_hidden_layers']} layers, but the checkpoint has no weight of "
                    f"model.layers.{layer}.{part}: copy it again"
                )
