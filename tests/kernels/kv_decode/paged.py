# SPDX-License-Identifier: Apache-2.0
"""Requests run through quantized pages step by step, as an engine would: shuffled blocks, garbage in empty cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_decode.reference import read_keys, read_values
from vllm_ext.kernels.kv_decode.rope import rotate
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors, from_stored
from vllm_ext.kernels.kv_store.layout import CellLayout

#: Tokens of a full-precision page.
PAGE_TOKENS = 4


class Case(NamedTuple):
    """Requests of several lengths; queries [tokens, heads, D], keys and values [tokens, kv heads, D] of each."""

    layout: CellLayout
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_tensors: CodecTensors = CodecTensors()
    value_tensors: CodecTensors = CodecTensors()
    window: int = 0
    sinks: int = 0
    clips: Sequence[float] = (1.0, 0.8)
    cos_sin: torch.Tensor | None = None

    @property
    def group_tokens(self) -> int:
        return self.layout.key.group_size if self.layout.key.per_channel else 1


class Outcome(NamedTuple):
    """Outputs [tokens, heads, D] of each request, and the pages at the end."""

    outputs: list[torch.Tensor]
    cache: torch.Tensor
    block_table: torch.Tensor


def make_case(
    layout: CellLayout, lengths: Sequence[int], kv_heads: int = 2, groups: int = 2, seed: int = 0, **options: object
) -> Case:
    """Random requests; options: fields of `Case`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(groups * kv_heads, layout.head_dim), (kv_heads, layout.head_dim), (kv_heads, layout.head_dim)]
    drawn = [[torch.randn(length, *shape, generator=generator) for length in lengths] for shape in shapes]
    return Case(layout, *drawn, **options)  # type: ignore[arg-type]


def run(case: Case, chunks: Sequence[Sequence[int]], seed: int = 0, is_stale: bool = False) -> Outcome:
    """Run every request in steps of these lengths (a request that has ended takes no further part).

    Only recent tokens and sinks have full-precision pages between steps: all other entries of the table are 0.
    is_stale: they still name pages that are no longer the request's, as in vLLM's workers.
    """
    layout, num_requests = case.layout, len(case.keys)
    kv_heads, longest = case.keys[0].shape[1], max(len(keys) for keys in case.keys)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-longest // layout.block_size)
    block_table = torch.randperm(num_requests * blocks, generator=generator).view(num_requests, blocks)
    shape = (num_requests * blocks, kv_heads, layout.block_size, layout.cell_bytes)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    pages = -(-longest // PAGE_TOKENS)
    all_pages = 1 + torch.randperm(num_requests * pages, generator=generator).view(num_requests, pages)
    shape = (1 + num_requests * pages, kv_heads, PAGE_TOKENS, 2 * layout.head_dim)
    recent = torch.full(shape, torch.nan, dtype=case.keys[0].dtype)
    done = [0] * num_requests
    outputs: list[list[torch.Tensor]] = [[] for _ in case.keys]
    for step in range(max(len(lengths) for lengths in chunks)):
        taken = [lengths[step] if step < len(lengths) else 0 for lengths in chunks]
        spans = [slice(start, start + length) for start, length in zip(done, taken, strict=True)]
        query, key, value = (
            torch.cat([x[span] for x, span in zip(side, spans, strict=True)])
            for side in (case.queries, case.keys, case.values)
        )
        position = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        request = torch.repeat_interleave(torch.tensor(taken))
        starts = torch.tensor([0, *taken]).cumsum(0).int()
        seq_lens = torch.tensor([span.stop for span in spans], dtype=torch.int32)
        stored_key = key if case.cos_sin is None else rotate(key, case.cos_sin[position], inverse=True)
        slots = block_table[request, position // layout.block_size] * layout.block_size + position % layout.block_size
        store_kv(
            stored_key, value, cache, slots, layout, case.key_tensors, case.value_tensors, case.clips
        )  # fmt: skip
        recent_table = _keep_recent(case, all_pages, done)
        if is_stale:
            recent[all_pages[recent_table == 0]] = torch.nan
            recent_table = all_pages.int()
        if layout.key.per_channel:
            store_completed_groups(
                torch.cat([stored_key, value], -1), cache, block_table, starts, seq_lens, recent, recent_table, layout,
                case.key_tensors, case.clips,
            )  # fmt: skip
        out = attend(
            query, key, value, cache, block_table, starts, seq_lens, recent, recent_table, layout, case.key_tensors,
            case.value_tensors, layout.head_dim**-0.5, case.window, case.sinks, case.cos_sin,
        )  # fmt: skip
        for index, part in enumerate(out.split(taken)):
            outputs[index].append(part)
        recent[all_pages[request, position // PAGE_TOKENS], :, position % PAGE_TOKENS] = torch.cat([key, value], -1)
        done = [span.stop for span in spans]
    assert done == [len(keys) for keys in case.keys], "the chunks do not make up the requests"
    return Outcome([torch.cat(parts) for parts in outputs], cache, block_table)


def read_back(case: Case, outcome: Outcome, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized keys and values [tokens, kv heads, D] in the model's coordinates; keys of incomplete groups: 0."""
    layout = case.layout
    position = torch.arange(len(case.keys[request]))
    block, token = outcome.block_table[request, position // layout.block_size], position % layout.block_size
    keys = from_stored(read_keys(outcome.cache, block, token, layout, case.key_tensors), case.key_tensors)
    if case.cos_sin is not None:
        keys = rotate(keys, case.cos_sin[position])
    keys[len(position) // case.group_tokens * case.group_tokens :] = 0
    values = read_values(outcome.cache, block, token, layout, case.value_tensors)
    return keys, from_stored(values, case.value_tensors)


def attend_plainly(case: Case, outcome: Outcome, request: int) -> torch.Tensor:
    """Softmax attention, query by query in float64, over keys and values mixed by the rule."""
    keys, values = (x.double() for x in read_back(case, outcome, request))
    query, raw_key, raw_value = (side[request].double() for side in (case.queries, case.keys, case.values))
    groups = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    for t in range(len(query)):
        start = (t - case.window + 1) // case.group_tokens * case.group_tokens
        full = torch.tensor([s < case.sinks or s >= start for s in range(t + 1)])[:, None, None]
        key, value = (
            torch.where(full, raw[: t + 1], coded[: t + 1]).repeat_interleave(groups, 1)
            for raw, coded in ((raw_key, keys), (raw_value, values))
        )
        scores = torch.einsum("hd,shd->hs", query[t], key) * case.layout.head_dim**-0.5
        out[t] = torch.einsum("hs,shd->hd", scores.softmax(-1), value)
    return out


def _keep_recent(case: Case, all_pages: torch.Tensor, done: Sequence[int]) -> torch.Tensor:
    """The table of pages that still hold what the next step may read in full precision."""
    first = torch.tensor(done).unsqueeze(-1) - (case.window - 1) - (case.group_tokens - 1)
    page = torch.arange(all_pages.shape[1])
    kept = ((page + 1) * PAGE_TOKENS > first) | (page * PAGE_TOKENS < case.sinks)
    return all_pages.masked_fill(~kept, 0).int()
