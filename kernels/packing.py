# SPDX-License-Identifier: Apache-2.0
"""Codes of 2 to 8 bits as a dense bit stream along the last dimension: no bit is wasted, at any width.

    code i of a row occupies bits [i*bits, (i+1)*bits) of that row; bit b of a row is bit b % 8 of byte b // 8

    bits = 3:   byte 0          byte 1          byte 2
                c2 c2 c1 c1 c1 c0 c0 c0 | c5 c4 c4 c4 c3 c3 c3 c2 | c7 c7 c7 c6 c6 c6 c5 c5     (high bit first)

Read as little-endian 32-bit words, 32 three-bit codes fill exactly three words.
"""

from __future__ import annotations

import math

import torch

#: Widths a code can have. Ternary weights, five to a byte, are another encoding: ternary.py.
CODE_BITS = (2, 3, 4, 5, 6, 8)


def packed_size(K: int, bits: int) -> int:
    """Bytes that K codes of `bits` bits occupy.

    Raises ValueError for a width outside `CODE_BITS`, and where K*bits does not fill whole bytes.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"bits={bits} is not a code width; use one of {', '.join(map(str, CODE_BITS))}")
    if K * bits % 8:
        raise ValueError(
            f"K={K} codes of bits={bits} do not fill whole bytes: K must be a multiple of {8 // math.gcd(8, bits)}"
        )
    return K * bits // 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into the bit stream above.

    codes: uint8 [..., K], each below 2**bits. Returns uint8 [..., K*bits/8] on the same device.
    Raises ValueError for another dtype, for K*bits not divisible by 8, and for a code that needs more than
    `bits` bits (it would run into its neighbour).
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    K = codes.shape[-1]
    size = packed_size(K, bits)
    if bits == 8:
        return codes.clone()
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"code {largest} does not fit in bits={bits}")
    codes_per_word, bytes_per_word, dtype = _word(bits)
    chunks = codes.reshape(*codes.shape[:-1], K // codes_per_word, codes_per_word).to(dtype)
    word = chunks[..., 0].clone()
    for i in range(1, codes_per_word):
        word |= chunks[..., i] << (i * bits)
    # Narrowing to uint8 keeps the low eight bits, which is the byte wanted.
    bytes_ = [(word >> (8 * j)).to(torch.uint8) for j in range(bytes_per_word)]
    return torch.stack(bytes_, dim=-1).reshape(*codes.shape[:-1], size)


def unpack_codes(packed: torch.Tensor, bits: int, K: int) -> torch.Tensor:
    """Undo `pack_codes`.

    packed: uint8 [..., K*bits/8]. Returns uint8 [..., K]. Raises ValueError for another dtype, for K*bits not
    divisible by 8, and for a last dimension that does not hold K codes.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
    size = packed_size(K, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"K={K} codes of bits={bits} take {size} bytes a row, got {packed.shape[-1]}")
    if bits == 8:
        return packed.clone()
    codes_per_word, bytes_per_word, dtype = _word(bits)
    chunks = packed.reshape(*packed.shape[:-1], size // bytes_per_word, bytes_per_word).to(dtype)
    word = chunks[..., 0].clone()
    for j in range(1, bytes_per_word):
        word |= chunks[..., j] << (8 * j)
    mask = 2**bits - 1
    codes = [((word >> (i * bits)) & mask).to(torch.uint8) for i in range(codes_per_word)]
    return torch.stack(codes, dim=-1).reshape(*packed.shape[:-1], K)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The shortest run of codes that ends on a byte: (codes, bytes, integer type that holds it)."""
    codes_per_word = 8 // math.gcd(8, bits)
    bytes_per_word = codes_per_word * bits // 8
    dtype = torch.uint8 if bytes_per_word == 1 else torch.int32 if bytes_per_word <= 3 else torch.int64
    return codes_per_word, bytes_per_word, dtype
