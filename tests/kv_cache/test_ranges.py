# SPDX-License-Identifier: Apache-2.0
"""Keys and values that fp8 scales cannot hold are reported, once, and others are not."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache import ranges
from vllm_ext.kv_cache.presets import PRESETS

PLAIN = CodecTensors()


def draw(size: float, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(32, 2, 128, generator=torch.Generator().manual_seed(0)) * size + offset


@pytest.mark.parametrize(
    ("codec", "x", "words"),
    [
        (Codec(2, 128), draw(1.0), None),
        (Codec(2, 128), draw(1.0, -700.0), "beyond 448 they are cut off"),
        (Codec(2, 128), draw(0.001), "differ by"),
        (Codec(2, 128), torch.zeros(32, 2, 128), None),
        (Codec(4, 128, scale_dtype=torch.float16), draw(0.001, -700.0), None),
        (Codec(2, 32, per_channel=True), draw(1.0, -700.0), None),
        (Codec(2, 32, per_channel=True), draw(1e-4), "differ by"),
    ],
)
def test_what_is_lost_is_named(codec: Codec, x: torch.Tensor, words: str | None) -> None:
    found = ranges.find_lost_range(codec, x)
    assert found is None if words is None else words in str(found)


def test_one_warning_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(ranges, "_reported", set())
    monkeypatch.setattr(ranges.logger, "warning", lambda text, *values: messages.append(text % values))
    preset, large, small = PRESETS["skvq_k2v2"], draw(1.0, 700.0), draw(0.001)
    ranges.warn_of_lost_range(preset, (PLAIN, PLAIN), large[:8], small[:8], "a")
    assert messages == []
    # A shift of the calibration brings them back.
    shifted = CodecTensors(shift=torch.full((2, 128), 700.0))
    ranges.warn_of_lost_range(preset, (shifted, PLAIN), large, draw(1.0), "a")
    assert messages == []
    for _ in range(2):
        ranges.warn_of_lost_range(preset, (PLAIN, PLAIN), large, small, "layers.3")
    assert len(messages) == 2
    assert messages[0].startswith("KV-cache preset skvq_k2v2: keys of layers.3 reach 70")
    assert "values of layers.3 differ by" in messages[1]
