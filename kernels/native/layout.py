# SPDX-License-Identifier: Apache-2.0
"""Layout CPU_RECORD: a weight [N, K] as the compiled kernels want it, packed and unpacked in plain torch.

This is the specification that native/repack.cpp is tested against, byte for byte; native/include/record.h draws the
same picture.

A record holds 16 rows (outputs) and 128 columns (k), in whole 64-byte lines:

    header lines   16 fp16 scales | 16 fp16 zero points     w[n, k] = scale[n] * (code[n, k] - zero[n])
                   groups of 128, of a multiple of it, or the whole row: 1 line; of 64: 2 lines; of 32: 4 lines
    4 * bits lines of codes

The 128 columns are 32 vectors of 4: vector v holds k = 4v .. 4v+3 of all 16 rows, row n in bytes 4n .. 4n+3. One
vector is one operand of vpdpbusd, and one row of an AMX tile. Codes are unsigned. Inside a byte of a line (bits 7..0):

    2 bits   line L    v4L+3 | v4L+2 | v4L+1 | v4L
    3 bits   line 3T   v8T+6 low two | v8T+1 | v8T
             line 3T+1 v8T+7 low two | v8T+3 | v8T+2
             line 3T+2 v8T+7 high one, v8T+6 high one | v8T+5 | v8T+4
    4 bits   line L    v2L+1 | v2L
    5 bits   line L < 16   as 4 bits, the low four;  line 16+L  bit i: the high one of v8L+i
    6 bits   line 3T+i v4T+3 (i = 0: bits 5-4, 1: bits 3-2, 2: bits 1-0) | v4T+i
    8 bits   line L    vL

Records lie in the order

    down, linear   for each 16 rows:  ceil(K/128) records
    gate_up        for each 16 rows of gate:  ceil(K/128) records of gate, then as many of the same rows of up

Rows past N and columns past K have code 0; rows past N, and groups past K, have scale 0 and zero point 0. A
symmetric weight has zero points 2**(bits-1).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..packing import CODE_BITS

ROWS = 16
DEPTH = 128
LINE = 64
VECTORS = DEPTH // 4


class Piece(NamedTuple):
    """Where some bits of a vector's codes are: `width` bits from `code_bit` on, in a line from `line_bit` on."""

    vector: int
    line: int
    line_bit: int
    code_bit: int
    width: int


@functools.cache
def list_pieces(bits: int) -> tuple[Piece, ...]:
    """The table of the drawing above. Raises ValueError for a width outside `packing.CODE_BITS`."""
    pieces: list[Piece] = []
    for v in range(VECTORS):
        if bits in (2, 4, 8):
            per_line = 8 // bits
            pieces.append(Piece(v, v // per_line, bits * (v % per_line), 0, bits))
        elif bits == 5:
            pieces.append(Piece(v, v // 2, 4 * (v % 2), 0, 4))
            pieces.append(Piece(v, 16 + v // 8, v % 8, 4, 1))
        elif bits == 3:
            triple, place = divmod(v, 8)
            if place < 6:
                pieces.append(Piece(v, 3 * triple + place // 2, 3 * (place % 2), 0, 3))
            else:
                pieces.append(Piece(v, 3 * triple + place - 6, 6, 0, 2))
                pieces.append(Piece(v, 3 * triple + 2, place, 2, 1))
        elif bits == 6:
            triple, place = divmod(v, 4)
            if place < 3:
                pieces.append(Piece(v, 3 * triple + place, 0, 0, 6))
            else:
                pieces += [Piece(v, 3 * triple + i, 6, 4 - 2 * i, 2) for i in range(3)]
        else:
            raise ValueError(f"bits={bits} is not a code width; use one of {', '.join(map(str, CODE_BITS))}")
    return tuple(pieces)


def groups_fit_chunk(group_size: int) -> bool:
    """Whether a record's 128 columns are whole groups, or part of one."""
    return group_size in (32, 64) or group_size % DEPTH == 0


def count_headers(group_size: int) -> int:
    """Header lines of a record. Raises ValueError for groups that records cannot hold."""
    if group_size != -1 and (group_size <= 0 or not groups_fit_chunk(group_size)):
        raise ValueError(
            f"group_size={group_size} does not fit records of {DEPTH}: use 32, 64, a multiple of {DEPTH}, or -1"
        )
    return DEPTH // group_size if 0 < group_size < DEPTH else 1


def record_bytes(bits: int, group_size: int) -> int:
    """Bytes of one record."""
    if bits not in CODE_BITS:
        raise ValueError(f"bits={bits} is not a code width; use one of {', '.join(map(str, CODE_BITS))}")
    return LINE * (count_headers(group_size) + 4 * bits)


def count_records(N: int, K: int, gate_up: bool = False) -> tuple[int, int]:
    """(blocks of 16 rows, records along K). gate_up: N is gate and up one after the other, padded separately."""
    blocks = 2 * -(-N // 2 // ROWS) if gate_up else -(-N // ROWS)
    return blocks, -(-K // DEPTH)


def pack_records(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    gate_up: bool = False,
) -> torch.Tensor:
    """Records of a weight: uint8 [row blocks, records along K, record bytes].

    codes uint8 [N, K], each below 2**bits; scales fp16 [N, K/g]; zeros uint8 [N, K/g], None where symmetric.
    Raises ValueError for a width or group size that records cannot hold.
    """
    N, K = codes.shape
    headers = count_headers(group_size)
    blocks, chunks = count_records(N, K, gate_up)
    if zeros is None:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
    lines = codes.new_zeros(blocks, chunks, headers + 4 * bits, LINE)
    for place, values in ((0, scales), (1, zeros.half())):
        spread = _spread_groups(values, K, group_size, headers, chunks)
        by_block = _block_rows(spread, gate_up).view(blocks, ROWS, chunks, headers).permute(0, 2, 3, 1)
        lines[:, :, :headers].view(torch.float16)[..., ROWS * place : ROWS * (place + 1)] = by_block
    padded = torch.nn.functional.pad(codes, (0, chunks * DEPTH - K))
    vectors = _block_rows(padded, gate_up).view(blocks, ROWS, chunks, VECTORS, 4).permute(0, 2, 3, 1, 4)
    vectors = vectors.reshape(blocks, chunks, VECTORS, LINE)
    for piece in list_pieces(bits):
        part = (vectors[:, :, piece.vector] >> piece.code_bit) & (2**piece.width - 1)
        lines[:, :, headers + piece.line] |= part << piece.line_bit
    return lines.view(blocks, chunks, -1)


def unpack_records(
    records: torch.Tensor, bits: int, group_size: int, N: int, K: int, gate_up: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo `pack_records`: (codes uint8 [N, K], scales fp16 [N, K/g], zeros uint8 [N, K/g])."""
    headers = count_headers(group_size)
    blocks, chunks = count_records(N, K, gate_up)
    lines = records.view(blocks, chunks, headers + 4 * bits, LINE)
    groups = 1 if group_size == -1 else K // group_size
    found = []
    for place in (0, 1):
        by_block = lines[:, :, :headers].view(torch.float16)[..., ROWS * place : ROWS * (place + 1)]
        spread = _unblock_rows(by_block.permute(0, 3, 1, 2).reshape(blocks * ROWS, chunks * headers), N, gate_up)
        # A group wider than a record stands in the header of each; the first is taken.
        step = 1 if headers > 1 else max(1, group_size // DEPTH)
        found.append(spread[:, ::step][:, :groups].contiguous())
    vectors = records.new_zeros(blocks, chunks, VECTORS, LINE)
    for piece in list_pieces(bits):
        part = (lines[:, :, headers + piece.line] >> piece.line_bit) & (2**piece.width - 1)
        vectors[:, :, piece.vector] |= part << piece.code_bit
    by_row = vectors.view(blocks, chunks, VECTORS, ROWS, 4).permute(0, 3, 1, 2, 4)
    codes = _unblock_rows(by_row.reshape(blocks * ROWS, chunks * DEPTH), N, gate_up)[:, :K].contiguous()
    return codes, found[0], found[1].to(torch.uint8)


def _spread_groups(values: torch.Tensor, K: int, group_size: int, headers: int, chunks: int) -> torch.Tensor:
    """[N, groups] -> [N, chunks * headers]: one column per header line, wide groups repeated, 0 past K."""
    size = K if group_size == -1 else group_size
    starts = torch.arange(chunks * headers, device=values.device) * (DEPTH // headers)
    return torch.where(starts < K, values[:, (starts // size).clamp(max=values.shape[1] - 1)], 0)


def _block_rows(values: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """Rows padded with 0 to whole blocks; of a gate_up weight, blocks of gate and up in turn."""
    if not gate_up:
        return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS)).contiguous()
    gate, up = (_block_rows(half, False).unflatten(0, (-1, ROWS)) for half in values.chunk(2))
    return torch.stack([gate, up], dim=1).flatten(0, 2)


def _unblock_rows(values: torch.Tensor, N: int, gate_up: bool) -> torch.Tensor:
    if not gate_up:
        return values[:N]
    pairs = values.view(-1, 2, ROWS, values.shape[-1])
    return torch.cat([pairs[:, half].flatten(0, 1)[: N // 2] for half in (0, 1)])
