# SPDX-License-Identifier: Apache-2.0
"""Keys and values into quantized pages of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import cpu, reference
from .codec import CodecTensors
from .layout import CellLayout


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

    Per-channel keys (KIVI) are not written here: their scales span a group of tokens, so `reference.
    store_completed_groups` writes each group when its last token comes, and until then they are read from the window.
    Raises ValueError for shapes that do not fit the cache and a slot past its end.
    Source: SKVQ (arXiv:2405.06219), KIVI (2402.02750), KVQuant (2401.18079), QServe KV4 (2405.04532); vLLM's
    `AttentionImpl.do_kv_cache_update`.
    """
    store = cpu.store_kv if cache.device.type == "cpu" else reference.store_kv
    store(key, value, cache, slot_mapping, layout, key_tensors, value_tensors, clips)
