# SPDX-License-Identifier: Apache-2.0
"""Attention over a quantized past, with recent tokens and sinks in full precision."""

from __future__ import annotations

import torch

from ..kv_store.codec import CodecTensors
from ..kv_store.layout import CellLayout
from . import cpu, reference


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
    cos_sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a step's queries, prefill and decode alike, over a past of quantized pages.

    query            float [tokens, heads, D], requests one after the other
    key, value       float [tokens, kv heads, D] of the same tokens, as the model made them; already stored
    cache            uint8 [blocks, kv heads, N, C]; kv_store/layout.py draws it
    block_table      int [requests, blocks] into cache
    query_start_loc  int [requests + 1]: where each request's queries begin
    seq_lens         int [requests]: tokens of each request, this step's included
    recent, recent_table  full-precision pages: kv_store/recent.py
    scale            of the scores, usually D**-0.5
    window, sinks    tokens before and at each query, and at the start, that are read in full precision
    cos_sin          float [positions, rotary]: keys in the cache are not rotated yet; None: they are

    Returns [tokens, heads, D] in query's dtype. Which key is read how is a function of the two positions alone
    (reference.py), so any split of a prompt into steps gives the same result.
    Raises ValueError for shapes that do not fit, and for a key that no page holds.
    Source: SKVQ's window and sinks; the two parts are merged as in FlashDecoding and vLLM's `merge_attn_states`.
    """
    run = cpu.attend if query.device.type == "cpu" else reference.attend
    return run(
        query, key, value, cache, block_table, query_start_loc, seq_lens, recent, recent_table, layout, key_tensors,
        value_tensors, scale, window, sinks, cos_sin,
    )  # fmt: skip
