# SPDX-License-Identifier: Apache-2.0
"""The specification of reading quantized pages, in plain torch and float32: cells to numbers, and exact attention.

Which precision a query at position t reads of the key and value at position s <= t:

    full precision  s < sinks, or s >= floor((t - window + 1) / g) * g        g = 1; per-channel keys: group_size
    quantized       otherwise

Nothing else enters, neither where a prompt was cut into chunks nor what is in this step: a prompt has one result. With
per-channel keys a group is read quantized once all of it has left the window, which is when it surely is complete;
the window then reaches up to g - 1 tokens further back, and an incomplete group is always in it. A token whose
full-precision page is gone (block 0 in the recent table) is read quantized.
"""

from __future__ import annotations

import torch

from ..kv_store.arguments import check_cache, check_rows
from ..kv_store.codec import CodecTensors, Quantized, dequantize, from_stored, transform_query, unpack_side
from ..kv_store.layout import CellLayout, Codec, Section, SideSections, view_section
from ..kv_store.recent import gather_recent
from .rope import rotate

#: Scores that `attend` holds at a time.
SCORES = 1 << 25


def read_keys(cache: torch.Tensor, block: torch.Tensor, token: torch.Tensor, layout: CellLayout,
              tensors: CodecTensors) -> torch.Tensor:  # fmt: skip
    """Keys in stored coordinates, float32 [..., kv heads, D], of tokens int64 [...] in blocks int64 [...]."""
    return _read_side(cache, block, token, layout.key, layout.key_sections, layout.head_dim, tensors)


def read_values(cache: torch.Tensor, block: torch.Tensor, token: torch.Tensor, layout: CellLayout,
                tensors: CodecTensors) -> torch.Tensor:  # fmt: skip
    """As `read_keys`, of values."""
    return _read_side(cache, block, token, layout.value, layout.value_sections, layout.head_dim, tensors)


def is_full_precision(
    query_position: torch.Tensor, key_position: torch.Tensor, window: int, sinks: int, group_tokens: int
) -> torch.Tensor:
    """The rule above, bool [..., queries, keys], for positions int64 [..., queries] and [..., keys]."""
    start = (query_position - window + 1).div(group_tokens, rounding_mode="floor") * group_tokens
    key = key_position.unsqueeze(-2)
    return (key >= start.unsqueeze(-1)) | (key < sinks)


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over some of the keys: its output, and the log of the sum of exponentials.

    query: float32 [batch, Q, kv heads, G, D]; key, value: float32 [batch, S, kv heads, D]; mask: bool [batch, Q, S];
    offset: float32 [batch, Q, kv heads, G], added to every score before scaling. Returns float32 [batch, Q, kv
    heads, G, D] and [batch, Q, kv heads, G]; 0 and -inf for a query without keys.
    """
    scores = torch.einsum("bqhgd,bshd->bqhgs", query, key)
    if offset is not None:
        scores = scores + offset.unsqueeze(-1)
    scores = (scores * scale).masked_fill(~mask[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    if bool(value.isfinite().all()):
        return torch.einsum("bqhgs,bshd->bqhgd", weights, value), lse
    # 0 times a NaN or an infinity is NaN: every query meets the values that it sees, and no others.
    rows = [
        torch.einsum("bhgs,bshd->bhgd", weights[:, i], value.masked_fill(~mask[:, i, :, None, None], 0.0))
        for i in range(query.shape[1])
    ]
    return torch.stack(rows, 1), lse


def merge_parts(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention over the union of two disjoint sets of keys, from `attend_part` of each."""
    total = torch.logaddexp(first[1], second[1])
    # A query without any key (padding) has -inf everywhere and gets 0.
    total = total.masked_fill(total == -torch.inf, 0.0)
    shares = [out * (lse - total).exp().unsqueeze(-1) for out, lse in (first, second)]
    return shares[0] + shares[1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    value_tensors: CodecTensors,
    scale: float,
    window: int,
    sinks: int,
    cos_sin: torch.Tensor | None,
) -> torch.Tensor:
    """Same arguments, result and errors as `vllm_ext.kernels.kv_decode.attend`.

    Pads requests to the longest and dequantizes all of their pages: neither fast nor small, nor capturable. Scores are
    computed for some queries at a time, so that they stay within SCORES numbers.
    """
    check_cache(cache, layout)
    check_rows("key", key, cache, layout)
    check_rows("value", value, cache, layout)
    tokens, num_heads, D = query.shape
    kv_heads = cache.shape[1]
    if num_heads % kv_heads or layout.head_dim != D:
        raise ValueError(f"query {list(query.shape)} does not fit {kv_heads} kv heads of head_dim={layout.head_dim}")
    out = query.new_zeros(query.shape)
    if tokens == 0 or seq_lens.numel() == 0:
        return out
    lens, starts = seq_lens.long(), query_start_loc.long()
    lengths = starts.diff()
    row = torch.arange(int(lengths.max()), device=query.device)
    position = torch.arange(int(lens.max()), device=query.device)
    query_position = (lens - lengths)[:, None] + row
    is_query = row < lengths[:, None]
    index = (starts[:-1, None] + row).clamp(max=tokens - 1)
    q = query[index].float().unflatten(2, (kv_heads, num_heads // kv_heads))

    group_tokens = layout.key.group_size if layout.key.per_channel else 1
    raw, kept = gather_recent(
        torch.cat([key, value], -1), starts, lens, recent, recent_table,
        torch.arange(lens.numel(), device=query.device)[:, None].expand(-1, position.numel()),
        position.expand(lens.numel(), -1),
    )  # fmt: skip
    mask = (position <= query_position.unsqueeze(-1)) & is_query.unsqueeze(-1)
    full = is_full_precision(query_position, position, window, sinks, group_tokens) & kept.unsqueeze(-2)
    # A table still names pages that left the window; they may hold anything by now, NaN included.
    raw = raw.masked_fill(~(mask & full).any(1)[..., None, None], 0.0)
    # Cells past a request's end, and of groups not complete yet, hold anything, NaN included.
    coded = position < (lens // group_tokens * group_tokens)[:, None]
    if bool((mask & ~full & ~coded.unsqueeze(-2)).any()):
        raise ValueError(
            f"a query needs a key of a group of {group_tokens} tokens that is not complete, and its full-precision "
            f"page is gone: keep {group_tokens - 1} tokens beyond the window"
        )

    column = (position // layout.block_size).expand(lens.numel(), -1)
    block = block_table.long().gather(1, column.clamp(max=block_table.shape[1] - 1)).masked_fill(~coded, 0)
    token = (position % layout.block_size).expand_as(block)
    empty = ~coded[..., None, None]
    keys = read_keys(cache, block, token, layout, key_tensors).masked_fill(empty, 0.0)
    values = read_values(cache, block, token, layout, value_tensors).masked_fill(empty, 0.0)
    if cos_sin is None:
        stored_query, offset = transform_query(q, key_tensors)
    else:
        # The rotation mixes stored channels, so the keys go back to the model's coordinates instead.
        keys = rotate(from_stored(keys, key_tensors), cos_sin[position])
        stored_query, offset = q, None
    rows = max(1, SCORES // (lens.numel() * num_heads * position.numel()))
    parts = []
    for first in range(0, row.numel(), rows):
        some = slice(first, first + rows)
        past = attend_part(
            stored_query[:, some], keys, values, (mask & ~full)[:, some], scale,
            None if offset is None else offset[:, some],
        )  # fmt: skip
        # A weighted mean of values may go back after the sum: the weights add up to one.
        has_past = (past[1] > -torch.inf)[..., None]
        past = (from_stored(past[0].transpose(2, 3), value_tensors).transpose(2, 3) * has_past, past[1])
        near = attend_part(q[:, some], raw[..., :D].float(), raw[..., D:].float(), (mask & full)[:, some], scale)
        parts.append(merge_parts(past, near).flatten(2, 3))
    out[index[is_query]] = torch.cat(parts, 1)[is_query].to(out.dtype)
    return out


def _read_side(
    cache: torch.Tensor,
    block: torch.Tensor,
    token: torch.Tensor,
    codec: Codec,
    sections: SideSections,
    head_dim: int,
    tensors: CodecTensors,
) -> torch.Tensor:
    codes = unpack_side(_read(cache, sections.codes, block, token), codec.bits, head_dim)
    row = token // codec.group_size if codec.per_channel else token
    scales = _read(cache, sections.scales, block, row, codec.scale_dtype)
    lows = _read(cache, sections.lows, block, row, codec.low_dtype)
    # A cell that was never written names any channel.
    channels = _read(cache, sections.outlier_channels, block, token).clamp(max=head_dim - 1)
    values = _read(cache, sections.outlier_values, block, token, torch.bfloat16)
    coded = Quantized(codes, scales, lows, channels, values)
    # One token of a group of tokens: every channel has a scale of its own.
    return dequantize(coded, codec._replace(group_size=1) if codec.per_channel else codec, tensors.levels)


def _read(
    cache: torch.Tensor,
    section: Section,
    block: torch.Tensor,
    row: torch.Tensor,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """[..., kv heads, row_bytes / size of dtype]."""
    if section.row_bytes == 0:
        return torch.empty((*block.shape, cache.shape[1], 0), dtype=dtype, device=cache.device)
    return view_section(cache, section)[block, :, row].contiguous().view(dtype)
