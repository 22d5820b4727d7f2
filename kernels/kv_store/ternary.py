# SPDX-License-Identifier: Apache-2.0
"""Ternary codes, five to a byte: 3**5 = 243 values of the 256 are used, 1.6 stored bits for 1.585 of information.

    byte j of a row = c[5j] + 3*c[5j+1] + 9*c[5j+2] + 27*c[5j+3] + 81*c[5j+4]

A row of K codes takes ceil(K/5) bytes; codes past K are 0. SKVQ (arXiv:2405.06219) counts its three levels as 1.5 bits
and its code stores them in two.
"""

from __future__ import annotations

import torch

TRITS_PER_BYTE = 5
#: Largest byte that five codes make; a greater one is damage.
LARGEST_BYTE = 3**TRITS_PER_BYTE - 1


def ternary_size(K: int) -> int:
    """Bytes that K ternary codes occupy."""
    return -(-K // TRITS_PER_BYTE)


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes five to a byte, as above.

    codes: uint8 [..., K], each 0, 1 or 2. Returns uint8 [..., ceil(K/5)] on the same device.
    Raises ValueError for another dtype and for a code above 2 (it would carry into its neighbour).
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and (largest := int(codes.max())) > 2:
        raise ValueError(f"code {largest} is not ternary: codes must be 0, 1 or 2")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS_PER_BYTE))
    digits = padded.unflatten(-1, (ternary_size(codes.shape[-1]), TRITS_PER_BYTE))
    return (digits * _weights(codes.device)).sum(-1, dtype=torch.uint8)


def unpack_ternary(packed: torch.Tensor, K: int) -> torch.Tensor:
    """Undo `pack_ternary`.

    packed: uint8 [..., ceil(K/5)]. Returns uint8 [..., K]. Raises ValueError for another dtype and for a last dimension
    that does not hold K codes. Bytes above 242 read as their value modulo 243: unwritten cells hold any byte.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
    if packed.shape[-1] != ternary_size(K):
        raise ValueError(f"K={K} ternary codes take {ternary_size(K)} bytes a row, got {packed.shape[-1]}")
    digits = packed.unsqueeze(-1) // _weights(packed.device) % 3
    return digits.flatten(-2)[..., :K]


def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)
