# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose experts are stored in one tensor for all, read as if each expert had tensors of its own.

transformers 5 keeps the experts of a layer as `experts.gate_up_proj` [experts, 2 * intermediate, hidden] and
`experts.down_proj` [experts, hidden, intermediate], under the names of its own modules, and can save them so
(`save_pretrained(save_original_format=False)`). Packed checkpoints always have tensors per expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vllm_ext.compress.families.layout import FamilyLayout
from vllm_ext.quantization.checkpoint import count_experts, read_size
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo, TensorReader

_FUSED = re.compile(r"(model\.layers\.\d+\.)(.+\.experts)\.(gate_up_proj|down_proj)")


class _Part(NamedTuple):
    """A piece of a stored tensor. first: number of elements before it."""

    name: str
    first: int


class SplitReader(TensorReader):
    """The tensors of a checkpoint with those of fused experts taken apart; only the piece asked for is read."""

    def __init__(self, reader: TensorReader, infos: Mapping[str, TensorInfo], parts: Mapping[str, _Part]) -> None:
        # Not the base's: the headers have been read.
        self.directory = reader.directory
        self.infos = dict(infos)
        self._reader, self._parts = reader, parts

    def read(self, name: str) -> torch.Tensor:
        """As the base's."""
        part = self._parts.get(name)
        return self._reader.read(name) if part is None else self.read_part(name, 0, self.infos[name].shape)

    def read_part(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """As the base's."""
        part = self._parts.get(name, _Part(name, 0))
        return self._reader.read_part(part.name, part.first + first, shape)


def split_fused_experts(reader: TensorReader, layout: FamilyLayout, config: Mapping[str, Any]) -> TensorReader:
    """The same checkpoint with tensors per expert; the reader itself where none are fused.

    Raises CheckpointError for a fused tensor of another shape than config.json says, among them transposed ones.
    """
    if layout.experts is None or not any(_FUSED.fullmatch(name) for name in reader.infos):
        return reader
    num_experts = count_experts(config)
    if num_experts is None:
        raise CheckpointError(f"config.json of a {layout.model_types[0]} model needs num_experts: copy it again")
    hidden, intermediate = (read_size(config, key) for key in ("hidden_size", layout.expert_size))
    gate, up, down = layout.projections
    infos: dict[str, TensorInfo] = {}
    parts: dict[str, _Part] = {}
    for name, info in reader.infos.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            own = _restore_name(name, layout)
            infos[own] = info
            if own != name:
                parts[own] = _Part(name, 0)
            continue
        is_down = match[3] == "down_proj"
        shape = (num_experts, hidden, intermediate) if is_down else (num_experts, 2 * intermediate, hidden)
        if info.shape != shape:
            raise CheckpointError(
                f"{name} is {info}, experts fused into one tensor, of which {list(shape)} is known: save the model "
                f"with transformers' save_pretrained, which writes one tensor per expert"
            )
        size = intermediate * hidden
        for expert in range(num_experts):
            path = f"{match[1]}{layout.experts}.{expert}"
            if is_down:
                pieces = {down: (expert * size, (hidden, intermediate))}
            else:
                pieces = {
                    projection: ((2 * expert + place) * size, (intermediate, hidden))
                    for place, projection in enumerate((gate, up))
                }
            for projection, (first, piece) in pieces.items():
                own = f"{path}.{projection}.weight"
                if own in reader.infos:
                    raise CheckpointError(f"the checkpoint holds both {own} and {name}: remove one of them")
                infos[own], parts[own] = TensorInfo(info.dtype, piece), _Part(name, first)
    return SplitReader(reader, infos, parts)


def _restore_name(name: str, layout: FamilyLayout) -> str:
    """The family's own name of a tensor that is stored under the name of transformers' module."""
    for own, renamed in layout.renamed.items():
        match = re.fullmatch(rf"(model\.layers\.\d+\.){re.escape(renamed)}(.+)", name)
        if match is not None:
            return f"{match[1]}{own}{match[2]}"
    return name
