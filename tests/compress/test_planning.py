# SPDX-License-Identifier: Apache-2.0
"""Plans from calibration text: what decides between mixed and uniform, time and layers as limits, runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compress.runnable_model import VOCABULARY, add_tokenizer, write_runnable
from vllm_ext.compress import gptq, held_out, layer_error, planning
from vllm_ext.compress.allocation import AllocationError
from vllm_ext.compress.held_out import measure_plans
from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.compress.plan_report import PlanReport
from vllm_ext.compress.planning import make_plan
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rounders import HessianRounder
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.compress.time_model import TimeModelError
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.scheme import Scheme

SCHEMES = [Scheme.parse(name) for name in ("w2a16_g32", "w3a16_g32", "w4a16_g32", "w8a16_g32")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_runnable(tmp_path_factory.mktemp("models") / "model", max_position_embeddings=512)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def source(model: Path) -> SourceModel:
    return open_source(model)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight windows of words, some far more frequent than others."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = (VOCABULARY * np.random.default_rng(0).random(8 * 512) ** 2).astype(int)
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


def plan(source: SourceModel, text: Path, bits: float = 3.75, **options: Any) -> PlanReport:
    return make_plan(source, bits=bits, schemes=SCHEMES, calibration=[text], options=PlanOptions(**options))


def answer(monkeypatch: pytest.MonkeyPatch, *losses: float) -> list[list[Plan]]:
    """Let the held-out losses of uniform, mixed at equal bytes, and mixed be these; returns the plans asked for."""
    asked: list[list[Plan]] = []

    def measure(source: SourceModel, plans: list[Plan], windows: np.ndarray, **_: Any) -> tuple[float, list[float]]:
        asked.append(plans)
        assert windows.shape == (2, 512)
        return 1.0, list(losses)

    monkeypatch.setattr(planning, "measure_plans", measure)
    return asked


def test_mixed_is_written_where_it_wins(source: SourceModel, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, 2.0, 1.75, 1.5)
    report = plan(source, text, bits=4.0)
    ((alone, equal, mixed),) = asked
    assert report.chosen == "mixed"
    assert report.plan.sha256 == mixed.sha256
    assert report.measure == "loss"
    found = report.comparison
    assert found is not None
    # w3a16_g32 is 3.75 bits, w4a16_g32 4.75: the plans are compared at 3.75, and the mixed one then has 4.
    assert {scheme for schemes in alone.modules.values() for scheme in schemes} == {SCHEMES[1]}  # type: ignore[union-attr]
    assert (found.uniform_bits, found.uniform_scheme) == (3.75, "w3a16_g32")
    assert found.equal_bits <= found.uniform_bits < found.mixed_bits <= 4.0
    assert (found.closed, found.closed_at_equal_bytes) == (pytest.approx(0.5), pytest.approx(0.25))
    assert equal.sha256 != alone.sha256
    record = json.loads(json.dumps(report.to_json()))
    assert record["comparison"]["mixed_wins"] is True
    assert 0 <= record["gap"] < 0.2
    # A uniform plan that fills the budget has its bytes: there is one mixed plan, measured once.
    asked = answer(monkeypatch, 2.0, 1.75)
    report = plan(source, text, bits=3.75)
    assert len(asked[0]) == 2
    assert report.comparison is not None
    assert report.comparison.equal == report.comparison.mixed == 1.75


@pytest.mark.parametrize(
    ("losses", "options", "chosen"),
    [
        ((2.0, 2.1, 1.5), {}, "uniform"),
        ((2.0, 2.0, 2.0), {}, "uniform"),
        ((2.0, 1.9, 2.1), {}, "uniform"),
        ((2.0, 2.5, 2.5), {"force_mixed": True}, "mixed"),
        ((2.0, 2.5, 2.5), {"time_weight": 1e-6}, "mixed"),
        ((2.0, 2.5, 2.5), {"per_layer": True, "exponent": 0.5}, "mixed"),
    ],
)
def test_uniform_is_written_where_mixed_does_not_win(
    source: SourceModel,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    options: dict[str, Any],
    chosen: str,
) -> None:
    answer(monkeypatch, *losses)
    report = plan(source, text, bits=4.0, **options)
    assert report.chosen == chosen
    assert report.comparison is not None
    assert not report.comparison.mixed_wins
    widths = {scheme for schemes in report.plan.modules.values() for scheme in schemes}  # type: ignore[union-attr]
    assert (len(widths) == 1) == (chosen == "uniform")


def test_held_out_loss_is_that_of_the_quantized_model(source: SourceModel, text: Path) -> None:
    """The same windows through the dequantized checkpoint, by transformers."""
    from vllm_ext.compress.evaluation import load_dequantized, measure_perplexity

    windows = np.random.default_rng(1).integers(0, VOCABULARY, (3, 64))
    report = plan(source, text, compare=False)
    assert report.comparison is None
    full, (loss,) = measure_plans(source, [report.plan], windows)
    assert full == pytest.approx(LayerStream(source, windows).loss(run_through(source, windows)), rel=1e-6)
    output = text.parent / "out"
    quantize_model(source.directory, output, plan=report.plan)
    assert np.exp(loss) == pytest.approx(measure_perplexity(load_dequantized(output), windows), rel=1e-5)
    with pytest.raises(ValueError, match="rounding gptq needs calibration windows"):
        measure_plans(source, [report.plan], windows, rounding="gptq")


def run_through(source: SourceModel, windows: np.ndarray) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    for layer in LayerStream(source, windows).layers():
        outputs = layer.outputs
    return outputs


def test_the_rounding_asked_for_is_compared(
    source: SourceModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, int]] = []
    swept: list[int] = []
    make, refine = held_out.make_rounder, gptq.refine_codes

    def note(name: str, sweeps: int) -> Any:
        used.append((name, sweeps))
        return make(name, sweeps)

    def count(*arguments: Any) -> Any:
        swept.append(arguments[-1])
        return refine(*arguments)

    monkeypatch.setattr(held_out, "make_rounder", note)
    monkeypatch.setattr(gptq, "refine_codes", count)
    reports = {}
    for sweeps in (1, 0):
        used.clear(), swept.clear()
        reports[sweeps] = make_plan(
            source, bits=3.75, schemes=SCHEMES, calibration=[text], rounding="gptq", sweeps=sweeps,
            options=PlanOptions(work=tmp_path),
        )  # fmt: skip
        assert set(used) == {("gptq", sweeps)}
        # Of sensitivities and of the comparison, and from no cache of the other number.
        assert set(swept) == ({1} if sweeps else set())
    found = [report.comparison for report in reports.values()]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].uniform != found[1].uniform
    assert reports[0].predicted_cost != reports[1].predicted_cost


def test_measurements_are_kept(
    source: SourceModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(source, text, work=tmp_path)
    assert first.comparison is not None

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(layer_error, "_measure_layer", fail)
    monkeypatch.setattr("vllm_ext.compress.measuring.stream_profile", fail)
    monkeypatch.setattr(planning, "measure_plans", fail)
    assert plan(source, text, work=tmp_path).to_json() == first.to_json()
    with pytest.raises(AssertionError, match="measured again"):
        plan(source, text, bits=4.5, work=tmp_path)
    assert plan(source, text, bits=4.5, work=tmp_path, compare=False).predicted_cost is not None
    with pytest.raises(AssertionError, match="measured again"):
        make_plan(source, bits=3.75, schemes=SCHEMES[:3], calibration=[text], options=PlanOptions(work=tmp_path))


def test_measures_and_layers(source: SourceModel, text: Path) -> None:
    plans = {
        name: plan(source, text, compare=False, **options)
        for name, options in {
            "weight": {"measure": "weight"},
            "layer": {"measure": "layer"},
            "mxmoe": {"measure": "layer", "per_layer": True},
        }.items()
    }
    assert [report.measure for report in plans.values()] == ["weight", "layer", "layer"]
    bits: dict[int, list[float]] = {}
    for path, schemes in plans["mxmoe"].plan.modules.items():
        assert isinstance(schemes, ExpertSchemes)
        stored = schemes.gate_up.stored_bytes(64, 64) + schemes.down.stored_bytes(64, 32)
        bits.setdefault(int(path.split(".")[2]), []).append(8 * stored / (3 * 64 * 32))
    assert all(3.5 < float(np.mean(found)) <= 3.75 for found in bits.values())
    with pytest.raises(PlanError, match="'layer' is measured on calibration text: give --calibration"):
        make_plan(source, bits=3.75, options=PlanOptions(measure="layer"))


def test_time_is_traded_for_loss(source: SourceModel, text: Path) -> None:
    free = plan(source, text, bits=5.0, compare=False)
    assert free.predicted_time_us is not None
    assert free.predicted_cost is not None
    limited = plan(source, text, bits=5.0, compare=False, max_time_us=free.predicted_time_us * 0.9)
    assert limited.predicted_time_us is not None
    assert limited.predicted_cost is not None
    assert limited.predicted_time_us <= free.predicted_time_us * 0.9
    assert limited.predicted_cost > free.predicted_cost
    weighted = plan(source, text, bits=5.0, compare=False, time_weight=1e9)
    assert weighted.predicted_time_us is not None
    assert weighted.predicted_time_us < limited.predicted_time_us
    with pytest.raises(AllocationError, match=r"a time of 1e-06 is below the least within"):
        plan(source, text, bits=5.0, max_time_us=1e-6)
    with pytest.raises(TimeModelError, match="device 'gtx' has no tuning table"):
        plan(source, text, device="gtx")


def test_the_exact_plan_is_no_worse(source: SourceModel, text: Path) -> None:
    near, exact = (plan(source, text, bits=4.0, compare=False, exact=exact) for exact in (False, True))
    assert exact.predicted_cost is not None
    assert near.predicted_cost is not None
    assert exact.predicted_cost <= near.predicted_cost
    assert exact.gap is not None
    assert exact.gap < 1e-4
    weighed = plan(source, text, bits=4.0, compare=False, exact=True, time_weight=0.01)
    assert weighed.predicted_cost is not None
    assert weighed.predicted_cost >= exact.predicted_cost


def test_too_few_windows_are_not_compared(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(" ".join(["w5"] * 600))
    report = plan(source, path)
    assert (report.chosen, report.comparison) == ("mixed", None)
    assert any("not compared with a uniform one: fewer than 4 windows" in note for note in report.notes)
    assert any("1 windows of 512 tokens, not the 128 asked for" in note for note in report.notes)
    # One of two words is not routed to all experts as often as 128 inputs need.
    assert any("experts get fewer calibration tokens than their own statistics need" in note for note in report.notes)
    assert report.to_json()["notes"] == list(report.notes)
    alone = make_plan(source, bits=3.75, schemes=SCHEMES)
    (note,) = alone.notes
    assert note.startswith("the mixed plan was not compared with a uniform one: there is no calibration text")
    assert make_plan(source, bits=3.75, schemes=SCHEMES, uniform=True).notes == ()


def test_a_uniform_plan_is_not_called_the_best_there_is(source: SourceModel) -> None:
    alone, mixed = (make_plan(source, bits=4.2, schemes=SCHEMES, uniform=uniform) for uniform in (True, False))
    assert alone.predicted_cost is not None
    assert mixed.predicted_cost is not None
    assert alone.lower_bound is not None
    assert alone.lower_bound <= mixed.predicted_cost < alone.predicted_cost
    assert alone.gap is not None
    assert alone.gap > 0.1


@pytest.mark.parametrize("bits", [float("inf"), float("nan"), -1.0, 0.0])
def test_bits_that_are_no_number_of_bits(source: SourceModel, bits: float) -> None:
    with pytest.raises(AllocationError, match="bits must be a positive number"):
        make_plan(source, bits=bits)


def test_a_killed_comparison_goes_on(
    source: SourceModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[int] = []
    inner, limit = HessianRounder.round_layer, 4

    def stop(self: HessianRounder, layer: Any, *arguments: Any) -> Any:
        if len(rounded) == limit:
            raise KeyboardInterrupt
        rounded.append(layer.index)
        return inner(self, layer, *arguments)

    def compare() -> PlanReport:
        return make_plan(
            source, bits=3.75, schemes=SCHEMES, calibration=[text], rounding="gptaq", options=PlanOptions(work=tmp_path)
        )

    monkeypatch.setattr(HessianRounder, "round_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        compare()
    assert list(tmp_path.rglob("gptaq-*layer-*"))
    limit = -1
    found = compare()
    # Two plans of three layers, each rounded once in all.
    assert sorted(rounded) == [0, 0, 1, 1, 2, 2]
    assert not list(tmp_path.rglob("gptaq-*layer-*"))
    whole = make_plan(source, bits=3.75, schemes=SCHEMES, calibration=[text], rounding="gptaq")
    assert found.to_json() == whole.to_json()


def test_the_smallest_scheme_leaves_nothing_to_mix_at_its_bytes(
    source: SourceModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, 2.0, 1.5)
    report = plan(source, text, bits=3.0)  # w2a16_g32 is 2.75 bits
    assert len(asked[0]) == 2
    assert report.comparison is not None
    assert report.comparison.equal == report.comparison.uniform
    assert (report.comparison.closed, report.comparison.closed_at_equal_bytes) == (0.5, 0.0)
    assert report.chosen == "mixed"


@pytest.mark.slow
def test_mixing_closes_the_gap_of_the_shipped_model(tiny_moe: str) -> None:
    """At 2.5 bits with the same rounding, on text of both domains that no plan has seen."""
    texts = [Path(tiny_moe) / f"{name}_train.txt" for name in ("kjv", "py")]
    report = make_plan(open_source(tiny_moe), bits=2.5, calibration=texts)
    assert report.chosen == "mixed"
    assert report.comparison is not None
    assert report.comparison.closed_at_equal_bytes > 0.2
