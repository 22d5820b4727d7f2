# SPDX-License-Identifier: Apache-2.0
"""What a family says about a checkpoint: modules, and the blocks of them that take a scheme each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a module is to a quantizer."""

    EXPERT = "expert"
    ATTENTION = "attention"
    LINEAR = "dense linear"
    ROUTER = "router"
    OTHER = "other"


#: Kinds whose weights a plan may quantize.
QUANTIZABLE = (Kind.EXPERT, Kind.ATTENTION, Kind.LINEAR)


@dataclass(frozen=True)
class Block:
    """Weights that share one scheme.

    name: "gate_up" or "down" for an expert, "weight" otherwise. paths: module paths of the linear weights in the
    checkpoint, without `.weight`, in the order in which they are stacked along N. shapes: (N, K) of each. itemsize:
    bytes of a weight in the checkpoint.
    """

    name: str
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    itemsize: int = 2

    @property
    def N(self) -> int:  # noqa: N802 - the field's name of the number of output rows
        """Output rows of the stacked weights."""
        return sum(rows for rows, _ in self.shapes)

    @property
    def K(self) -> int:  # noqa: N802 - the field's name of the number of inputs
        """Inputs."""
        return self.shapes[0][1]

    @property
    def num_weights(self) -> int:
        """Weights of the block."""
        return self.N * self.K


@dataclass(frozen=True)
class Module:
    """A module that a plan can name (`path`), or whose 2-D weight is left as it is.

    layer: index of its decoder layer, None outside. expert: its number in the layer, None for other kinds.
    """

    path: str
    kind: Kind
    layer: int | None
    blocks: tuple[Block, ...]
    expert: int | None = None
