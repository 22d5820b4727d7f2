# SPDX-License-Identifier: Apache-2.0
"""How keys and values of a token are coded, and where their bytes lie in a page of the cache.

A layer's cache is uint8 [blocks, kv heads, N tokens, C]: C bytes for a token of a head. The N*C bytes of one
(block, head), its plane, are contiguous, and inside a plane every field has a section of its own, so that each is
read in long runs and starts on a multiple of 16 bytes when N is one:

    +---------------+---------------+---------------+-----------+-- ... --+------------------------+
    | K codes       | K scales      | K lows        | K outliers|         | V codes, scales, ...   |
    | [N, D*bits/8] | [N, D/g]      | [N, D/g]      | [N, o]    |         |                        |
    +---------------+---------------+---------------+-----------+-- ... --+------------------------+

    value = low + scale * level[code]        level[code] = code, or an entry of a calibrated codebook

    codes     row n: the codes of token n along its channels, for every codec. 2, 3, 4 and 8 bits are the bit stream
              of kernels/packing.py; 1.5 bits are ternary, five to a byte (kernels/ternary.py)
    scales    fp8 e4m3 or fp16. per_channel=False: one per (token, group of g channels). per_channel=True (KIVI): one
    lows      per (group of g tokens, channel), [N/g, D], lows in fp16 (`Codec.low_dtype`); the rows of a group are
              written when its last token comes
    outliers  uint8 channel [N, o], then bf16 value [N, o]: the o/2 greatest and the o/2 least values of a token

The outlier list has a fixed length, where KVQuant's sparse rows vary: a cell has a fixed size.

Bytes of a token and head for D = 128 (bits: 8*C / 2D, both sides, everything included):

    preset         K codes  K meta         V codes  V meta          C     bits
    skvq_k2v2      32       1 + 1          32       1 + 1           68    2.125
    skvq_k2v15     32       1 + 1          26       1 + 1           62    1.9375
    kivi_k2v2      32       4 + 8          32       4 + 4           84    2.625
    kivi_k4v4      64       4 + 8          64       4 + 4           148   4.625
    kv4            64       2 + 2          64       2 + 2           136   4.25
    kvquant_k3v3   48       1 + 1 + 6      48       1 + 1 + 6       112   3.5
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..packing import packed_size
from ..ternary import ternary_size

#: Bits of a code -> its number of levels. 1.5 is the usual name of three levels.
LEVELS: dict[float, int] = {1.5: 3, 2: 4, 3: 8, 4: 16, 8: 256}

SCALE_DTYPES = (torch.float8_e4m3fn, torch.float16)


class Codec(NamedTuple):
    """How one of K and V is coded. group_size: channels, or tokens where per_channel. outliers: per token and head."""

    bits: float
    group_size: int
    per_channel: bool = False
    scale_dtype: torch.dtype = torch.float8_e4m3fn
    outliers: int = 0

    @property
    def num_levels(self) -> int:
        """Values that a code can have."""
        return LEVELS[self.bits]

    @property
    def low_dtype(self) -> torch.dtype:
        """Of lows. A channel of keys may lie far off zero for its spread, where fp8 has no numbers between."""
        return torch.float16 if self.per_channel else self.scale_dtype


class Section(NamedTuple):
    """One field of a plane: `rows` rows of `row_bytes` bytes from byte `offset` on."""

    offset: int
    rows: int
    row_bytes: int


class SideSections(NamedTuple):
    """The fields of K or of V; no outliers: sections without bytes."""

    codes: Section
    scales: Section
    lows: Section
    outlier_channels: Section
    outlier_values: Section


class CellLayout(NamedTuple):
    """The pages of one layer: codecs, sizes, and the sections of K and of V. Make it with `plan_cells`."""

    key: Codec
    value: Codec
    head_dim: int
    block_size: int
    cell_bytes: int
    key_sections: SideSections
    value_sections: SideSections


def code_bytes(codec: Codec, head_dim: int) -> int:
    """Bytes of a token's codes. Raises ValueError where they do not fill whole bytes."""
    if codec.bits == 1.5:
        return ternary_size(head_dim)
    return packed_size(head_dim, int(codec.bits))


def side_bytes(codec: Codec, head_dim: int) -> int:
    """Bytes per token and head of K or of V. Raises ValueError, naming the value and the fix, for a misfit."""
    _check_codec(codec, head_dim)
    scales = (codec.scale_dtype.itemsize + codec.low_dtype.itemsize) * head_dim
    return code_bytes(codec, head_dim) + -(-scales // codec.group_size) + 3 * codec.outliers


def bits_per_element(codec: Codec, head_dim: int) -> float:
    """Stored bits of an element, scales, lows, outliers and padding included."""
    return 8 * side_bytes(codec, head_dim) / head_dim


def plan_cells(key: Codec, value: Codec, head_dim: int, block_size: int) -> CellLayout:
    """Place every field of a page.

    head_dim: elements of a head, the same for K and V. block_size: tokens of a page. Raises ValueError, naming the
    value and the fix, for a head size, group size or block size that does not fit.
    """
    cell_bytes = side_bytes(key, head_dim) + side_bytes(value, head_dim)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    for codec in (key, value):
        if codec.per_channel and block_size % codec.group_size:
            raise ValueError(
                f"block_size={block_size} does not hold whole groups of {codec.group_size} tokens: "
                f"use a multiple of {codec.group_size}"
            )
    key_sections, end = _place_side(key, head_dim, block_size, 0)
    value_sections, end = _place_side(value, head_dim, block_size, end)
    # Scales of a group may not divide evenly among its tokens; what is left is padding.
    assert 0 <= cell_bytes * block_size - end < block_size
    return CellLayout(key, value, head_dim, block_size, cell_bytes, key_sections, value_sections)


def view_section(cache: torch.Tensor, section: Section) -> torch.Tensor:
    """uint8 [blocks, kv heads, rows, row_bytes] of a field: a view, so that writing to it writes to the cache.

    cache: uint8 [blocks, kv heads, N, C]; any strides of blocks and heads. Raises ValueError for pages whose
    tokens are not contiguous: no view of a plane exists then.
    """
    blocks, heads, tokens, cell_bytes = cache.shape
    if tokens and cache.stride()[2:] != (cell_bytes, 1):
        raise ValueError(
            f"the cells of a (block, head) must be contiguous, got strides {cache.stride()} for {list(cache.shape)}: "
            "use a cache layout that ends in HNC"
        )
    return cache.as_strided(
        (blocks, heads, section.rows, section.row_bytes),
        (cache.stride(0), cache.stride(1), section.row_bytes, 1),
        cache.storage_offset() + section.offset,
    )


def _place_side(codec: Codec, head_dim: int, block_size: int, start: int) -> tuple[SideSections, int]:
    size = codec.scale_dtype.itemsize
    if codec.per_channel:
        rows, columns = block_size // codec.group_size, head_dim
    else:
        rows, columns = block_size, head_dim // codec.group_size
    shapes = [
        (block_size, code_bytes(codec, head_dim)),
        (rows, columns * size),
        (rows, columns * codec.low_dtype.itemsize),
        (block_size, codec.outliers),
        (block_size, 2 * codec.outliers),
    ]
    sections = []
    for rows, row_bytes in shapes:
        sections.append(Section(start, rows, row_bytes))
        start += rows * row_bytes
    return SideSections(*sections), start


def _check_codec(codec: Codec, head_dim: int) -> None:
    if codec.bits not in LEVELS:
        raise ValueError(f"bits={codec.bits} is not a width of the cache; use one of {', '.join(map(str, LEVELS))}")
    if codec.scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype={codec.scale_dtype} is not supported; use float8_e4m3fn or float16")
    if head_dim < 1 or codec.group_size < 1:
        raise ValueError(f"head_dim={head_dim} and group_size={codec.group_size} must be positive")
    if not codec.per_channel and head_dim % codec.group_size:
        raise ValueError(
            f"group_size={codec.group_size} does not divide head_dim={head_dim}: "
            f"set group_size to one of {', '.join(map(str, _divisors(head_dim)))}"
        )
    if codec.outliers and (codec.per_channel or codec.outliers % 2 or codec.outliers >= codec.group_size):
        raise ValueError(
            f"outliers={codec.outliers} must be even, below group_size={codec.group_size}, and of a per-token codec"
        )
    if codec.outliers and head_dim > 256:
        raise ValueError(f"head_dim={head_dim} is too large for outliers, whose channel is one byte: set outliers to 0")


def _divisors(number: int) -> list[int]:
    """Those of at least 8, the smallest group whose scales do not outweigh its codes."""
    return [divisor for divisor in range(min(8, number), number + 1) if number % divisor == 0]
