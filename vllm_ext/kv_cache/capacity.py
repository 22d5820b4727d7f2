# SPDX-License-Identifier: Apache-2.0
"""How many tokens fit a KV cache of given bytes: the arithmetic of vLLM's "KV cache size" line, window included.

A page holds `block_size` tokens of a layer. Tokens in full precision have pages of their own, in the same pool:

    blocks in the pool    bytes // sum over layers of page bytes
    recent page           block_size's largest power-of-two divisor of tokens whose K and V fit under a page; the
                          rest of the page is padding, since one pool has one page size
    blocks of a request   ceil(tokens / block_size) + sink pages + pages of two windows, which a prefill step holds:
                          the one before its first query, and the one before the next step's
    tokens that fit       blocks / blocks of a request at max_model_len, times max_model_len

Where layers have presets of their own (kvplan), a block holds the pages of all layers one after the other, and what
counts is the room of all of them together: `share_room`.

The window's price is per request, so short requests pay it in full: that is why the ratio grows with max_model_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ext.kv_cache.presets import Preset, is_mixed

#: Where layers have presets of their own, the full-precision page of one layer is so many bytes longer: vLLM may deal
#: layers of one size to several groups, which would each take blocks of their own (`_get_packed_kv_cache_groups`).
MIXED_PADDING = 64


def count_recent_pages(window: int, sinks: int, page_tokens: int, max_model_len: int) -> int:
    """Most full-precision pages that one request holds at a time: the admission bound of `recent.RecentSpec`.

    window: tokens, the query's own included, `Preset.retained_window`. page_tokens: of a full-precision page.
    max_model_len: of a request.
    """
    pages = -(-sinks // page_tokens)
    if window > 1:
        # window - 1 tokens that begin with the last of a page.
        pages += 2 * (-(-(window - 2) // page_tokens) + 1)
    return min(pages, -(-max_model_len // page_tokens))


def count_page_tokens(block_size: int, token_bytes: int, room: int) -> int:
    """Tokens of a full-precision page: a power of two, so that blocks of both kinds end together; 0 where none fits.

    block_size: tokens of a quantized page. token_bytes: unquantized K and V of a token in one layer. room: bytes.
    """
    tokens = block_size & -block_size
    while tokens * token_bytes > room:
        tokens //= 2
    return tokens


def share_room(presets: Sequence[Preset], page_bytes: Sequence[int]) -> int:
    """Bytes that a full-precision page of every layer may have, for the presets and quantized pages of all layers."""
    return (sum(page_bytes) - MIXED_PADDING) // len(page_bytes) if is_mixed(presets) else page_bytes[0]


@dataclass(frozen=True)
class Geometry:
    """Attention of a model, on one rank. dtype_bytes: of an unquantized element; block_size: tokens of a page."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 128
    dtype_bytes: int = 2

    @property
    def token_bytes(self) -> int:
        """Unquantized K and V of a token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True)
class Capacity:
    """tokens: that fit at max_model_len. ratio: to the unquantized cache. bits: true bits of an element in a page.

    page_bytes: of all layers together. recent_tokens: tokens of a full-precision page, 0 where none is kept.
    recent_pages: per request.
    """

    tokens: int
    ratio: float
    bits: float
    page_bytes: int
    recent_tokens: int
    recent_pages: int


def compute_capacity(
    preset: Preset | Sequence[Preset],
    geometry: Geometry,
    cache_bytes: int,
    max_model_len: int,
    group_size: int | None = None,
) -> Capacity:
    """Tokens that fit `cache_bytes` when requests have up to `max_model_len` tokens.

    preset: for all layers, or one for each (kvplan; their window and sinks are equal, `parse_plan`). Raises
    ValueError for a head size that a preset does not fit, sequences of another length than the model, and a cache that
    does not hold one request's recent tokens in a page.
    """
    presets = [preset] * geometry.num_layers if isinstance(preset, Preset) else list(preset)
    if len(presets) != geometry.num_layers:
        raise ValueError(f"{len(presets)} presets do not fit {geometry.num_layers} layers")
    pages = [geometry.num_kv_heads * geometry.block_size * _cell_bytes(each, geometry, group_size) for each in presets]
    recent_tokens = recent_pages = 0
    if any(each.keeps_recent for each in presets):
        room = share_room(presets, pages)
        recent_tokens = count_page_tokens(geometry.block_size, geometry.token_bytes, room)
        if recent_tokens == 0:
            raise ValueError(
                f"a page of {room} bytes does not hold one token in full precision: raise block_size "
                f"above {geometry.block_size}"
            )
        window, sinks = max(each.retained_window for each in presets), max(each.sinks for each in presets)
        recent_pages = count_recent_pages(window, sinks, recent_tokens, max_model_len)
    request = -(-max_model_len // geometry.block_size) + recent_pages
    tokens = int(cache_bytes // sum(pages) / request * max_model_len)
    elements = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.block_size * geometry.head_dim
    return Capacity(
        tokens,
        tokens / compute_plain_capacity(geometry, cache_bytes, max_model_len),
        8 * sum(pages) / elements,
        sum(pages),
        recent_tokens,
        recent_pages,
    )


def compute_plain_capacity(geometry: Geometry, cache_bytes: int, max_model_len: int) -> int:
    """Tokens that fit the same bytes unquantized. Raises ValueError for a cache of less than one block."""
    blocks = cache_bytes // (geometry.num_layers * geometry.block_size * geometry.token_bytes)
    if blocks < 1:
        raise ValueError(f"a cache of {cache_bytes} bytes does not hold one block; give it more memory")
    return int(blocks / -(-max_model_len // geometry.block_size) * max_model_len)


def _cell_bytes(preset: Preset, geometry: Geometry, group_size: int | None) -> int:
    return preset.plan_cells(geometry.head_dim, geometry.block_size, group_size).cell_bytes
