# SPDX-License-Identifier: Apache-2.0
"""Keys and values into quantized pages of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import cpu, reference
from .codec import CodecTensors
from .layout import CellLayout
from .recent import gather_recent, list_completed_groups


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    value_tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
) -> None:
    """Quantize, pack and write the keys and values of a step's tokens.

    key, value    float [tokens, kv heads, D]; keys of a pre-RoPE preset are already rotated back (kv_decode.rope)
    cache         uint8 [blocks, kv heads, N, C], written in place; layout.py draws it
    slot_mapping  int [slots]: block * N + token of the first `slots` rows; -1: not stored
    layout        codecs and sections, `layout.plan_cells`
    key_tensors, value_tensors  calibration of this layer, on the cache's device
    clips         shares of a group's range that its levels may span; the best for each group is taken, or the one of
                  its tensors

    Per-channel keys (KIVI) are not written here: their scales span a group of tokens, so `store_completed_groups`
    writes each group when its last token comes, and until then they are read from the window.
    Raises ValueError for shapes that do not fit the cache and a slot past its end.
    Source: SKVQ (arXiv:2405.06219), KIVI (2402.02750), KVQuant (2401.18079), QServe KV4 (2405.04532); vLLM's
    `AttentionImpl.do_kv_cache_update`.
    """
    store = cpu.store_kv if cache.device.type == "cpu" else reference.store_kv
    store(key, value, cache, slot_mapping, layout, key_tensors, value_tensors, clips)


def store_key_groups(
    keys: torch.Tensor,
    cache: torch.Tensor,
    first_slots: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    clips: Sequence[float] = (1.0,),
) -> None:
    """Code whole groups of keys per channel (KIVI) and write their codes and scales.

    keys: float [groups, group_size tokens, kv heads, D]. first_slots: int [groups], slot of each group's first token,
    -1 to skip; a group starts on a multiple of group_size and stays inside one page. The rest as `store_kv`. Raises
    ValueError for a layout with per-token keys, shapes that do not fit, a slot that starts no group and one past the
    cache's end.
    """
    store = cpu.store_key_groups if cache.device.type == "cpu" else reference.store_key_groups
    store(keys, cache, first_slots, layout, key_tensors, clips)


def store_completed_groups(
    step: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    layout: CellLayout,
    key_tensors: CodecTensors,
    clips: Sequence[float],
) -> None:
    """Find the groups that this step completes, collect their keys, and store them.

    step: [tokens, kv heads, 2*D], this step's keys (as they are stored) and values; block_table: int [requests,
    blocks] of `cache`; the rest as `gather_recent`. A group is coded from its whole content, so its cells depend on
    the tokens alone, not on how a prompt was cut. Raises ValueError where a key of a completed group is in neither:
    the window of recent pages must reach group_size - 1 tokens behind the step.
    """
    group_size = layout.key.group_size
    request, first = list_completed_groups(query_start_loc, seq_lens, group_size)
    position = first[:, None] + torch.arange(group_size, device=first.device)
    keys, kept = gather_recent(
        step, query_start_loc, seq_lens, recent, recent_table, request[:, None].expand_as(position), position
    )
    if not bool(kept.all()):
        missing = int((~kept).nonzero()[0, 0])
        raise ValueError(
            f"request {int(request[missing])} has no full-precision key for its group at {int(first[missing])}: "
            f"keep {group_size - 1} tokens beyond the window"
        )
    slots = block_table.long()[request, first // layout.block_size] * layout.block_size + first % layout.block_size
    store_key_groups(keys[..., : layout.head_dim], cache, slots, layout, key_tensors, clips)
