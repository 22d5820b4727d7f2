# SPDX-License-Identifier: Apache-2.0
"""Time: rooflines by hand, tables interpolated, batches that leave experts idle, bad tables by message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.compress.families import Block
from vllm_ext.compress.time_model import (
    DEVICES,
    Device,
    MeasuredTimes,
    Roofline,
    TimeModelError,
    open_time_model,
    parse_batches,
    predict_times,
)
from vllm_ext.quantization.scheme import Scheme

BLOCK = Block("gate_up", ("gate", "up"), ((64, 128), (64, 128)))
W4, W8, W4A8 = (Scheme.parse(name) for name in ("w4a16_g128", "w8a16_g128", "w4a8_g128"))


def row(**changes: Any) -> dict[str, Any]:
    return {"scheme": "w4a16_g128", "tile": "a", "N": 128, "K": 128, "tokens": 16, "microseconds": 8.0, **changes}


def test_roofline_is_memory_for_few_tokens_and_arithmetic_for_many() -> None:
    model = Roofline(Device("test", bandwidth=1e9, rates={16: 1e12, 8: 2e12}))
    one = model.predict(BLOCK, W4, np.array([1.0]), "16")[0]
    assert one == pytest.approx(1e6 * (W4.stored_bytes(128, 128) + 128 * 2 + 128 * 2) / 1e9)
    fast = Roofline(Device("test", bandwidth=1e18, rates={16: 1e12, 8: 2e12}))
    assert fast.predict(BLOCK, W4, np.array([64.0]), "64")[0] == pytest.approx(1e6 * 2 * 64 * 128 * 128 / 1e12)
    assert fast.predict(BLOCK, W4A8, np.array([64.0]), "64")[0] == pytest.approx(1e6 * 2 * 64 * 128 * 128 / 2e12)
    # One row of a tile costs the whole tile, 65 rows cost two tiles of 64.
    assert fast.predict(BLOCK, W4, np.array([65.0]), "64")[0] == pytest.approx(1e6 * 2 * 128 * 128 * 128 / 1e12)
    assert model.predict(BLOCK, W8, np.array([1.0]), "16")[0] > 1.8 * one


def test_ternary_weights_take_the_time_of_two_bits() -> None:
    """They are smaller in the file, and 2-bit codes where a kernel reads them."""
    ternary, two = Scheme.parse("w1.6a16_g128_sym"), Scheme.parse("w2a16_g128_sym")
    assert ternary.stored_bytes(128, 128) < two.stored_bytes(128, 128)
    for model in (Roofline(DEVICES["cpu"]), MeasuredTimes([{"rows": [row(scheme=str(two), tile="1")]}])):
        times = [model.predict(BLOCK, scheme, np.array([1.0, 64.0]), "1") for scheme in (ternary, two)]
        assert np.isfinite(times[0]).all()
        assert np.array_equal(*times)


@given(st.floats(0.001, 0.999))
def test_one_token_is_one_tile(share: float) -> None:
    """What is computed as one token, and comes out a little above, is not two tiles."""
    model = Roofline(DEVICES["cpu"])
    one = float(model.predict(BLOCK, W4, np.array([1.0]), "1")[0])
    assert predict_times(model, [BLOCK], [[W4]], np.array([share]), {1: 1.0})[0, 0, 0] == pytest.approx(share * one)


def test_idle_experts_cost_nothing_and_busy_ones_by_their_tokens() -> None:
    """With a time of one microsecond a token, a block costs its expected tokens whatever the batch."""

    class Linear:
        tiles = ("only",)

        def predict(self, block: Block, scheme: Scheme, tokens: np.ndarray, tile: str) -> np.ndarray:
            assert (tokens >= 1 - 1e-9).all()
            return np.asarray(tokens, np.float64)

    class Constant(Linear):
        def predict(self, block: Block, scheme: Scheme, tokens: np.ndarray, tile: str) -> np.ndarray:
            return np.full(len(tokens), 5.0)

    shares = np.array([0.001, 0.25, 1.0])
    blocks, options = [BLOCK] * 3, [[W4, None]] * 3
    times = predict_times(Linear(), blocks, options, shares, {1: 0.5, 64: 0.5})
    assert times.shape == (1, 3, 2)
    assert times[0, :, 0] == pytest.approx(shares * (0.5 * 1 + 0.5 * 64))
    assert np.isinf(times[0, :, 1]).all()
    # A time that does not depend on the tokens is paid as often as the expert is needed.
    times = predict_times(Constant(), blocks, options, shares, {4: 1.0})
    assert times[0, :, 0] == pytest.approx(5.0 * (1 - (1 - shares) ** 4))
    for bad in ([0.0, 1, 1], [1.5, 1, 1], [1.0]):
        with pytest.raises(ValueError, match="shares must be in"):
            predict_times(Linear(), blocks, options, np.array(bad), {1: 1.0})


@given(st.integers(1, 400))
def test_tables_are_interpolated(tokens: int) -> None:
    rows = [row(tokens=16, microseconds=8.0), row(tokens=64, microseconds=20.0), row(tokens=128, microseconds=30.0)]
    model = MeasuredTimes([{"rows": rows}])
    (time,) = model.predict(BLOCK, W4, np.array([float(tokens)]), "a")
    if tokens <= 16:
        assert time == 8.0
    elif tokens <= 64:
        assert time == pytest.approx(8 + (tokens - 16) / 48 * 12)
    elif tokens > 128:
        assert time == pytest.approx(30 * tokens / 128)
    assert np.isinf(model.predict(BLOCK, W8, np.array([4.0]), "a")).all()
    assert np.isinf(model.predict(BLOCK, W4, np.array([4.0]), "b")).all()


def test_another_shape_takes_the_nearest_scaled_by_its_weights() -> None:
    rows = [row(N=256, microseconds=10.0), row(N=8192, microseconds=1000.0), row(tile="b", scheme="w8a16_g128")]
    model = MeasuredTimes([{"rows": rows}])
    assert model.tiles == ("a", "b")
    assert model.predict(BLOCK, W4, np.array([16.0]), "a")[0] == pytest.approx(5.0)


def test_tables_are_found_by_device(tmp_path: Path) -> None:
    table = {"format": 1, "device": "NVIDIA H200", "op": "mixed_moe", "rows": [row()]}
    (tmp_path / "h200.json").write_text(json.dumps(table))
    assert isinstance(open_time_model("h200", tmp_path), MeasuredTimes)
    other = open_time_model("a100", tmp_path)
    assert isinstance(other, Roofline)
    assert other.device is DEVICES["a100"]
    with pytest.raises(TimeModelError, match="device 'gtx' has no tuning table and is not one of cpu, a100"):
        open_time_model("gtx", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a tuning table"),
        ('{"device": "x"}', "is not a tuning table"),
        ('{"device": "x", "format": 7, "rows": []}', "has format 7, this release reads 1"),
    ],
)
def test_damaged_tables(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(TimeModelError, match=message):
        open_time_model("x", tmp_path)


@pytest.mark.parametrize("change", [{"microseconds": 0}, {"tokens": 0}, {"microseconds": float("nan")}])
def test_rows_without_positive_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(TimeModelError, match="without positive numbers"):
        MeasuredTimes([{"rows": [row(**change)]}])


def test_bad_rows() -> None:
    with pytest.raises(TimeModelError, match="have no rows"):
        MeasuredTimes([])
    for bad in ({"tokens": 1}, row(scheme="w9"), row(tokens="many"), 5):
        with pytest.raises(TimeModelError, match="bad row"):
            MeasuredTimes([{"rows": [bad]}])


def test_batches() -> None:
    assert parse_batches("1:1,32:3") == {1: 0.25, 32: 0.75}
    assert parse_batches("8") == {8: 1.0}
    for text, message in (("a", "'a' is not TOKENS:SHARE"), ("0:1", "at least one token"), ("4:-1", "positive share")):
        with pytest.raises(TimeModelError, match=message):
            parse_batches(text)
