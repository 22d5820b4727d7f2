# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (model_type qwen3_moe): Qwen3-30B-A3B, Qwen3-235B-A22B, and the shipped small model.

Source: names and shapes as in the published checkpoints and in transformers' `Qwen3MoeForCausalLM`; fused layers as
in `packed_modules_mapping` of vLLM's qwen3_moe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from vllm_ext.compress.families.structure import Block, Kind, Module
from vllm_ext.quantization.checkpoint import count_experts
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo, suggest

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")
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
            block = Block("weight", (path,), ((info.shape[0], info.shape[1]),))
            modules.append(Module(path, _KINDS.get(inner, Kind.OTHER), layer, (block,)))
        modules += self._list_experts(config, infos, experts)
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

    def _list_experts(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], experts: Mapping[int, Mapping[int, set[str]]]
    ) -> list[Module]:
        num_experts = count_experts(config)
        if num_experts is None:
            raise CheckpointError("config.json of a qwen3_moe model needs num_experts: copy it again")
        hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
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
                    "gate_up", (f"{path}.gate_proj", f"{path}.up_proj"), (expected["gate_proj"], expected["up_proj"])
                )
                down = Block("down", (f"{path}.down_proj",), (expected["down_proj"],))
                modules.append(Module(path, Kind.EXPERT, layer, (gate_up, down), expert))
        return modules
