# SPDX-License-Identifier: Apache-2.0
"""Schemes: how one weight matrix is stored and what its activations are rounded to, as a short name.

    w4a16_g128       4-bit codes, activations as they are, one fp16 scale and one uint8 zero point per 128 weights
    w3a8_g64_sym     3-bit codes with a fixed zero point of 4, activations rounded to int8, groups of 64
    w8a8_g-1_sym     one scale per output row
    w1.6a16_g64_sym  ternary, -1, 0 or +1 times the scale: five codes a byte (kernels/ternary.py)
    w16a16           left as it is in the checkpoint

A scheme names its tensors in one table (`Scheme.tensors`): who writes, reads, checks or splits a checkpoint goes
by that table alone.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_ext.kernels import packing, ternary

#: Name of the width of ternary codes; the bits that five of them in a byte take.
TERNARY_BITS = 1.6

WEIGHT_BITS = (TERNARY_BITS, 2, 3, 4, 5, 6, 8, 16)
ACT_BITS = (8, 16)
GROUP_SIZES = (32, 64, 128, -1)

GRAMMAR = "w{1.6,2,3,4,5,6,8}a{8,16}_g{32,64,128,-1}[_sym], w1.6 with _sym alone, or w16a16 (left as it is)"

_PATTERN = re.compile(r"w(\d+(?:\.\d+)?)a(\d+)(?:_g(-?\d+)(_sym)?)?")


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

    weight_bits: float
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
        if self.is_ternary and not self.symmetric:
            raise ValueError("ternary weights have no zero point: the name ends in _sym")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `text` names. Raises ValueError naming `text` and the nearest valid scheme."""
        match = _PATTERN.fullmatch(text)
        if match is not None:
            weight_bits, act_bits, group_size, symmetric = match.groups()
            try:
                bits = float(weight_bits) if "." in weight_bits else int(weight_bits)
                scheme = cls(bits, int(act_bits), int(group_size or -1), symmetric is not None)
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
        return f"w{self.weight_bits:g}a{self.act_bits}_g{self.group_size}{symmetric}"

    @property
    def is_quantized(self) -> bool:
        """False for w16a16, which leaves the weight as it is."""
        return self.weight_bits != 16

    @property
    def is_ternary(self) -> bool:
        """True for w1.6."""
        return self.weight_bits == TERNARY_BITS

    @property
    def code_bits(self) -> int:
        """Bits of a code once it is unpacked."""
        return ternary.CODE_BITS if self.is_ternary else int(self.weight_bits)

    @property
    def lowest_code(self) -> int:
        """The smallest code there is. Ternary codes are 2-bit codes without the lowest level."""
        return ternary.LOWEST_CODE if self.is_ternary else 0

    @property
    def highest_code(self) -> int:
        """The largest code there is."""
        return 2**self.code_bits - 1

    @property
    def fixed_zero(self) -> int:
        """Zero point of a symmetric scheme: the code of a weight of 0."""
        return 2 ** (self.code_bits - 1)

    @property
    def in_memory(self) -> Scheme:
        """The scheme of which compiled kernels read the codes: ternary ones are repacked into 2 bits after loading."""
        return replace(self, weight_bits=self.code_bits) if self.is_ternary else self

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """{suffix of the tensor's name: its type, shape(N, K) and split dimensions}."""
        if not self.is_quantized:
            return {"weight": TensorSpec(None, lambda N, K: (N, K), (0, 1))}
        # One group per row belongs to all of K: a rank that holds a part of K still needs it whole.
        group_split = (0, None if self.group_size == -1 else 1)
        table = {
            "qweight": TensorSpec(torch.uint8, lambda N, K: (N, self.packed_size(K)), (0, 1)),
            "scales": TensorSpec(torch.float16, lambda N, K: (N, self.num_groups(K)), group_split),
        }
        if not self.symmetric:
            table["zeros"] = TensorSpec(torch.uint8, lambda N, K: (N, self.num_groups(K)), group_split)
        return table

    def packed_size(self, K: int) -> int:
        """Bytes of a row of K codes. Raises ValueError for a K whose codes do not fill whole bytes."""
        if self.is_ternary:
            return ternary.packed_size(K, self.group_size)
        return packing.packed_size(K, self.code_bits)

    def count_inputs(self, num_bytes: int) -> int:
        """The K whose codes take `num_bytes` a row. Raises ValueError where there is none."""
        if self.is_ternary:
            return ternary.count_codes(num_bytes, self.group_size)
        K, rest = divmod(num_bytes * 8, self.code_bits)
        if rest:
            raise ValueError(f"rows of {num_bytes} bytes hold no whole number of {self.code_bits}-bit codes")
        return K

    def pack_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The tensor `qweight`, uint8 [N, packed_size(K)], of codes uint8 [N, K], from lowest_code to highest_code.

        Raises ValueError for codes out of range and as `packed_size`.
        """
        if self.is_ternary:
            return ternary.pack_codes(codes, self.group_size)
        return packing.pack_codes(codes, self.code_bits)

    def unpack_codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Undo `pack_codes`. Raises ValueError for rows that hold no whole number of codes, and for damaged bytes."""
        K = self.count_inputs(packed.shape[-1])
        if self.is_ternary:
            return ternary.unpack_codes(packed, self.group_size, K)
        return packing.unpack_codes(packed, self.code_bits, K)

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
        if symmetric or weight_bits != TERNARY_BITS
    ]
    return [*names, "w16a16"]


def _suggest(text: str) -> str:
    names, symmetric = list_schemes(), f"{text}_sym"
    # A ternary scheme without its _sym: another width would be nearer, letter by letter.
    nearest = symmetric if symmetric in names else difflib.get_close_matches(text, names, n=1, cutoff=0.0)[0]
    return f"nearest is {nearest}; known schemes are {GRAMMAR}"


def _join(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))
