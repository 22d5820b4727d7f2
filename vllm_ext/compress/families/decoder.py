# SPDX-License-Identifier: Apache-2.0
"""What a family says about a transformers model: decoder, experts, and how tensors meet the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional


class Decoder(NamedTuple):
    """The parts of a causal language model that run one after the other.

    base: the module whose forward embeds, prepares masks and positions, and runs the layers.
    """

    base: torch.nn.Module
    embedding: torch.nn.Embedding
    layers: torch.nn.ModuleList
    norm: torch.nn.Module
    head: torch.nn.Linear


@dataclass(frozen=True)
class Residual:
    """How the tensors of a checkpoint meet the residual stream, by tensor name.

    embedding: rows are written to the stream. head: reads it, after the norm head_gain; the same name as embedding
    where the two are tied. untied_head: the head's name in a checkpoint where they are not.
    readers: {weight [N, hidden]: gain [hidden] of the norm before it}, without the head.
    writers: weights [hidden, K], and biases [hidden], whose output is added to the stream. gains: every such norm.
    """

    embedding: str
    head: str
    head_gain: str
    untied_head: str
    readers: dict[str, str]
    writers: tuple[str, ...]
    gains: tuple[str, ...]


@dataclass(frozen=True)
class RoutedTokens:
    """What the routed experts of one layer were given.

    hidden: float [tokens, hidden]. ids: int64 [tokens, top k]. weights: float [tokens, top k], routing weights.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def find_tokens(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of `hidden`, ascending, int64 [n]; their routing weights, float [n]) of one expert."""
        rows, slots = (self.ids == expert).nonzero(as_tuple=True)
        return rows, self.weights[rows, slots]

    @classmethod
    def join(cls, parts: list[RoutedTokens]) -> RoutedTokens:
        """The tokens of several batches, in their order."""
        return cls(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.ids for part in parts]),
            torch.cat([part.weights for part in parts]),
        )


def apply_gate(projected: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the input of the down projection: [tokens, 2 * intermediate] -> [tokens, intermediate]."""
    gate, up = projected.chunk(2, dim=-1)
    return functional.silu(gate) * up
