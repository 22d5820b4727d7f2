# SPDX-License-Identifier: Apache-2.0
"""Pages: every byte has one owner, sizes are those of the drawing, and what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.kernels.kv_store.layout import (
    LEVELS,
    CellLayout,
    Codec,
    Section,
    bits_per_element,
    plan_cells,
    side_bytes,
    view_section,
)


@st.composite
def layouts(draw: st.DrawFn) -> CellLayout:
    head_dim = draw(st.sampled_from([8, 24, 40, 64, 80, 128, 256]))
    block_size = draw(st.sampled_from([16, 32, 64]))
    return plan_cells(draw(codecs(head_dim, True)), draw(codecs(head_dim, False)), head_dim, block_size)


@st.composite
def codecs(draw: st.DrawFn, head_dim: int, allow_channels: bool) -> Codec:
    bits = draw(st.sampled_from(list(LEVELS)))
    scale_dtype = draw(st.sampled_from([torch.float8_e4m3fn, torch.float16]))
    if allow_channels and draw(st.booleans()):
        return Codec(bits, draw(st.sampled_from([4, 8, 16])), True, scale_dtype)
    group_size = draw(st.sampled_from([size for size in range(4, head_dim + 1) if head_dim % size == 0]))
    return Codec(bits, group_size, False, scale_dtype, draw(st.sampled_from([0, 2])))


def list_sections(layout: CellLayout) -> list[Section]:
    return [*layout.key_sections, *layout.value_sections]


@given(layouts())
def test_no_byte_of_a_page_has_two_owners(layout: CellLayout) -> None:
    cache = torch.zeros(2, 3, layout.block_size, layout.cell_bytes, dtype=torch.uint8)
    for section in list_sections(layout):
        view = view_section(cache, section)
        assert view.shape == (2, 3, section.rows, section.row_bytes)
        view += 1
    # Padding is all at the end, and less than a byte a token.
    used = int(cache[0, 0].sum())
    assert layout.cell_bytes * layout.block_size - used < layout.block_size
    assert bool((cache.flatten(2)[..., :used] == 1).all())


@given(layouts())
def test_sections_start_on_16_bytes(layout: CellLayout) -> None:
    if layout.key.per_channel and layout.head_dim % 16:
        return
    assert [section.offset % 16 for section in list_sections(layout)] == [0] * 10


@pytest.mark.parametrize(
    ("codec", "head_dim", "size", "bits"),
    [
        (Codec(2, 128), 128, 34, 2.125),
        (Codec(1.5, 128), 128, 28, 1.75),
        (Codec(2, 32, per_channel=True), 128, 44, 2.75),
        # 240 bytes of scales for 32 tokens: a little padding.
        (Codec(2, 32, per_channel=True), 80, 28, 2.8),
        (Codec(4, 128, scale_dtype=torch.float16), 128, 68, 4.25),
        (Codec(3, 128, outliers=2), 128, 56, 3.5),
        (Codec(1.5, 64), 64, 15, 1.875),
        (Codec(8, 80, scale_dtype=torch.float16), 80, 84, 8.4),
    ],
)
def test_true_bits(codec: Codec, head_dim: int, size: int, bits: float) -> None:
    assert side_bytes(codec, head_dim) == size
    assert bits_per_element(codec, head_dim) == pytest.approx(bits)


def test_sections_are_views_of_strided_caches() -> None:
    layout = plan_cells(Codec(2, 16), Codec(4, 16), 16, 16)
    # Block-outermost with several layers: blocks are further apart than a page is long.
    whole = torch.zeros(4, 3, 2, 16, layout.cell_bytes, dtype=torch.uint8)
    cache = whole[:, 1]
    for section in list_sections(layout):
        view_section(cache, section)[...] = 1
    assert bool((cache == 1).all())
    assert int(whole.sum(dtype=torch.int64)) == cache.numel()
    with pytest.raises(ValueError, match="cache layout that ends in HNC"):
        view_section(cache.transpose(1, 2).contiguous().transpose(1, 2), layout.key_sections.codes)


@pytest.mark.parametrize(
    ("codec", "head_dim", "message"),
    [
        (Codec(2, 128), 192, "group_size=128 does not divide head_dim=192: set group_size to one of 8, 12, 16"),
        (Codec(2, 33), 66, "K=66 codes of bits=2 do not fill whole bytes"),
        (Codec(3, 36), 36, "K=36 codes of bits=3"),
        (Codec(7, 8), 8, "bits=7 is not a width of the cache"),
        (Codec(2, 64, outliers=3), 64, "outliers=3 must be even"),
        (Codec(2, 8, outliers=8), 64, "below group_size=8"),
        (Codec(2, 512, outliers=2), 512, "head_dim=512 is too large for outliers"),
        (Codec(2, 64, scale_dtype=torch.bfloat16), 64, "use float8_e4m3fn or float16"),
        (Codec(2, 0), 64, "group_size=0 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(codec: Codec, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        side_bytes(codec, head_dim)


def test_blocks_hold_whole_groups() -> None:
    with pytest.raises(ValueError, match="block_size=48 does not hold whole groups of 32 tokens"):
        plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 64, 48)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        plan_cells(Codec(2, 32), Codec(2, 32), 64, 0)
