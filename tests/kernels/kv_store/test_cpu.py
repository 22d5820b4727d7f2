# SPDX-License-Identifier: Apache-2.0
"""The compiled store writes what the reference writes, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.native.conftest import isa, ops  # noqa: F401  (fixtures)
from vllm_ext.kernels.kv_decode.reference import read_keys, read_values
from vllm_ext.kernels.kv_store import cpu, reference
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells

PLAIN = CodecTensors()
FP16 = torch.float16
BLOCKS, HEADS = 3, 3

#: Presets' codecs, and groups that do not divide into vectors, at head sizes from 16 to 256.
LAYOUTS: dict[str, CellLayout] = {
    "skvq_k2v2": plan_cells(Codec(2, 128), Codec(2, 128), 128, 16),
    "skvq_k2v15": plan_cells(Codec(2, 64), Codec(1.5, 64), 64, 32),
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 128, 64),
    "kv4": plan_cells(Codec(4, 80, scale_dtype=FP16), Codec(4, 80, scale_dtype=FP16), 80, 7),
    "k8v8 groups": plan_cells(Codec(8, 24), Codec(8, 12, scale_dtype=FP16), 48, 16),
    "k15v2 groups": plan_cells(Codec(1.5, 20), Codec(2, 8), 160, 16),
    "small": plan_cells(Codec(2, 16), Codec(1.5, 16), 16, 8),
    "k3v3": plan_cells(Codec(3, 128), Codec(3, 32), 128, 16),
    "k3v15 groups": plan_cells(Codec(3, 24), Codec(1.5, 16), 48, 32),
    "large": plan_cells(Codec(4, 256), Codec(2, 128), 256, 128),
}


def make_tensors(codec: Codec, head_dim: int, seed: int) -> CodecTensors:
    generator = torch.Generator().manual_seed(seed)
    return CodecTensors(
        order=torch.rand(HEADS, head_dim, generator=generator).argsort(-1),
        smooth=torch.rand(HEADS, head_dim, generator=generator) + 0.5,
        shift=torch.randn(HEADS, head_dim, generator=generator),
        clip=torch.rand(HEADS, head_dim // codec.group_size, generator=generator) * 0.3 + 0.7,
    )


def make_rows(head_dim: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as slices of one fused projection: strided."""
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(tokens, HEADS, 3 * head_dim, generator=generator) * 3 + 1
    return fused.to(dtype)[..., :head_dim], fused.to(dtype)[..., head_dim : 2 * head_dim]


def draw_slots(layout: CellLayout, tokens: int) -> torch.Tensor:
    """Slots in no order; every fifth token has none."""
    slots = torch.randperm(BLOCKS * layout.block_size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    slots[4::5] = -1
    return slots


def store_both(
    layout: CellLayout,
    rows: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    key_tensors: CodecTensors = PLAIN,
    value_tensors: CodecTensors = PLAIN,
    clips: tuple[float, ...] = (1.0,),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches of the compiled kernel and of the reference; blocks are apart from each other in memory."""
    assert cpu.knows(layout, key_tensors, value_tensors)
    caches = []
    for store in (cpu.store_kv, reference.store_kv):
        whole = torch.full((BLOCKS, 2, HEADS, layout.block_size, layout.cell_bytes), 0xA5, dtype=torch.uint8)
        store(*rows, whole[:, 1], slots, layout, key_tensors, value_tensors, clips)
        assert bool((whole[:, 0] == 0xA5).all())
        caches.append(whole[:, 1])
    return caches[0], caches[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells_are_those_of_the_reference(isa: str, name: str) -> None:  # noqa: F811
    layout = LAYOUTS[name]
    for tokens, dtype in ((1, torch.bfloat16), (21, torch.float16), (20, torch.float32)):
        rows = make_rows(layout.head_dim, tokens, dtype)
        slots = draw_slots(layout, tokens)
        for calibrated in (False, True):
            tensors = {}
            if calibrated:
                tensors = {
                    "key_tensors": PLAIN if layout.key.per_channel else make_tensors(layout.key, layout.head_dim, 1),
                    "value_tensors": make_tensors(layout.value, layout.head_dim, 2),
                }
            actual, expected = store_both(layout, rows, slots.int() if tokens == 1 else slots, **tensors)
            assert torch.equal(actual, expected), (tokens, dtype, calibrated)


def test_nothing_to_store_changes_nothing(isa: str) -> None:  # noqa: F811
    layout = LAYOUTS["kv4"]
    cache = torch.full((BLOCKS, HEADS, layout.block_size, layout.cell_bytes), 0xA5, dtype=torch.uint8)
    for slots in (torch.empty(0, dtype=torch.int64), torch.tensor([-1, -1])):
        cpu.store_kv(*make_rows(80, 2, torch.bfloat16), cache, slots, layout, PLAIN, PLAIN, (1.0,))
        assert bool((cache == 0xA5).all())


def test_many_tokens_are_shared_among_threads(isa: str) -> None:  # noqa: F811
    layout = plan_cells(Codec(2, 64), Codec(4, 32), 64, 128)
    # Rows past the slots pad the batch.
    rows = make_rows(64, 390, torch.bfloat16)
    actual, expected = store_both(layout, rows, draw_slots(layout, 384))
    assert torch.equal(actual, expected)


def test_of_several_clips_the_best_is_taken(isa: str) -> None:  # noqa: F811
    layout = LAYOUTS["skvq_k2v15"]
    rows = make_rows(64, 90, torch.bfloat16)
    slots = torch.arange(90)
    actual, expected = store_both(layout, rows, slots, clips=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    # Equal errors up to their last bits may go either way.
    assert float((actual == expected).float().mean()) > 0.999
    block, token = slots // layout.block_size, slots % layout.block_size
    for read, x in ((read_keys, rows[0]), (read_values, rows[1])):
        errors = [
            float((read(cache, block, token, layout, PLAIN) - x.float()).square().sum()) for cache in (actual, expected)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-5)


def test_saturation_and_damage_are_as_in_the_reference(isa: str) -> None:  # noqa: F811
    layout = plan_cells(Codec(2, 16), Codec(4, 16, scale_dtype=FP16), 32, 16)
    key, value = (x.clone() for x in make_rows(32, 8, torch.float32))
    for x in (key, value):
        x[0, 0, 3], x[1, 0, 17], x[2, 1, 0], x[3, 1, 31] = 1e6, -1e6, torch.nan, torch.inf
        x[4, :, :16] = 2.5
        x[5] = 0
        x[6] = 1e-6
    slots = torch.arange(8)
    actual, expected = store_both(layout, (key, value), slots)
    position = torch.zeros(8, dtype=torch.int64)
    for read in (read_keys, read_values):
        numbers = [read(cache, position, slots, layout, PLAIN) for cache in (actual, expected)]
        assert bool(numbers[0][2, 1, :16].isnan().all())
        assert bool(numbers[0][3, 1, 16:].isnan().all())
        torch.testing.assert_close(numbers[0], numbers[1], rtol=0, atol=0, equal_nan=True)


def test_misfits_are_refused_by_name(isa: str) -> None:  # noqa: F811
    layout = LAYOUTS["small"]
    rows = make_rows(16, 2, torch.bfloat16)
    with pytest.raises(ValueError, match="slot 24 is past the cache's 3 blocks of 8"):
        store_both(layout, rows, torch.tensor([0, 24]))
    with pytest.raises(ValueError, match=r"smooth must be \[3, 16\], got \[2, 16\]"):
        store_both(layout, rows, torch.tensor([0, 1]), CodecTensors(smooth=torch.ones(2, 16)))
    with pytest.raises(ValueError, match="order holds 16, but head_dim=16"):
        store_both(layout, rows, torch.tensor([0, 1]), CodecTensors(order=torch.full((3, 16), 16)))
    with pytest.raises(ValueError, match=r"value must be float \[at least 3"):
        store_both(layout, rows, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "layout",
    [
        plan_cells(Codec(3, 16, outliers=2), Codec(3, 16), 16, 8),
        plan_cells(Codec(2, 16, outliers=2), Codec(2, 16), 16, 8),
        plan_cells(Codec(2, 24), Codec(2, 24), 24, 8),
        plan_cells(Codec(2, 48, per_channel=True), Codec(2, 16), 48, 48),
    ],
)
def test_layouts_left_to_the_reference_are_stored_all_the_same(layout: CellLayout) -> None:
    assert not cpu.knows(layout)
    rows = make_rows(layout.head_dim, 4, torch.bfloat16)
    caches = [torch.zeros(BLOCKS, HEADS, layout.block_size, layout.cell_bytes, dtype=torch.uint8) for _ in range(2)]
    for store, cache in zip((cpu.store_kv, reference.store_kv), caches, strict=True):
        store(*rows, cache, torch.arange(4), layout, PLAIN, PLAIN, (1.0,))
    assert torch.equal(*caches)
    assert not cpu.knows(LAYOUTS["small"], CodecTensors(levels=torch.arange(4.0)))
