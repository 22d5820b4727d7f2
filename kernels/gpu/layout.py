# SPDX-License-Identifier: Apache-2.0
"""Layout GPU_FRAGMENT: the codes of a weight [N, K] in the order in which a tensor core's registers want them.

A thread of `mma`/`wgmma` holds, of every row of its A operand, columns that lie 8 (int8: 16) apart. Those codes lie
next to each other here: a thread's share of a row is one contiguous run, fetched by one vector load, and the registers
that decoding makes of it are operands as they are. No weight goes through shared memory a second time.

Both sections are cut into blocks of 64 rows and 128 columns; the blocks of 64 rows follow each other along K, so that
a thread block streams linear memory.

    codes   [row tile = N/64][chunk = K/128][row 64][lane 4][word W][element E]     one plane, see below

            a lane (the thread's place among the four that share a row) holds 32 codes of a row's chunk, slot by slot:

            16-bit activations   halfwords, E = 2    column = 8 * slot + 2 * lane + e     16 slots
            8-bit activations    bytes,     E = 4    column = 16 * slot + 4 * lane + e     8 slots

            a word holds the codes of n = 16/bits (8/bits) consecutive slots, the first in the lowest bits:

            4 bits, halfword w, element e   [15..12] slot 4w+3  [11..8] slot 4w+2  [7..4] slot 4w+1  [3..0] slot 4w
            two such halfwords, e = 0 and 1, are one 32-bit register; shifting and masking it gives two weights at once

    planes  3 bits = a plane of the low two bits, then a plane of the high one;  6 bits = four low, then two high.
            A plane is the whole weight, laid out as above with the plane's own bits.

    widths  5-bit codes are stored in 6 bits, ternary ones in 2. 8-bit codes are stored as signed bytes, code - 128;
            with 8-bit activations in plain order, [row 64][column 128], for they need no decoding.

    scale   int32 [row tile][chunk][piece][row 64]: fp16 scale in the low half, the zero point as fp16 in the high half
            and    a piece is a group of 32 or 64 columns, else the whole chunk: a wider group's scale is repeated.
    zero           w[n, k] = scale * (code[n, k] - zero)

Rows past N and columns past K have code 0, scale 0 and zero point 0. The rows of a gate_up weight alternate in eights,
eight rows of gate and the same eight of up: a thread's accumulators of `mma` are rows r and r + 8, so whoever holds an
output of gate holds up's beside it.
"""

from __future__ import annotations

import torch

#: Rows and columns of a block.
ROWS, DEPTH = 64, 128

#: Rows of gate before the rows of up that belong to them.
ALTERNATION = 8

#: Group sizes that pieces can hold; -1: the whole row.
GROUP_SIZES = (32, 64, 128, -1)

#: Bits of a code -> bits it takes here.
STORED_BITS = {2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 8: 8}

#: Largest zero point of codes of less than 8 bits: added to the 128 of a decoded code, bf16 still holds it exactly.
LARGEST_ZERO = 127

#: Stored bits -> bits of the planes they are split into, low bits first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


def count_pieces(group_size: int) -> int:
    """Groups in a chunk of 128 columns. Raises ValueError for groups that this layout does not have."""
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size={group_size} does not fit chunks of {DEPTH}: use 32, 64, 128, or -1 for whole rows"
        )
    return DEPTH // group_size if 0 < group_size < DEPTH else 1


def count_blocks(N: int, K: int, gate_up: bool = False) -> tuple[int, int]:
    """(row tiles, chunks) of a weight [N, K]. gate_up: N is gate and up one after the other."""
    rows = 2 * (-(-(N // 2) // ALTERNATION) * ALTERNATION) if gate_up else N
    return -(-rows // ROWS), -(-K // DEPTH)


def section_bytes(bits: int, group_size: int, N: int, K: int, gate_up: bool = False) -> tuple[int, int]:
    """Bytes of (codes, scales with zero points). Raises ValueError for a width or group that this layout lacks."""
    row_tiles, chunks = count_blocks(N, K, gate_up)
    blocks = row_tiles * chunks
    return blocks * ROWS * DEPTH * _stored_bits(bits) // 8, blocks * count_pieces(group_size) * ROWS * 4


def pack_fragments(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    act_bits: int,
    group_size: int,
    gate_up: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sections of a weight: (codes uint8 [bytes], scales with zero points int32 [words]).

    codes uint8 [N, K], each below 2**bits; scales fp16 [N, K/g]; zeros uint8 [N, K/g], None where symmetric.
    Raises ValueError for a width or group size that this layout does not have, and for a zero point past LARGEST_ZERO.
    """
    N, K = codes.shape
    row_tiles, chunks = count_blocks(N, K, gate_up)
    if zeros is None:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
    elif bits < 8 and zeros.numel() and (largest := int(zeros.max())) > LARGEST_ZERO:
        raise ValueError(f"zero point {largest} of bits={bits} is past {LARGEST_ZERO}: codes end at {2**bits - 1}")
    padded = torch.nn.functional.pad(codes, (0, chunks * DEPTH - K))
    blocks = _arrange_rows(padded, row_tiles, gate_up).view(row_tiles, ROWS, chunks, DEPTH).transpose(1, 2)
    stored = _stored_bits(bits)
    if stored == 8:
        # Two's complement of code - 128.
        blocks = blocks ^ 0x80
    if stored == 8 and act_bits == 8:
        packed = blocks.reshape(-1)
    else:
        planes, shift = [], 0
        for plane_bits in PLANES[stored]:
            planes.append(_pack_plane((blocks >> shift) & (2**plane_bits - 1), plane_bits, act_bits).reshape(-1))
            shift += plane_bits
        packed = torch.cat(planes)
    pieces = count_pieces(group_size)
    halves = [_spread_groups(values, K, group_size, chunks * pieces) for values in (scales.half(), zeros.half())]
    words = torch.stack([_arrange_rows(half, row_tiles, gate_up) for half in halves], dim=-1).view(torch.int32)
    words = words.view(row_tiles, ROWS, chunks * pieces).transpose(1, 2)
    return packed, words.reshape(-1)


def unpack_fragments(
    packed: torch.Tensor,
    words: torch.Tensor,
    bits: int,
    act_bits: int,
    group_size: int,
    N: int,
    K: int,
    gate_up: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo `pack_fragments`: (codes uint8 [N, K], scales fp16 [N, K/g], zeros uint8 [N, K/g])."""
    row_tiles, chunks = count_blocks(N, K, gate_up)
    stored = _stored_bits(bits)
    if stored == 8 and act_bits == 8:
        blocks = packed.view(row_tiles, chunks, ROWS, DEPTH)
    else:
        blocks = torch.zeros(row_tiles, chunks, ROWS, DEPTH, dtype=torch.uint8, device=packed.device)
        start = shift = 0
        for plane_bits in PLANES[stored]:
            end = start + blocks.numel() * plane_bits // 8
            plane = packed[start:end].view(row_tiles, chunks, -1)
            blocks |= _unpack_plane(plane, plane_bits, act_bits) << shift
            start, shift = end, shift + plane_bits
    if stored == 8:
        blocks = blocks ^ 0x80
    codes = _restore_rows(blocks.transpose(1, 2).reshape(row_tiles * ROWS, chunks * DEPTH), N, gate_up)[:, :K]
    pieces = count_pieces(group_size)
    halves = words.view(torch.float16).view(row_tiles, chunks * pieces, ROWS, 2).transpose(1, 2)
    both = _restore_rows(halves.reshape(row_tiles * ROWS, -1), N, gate_up).view(N, chunks * pieces, 2)
    groups = 1 if group_size == -1 else K // group_size
    scales, zeros = both[:, :groups, 0].contiguous(), both[:, :groups, 1].to(torch.uint8)
    return codes.contiguous(), scales, zeros


def _stored_bits(bits: int) -> int:
    if bits not in STORED_BITS:
        raise ValueError(f"bits={bits} is not a code width; use one of {', '.join(map(str, STORED_BITS))}")
    return STORED_BITS[bits]


def _plane_shape(plane_bits: int, act_bits: int) -> tuple[int, int, int, int]:
    """(words of a lane, codes in a word, elements, bits of a word) of a plane."""
    elements, word_bits = (4, 8) if act_bits == 8 else (2, 16)
    codes_per_word = word_bits // plane_bits
    return DEPTH // (4 * elements * codes_per_word), codes_per_word, elements, word_bits


def _pack_plane(fields: torch.Tensor, plane_bits: int, act_bits: int) -> torch.Tensor:
    """Fields uint8 [row tiles, chunks, 64, 128] of one plane -> uint8 [row tiles, chunks, 64, bytes of a row]."""
    words, codes_per_word, elements, word_bits = _plane_shape(plane_bits, act_bits)
    by_slot = fields.unflatten(-1, (words, codes_per_word, 4, elements))
    # int16 holds the sixteen bits of a halfword; its sign is the top bit of the last code.
    total = by_slot.new_zeros((*by_slot.shape[:4], 4, elements), dtype=torch.uint8 if word_bits == 8 else torch.int16)
    for place in range(codes_per_word):
        total |= by_slot[..., place, :, :].to(total.dtype) << (plane_bits * place)
    return total.transpose(-3, -2).contiguous().view(torch.uint8).flatten(3)


def _unpack_plane(plane: torch.Tensor, plane_bits: int, act_bits: int) -> torch.Tensor:
    """Undo `_pack_plane`: uint8 [row tiles, chunks, bytes of a block] -> fields uint8 [row tiles, chunks, 64, 128]."""
    words, codes_per_word, elements, word_bits = _plane_shape(plane_bits, act_bits)
    typed = plane.contiguous().view(torch.uint8 if word_bits == 8 else torch.int16)
    by_lane = typed.view(*plane.shape[:2], ROWS, 4, words, elements).transpose(-3, -2)
    # The sign that a shift of int16 brings in is masked away.
    fields = [(by_lane >> (plane_bits * place)) & (2**plane_bits - 1) for place in range(codes_per_word)]
    return torch.stack(fields, dim=-3).to(torch.uint8).flatten(3)


def _spread_groups(values: torch.Tensor, K: int, group_size: int, num_pieces: int) -> torch.Tensor:
    """[N, groups] -> [N, pieces]: a whole row's value repeated, 0 past K."""
    if group_size != -1:
        return torch.nn.functional.pad(values, (0, num_pieces - values.shape[1]))
    return values.expand(-1, num_pieces)


def _arrange_rows(values: torch.Tensor, row_tiles: int, gate_up: bool) -> torch.Tensor:
    """Rows padded with 0 to whole tiles; of a gate_up weight, eights of gate and of up in turn."""
    if gate_up:
        gate, up = values.chunk(2)
        padding = (0, 0, 0, -gate.shape[0] % ALTERNATION)
        eights = [torch.nn.functional.pad(half, padding).unflatten(0, (-1, ALTERNATION)) for half in (gate, up)]
        values = torch.stack(eights, dim=1).flatten(0, 2)
    return torch.nn.functional.pad(values, (0, 0, 0, row_tiles * ROWS - values.shape[0])).contiguous()


def _restore_rows(values: torch.Tensor, N: int, gate_up: bool) -> torch.Tensor:
    if not gate_up:
        return values[:N]
    pairs = values.unflatten(0, (-1, 2, ALTERNATION))
    return torch.cat([pairs[:, half].flatten(0, 1)[: N // 2] for half in (0, 1)])
