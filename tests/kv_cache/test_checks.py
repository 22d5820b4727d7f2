# SPDX-License-Identifier: Apache-2.0
"""The consistency check: what it expects to be kept, and that it sees a page that is gone, and one of another token."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.backend import KVCacheMetadata
from vllm_ext.kv_cache.checks import check_step, list_expected, list_whole_groups
from vllm_ext.kv_cache.presets import PRESETS

PAGE, BLOCK, HEADS, HEAD_DIM, TOKENS = 4, 16, 2, 16, 40


def make_step(starts: list[int], lens: list[int], table: torch.Tensor | None = None) -> KVCacheMetadata:
    blocks = torch.arange(8).view(2, 4) if table is None else table
    return KVCacheMetadata(
        torch.tensor(starts), torch.tensor(lens), blocks, blocks[:, :0], starts[-1], completes_groups=False
    )  # fmt: skip


def test_the_window_before_the_first_query_and_the_sinks_are_expected() -> None:
    request, position = list_expected(make_step([0, 3, 4], [23, 1]), window=6, sinks=2)
    # The second request starts here: nothing of it was kept.
    assert request.tolist() == [0] * 7
    assert position.tolist() == [0, 1, 15, 16, 17, 18, 19]


def test_groups_that_are_at_hand_as_a_whole_are_found() -> None:
    # Of the first request the end of a group and a whole one, of the second a group without its last token.
    request = torch.tensor([0] * 6 + [1] * 3)
    position = torch.tensor([3, 4, 5, 6, 7, 8, 0, 1, 2])
    assert list_whole_groups(request, position, 4).tolist() == [[1, 2, 3, 4]]
    assert list_whole_groups(request[:0], position[:0], 4).shape == (0, 4)


def test_per_channel_keys_are_compared_by_whole_groups() -> None:
    preset = dataclasses.replace(PRESETS["kivi_k2v2"], window=8).fit(HEAD_DIM)
    tokens, block = 70, 32
    layout = preset.plan_cells(HEAD_DIM, block)
    key, value = torch.randn(2, tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).unbind(0)
    impl: Any = SimpleNamespace(
        preset=preset, num_kv_heads=HEADS, head_size=HEAD_DIM, tensors=(CodecTensors(), CodecTensors()),
        clips=preset.clips, layer_name="layers.0", cos_sin=None,
    )  # fmt: skip
    cache = torch.zeros(3, HEADS, block, layout.cell_bytes, dtype=torch.uint8)
    store_kv(key, value, cache, torch.arange(tokens), layout, *impl.tensors, impl.clips)
    recent = torch.zeros(1 + 18, HEADS, PAGE, 2 * HEAD_DIM)
    padded = torch.nn.functional.pad(torch.cat([key, value], -1), (0, 0, 0, 0, 0, 2))
    recent[1:] = padded.unflatten(0, (-1, PAGE)).transpose(1, 2)
    recent_table = torch.arange(1, 19, dtype=torch.int32)[None]
    step = make_step([0, 1], [tokens + 1], torch.arange(3)[None])
    none = torch.zeros(1, HEADS, 1, 2 * HEAD_DIM)
    store_completed_groups(
        torch.cat([key, value], -1), cache, step.block_table, torch.tensor([0, tokens]), torch.tensor([tokens]), none,
        torch.zeros(1, 1, dtype=torch.int32), layout, impl.tensors[0], impl.clips,
    )  # fmt: skip
    check_step(impl, cache, step, recent, recent_table, layout)
    # Keys of positions 40 to 43, of the group from 32 to 63; those from 64 on have no codes yet.
    recent[11, :, :, :HEAD_DIM] = recent[2, :, :, :HEAD_DIM]
    with pytest.raises(RuntimeError, match=r"has another token's page for position 40 of row 0 \(4 of 32 tokens\)"):
        check_step(impl, cache, step, recent, recent_table, layout)


@pytest.fixture
def caches() -> dict[str, Any]:
    """A request of 40 tokens and its next step, in both caches."""
    preset = dataclasses.replace(PRESETS["skvq_k2v2"], window=8, sinks=2).fit(HEAD_DIM)
    layout = preset.plan_cells(HEAD_DIM, BLOCK)
    key, value = torch.randn(2, TOKENS, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).unbind(0)
    cache = torch.zeros(8, HEADS, BLOCK, layout.cell_bytes, dtype=torch.uint8)
    impl = SimpleNamespace(
        preset=preset, num_kv_heads=HEADS, head_size=HEAD_DIM, tensors=(CodecTensors(), CodecTensors()),
        clips=preset.clips, layer_name="layers.0", cos_sin=None,
    )  # fmt: skip
    store_kv(key, value, cache, torch.arange(TOKENS), layout, *impl.tensors, impl.clips)
    recent = torch.zeros(1 + TOKENS // PAGE, HEADS, PAGE, 2 * HEAD_DIM)
    recent[1:] = torch.cat([key, value], -1).unflatten(0, (-1, PAGE)).transpose(1, 2)
    table = torch.arange(1, 1 + TOKENS // PAGE, dtype=torch.int32)[None]
    step = make_step([0, 1], [TOKENS + 1], torch.arange(4)[None])
    return {
        "impl": impl, "cache": cache, "step": step, "recent": recent, "recent_table": table, "layout": layout
    }  # fmt: skip


def test_equal_caches_pass(caches: dict[str, Any]) -> None:
    check_step(**caches)


def test_a_page_that_is_gone_is_named(caches: dict[str, Any]) -> None:
    caches["recent_table"][0, 8] = 0
    with pytest.raises(RuntimeError, match=r"layers\.0 has no full-precision page for position 33 of row 0 \(3 of 9"):
        check_step(**caches)


@pytest.mark.parametrize("side", [slice(0, HEAD_DIM), slice(HEAD_DIM, 2 * HEAD_DIM)])
def test_the_page_of_another_token_is_named(caches: dict[str, Any], side: slice) -> None:
    caches["recent"][10, :, :, side] = caches["recent"][2, :, :, side]
    with pytest.raises(RuntimeError, match=r"has another token's page for position 36 of row 0 \(4 of 9 tokens\)"):
        check_step(**caches)


def test_the_same_token_from_another_batch_passes(caches: dict[str, Any]) -> None:
    """The rounding of bf16 moves some codes, and the clip that is best for a group."""
    noise = torch.randn(caches["recent"].shape, generator=torch.Generator().manual_seed(1))
    before = caches["recent"].clone()
    caches["recent"] *= 1 + 2**-8 * noise
    assert not torch.equal(before, caches["recent"])
    check_step(**caches)


def test_pages_that_were_never_written_are_named(caches: dict[str, Any]) -> None:
    caches["cache"].fill_(255)
    with pytest.raises(RuntimeError, match=r"has another token's page for position 0 of row 0 \(9 of 9 tokens\)"):
        check_step(**caches)
