# SPDX-License-Identifier: Apache-2.0
"""The compiled store of keys per channel writes what the reference writes, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.native.conftest import isa, ops  # noqa: F401  (fixtures)
from vllm_ext.kernels.kv_decode.reference import read_keys
from vllm_ext.kernels.kv_store import cpu, reference
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells, view_section

PLAIN = CodecTensors()
FP16 = torch.float16
BLOCKS, HEADS = 3, 3

LAYOUTS: dict[str, CellLayout] = {
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 128, 64),
    "kivi_k4v4": plan_cells(Codec(4, 32, per_channel=True), Codec(4, 32), 64, 96),
    "k3 in fp16": plan_cells(Codec(3, 16, per_channel=True, scale_dtype=FP16), Codec(2, 16), 80, 16),
    "k15": plan_cells(Codec(1.5, 64, per_channel=True), Codec(2, 16), 16, 64),
    "k8, long": plan_cells(Codec(8, 128, per_channel=True), Codec(2, 64), 256, 128),
}


def make_groups(layout: CellLayout, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys of whole groups as slices of keys with their values: strided. Channels lie off zero, each by its own."""
    generator = torch.Generator().manual_seed(groups)
    shape = groups, layout.key.group_size, HEADS, 2 * layout.head_dim
    offsets = 8 * torch.randn(2 * layout.head_dim, generator=generator)
    return (torch.randn(shape, generator=generator) + offsets).to(dtype)[..., : layout.head_dim]


def store_groups(
    layout: CellLayout,
    keys: torch.Tensor,
    slots: torch.Tensor,
    tensors: CodecTensors = PLAIN,
    clips: tuple[float, ...] = (1.0,),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches of the compiled kernel and of the reference."""
    assert cpu.knows(layout, tensors)
    caches = []
    for store in (cpu.store_key_groups, reference.store_key_groups):
        whole = torch.full((BLOCKS, 2, HEADS, layout.block_size, layout.cell_bytes), 0xA5, dtype=torch.uint8)
        store(keys, whole[:, 1], slots, layout, tensors, clips)
        assert bool((whole[:, 0] == 0xA5).all())
        caches.append(whole[:, 1])
    return caches[0], caches[1]


def make_tensors(head_dim: int) -> CodecTensors:
    generator = torch.Generator().manual_seed(head_dim)
    return CodecTensors(
        order=torch.rand(HEADS, head_dim, generator=generator).argsort(-1),
        smooth=torch.rand(HEADS, head_dim, generator=generator) + 0.5,
        shift=torch.randn(HEADS, head_dim, generator=generator),
        clip=torch.rand(HEADS, head_dim, generator=generator) * 0.3 + 0.7,
    )


def draw_groups(layout: CellLayout) -> torch.Tensor:
    """Slots of all groups of the cache in no order; of every third one nothing is stored."""
    size = layout.key.group_size
    count = BLOCKS * layout.block_size // size
    first = torch.randperm(count, generator=torch.Generator().manual_seed(count)) * size
    first[2::3] = -1
    return first


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_of_keys_are_those_of_the_reference(isa: str, name: str) -> None:  # noqa: F811
    layout = LAYOUTS[name]
    slots, D = draw_groups(layout), layout.head_dim
    calibrated = make_tensors(D)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        keys = make_groups(layout, len(slots), dtype)
        for tensors in (PLAIN, calibrated):
            given = slots.int() if dtype is torch.float16 else slots
            actual, expected = store_groups(layout, keys, given, tensors)
            assert torch.equal(actual, expected), (dtype, tensors is PLAIN)
    # Elements that are apart from each other.
    apart = make_groups(layout, len(slots), torch.float32).transpose(2, 3).contiguous().transpose(2, 3)
    assert apart.stride(-1) == HEADS
    assert torch.equal(store_groups(layout, apart, slots)[0], store_groups(layout, apart.contiguous(), slots)[1])
    assert torch.equal(*store_groups(layout, make_groups(layout, 0, torch.float32), slots[:0]))


def test_of_several_clips_of_a_channel_the_best_is_taken(isa: str) -> None:  # noqa: F811
    layout = LAYOUTS["kivi_k4v4"]
    slots = torch.arange(BLOCKS * layout.block_size // 32) * 32
    actual, expected = store_groups(
        layout, make_groups(layout, len(slots), torch.bfloat16), slots, clips=(1.0, 0.9, 0.8, 0.7)
    )
    plain, _ = store_groups(layout, make_groups(layout, len(slots), torch.bfloat16), slots)
    for section in layout.key_sections[:3]:
        cells, of_reference, unclipped = (view_section(cache, section) for cache in (actual, expected, plain))
        # Equal errors up to their last bits may go either way.
        assert float((cells == of_reference).float().mean()) > 0.998
        assert float((cells == unclipped).float().mean()) < 0.95


def test_groups_with_damage_are_as_in_the_reference(isa: str) -> None:  # noqa: F811
    layout = plan_cells(Codec(2, 16, per_channel=True), Codec(2, 16), 32, 32)
    keys = make_groups(layout, 6, torch.float32).clone()
    keys[0, 3, 0, 5], keys[1, 0, 1, 0], keys[2, 15, 2, 31], keys[3, :, :, 7] = torch.nan, 1e6, -torch.inf, 2.5
    tokens = torch.arange(6 * 16)
    for tensors in (PLAIN, make_tensors(32)._replace(clip=None)):
        caches = store_groups(layout, keys, torch.arange(6) * 16, tensors)
        reads = [read_keys(cache, tokens // 32, tokens % 32, layout, tensors) for cache in caches]
        torch.testing.assert_close(*reads, rtol=0, atol=0, equal_nan=True)
        # Two channels of a group of 16 tokens.
        assert int(reads[0].isnan().sum()) == 32


def test_misfits_of_groups_are_refused_by_name(isa: str, ops: Any) -> None:  # noqa: F811
    """By the op itself too, which C++ may call."""
    layout = LAYOUTS["kivi_k2v2"]
    keys = make_groups(layout, 1, torch.float32)
    cache = torch.zeros(BLOCKS, HEADS, layout.block_size, layout.cell_bytes, dtype=torch.uint8)
    fields = cpu.list_fields(layout)

    def store(keys: torch.Tensor, slot: int) -> None:
        ops.kv_store_key_groups(keys, cache, torch.tensor([slot]), fields, None, None, None, None, (1.0,))

    with pytest.raises(ValueError, match="slot 192 is past the cache's 3 blocks of 64"):
        store(keys, 192)
    with pytest.raises(ValueError, match="slot 16 must be a multiple of the group of 32 tokens"):
        store(keys, 16)
    with pytest.raises(ValueError, match=r"keys must be \[1, 32, 3, 128\], got \[1, 31, 3, 128\]"):
        store(keys[:, 1:], 0)
    with pytest.raises(ValueError, match=r"clip must be \[3, 128\], got \[3, 4\]"):
        store_groups(layout, keys, torch.tensor([0]), CodecTensors(clip=torch.ones(3, 4)))
    assert not cache.any()
