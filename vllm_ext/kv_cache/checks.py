# SPDX-License-Identifier: Apache-2.0
"""`kv_cache.check`: do a layer's two caches hold the same tokens, in every step?

For every token before the step that the step's queries may read in full precision: its page must be there, and what
the quantized page holds must be about as near to it as its own codes. A block that was freed too early, given out
twice, or found by a wrong hash shows up here, where outputs would only be a little worse.

Not the same bytes: of a prefix hit, quantized pages and those of the window may come from two requests, which computed
the same tokens in batches that round differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_ext.kernels.kv_decode.reference import read_keys, read_values
from vllm_ext.kernels.kv_decode.rope import rotate
from vllm_ext.kernels.kv_store import store_kv
from vllm_ext.kernels.kv_store.codec import dequantize, to_stored
from vllm_ext.kernels.kv_store.layout import CellLayout
from vllm_ext.kernels.kv_store.recent import gather_recent
from vllm_ext.kernels.kv_store.reference import quantize_key_groups

if TYPE_CHECKING:
    from vllm_ext.kv_cache.backend import KVCacheImpl, KVCacheMetadata

#: A page is another token's where it is this much further away than the token's own codes, plus a share of the token's
#: size. Another token is about 1.4 times that size away, two bits are 0.3 of it, and bf16 rounds by less than 0.01.
FURTHER, SHARE = 1.5, 0.02


def check_step(
    impl: KVCacheImpl,
    cache: torch.Tensor,
    step: KVCacheMetadata,
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    layout: CellLayout,
) -> None:
    """Raise RuntimeError, naming layer, row of the batch and position, where the caches differ.

    Per-channel keys are compared where all of their group is at hand in full precision.
    """
    preset = impl.preset
    if not preset.keeps_recent:
        return
    request, position = list_expected(step, preset.retained_window, preset.sinks)
    if request.numel() == 0:
        return
    empty = recent.new_zeros(0, impl.num_kv_heads, 2 * impl.head_size)
    # No rows of the step: what is found comes from the pages.
    none = torch.zeros_like(step.query_start_loc)
    rows, kept = gather_recent(empty, none, step.seq_lens, recent, recent_table, request, position)
    if not bool(kept.all()):
        _fail(impl, "has no full-precision page for", request, position, ~kept)
    scratch = cache.new_zeros(-(-len(rows) // layout.block_size), *cache.shape[1:])
    slots = torch.arange(len(rows), device=cache.device)
    key, value = rows[..., : impl.head_size].contiguous(), rows[..., impl.head_size :].contiguous()
    if impl.cos_sin is not None:
        key = rotate(key, impl.cos_sin[position], inverse=True)
    store_kv(key, value, scratch, slots, layout, *impl.tensors, impl.clips)
    block = step.block_table.long()[request, position // layout.block_size]
    places = [(cache, block, position % layout.block_size)]
    places.append((scratch, slots // layout.block_size, slots % layout.block_size))
    readers = [(read_values, value, impl.tensors[1])]
    if not layout.key.per_channel:
        readers.append((read_keys, key, impl.tensors[0]))
    for read, exact, tensors in readers:
        token = to_stored(exact, tensors)
        there, own = (read(*place, layout, tensors) for place in places)
        _compare(impl, there, own, token, request, position)
    if layout.key.per_channel:
        whole = list_whole_groups(request, position, layout.key.group_size)
        token = to_stored(key[whole], impl.tensors[0])
        coded = quantize_key_groups(token, layout.key, impl.tensors[0], impl.clips)
        own = dequantize(coded, layout.key, impl.tensors[0].levels).permute(0, 3, 1, 2)
        there = read_keys(cache, block[whole], position[whole] % layout.block_size, layout, impl.tensors[0])
        there, own, token = (x.flatten(0, 1) for x in (there, own, token))
        _compare(impl, there, own, token, request[whole].flatten(), position[whole].flatten())


def list_whole_groups(request: torch.Tensor, position: torch.Tensor, group_tokens: int) -> torch.Tensor:
    """Rows of the tokens of every group of which all are listed, int64 [groups, group_tokens].

    request, position: int64 [tokens], ascending.
    """
    first = (position % group_tokens == 0).nonzero().squeeze(-1)
    first = first[first + group_tokens <= len(position)]
    last = first + group_tokens - 1
    is_whole = (request[last] == request[first]) & (position[last] == position[first] + group_tokens - 1)
    return first[is_whole][:, None] + torch.arange(group_tokens, device=first.device)


def _compare(
    impl: KVCacheImpl,
    there: torch.Tensor,
    own: torch.Tensor,
    token: torch.Tensor,
    request: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """What pages hold, what a token's own codes hold, and the token, float32 [tokens, kv heads, D]."""
    distance, least = ((x - token).flatten(1).norm(dim=1) for x in (there, own))
    # Also where it is NaN.
    differs = ~(distance <= FURTHER * least + SHARE * token.flatten(1).norm(dim=1))
    if bool(differs.any()):
        _fail(impl, "has another token's page for", request, position, differs)


def list_expected(step: KVCacheMetadata, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens before the step that must be kept: the sinks, and `window` - 1 before the first query.

    Returns (request, position), int64 [tokens].
    """
    lens, lengths = step.seq_lens.long(), step.query_start_loc.diff().long()
    past = torch.where(lengths > 0, lens - lengths, 0)
    position = torch.arange(int(past.max()) if past.numel() else 0, device=past.device)
    needed = (position < sinks) | (position >= (past - window + 1)[:, None])
    request, position = (needed & (position < past[:, None])).nonzero().unbind(1)
    return request, position


def _fail(impl: KVCacheImpl, what: str, request: torch.Tensor, position: torch.Tensor, is_bad: torch.Tensor) -> None:
    first = int(is_bad.nonzero()[0, 0])
    raise RuntimeError(
        f"{impl.layer_name} {what} position {int(position[first])} of row {int(request[first])} "
        f"({int(is_bad.sum())} of {len(is_bad)} tokens): please report this as a bug of vllm-ext"
    )
