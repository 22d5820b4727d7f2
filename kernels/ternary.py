# SPDX-License-Identifier: Apache-2.0
"""Ternary codes, five to a byte: the packing itself, and rows of weights as checkpoints store them.

3**5 = 243 values of the 256 are used, 1.6 stored bits for 1.585 of information. A row of K codes takes ceil(K/5) bytes;
codes past K are 0. SKVQ (arXiv:2405.06219), whose values in the KV cache are packed so, counts its three levels as 1.5
bits and its code stores them in two.

Rows of weights are packed in runs of columns that fill whole bytes:

    run of 64 columns, 13 bytes (of 32, 7 bytes, where groups are of 32)

    byte 0         byte 1         ...  byte 12                            byte j = d[5j] + 3*d[5j+1] + 9*d[5j+2]
    d0 d1 d2 d3 d4 d5 d6 d7 d8 d9      d60 d61 d62 d63 and a 0 for padding         + 27*d[5j+3] + 81*d[5j+4]

A digit d is 0, 1 or 2 for a weight of -1, 0 or +1 times its scale. Runs begin at the borders of groups, so a part of
the columns that is whole groups is whole bytes too. As codes, here and in every layout of memory, they are 2-bit codes
of a symmetric weight (zero point 2) that never use the lowest level: code = d + 1.
"""

from __future__ import annotations

import torch

TRITS_PER_BYTE = 5
#: Largest byte that five codes make; a greater one is damage.
LARGEST_BYTE = 3**TRITS_PER_BYTE - 1

#: Bits that the code of a weight takes once it is unpacked.
CODE_BITS = 2

#: Codes of -1 and +1; between them lies the zero point.
LOWEST_CODE, HIGHEST_CODE = 1, 3

LONG_RUN, SHORT_RUN = 64, 32


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


def choose_run(group_size: int) -> int:
    """Columns of a run: 64, where a group (-1: the whole row) is a multiple of that, else 32.

    Raises ValueError for a group that is a multiple of neither.
    """
    if group_size == -1 or (group_size > 0 and group_size % LONG_RUN == 0):
        return LONG_RUN
    if group_size > 0 and group_size % SHORT_RUN == 0:
        return SHORT_RUN
    raise ValueError(f"group_size={group_size} does not fit ternary codes: use a multiple of {SHORT_RUN}, or -1")


def packed_size(K: int, group_size: int) -> int:
    """Bytes that K ternary codes occupy. Raises ValueError where K is not whole runs, and as `choose_run`."""
    run = choose_run(group_size)
    if K % run:
        raise ValueError(
            f"K={K} ternary codes in groups of {group_size} are not whole runs: K must be a multiple of {run}"
        )
    return K // run * ternary_size(run)


def count_codes(num_bytes: int, group_size: int) -> int:
    """The K that `packed_size` gives `num_bytes` for. Raises ValueError where none does, and as `choose_run`."""
    run = choose_run(group_size)
    runs, rest = divmod(num_bytes, ternary_size(run))
    if rest:
        raise ValueError(f"{num_bytes} bytes are not whole runs of {run} ternary codes in {ternary_size(run)} bytes")
    return runs * run


def pack_codes(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Pack the codes of a weight.

    codes: uint8 [..., K], each 1, 2 or 3. Returns uint8 [..., packed_size(K, group_size)] on the same device.
    Raises ValueError for another dtype, another code, and as `packed_size`.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    size = packed_size(codes.shape[-1], group_size)
    if codes.numel():
        lowest, highest = (int(extreme) for extreme in codes.aminmax())
        if lowest < LOWEST_CODE or highest > HIGHEST_CODE:
            wrong = lowest if lowest < LOWEST_CODE else highest
            raise ValueError(f"code {wrong} is not ternary: codes must be {LOWEST_CODE} to {HIGHEST_CODE}")
    run = choose_run(group_size)
    packed = pack_ternary((codes - LOWEST_CODE).unflatten(-1, (codes.shape[-1] // run, run)))
    return packed.reshape(*codes.shape[:-1], size)


def unpack_codes(packed: torch.Tensor, group_size: int, K: int) -> torch.Tensor:
    """Undo `pack_codes`.

    packed: uint8 [..., packed_size(K, group_size)]. Returns uint8 [..., K]. Raises ValueError for another dtype, for a
    last dimension that does not hold K codes, and for a byte that no five codes make.
    """
    size = packed_size(K, group_size)
    if packed.shape[-1] != size:
        raise ValueError(f"K={K} ternary codes take {size} bytes a row, got {packed.shape[-1]}")
    if packed.numel() and (largest := int(packed.max())) > LARGEST_BYTE:
        raise ValueError(f"byte {largest} holds no five ternary codes, which is at most {LARGEST_BYTE}: it is damaged")
    run = choose_run(group_size)
    digits = unpack_ternary(packed.unflatten(-1, (K // run, ternary_size(run))), run)
    return digits.reshape(*packed.shape[:-1], K) + LOWEST_CODE


def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)
