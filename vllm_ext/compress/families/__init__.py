# SPDX-License-Identifier: Apache-2.0
"""Model families: which tensors of an unquantized checkpoint are experts, attention, routers, and what fuses.

transformers 5 keeps the experts of a layer as fused 3-D parameters in memory, checkpoints keep them per expert. So
everything here works from the names and shapes in the checkpoint's headers; weights are read when they are needed.
A new family is an entry of `layout.LAYOUTS`, or, where that cannot say it, a class with the members of `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_ext.compress.families.adapter import CheckpointFamily
from vllm_ext.compress.families.decoder import Decoder, Residual, RoutedTokens
from vllm_ext.compress.families.layout import LAYOUTS, describe_refusal
from vllm_ext.compress.families.structure import QUANTIZABLE, Block, Kind, Module
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorInfo, TensorReader


class Family(Protocol):
    """The adapter of one kind of model."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json that this adapter reads."""

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Sibling linears that vLLM fuses into one, which therefore need one scheme."""

    @property
    def linear_order(self) -> tuple[tuple[str, ...], ...]:
        """Last parts of the paths of a layer's linears, outside of the experts, in the order in which data passes
        them; those that share their input stand together."""

    def open_reader(self, directory: Path, config: Mapping[str, Any]) -> TensorReader:
        """The tensors of a checkpoint, every expert with its own, however they are stored."""

    def list_modules(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> list[Module]:
        """Modules with a 2-D weight, in the order of the layers."""

    def explain_kept(self, path: str) -> str | None:
        """Why a linear stays as it is; None where there is no reason of its own."""

    def experts_path(self, layer: int) -> str:
        """Path of a layer's routed experts in the checkpoint."""

    def find_linear(self, layer: torch.nn.Module, index: int, path: str) -> torch.nn.Module:
        """A linear of transformers' decoder layer by its path in the checkpoint."""

    def find_routers(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """{path of a layer's experts in the checkpoint: its router} of a transformers model."""

    def read_routing(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert ids [tokens, top k], routing weights [tokens, top k]) of a router's output."""

    def find_decoder(self, model: torch.nn.Module) -> Decoder:
        """The parts of a transformers model, real or on the meta device.

        Raises CheckpointError for a model that transformers would run otherwise than an engine does.
        """

    def layer_prefix(self, layer: int) -> str:
        """What the names of a decoder layer's tensors begin with in the checkpoint."""

    def read_layer(
        self, reader: TensorReader, layer: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """State of transformers' decoder layer, read from the checkpoint."""

    def find_experts(self, layer: torch.nn.Module) -> torch.nn.Module | None:
        """The module of a decoder layer that holds its routed experts; None for a dense layer."""

    def replace_experts(self, layer: torch.nn.Module, experts: torch.nn.Module) -> None:
        """Put a module with the same forward(hidden, ids, weights) in the place of a layer's routed experts."""

    def read_expert_inputs(self, arguments: tuple[Any, ...]) -> RoutedTokens:
        """What the module of `find_experts` was called with."""

    def expert_weight(self, experts: torch.nn.Module, expert: int, block: str) -> torch.Tensor:
        """Weight [N, K] of a block: gate stacked over up for "gate_up"."""

    def describe_residual(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Residual:
        """How every tensor meets the residual stream. Raises CheckpointError for one of which that is not known."""


FAMILIES: tuple[Family, ...] = tuple(map(CheckpointFamily, LAYOUTS))


def find_family(config: Mapping[str, Any]) -> Family:
    """The adapter for a config.json.

    Raises CheckpointError naming the known families, or the reason for one that cannot be quantized.
    """
    model_type = config.get("model_type")
    refusal = describe_refusal(model_type)
    if refusal is not None:
        raise CheckpointError(refusal)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(f"no adapter for model_type {model_type!r}; known families: {known}")


__all__ = [
    "FAMILIES",
    "QUANTIZABLE",
    "Block",
    "Decoder",
    "Family",
    "Kind",
    "Module",
    "Residual",
    "RoutedTokens",
    "find_family",
]
