# SPDX-License-Identifier: Apache-2.0
"""`attend` on the CPU: cpu.cpp where the compiled kernels know the layout, the reference elsewhere."""

from __future__ import annotations

import torch

from ..kv_store.arguments import check_cache, check_rows
from ..kv_store.codec import CodecTensors
from ..kv_store.cpu import knows, list_fields
from ..kv_store.layout import CellLayout
from ..native.load import load_ops
from . import reference


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

    The reference runs for float32 queries, for which it is exact, codebooks, outliers, keys before RoPE (KVQuant),
    head sizes that are no multiple of 16, and where nothing could be compiled. The compiled kernel multiplies codes
    with integers: 16 bits of the query and of the softmax's weights. Before the output is rounded, its error is below
    0.1 % of exact attention on the dequantized cache.
    """
    check_cache(cache, layout)
    check_rows("key", key, cache, layout)
    check_rows("value", value, cache, layout)
    is_fast = query.dtype != torch.float32 and cos_sin is None and knows(layout, key_tensors, value_tensors)
    if not is_fast or (ops := load_ops()) is None:
        return reference.attend(
            query, key, value, cache, block_table, query_start_loc, seq_lens, recent, recent_table, layout, key_tensors,
            value_tensors, scale, window, sinks, cos_sin,
        )  # fmt: skip
    out: torch.Tensor = ops.kv_attend(
        query, key, value, cache, block_table, query_start_loc, seq_lens, recent, recent_table, list_fields(layout),
        key_tensors.order, key_tensors.smooth, key_tensors.shift, value_tensors.order, value_tensors.smooth,
        value_tensors.shift, scale, window, sinks,
    )  # fmt: skip
    return out
