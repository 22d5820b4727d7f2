# SPDX-License-Identifier: Apache-2.0
"""Weights written into an arena, read back, and copied from one layout to another; arena.py says where each lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ternary
from .arena import (
    FULL_PRECISION_DTYPES,
    REPACKED_CODES,
    STORED_CODES,
    Field,
    Layout,
    find_element_type,
    num_groups,
    view_block,
)
from .gpu import layout as fragments
from .native import layout as records
from .native.load import find_ops
from .packing import pack_codes, unpack_codes


def write_codes(
    arena: torch.Tensor,
    row: Sequence[int],
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    gate_up: bool = False,
) -> None:
    """Write a block of codes at its place, in the layout of its row.

    row: the block's row of the table, as a list. codes uint8 [N, K], one code an element; scales fp16
    [N, K/g]; zeros uint8 [N, K/g], or None for a symmetric block. gate_up: as in `section_bytes`.
    Raises ValueError where the tensors do not agree with the row.
    """
    if row[Field.LAYOUT] in REPACKED_CODES:
        _write_repacked(arena, row, codes, scales, zeros, gate_up)
        return
    if row[Field.LAYOUT] not in STORED_CODES:
        raise ValueError(f"layout {row[Field.LAYOUT]} does not hold codes")
    views = view_block(arena, row, *codes.shape)
    if (zeros is None) != ("zeros" not in views):
        raise ValueError("zeros are given exactly for asymmetric blocks")
    if row[Field.LAYOUT] == Layout.PLAIN_TERNARY:
        packed = ternary.pack_codes(codes, row[Field.GROUP_SIZE])
    else:
        packed = pack_codes(codes, row[Field.WEIGHT_BITS])
    tensors = {"qweight": packed, "scales": scales, "zeros": zeros}
    for name, view in views.items():
        tensor = tensors[name]
        assert tensor is not None
        _check_tensor(name, tensor, view.dtype, view.shape)
        view.copy_(tensor)


def _write_repacked(
    arena: torch.Tensor,
    row: Sequence[int],
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    gate_up: bool,
) -> None:
    N, K = codes.shape
    bits, group_size = row[Field.WEIGHT_BITS], row[Field.GROUP_SIZE]
    views = view_block(arena, row, N, K, gate_up)
    groups = (N, num_groups(K, group_size))
    _check_tensor("codes", codes, torch.uint8, (N, K))
    _check_tensor("scales", scales, torch.float16, groups)
    if zeros is not None:
        _check_tensor("zeros", zeros, torch.uint8, groups)
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"code {largest} does not fit in bits={bits}")
    if row[Field.LAYOUT] == Layout.GPU_FRAGMENT:
        packed = fragments.pack_fragments(codes, scales, zeros, bits, row[Field.ACT_BITS], group_size, gate_up)
        for view, section in zip(views.values(), packed, strict=True):
            view.copy_(section)
        return
    place = views["records"]
    ops = find_ops() if arena.device.type == "cpu" else None
    if ops is None:
        place.copy_(records.pack_records(codes, scales, zeros, bits, group_size, gate_up))
    else:
        ops.repack_block(codes, scales, zeros, bits, group_size, gate_up, place.view(-1))


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != list(shape):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def read_codes(
    arena: torch.Tensor, row: Sequence[int], N: int, K: int, gate_up: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Read a block of codes back: (codes uint8 [N, K], scales fp16 [N, K/g], zeros uint8 [N, K/g] or None).

    Of a plain block, scales and zeros are views of the arena; of REPACKED_CODES zeros are always given.
    Raises ValueError for a table row that points past the arena's end. gate_up: as in `section_bytes`.
    """
    views = view_block(arena, row, N, K, gate_up)
    if "records" in views:
        widths = row[Field.WEIGHT_BITS], row[Field.GROUP_SIZE]
        return records.unpack_records(views["records"], *widths, N, K, gate_up)
    if "fragments" in views:
        formats = row[Field.WEIGHT_BITS], row[Field.ACT_BITS], row[Field.GROUP_SIZE]
        return fragments.unpack_fragments(views["fragments"], views["scale_zeros"], *formats, N, K, gate_up)
    if row[Field.LAYOUT] == Layout.PLAIN_TERNARY:
        codes = ternary.unpack_codes(views["qweight"], row[Field.GROUP_SIZE], K)
    else:
        codes = unpack_codes(views["qweight"], row[Field.WEIGHT_BITS], K)
    return codes, views["scales"], views.get("zeros")


def write_full_precision(arena: torch.Tensor, row: Sequence[int], weight: torch.Tensor) -> None:
    """Write a block that is kept as it is: weight [N, K] of the layout's element type."""
    dtype = find_element_type(row)
    if weight.dtype != dtype:
        raise ValueError(f"layout {Layout(row[Field.LAYOUT]).name} holds {dtype}, got {weight.dtype}")
    view_block(arena, row, *weight.shape)["weight"].copy_(weight)


def read_full_precision(arena: torch.Tensor, row: Sequence[int], N: int, K: int) -> torch.Tensor:
    """Read a block that is kept as it is: [N, K] of the layout's element type, a view of the arena."""
    find_element_type(row)
    return view_block(arena, row, N, K)["weight"]


def copy_block(
    source: torch.Tensor,
    source_row: Sequence[int],
    target: torch.Tensor,
    target_row: Sequence[int],
    N: int,
    K: int,
    gate_up: bool = False,
) -> None:
    """Copy a weight [N, K] from one arena to another, whose row may give it another layout of codes.

    gate_up: as in `section_bytes`.
    """
    if source_row[Field.LAYOUT] in FULL_PRECISION_DTYPES:
        write_full_precision(target, target_row, read_full_precision(source, source_row, N, K))
    else:
        write_codes(target, target_row, *read_codes(source, source_row, N, K, gate_up), gate_up)


def dequantize_block(arena: torch.Tensor, row: Sequence[int], N: int, K: int, gate_up: bool = False) -> torch.Tensor:
    """The weight [N, K] in float32 that a row of the table stands for. gate_up: as in `section_bytes`."""
    if row[Field.LAYOUT] in FULL_PRECISION_DTYPES:
        return read_full_precision(arena, row, N, K).float()
    codes, scales, zeros = read_codes(arena, row, N, K, gate_up)
    groups = scales.shape[1]
    centred = codes.view(N, groups, K // groups).float()
    centred -= 2 ** (row[Field.WEIGHT_BITS] - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return (centred * scales.float().unsqueeze(-1)).view(N, K)
