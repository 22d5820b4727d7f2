# SPDX-License-Identifier: Apache-2.0
"""Storing: only the slots given are written, groups of keys are found and collected, misuse is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.kv_decode.reference import read_keys, read_values
from vllm_ext.kernels.kv_store import reference, store_completed_groups, store_key_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors, dequantize, quantize
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells
from vllm_ext.kernels.kv_store.recent import gather_recent, list_completed_groups

PLAIN = CodecTensors()
TOKENS = plan_cells(Codec(2, 8), Codec(1.5, 16), 16, 8)
CHANNELS = plan_cells(Codec(2, 4, per_channel=True), Codec(2, 8), 16, 8)


def make_rows(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 2, 16, generator=generator).unbind(0)  # type: ignore[return-value]


def make_cache(layout: CellLayout, fill: int = 0, blocks: int = 3) -> torch.Tensor:
    return torch.full((blocks, 2, layout.block_size, layout.cell_bytes), fill, dtype=torch.uint8)


@given(st.integers(0, 2**16), st.lists(st.integers(-1, 23), max_size=9, unique_by=lambda slot: (slot, slot == -1)))
def test_slots_hold_what_the_codec_makes_and_others_are_left_alone(seed: int, slots: list[int]) -> None:
    # Rows beyond the slots are padding.
    key, value = make_rows(seed, len(slots) + 2)
    cache = make_cache(TOKENS, 7)
    store_kv(key, value, cache, torch.tensor(slots, dtype=torch.int64), TOKENS, PLAIN, PLAIN)
    position = torch.arange(24)
    block, token = position // 8, position % 8
    keys, values = read_keys(cache, block, token, TOKENS, PLAIN), read_values(cache, block, token, TOKENS, PLAIN)
    untouched = make_cache(TOKENS, 7)
    old_keys, old_values = (read(untouched, block, token, TOKENS, PLAIN) for read in (read_keys, read_values))
    for slot in range(24):
        if slot in slots:
            row = slots.index(slot)
            assert torch.equal(keys[slot], dequantize(quantize(key[row], TOKENS.key), TOKENS.key))
            assert torch.equal(values[slot], dequantize(quantize(value[row], TOKENS.value), TOKENS.value))
        else:
            assert torch.equal(keys[slot], old_keys[slot])
            assert torch.equal(values[slot], old_values[slot])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_model_dtype_is_stored(dtype: torch.dtype) -> None:
    key, value = (x.to(dtype) for x in make_rows(0, 8))
    cache = make_cache(TOKENS)
    store_kv(key, value, cache, torch.arange(8, dtype=torch.int32), TOKENS, PLAIN, PLAIN)
    read = read_keys(cache, torch.zeros(8, dtype=torch.int64), torch.arange(8), TOKENS, PLAIN)
    assert torch.equal(read, dequantize(quantize(key.float(), TOKENS.key), TOKENS.key))


def test_key_groups_share_scales_over_tokens() -> None:
    keys = torch.zeros(1, 4, 2, 16)
    # A large channel: its own scale, so that the others lose nothing.
    keys[0, :, :, 3] = torch.tensor([100.0, 102.0, 104.0, 106.0])[:, None]
    keys[0, :, :, 5] = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    cache = make_cache(CHANNELS)
    store_key_groups(keys, cache, torch.tensor([12]), CHANNELS, PLAIN, (1.0,))
    read = read_keys(cache, torch.ones(4, dtype=torch.int64), torch.arange(4, 8), CHANNELS, PLAIN)
    assert torch.equal(read[..., 5], keys[0, ..., 5])
    assert float((read[..., 3] - keys[0, ..., 3]).abs().max()) <= 4.0
    untouched = read_keys(cache, torch.zeros(8, dtype=torch.int64), torch.arange(8), CHANNELS, PLAIN)
    assert float(untouched.abs().max()) == 0.0
    before = cache.clone()
    store_key_groups(keys, cache, torch.tensor([-1]), CHANNELS, PLAIN, (1.0,))
    assert torch.equal(cache, before)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4), st.sampled_from([1, 4, 8]))
def test_completed_groups_are_those_that_end_in_the_step(requests: list[tuple[int, int]], size: int) -> None:
    starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0)
    lens = torch.tensor([old + new for old, new in requests], dtype=torch.int64)
    request, first = list_completed_groups(starts, lens, size)
    expected = [
        (index, group * size)
        for index, (old, new) in enumerate(requests)
        for group in range(40)
        if old < (group + 1) * size <= old + new
    ]
    assert list(zip(request.tolist(), first.tolist(), strict=True)) == expected


def test_recent_tokens_come_from_the_step_or_their_pages() -> None:
    step = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 4)
    recent = 10 + torch.arange(8.0).view(4, 1, 2, 1).expand(4, 1, 2, 4)
    # Request 0: 4 tokens, 1 of them new; request 1: 5 tokens, 2 of them new, its first page gone.
    table = torch.tensor([[1, 2], [0, 3]])
    starts, lens = torch.tensor([0, 1, 3]), torch.tensor([4, 5])
    request = torch.tensor([0] * 5 + [1] * 6)
    position = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5])
    values, kept = gather_recent(step, starts, lens, recent, table, request, position)
    assert kept.tolist() == [True] * 4 + [False] + [False, False, True, True, True, False]
    assert values[:, 0, 0].tolist() == [12.0, 13.0, 14.0, 0.0, 0.0, 0.0, 0.0, 16.0, 1.0, 2.0, 0.0]


def test_misuse_is_refused_by_name() -> None:
    key, value = make_rows(0, 4)
    cache, slots = make_cache(TOKENS), torch.arange(4)
    with pytest.raises(ValueError, match="slot 24 is past the cache's 3 blocks of 8"):
        store_kv(key, value, cache, slots + 21, TOKENS, PLAIN, PLAIN)
    with pytest.raises(ValueError, match=r"key must be float \[tokens, 2, 16\], got torch\.int64"):
        store_kv(key.long(), value, cache, slots, TOKENS, PLAIN, PLAIN)
    with pytest.raises(ValueError, match=r"cache must be uint8 \[blocks, kv heads, 8, 14\]"):
        store_kv(key, value, cache[..., :-1], slots, TOKENS, PLAIN, PLAIN)
    with pytest.raises(ValueError, match="needs per-channel keys"):
        store_key_groups(key.unsqueeze(0), cache, torch.tensor([0]), TOKENS, PLAIN, (1.0,))
    cache = make_cache(CHANNELS)
    with pytest.raises(ValueError, match="multiples of the group of 4 tokens"):
        store_key_groups(key.unsqueeze(0), cache, torch.tensor([2]), CHANNELS, PLAIN, (1.0,))
    with pytest.raises(ValueError, match=r"keys must be float \[1, 4, 2, 16\], got torch\.float32 \[1, 3, 2, 16\]"):
        store_key_groups(key[None, :3], cache, torch.tensor([0]), CHANNELS, PLAIN, (1.0,))
    with pytest.raises(ValueError, match="slot 24 is past the cache's 3 blocks of 8"):
        store_key_groups(key.unsqueeze(0), cache, torch.tensor([24]), CHANNELS, PLAIN, (1.0,))
    step = torch.cat([key, value], -1)
    with pytest.raises(ValueError, match="request 0 has no full-precision key for its group at 4: keep 3 tokens"):
        store_completed_groups(
            step, cache, torch.zeros(1, 3), torch.tensor([0, 4]), torch.tensor([10]), torch.zeros(1, 2, 4, 32),
            torch.zeros(1, 3), CHANNELS, PLAIN, (1.0,),
        )  # fmt: skip


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, torch.float16])
def test_a_step_without_stored_tokens_stores_nothing(scale_dtype: torch.dtype) -> None:
    """A batch of padding alone; the bytes of no scales have the shape of their bytes, too."""
    layout = plan_cells(Codec(4, 8, scale_dtype=scale_dtype), Codec(4, 8, scale_dtype=scale_dtype), 16, 8)
    key, value = make_rows(0, 3)
    cache = make_cache(layout, 7)
    reference.store_kv(key, value, cache, torch.full((3,), -1), layout, PLAIN, PLAIN, (1.0,))
    assert torch.equal(cache, make_cache(layout, 7))
