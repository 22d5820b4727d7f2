# SPDX-License-Identifier: Apache-2.0
"""Keys and values that fp8 scales cannot hold are counted and reported, once, and others are not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from vllm_ext import observability
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache import ranges
from vllm_ext.kv_cache.calibration import calibrate_side, measure_error
from vllm_ext.kv_cache.presets import PRESETS

PLAIN = CodecTensors()


def draw(size: float, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(32, 2, 128, generator=torch.Generator().manual_seed(0)) * size + offset


@pytest.mark.parametrize(
    ("codec", "x", "saturated", "underflowing"),
    [
        (Codec(2, 128), draw(1.0), 0, 0),
        (Codec(2, 128), draw(1.0, -700.0), 64, 0),
        (Codec(2, 128), draw(1.0, 700.0), 64, 0),
        # Nothing is cut off where a group begins within the range, however far it reaches.
        (Codec(2, 128), draw(200.0).clamp(-440, 800), 0, 0),
        (Codec(1.5, 128), draw(1.0).sign() * 460, 64, 0),
        (Codec(2, 128), draw(0.001), 0, 64),
        (Codec(2, 128), torch.zeros(32, 2, 128), 0, 0),
        (Codec(2, 128), torch.full((32, 2, 128), torch.nan), 0, 0),
        (Codec(2, 32, per_channel=True), draw(1.0, -700.0), 0, 0),
        (Codec(2, 32, per_channel=True), draw(1e-4), 0, 2 * 128),
    ],
)
def test_groups_that_fp8_loses_are_marked(codec: Codec, x: torch.Tensor, saturated: int, underflowing: int) -> None:
    found = ranges.mark_lost(codec, *ranges.find_ranges(codec, x))
    assert [int(mask.sum()) for mask in found] == [saturated, underflowing]


def test_outliers_are_stored_beside() -> None:
    x = draw(1.0)
    x[:, :, 5], x[:, :, 7] = 900.0, -900.0
    lost = [
        ranges.mark_lost(codec, *ranges.find_ranges(codec, x))[0]
        for codec in (Codec(3, 128), Codec(3, 128, outliers=2))
    ]
    assert [int(mask.sum()) for mask in lost] == [64, 0]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Counter[str]]:
    """Messages of the log, and what was added to the metrics."""
    messages: list[str] = []
    counts: Counter[str] = Counter()
    monkeypatch.setattr(ranges, "_reported", set())
    monkeypatch.setattr(ranges.logger, "warning", lambda text, *values: messages.append(text % values))
    monkeypatch.setattr(observability, "add", lambda name, value, index: counts.update({f"{name} of {index}": value}))
    return messages, counts


def test_one_warning_a_side_and_every_group_counted(log: tuple[list[str], Counter[str]]) -> None:
    messages, counts = log
    preset, large, small = PRESETS["skvq_k2v2"], draw(1.0, 700.0), draw(0.001)
    ranges.count_lost_groups(preset, (PLAIN, PLAIN), large[:8], small[:8], "a")
    # A shift of the calibration brings them back.
    shifted = CodecTensors(shift=torch.full((2, 128), 700.0))
    ranges.count_lost_groups(preset, (shifted, PLAIN), large, draw(1.0), "a")
    assert (messages, counts) == ([], {})
    for _ in range(2):
        ranges.count_lost_groups(preset, (PLAIN, PLAIN), large, small, "layers.3", 1)
    assert len(messages) == 2
    assert messages[0].startswith("KV-cache preset skvq_k2v2: 64 of 64 groups of keys of layers.3 reach 70")
    assert "64 of 64 groups of values of layers.3 differ by" in messages[1]
    assert counts == {
        "vllm_ext:kv_cache_saturated_groups_total of 1": 128,
        "vllm_ext:kv_cache_underflow_groups_total of 1": 128,
    }


def test_a_few_tokens_without_values_are_counted_and_not_warned_of(log: tuple[list[str], Counter[str]]) -> None:
    messages, counts = log
    value = draw(1.0)
    value[0] *= 1e-4
    ranges.count_lost_groups(PRESETS["skvq_k2v2"], (PLAIN, PLAIN), draw(1.0), value, "a")
    assert (messages, counts) == ([], {"vllm_ext:kv_cache_underflow_groups_total of 0": 2})


def test_fp16_scales_lose_nothing(log: tuple[list[str], Counter[str]]) -> None:
    messages, counts = log
    ranges.count_lost_groups(PRESETS["kv4"], (PLAIN, PLAIN), draw(1.0, 700.0), draw(1e-3), "a")
    assert (messages, counts) == ([], {})


@pytest.mark.parametrize(("size", "offset"), [(1e-3, 0.0), (1e-4, 0.0), (3000.0, 0.0), (1.0, -700.0)])
def test_calibration_finds_a_unit_in_which_fp8_suffices(size: float, offset: float) -> None:
    """Values of any size, and far off zero, lose no more than with scales and lows of fp16."""
    x = draw(size, offset)
    coarse, fine = Codec(2, 128), Codec(2, 128, scale_dtype=torch.float16)
    clips = PRESETS["skvq_k2v2"].clips
    expected = measure_error(draw(1.0), fine, PLAIN, clips)
    norm = float(x.square().sum() / (x - offset).square().sum())
    found = measure_error(x, coarse, calibrate_side(x, coarse, clips), clips) * norm
    assert found < 1.1 * expected < measure_error(x, coarse, PLAIN, clips) * norm
