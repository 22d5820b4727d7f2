# SPDX-License-Identifier: Apache-2.0
"""Keys and values in full precision: tokens of the running step, and the pages of recent tokens and sinks.

recent        [blocks, kv heads, M tokens, 2*D] in the model's dtype: K, then V
recent_table  int [requests, blocks]: the page of every M tokens of a request; 0: none kept (vLLM's null block)
"""

from __future__ import annotations

import torch


def gather_recent(
    step: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of chosen (request, position) pairs, wherever they are kept.

    step: [tokens, kv heads, 2*D], this step's K, then V. query_start_loc: int [requests + 1]; seq_lens: int
    [requests], this step included. request, position: int64 [...]. Returns ([..., kv heads, 2*D] in step's dtype,
    bool [...]: kept). What is not kept, or lies past the request's end, is zero.
    """
    starts, lengths = query_start_loc[:-1].long(), query_start_loc.diff().long()
    lens = seq_lens.long()
    in_step = position - (lens - lengths)[request]
    is_step = (in_step >= 0) & (position < lens[request])
    page_tokens, width = recent.shape[2], recent_table.shape[1]
    column = position // page_tokens
    page = recent_table.long()[request, column.clamp(0, width - 1)] if width else torch.zeros_like(position)
    is_kept = ~is_step & (in_step < 0) & (position >= 0) & (column < width) & (page > 0)
    out = step.new_zeros((*position.shape, *step.shape[1:]))
    out[is_step] = step[(starts[request] + in_step)[is_step]]
    out[is_kept] = recent[page[is_kept], :, (position % page_tokens)[is_kept]].to(step.dtype)
    return out, is_step | is_kept


def list_completed_groups(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of `group_size` tokens whose last token comes in this step: (request, first position), int64 [groups].

    In the order of requests, then of positions. Arguments as `gather_recent`.
    """
    lens = seq_lens.long()
    first = (lens - query_start_loc.diff().long()) // group_size
    counts = lens // group_size - first
    request = torch.repeat_interleave(counts)
    index = torch.arange(request.numel(), device=request.device) - (counts.cumsum(0) - counts)[request]
    return request, (first[request] + index) * group_size
