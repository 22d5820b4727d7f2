# SPDX-License-Identifier: Apache-2.0
"""Model families: which tensors of an unquantized checkpoint are experts, attention, routers, and what fuses.

transformers 5 keeps the experts of a layer as fused 3-D parameters in memory, checkpoints keep them per expert. So
everything here works from the names and shapes in the checkpoint's headers; weights are read when they are needed.
A new family is a class with the members of `Family` and one entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from vllm_ext.compress.families.qwen3_moe import Qwen3Moe
from vllm_ext.compress.families.structure import QUANTIZABLE, Block, Kind, Module
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo


class Family(Protocol):
    """The adapter of one kind of model."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json that this adapter reads."""

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Sibling linears that vLLM fuses into one, which therefore need one scheme."""

    def list_modules(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> list[Module]:
        """Modules with a 2-D weight, in the order of the layers."""

    def find_routers(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """{path of a layer's experts in the checkpoint: its router} of a transformers model."""

    def read_routing(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert ids [tokens, top k], routing weights [tokens, top k]) of a router's output."""


FAMILIES: tuple[Family, ...] = (Qwen3Moe(),)


def find_family(config: Mapping[str, Any]) -> Family:
    """The adapter for a config.json. Raises CheckpointError naming the known families."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(f"no adapter for model_type {model_type!r}; known families: {known}")


__all__ = ["FAMILIES", "QUANTIZABLE", "Block", "Family", "Kind", "Module", "find_family"]
