# SPDX-License-Identifier: Apache-2.0
"""Schemes: how one weight matrix is stored and what its activations are rounded to, as a short name.

    w4a16_g128       4-bit codes, activations as they are, one fp16 scale and one uint8 zero point per 128 weights
    w3a8_g64_sym     3-bit codes with a fixed zero point of 4, activations rounded to int8, groups of 64
    w8a8_g-1_sym     one scale per output row
    w16a16           left as it is in the checkpoint

A scheme names its tensors in one table (`Scheme.tensors`): who writes, reads, checks or splits a checkpoint goes
by that table alone.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_ext.kernels.packing import packed_size

WEIGHT_BITS = (2, 3, 4, 5, 6, 8, 16)
ACT_BITS = (8, 16)
GROUP_SIZES = (32, 64, 128, -1)

GRAMMAR = "w{2,3,4,5,6,8}a{8,16}_g{32,64,128,-1}[_sym], or w16a16 (left as it is)"

_PATTERN = re.compile(r"w(\d+)a(\d+)(?:_g(-?\d+)(_sym)?)?")


class TensorSpec(NamedTuple):
    """One tensor of a scheme, for a weight of N output rows and K inputs.

    dtype None: that of the checkpoint. split_dims: the dimensions a tensor-parallel rank takes its part of when
    (N, K) is divided; None where every rank keeps the whole tensor.
    """

    dtype: torch.dtype | None
    shape: Callable[[int, int], tuple[int, int]]
    split_dims: tuple[int | None, int | None]


@dataclass(frozen=True)
class Scheme:
    """Weight bits, activation bits, group size along K (-1: the whole row), and whether the zero point is fixed.

    Raises ValueError, naming the value and what is valid, for a combination outside the grammar.
    """

    weight_bits: int
    act_bits: int = 16
    group_size: int = -1
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits={self.weight_bits} is not one of {_join(WEIGHT_BITS)}")
        if self.act_bits not in ACT_BITS:
            raise ValueError(f"act_bits={self.act_bits} is not one of {_join(ACT_BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size} is not one of {_join(GROUP_SIZES)}")
        if self.weight_bits == 16 and (self.act_bits, self.group_size, self.symmetric) != (16, -1, False):
            raise ValueError("16-bit weights are left as they are: w16a16 takes no a8, no group and no _sym")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `text` names. Raises ValueError naming `text` and the nearest valid scheme."""
        match = _PATTERN.fullmatch(text)
        if match is not None:
            weight_bits, act_bits, group_size, symmetric = match.groups()
            try:
                scheme = cls(int(weight_bits), int(act_bits), int(group_size or -1), symmetric is not None)
            except ValueError as error:
                raise ValueError(f"scheme {text!r}: {error}; {_suggest(text)}") from error
            # Refuses what int() accepts but we never write, such as w04, and a missing group.
            if str(scheme) == text:
                return scheme
        raise ValueError(f"unknown scheme {text!r}: {_suggest(text)}")

    def __str__(self) -> str:
        if not self.is_quantized:
            return "w16a16"
        symmetric = "_sym" if self.symmetric else ""
        return f"w{self.weight_bits}a{self.act_bits}_g{self.group_size}{symmetric}"

    @property
    def is_quantized(self) -> bool:
        """False for w16a16, which leaves the weight as it is."""
        return self.weight_bits != 16

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """{suffix of the tensor's name: its type, shape(N, K) and split dimensions}."""
        if not self.is_quantized:
            return {"weight": TensorSpec(None, lambda N, K: (N, K), (0, 1))}
        # One group per row belongs to all of K: a rank that holds a part of K still needs it whole.
        group_split = (0, None if self.group_size == -1 else 1)
        table = {
            "qweight": TensorSpec(torch.uint8, lambda N, K: (N, packed_size(K, self.weight_bits)), (0, 1)),
            "scales": TensorSpec(torch.float16, lambda N, K: (N, self.num_groups(K)), group_split),
        }
        if not self.symmetric:
            table["zeros"] = TensorSpec(torch.uint8, lambda N, K: (N, self.num_groups(K)), group_split)
        return table

    def num_groups(self, K: int) -> int:
        """Groups in a row of K inputs. Raises ValueError where the group size does not divide K."""
        if self.group_size == -1:
            return 1
        if K % self.group_size:
            fitting = [size for size in GROUP_SIZES if size == -1 or K % size == 0]
            raise ValueError(
                f"scheme {self}: group size {self.group_size} does not divide K={K}; "
                f"group sizes that do: {_join(fitting)} (-1 is the whole row)"
            )
        return K // self.group_size

    def stored_bytes(self, N: int, K: int, itemsize: int = 2) -> int:
        """Bytes of all tensors of an [N, K] weight. Raises ValueError as `num_groups`.

        itemsize: bytes per weight of the unquantized checkpoint, which w16a16 leaves as it is.
        """
        total = 0
        for spec in self.tensors.values():
            total += math.prod(spec.shape(N, K)) * (itemsize if spec.dtype is None else spec.dtype.itemsize)
        return total

    def bits_per_weight(self, N: int, K: int) -> float:
        """True bits: 8 * stored bytes / weights, scales and zero points included."""
        return 8 * self.stored_bytes(N, K) / (N * K)


def list_schemes() -> list[str]:
    """Every scheme this version knows, in canonical form."""
    names = [
        str(Scheme(weight_bits, act_bits, group_size, symmetric))
        for weight_bits, act_bits, group_size, symmetric in itertools.product(
            WEIGHT_BITS[:-1], ACT_BITS, GROUP_SIZES, (False, True)
        )
    ]
    return [*names, "w16a16"]


def _suggest(text: str) -> str:
    nearest = difflib.get_close_matches(text, list_schemes(), n=1, cutoff=0.0)[0]
    return f"nearest is {nearest}; known schemes are {GRAMMAR}"


def _join(values: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, values))
