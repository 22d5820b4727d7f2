# SPDX-License-Identifier: Apache-2.0
"""The quality table: its cells, what a score is, what targets are judged by, the page, and going on after a stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import __main__ as quality
from bench.quality.cells import BF16, BUDGETS, EQUAL_ROW, FIRST_SEED, METHODS, NUM_WINDOWS, TEXTS, Cell, list_cells
from bench.quality.figures import render_page
from bench.quality.score import Reference, score_checkpoint
from bench.quality.targets import list_targets, measure_closed, read_losses
from bench.records import Metric, Record, check_name, describe_environment, load_records, read_record, write_record
from tests.compress.runnable_model import EXPERTS, add_tokenizer, make_tokens, write_runnable
from vllm_ext.compress.evaluation import load_dequantized, measure_perplexity
from vllm_ext.compress.held_out import measure_plans
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme

WINDOWS = make_tokens(windows=20, context=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Without a dense layer: one more, and the outputs of two bits explode.
    directory = write_runnable(tmp_path_factory.mktemp("models") / "model", mlp_only_layers=[])
    add_tokenizer(directory)
    return directory


def make_plan(scheme: str) -> Plan:
    return Plan.parse(
        {
            f"model.layers.{layer}.mlp.experts.{e}": {"gate_up": scheme, "down": scheme}
            for layer in range(3)
            for e in range(EXPERTS)
        }
    )


def test_cells_have_names_of_their_own_and_fit_their_budgets() -> None:
    cells = list(list_cells((0, 1)))
    assert len({(cell.arm, cell.seed) for cell in cells}) == len(cells)
    for cell in cells:
        check_name("arm", cell.arm)
    # Rounding to nearest has no seed, and one domain is calibrated on once.
    assert all(cell.seed == FIRST_SEED for cell in cells if cell.method.name == "rtn" or len(cell.calibration) == 1)
    for budget in BUDGETS:
        assert set(budget.uniform) == {method.name for method in METHODS if method.uniform}
        for row, name in budget.uniform.items():
            uniform = Scheme.parse(name)
            bits = (2 * uniform.bits_per_weight(256, 256) + uniform.bits_per_weight(256, 128)) / 3
            assert budget.bits - 0.3 < bits <= budget.bits
            if row == EQUAL_ROW and budget.name == "2.5":
                # Both sides of mixing have the same bytes.
                (equal,) = (cell for cell in cells if cell.method.equal and cell.seed == FIRST_SEED)
                assert equal.describe()["bits"] == bits
                assert equal.budget == budget
        for name in (*budget.schemes, *budget.mxmoe_schemes, *budget.uniform.values()):
            assert Scheme.parse(name).act_bits == (8 if budget.name.endswith("a8") else 16)
        rows = {cell.method.name for cell in cells if cell.budget == budget}
        assert {"rtn", "gptq", "gptaq", "mxmoe", "mxmoe_wide", "ours"} <= rows
    assert {cell.calibration for cell in cells} == {("kjv", "py"), ("kjv",), ("py",)}


def test_both_sides_of_mixing_are_rounded_alike() -> None:
    arguments = {method.name: dict(method.arguments) for method in METHODS}
    assert arguments["gptaq"] == arguments["ours"] == arguments["mxmoe"] == arguments["mxmoe_wide"]
    assert arguments["ours"] == arguments["ours_equal"]
    assert arguments["gptq"] == {"rounding": "gptq", "rotate": True, "sweeps": 0}
    cells = {(cell.method.name, cell.budget.name): cell for cell in list_cells((1,))}
    for budget in BUDGETS:
        wide, ours = (cells[row, budget.name].describe() for row in ("mxmoe_wide", "ours"))
        assert wide["schemes"] == ours["schemes"]
        assert wide["options"]["per_layer"]
        assert not ours["options"]["per_layer"]


def test_a_record_says_what_it_was_made_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quality"
    cell, other = (next(one for one in list_cells((0,)) if one.arm == arm) for arm in ("ours_2.5", "ours_2.25"))
    described = json.loads(json.dumps(cell.describe()))
    assert described == cell.describe()
    assert described["bits"] == 2.5
    assert described["num_windows"] == NUM_WINDOWS
    assert described["calibration"] == ["kjv_train.txt", "py_train.txt"]
    record = make_record(cell.arm, {})
    write_record(tmp_path, replace(record, settings={"windows": None, "arguments": described}))
    assert quality._has_record(out, cell.arm, 0, None, cell.describe())
    assert not quality._has_record(out, cell.arm, 0, 8, cell.describe())
    assert not quality._has_record(out, cell.arm, 0, None, {**cell.describe(), "num_windows": 128})
    assert not quality._has_record(out, other.arm, 0, None, other.describe())
    quality._warn_of_other_code(out, [cell, other])
    assert "1 of 2 cells have records of other code than" in capsys.readouterr().err
    write_record(tmp_path, replace(record, git_hash=describe_environment()["git_hash"]))
    quality._warn_of_other_code(out, [cell, other])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("scheme", ["w3a16_g32", "w3a8_g32_sym"])
def test_a_score_is_that_of_the_layers_that_were_quantized(model: Path, tmp_path: Path, scheme: str) -> None:
    quantize_model(model, tmp_path / "out", plan=make_plan(scheme))
    reference = Reference(model, WINDOWS, tmp_path / "work")
    found = score_checkpoint(tmp_path / "out", {"text": reference})["text"]
    full, (quantized,) = measure_plans(open_source(model), [make_plan(scheme)], WINDOWS)
    assert found.loss == pytest.approx(quantized, rel=1e-5)
    assert found.tokens == 20 * 23
    assert found.divergence > 0
    assert 0 < found.changed < 1
    own = reference.score()
    assert own.loss == pytest.approx(full, rel=1e-5)
    assert (own.divergence, own.changed) == (0.0, 0.0)
    assert found.perplexity == math.exp(found.loss)
    if scheme.startswith("w3a16"):
        whole = measure_perplexity(load_dequantized(tmp_path / "out"), WINDOWS)
        assert found.perplexity == pytest.approx(whole, rel=1e-4)
    again = Reference(model, WINDOWS, tmp_path / "work")
    assert torch.equal(again.experts, reference.experts)
    assert again.score().loss == own.loss


def test_divergence_is_what_it_says(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.quality.score.DIVERGENCE_EVERY", 1)
    quantize_model(model, tmp_path / "out", plan=make_plan("w2a16_g32"))
    found = score_checkpoint(tmp_path / "out", {"text": Reference(model, WINDOWS)})["text"]
    from vllm_ext.compress.profile import load_model

    ids = torch.from_numpy(WINDOWS)
    with torch.inference_mode():
        logits = [
            one(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            for one in (load_model(model, torch.float32, "cpu"), load_dequantized(tmp_path / "out"))
        ]
    expected = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert found.divergence == pytest.approx(expected, rel=1e-3)


def make_record(arm: str, losses: dict[str, float], seed: int = 0, **metrics: float) -> Record:
    found = {f"perplexity_{text}": Metric(math.exp(loss), "") for text, loss in losses.items()}
    found |= {name: Metric(value, "") for name, value in metrics.items()}
    return Record("quality", arm, seed, found, {}, {}, "0", seed=seed, settings={"windows": None})


def make_records(ours: float = 0.1) -> list[Record]:
    """Full loss 3, uniform GPTQ 0.4 above it, with the better rounding 0.3."""
    records = [make_record(BF16, dict.fromkeys(TEXTS, 3.0))]
    for seed in (0, 1):
        for budget in BUDGETS:
            rows = (("gptq", 0.4), ("gptaq", 0.3), ("mxmoe", 0.2), ("mxmoe_wide", 0.15), ("ours", ours))
            rows += (("ours_equal", 0.15),)
            for row, rise in rows:
                losses = {text: 3.0 + rise + 0.01 * seed for text in TEXTS}
                records.append(make_record(f"{row}_{budget.name}", losses, seed, bits=budget.bits))
    return records


def test_targets_are_judged_by_the_worse_text_and_the_spread() -> None:
    losses = read_losses(make_records())
    closed = measure_closed(losses, "gptq_2.25", "ours_2.25", "kjv")
    assert closed[0] == pytest.approx(0.75)
    assert closed[1] == pytest.approx(0.3 / 0.41)
    targets = {target.title: target for target in list_targets(losses)}
    mixing = next(target for title, target in targets.items() if "mixing alone" in title)
    assert mixing.values["py"] == pytest.approx(100 * (0.15 / 0.3 + 0.15 / 0.31) / 2)
    assert all(target.met for target in targets.values())
    peers = [target for title, target in targets.items() if "MxMoE" in title]
    # The better of the two rows is the one to beat.
    assert [target.values["kjv"] for target in peers] == [pytest.approx(50)] * len(BUDGETS)
    worse = {target.title: target.met for target in list_targets(read_losses(make_records(ours=0.145)))}
    # 0.005 below the better row, with seeds 0.01 apart.
    assert not any(met for title, met in worse.items() if "MxMoE" in title)
    assert list_targets(read_losses(make_records()[:1])) == []
    # One seed has no spread to be above.
    alone = list_targets(read_losses([record for record in make_records() if record.seed == 0]))
    assert {target.met for target in alone if "MxMoE" in target.title or "uniform row" in target.title} == {None}


def test_only_seeds_that_all_rows_have_are_compared() -> None:
    records = [record for record in make_records() if (record.arm, record.seed) != ("mxmoe_wide_2.5", 1)]
    peer = next(target for target in list_targets(read_losses(records)) if target.title.endswith("above ours at 2.5"))
    assert peer.met is None
    assert peer.values["kjv"] == pytest.approx(50)


def test_never_worse_is_judged_by_every_seed() -> None:
    """The mean over seeds is better, one seed against its own better uniform row is not."""
    records = [record for record in make_records() if record.arm != "ours_3.25"]
    for seed, rise in ((0, 0.301), (1, 0.1)):
        records.append(make_record("ours_3.25", dict.fromkeys(TEXTS, 3.0 + rise), seed, bits=3.25))
    found = {target.title: target for target in list_targets(read_losses(records))}
    (at_3,) = (target for title, target in found.items() if "uniform row above ours at 3.25" in title)
    assert at_3.met is False
    assert at_3.values["py"] == pytest.approx(-1)
    (at_4,) = (target for title, target in found.items() if "uniform row above ours at 4.25" in title)
    assert at_4.met is True


@pytest.mark.parametrize(("peak", "met"), [(2700.0, True), (2800.0, False)])
def test_memory_is_judged_without_the_activations(peak: float, met: bool) -> None:
    values = {"peak_memory": peak, "activations": 200.0, "layer_float32": 1000.0, "wall": 1.0, "cpu": 2.0}
    settings = {"shapes": {"layers": 2}, "scheme": "w3a16_g128", "rounding": "gptaq", "sweeps": 3, "windows": 16}
    record = Record(
        "quality", "real_shape", 0, {name: Metric(value, "") for name, value in values.items()}, {}, {}, "0",
        settings={**settings, "threads": 2},
    )  # fmt: skip
    target = list_targets({}, [record])[0]
    assert (target.met, target.values[""]) == (met, pytest.approx((peak - 200) / 1000))
    text = render_page([*make_records(), record])
    assert f"{target.values['']:.2f} layers |  | at most 2.5 | {'met' if met else 'missed'} |" in text
    assert "router repair are not run here" in text


def test_the_page_has_every_row_and_says_what_was_missed() -> None:
    text = render_page(make_records())
    assert "| ours | 22.309 (0.112) |" in text
    assert "| bf16 | 20.086 |" in text
    assert "| met |" in text
    assert "| missed |" in render_page(make_records(ours=0.145))
    one = render_page([record for record in make_records() if (record.arm, record.seed) != ("ours_2.5", 1)])
    assert "| ours | 22.309 (0.112) | 22.198 (1) |" in one
    assert render_page(make_records()) == text
    assert "Targets" not in render_page(make_records()[:1])


def test_what_remains_of_the_gain_of_two_domains() -> None:
    records = make_records()
    for text in TEXTS:
        for row, rise in (("gptq", 0.5), ("gptaq", 0.4), ("ours", 0.2)):
            records.append(make_record(f"{row}_2.5_from_{text}", dict.fromkeys(TEXTS, 3.0 + rise)))
    page = render_page(records)
    assert page.count("| gptaq | kjv | 29.964 (1) | 29.964 (1) |  |") == 1
    assert page.count("| gptq: kjv 60 % (75 %), py 60 % (75 %); gptaq: kjv 50 % (67 %), py 50 % (67 %) |") == 2


@pytest.mark.slow
def test_quick_run_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "quality"
    arguments = ["--quick", "--out", str(out), "--work", str(tmp_path / "work"), "--seeds", "0"]
    original, seen = quality.run_cell, []

    def stop(cell: Cell, *rest: Any) -> None:
        seen.append(cell.arm)
        if len(seen) == 2:
            raise KeyboardInterrupt
        original(cell, *rest)

    monkeypatch.setattr(quality, "run_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments)
    assert quality.main(arguments) == 0
    assert seen == ["gptq_2.25", "ours_2.25", "ours_2.25"]
    records = {record.arm: record for record in load_records(out.parent)}
    assert set(records) == {BF16, "gptq_2.25", "ours_2.25"}
    assert records["gptq_2.25"].metrics["divergence_kjv"].value > records["ours_2.25"].metrics["divergence_kjv"].value
    assert (out / "quality.png").stat().st_size > 1000
    assert "ours" in (out / "README.md").read_text()
    assert read_record(out / "ours_2.25-0.json").settings["windows"] == quality.QUICK_WINDOWS


def test_records_go_to_a_folder_of_their_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--out", str(tmp_path / "elsewhere")])
