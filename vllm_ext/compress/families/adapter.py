# SPDX-License-Identifier: Apache-2.0
"""The checkpoint adapter of every family whose names stand in `layout.LAYOUTS`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_ext.compress.families.decoder import Decoder, Residual, RoutedTokens
from vllm_ext.compress.families.fused_experts import split_fused_experts
from vllm_ext.compress.families.layout import ATTENTION_NORM, MLP_NORM, FamilyLayout
from vllm_ext.compress.families.structure import Block, Kind, Module
from vllm_ext.quantization.model_config import check_layer_count, count_experts, read_size
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo, TensorReader, suggest

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

#: Computed from the configuration; some old checkpoints hold it, and neither transformers nor vLLM reads it.
_ROTARY = ".rotary_emb.inv_freq"


class CheckpointFamily:
    """The adapter of one family; members as in `families.Family`.

    layout: what its checkpoints call things. Decoder, norms, embedding and head have the same names in all of them.
    """

    def __init__(self, layout: FamilyLayout) -> None:
        self.layout = layout
        self.model_types = layout.model_types
        self.fused = layout.fused
        self.linear_order = layout.linear_order
        gate, up, down = map(re.escape, layout.projections)
        self._expert = re.compile(rf"{re.escape(layout.experts or '')}\.(\d+)\.({gate}|{up}|{down})")

    def open_reader(self, directory: Path, config: Mapping[str, Any]) -> TensorReader:
        """The tensors of a checkpoint, every expert with its own, however they are stored."""
        return split_fused_experts(TensorReader(directory), self.layout, config)

    def explain_kept(self, path: str) -> str | None:
        """Why a linear of this family that is no expert stays as it is; None where there is no reason of its own."""
        match = _LAYER.fullmatch(path)
        return None if match is None else self.layout.kept.get(match[2])

    def list_modules(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> list[Module]:
        """Every module with a 2-D weight, layer by layer, experts in their order.

        Raises CheckpointError for an expert that is missing, incomplete or of another shape than config.json says, for
        a tensor of experts that is no projection, and for a layer that is not complete.
        """
        modules: list[Module] = []
        experts: dict[int, dict[int, set[str]]] = {}
        for name, info in infos.items():
            path, _, suffix = name.rpartition(".")
            match = _LAYER.fullmatch(path)
            layer, inner = (int(match[1]), match[2]) if match else (None, path)
            expert = self._match_expert(inner)
            if self.layout.experts is not None and f".{self.layout.experts}." in name:
                if expert is None or suffix != "weight" or len(info.shape) != 2:
                    raise CheckpointError(
                        f"{name} ({info}) is no weight of an expert of {self.layout.name}, which are "
                        f"{self.layout.experts}.NUMBER.{{{','.join(self.layout.projections)}}}.weight: convert the "
                        f"checkpoint with transformers' save_pretrained"
                    )
            elif suffix != "weight" or len(info.shape) != 2:
                continue
            if expert is not None and layer is not None:
                experts.setdefault(layer, {}).setdefault(int(expert[1]), set()).add(expert[2])
                continue
            role = self.layout.linears.get(inner)
            block = Block("weight", (path,), ((info.shape[0], info.shape[1]),), info.dtype.itemsize)
            modules.append(Module(path, Kind.OTHER if role is None else role.kind, layer, (block,)))
        if self.layout.experts is not None:
            modules += self._list_experts(config, infos, experts)
        self._check_layers(config, infos, modules)
        # Outside the layers first; a stable order, whatever the order of the files.
        return sorted(
            modules, key=lambda m: (-1 if m.layer is None else m.layer, m.expert is not None, m.expert or 0, m.path)
        )

    def experts_path(self, layer: int) -> str:
        """Path of a layer's routed experts in the checkpoint."""
        return f"{self.layer_prefix(layer)}{self.layout.experts}"

    def find_routers(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """{path of a layer's experts in the checkpoint: its router} of a transformers model."""
        matches = ((_LAYER.fullmatch(name), module) for name, module in model.named_modules())
        return {
            self.experts_path(int(match[1])): module
            for match, module in matches
            if match is not None and match[2] == "mlp.gate" and self.layout.experts is not None
        }

    def read_routing(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert ids int64 [tokens, top k], routing weights [tokens, top k]) of a router's output."""
        _, weights, ids = output
        return ids, weights

    def find_decoder(self, model: torch.nn.Module) -> Decoder:
        """The parts of a transformers model, real or on the meta device.

        Raises CheckpointError for a model that transformers would run otherwise than an engine does.
        """
        for key in self.layout.unread:
            if getattr(model.config, key, False):
                raise CheckpointError(
                    f"config.json has {key} = {getattr(model.config, key)!r}, which vLLM applies and transformers' "
                    f"{type(model).__name__} does not read: calibration would see another model than is served; "
                    f"quantize without --calibration"
                )
        base: Any = model.model
        return Decoder(base, base.embed_tokens, base.layers, base.norm, model.lm_head)

    def layer_prefix(self, layer: int) -> str:
        """What the names of a decoder layer's tensors begin with in the checkpoint."""
        return f"model.layers.{layer}."

    def find_linear(self, layer: torch.nn.Module, index: int, path: str) -> torch.nn.Module:
        """A linear of transformers' decoder layer by its path in the checkpoint."""
        return layer.get_submodule(self._rename(path.removeprefix(self.layer_prefix(index))))

    def read_layer(
        self, reader: TensorReader, layer: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """State of transformers' decoder layer, experts stacked as it keeps them: [experts, N, K]."""
        prefix = self.layer_prefix(layer)
        gate_name, up_name, down_name = self.layout.projections
        state: dict[str, torch.Tensor] = {}
        experts: dict[int, dict[str, str]] = {}
        for name in reader.infos:
            inner = name.removeprefix(prefix)
            if inner == name or name.endswith(_ROTARY):
                continue
            match = self._match_expert(inner.removesuffix(".weight"))
            if match is None:
                state[self._rename(inner)] = reader.read(name).to(device, dtype)
            else:
                experts.setdefault(int(match[1]), {})[match[2]] = name
        if experts:
            intermediate, hidden = reader.infos[experts[0][gate_name]].shape
            # Filled in place: a stack of parts would hold the layer twice.
            gate_up = torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype, device=device)
            down = torch.empty(len(experts), hidden, intermediate, dtype=dtype, device=device)
            for expert, names in experts.items():
                gate_up[expert, :intermediate].copy_(reader.read(names[gate_name]))
                gate_up[expert, intermediate:].copy_(reader.read(names[up_name]))
                down[expert].copy_(reader.read(names[down_name]))
            state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"] = gate_up, down
        return state

    def find_experts(self, layer: torch.nn.Module) -> torch.nn.Module | None:
        """The module of a decoder layer that holds its routed experts; None for a dense layer."""
        return getattr(layer.mlp, "experts", None)

    def replace_experts(self, layer: torch.nn.Module, experts: torch.nn.Module) -> None:
        """Put a module with the same forward(hidden, ids, weights) in the place of a layer's routed experts."""
        mlp: Any = layer.mlp
        mlp.experts = experts

    def read_expert_inputs(self, arguments: tuple[Any, ...]) -> RoutedTokens:
        """What the module of `find_experts` was called with."""
        hidden, ids, weights = arguments
        return RoutedTokens(hidden, ids, weights)

    def expert_weight(self, experts: torch.nn.Module, expert: int, block: str) -> torch.Tensor:
        """Weight [N, K] of a block: gate stacked over up for "gate_up"."""
        stacked: Any = experts.gate_up_proj if block == "gate_up" else experts.down_proj
        return stacked[expert]

    def describe_residual(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Residual:
        """How every tensor meets the residual stream; norms inside of attention do not."""
        readers: dict[str, str] = {}
        writers: list[str] = []
        gains = [_NORM]
        for name in infos:
            path, _, suffix = name.rpartition(".")
            match = _LAYER.fullmatch(path)
            if match is None:
                continue
            inner, prefix = match[2], f"model.layers.{match[1]}."
            expert = self._match_expert(inner)
            role = self.layout.linears.get(inner)
            norm = role.norm if role is not None else None
            writes = role is not None and role.writes
            if expert is not None:
                writes = expert[2] == self.layout.projections[2]
                norm = None if writes else MLP_NORM
            if inner in (ATTENTION_NORM, MLP_NORM):
                gains.append(name)
            elif writes:
                writers.append(name)
            elif norm is not None and suffix == "weight":
                readers[name] = f"{prefix}{norm}.weight"
            elif role is None and len(infos[name].shape) == 2:
                raise CheckpointError(
                    f"{name} is no tensor of {self.layout.name}, so how it meets the residual stream is unknown"
                )
        head = _HEAD if _HEAD in infos else _EMBEDDING
        return Residual(_EMBEDDING, head, _NORM, _HEAD, readers, tuple(writers), tuple(gains))

    def _match_expert(self, inner: str) -> re.Match[str] | None:
        """(expert, projection) of a path below a decoder layer; None for what is no part of an expert."""
        return None if self.layout.experts is None else self._expert.fullmatch(inner)

    def _rename(self, inner: str) -> str:
        """The name in transformers' decoder layer of what the checkpoint calls `inner`."""
        for old, new in self.layout.renamed.items():
            if inner.startswith(old):
                return new + inner.removeprefix(old)
        return inner

    def _list_experts(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], experts: Mapping[int, Mapping[int, set[str]]]
    ) -> list[Module]:
        num_experts = count_experts(config)
        if num_experts is None:
            raise CheckpointError(f"config.json of a {self.model_types[0]} model needs num_experts: copy it again")
        hidden, intermediate = (read_size(config, key) for key in ("hidden_size", self.layout.expert_size))
        gate, up, down = self.layout.projections
        expected = {gate: (intermediate, hidden), up: (intermediate, hidden), down: (hidden, intermediate)}
        modules = []
        for layer, found in experts.items():
            for expert in range(max(num_experts, max(found) + 1)):
                path = f"{self.experts_path(layer)}.{expert}"
                if expert >= num_experts:
                    raise CheckpointError(f"the checkpoint holds {path}, config.json says {num_experts} experts")
                for projection, shape in expected.items():
                    name = f"{path}.{projection}.weight"
                    if name not in infos:
                        raise CheckpointError(f"{name} is missing{suggest(name, infos)}: copy the checkpoint again")
                    if infos[name].shape != shape:
                        raise CheckpointError(f"{name} is {infos[name]}, config.json says {list(shape)}")
                gate_up_block = Block(
                    "gate_up",
                    (f"{path}.{gate}", f"{path}.{up}"),
                    (expected[gate], expected[up]),
                    infos[f"{path}.{gate}.weight"].dtype.itemsize,
                )
                itemsize = infos[f"{path}.{down}.weight"].dtype.itemsize
                down_block = Block("down", (f"{path}.{down}",), (expected[down],), itemsize)
                modules.append(Module(path, Kind.EXPERT, layer, (gate_up_block, down_block), expert))
        return modules

    def _check_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], modules: Sequence[Module]
    ) -> None:
        """Raise CheckpointError for a layer that lacks a part, or a tensor that others of its kind have, for one that
        config.json does not count, and for an embedding, last norm or head that is not there.

        Nothing later would notice: vLLM does not miss tensors of quantized models.
        """
        check_layer_count(config, infos)
        for name in (_EMBEDDING, _NORM, *([_HEAD] if config.get("tie_word_embeddings") is False else [])):
            if name not in infos:
                raise CheckpointError(f"{name} is missing{suggest(name, infos)}: copy the checkpoint again")
        routed = {module.layer for module in modules if module.kind is Kind.EXPERT}
        routers = {module.layer for module in modules if module.kind is Kind.ROUTER}
        found: dict[int, set[str]] = {}
        for name in infos:
            match = _LAYER.fullmatch(name)
            if match is None or self._match_expert(match[2].removesuffix(".weight")) or name.endswith(_ROTARY):
                continue
            found.setdefault(int(match[1]), set()).add(match[2])
        known: dict[bool, set[str]] = {True: set(), False: set()}
        for layer, names in found.items():
            known[layer in routed] |= names
        parts = dict.fromkeys(path.partition(".")[0] for path in self.layout.linears)
        for layer in range(read_size(config, "num_hidden_layers")):
            names, prefix = found.get(layer, set()), self.layer_prefix(layer)
            lacks = [part for part in parts if not any(name.startswith(f"{part}.") for name in names)]
            if layer in routers and layer not in routed:
                lacks.append(str(self.layout.experts))
            if layer in routed and layer not in routers:
                lacks += [path for path, role in self.layout.linears.items() if role.kind is Kind.ROUTER]
            if lacks:
                raise CheckpointError(
                    f"config.json says {config['num_hidden_layers']} layers, but the checkpoint has no weight of "
                    f"{prefix}{lacks[0]}: copy it again"
                )
            if missing := sorted(known[layer in routed] - names):
                raise CheckpointError(f"{prefix}{missing[0]} is missing, which other layers have: copy it again")
