# SPDX-License-Identifier: Apache-2.0
"""Speed of whole engines on layers of a real shape: who runs when, and one small run of everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import engine_speed
from bench.arms import RunResult
from bench.records import Metric, load_records

SMALL = {
    "experts": 8, "experts_per_token": 2, "moe_intermediate": 128, "hidden": 256, "heads": 4, "kv_heads": 2,
    "head_dim": 64,
}  # fmt: skip


class FakeEngine:
    """Notes its runs in a list that all share."""

    def __init__(self, name: str, case: Any, runs: list[tuple[str, int, int]]) -> None:
        self.name, self.case, self.runs = name, case, runs

    def run(self, seed: int) -> RunResult:
        options = self.case.workload.options
        self.runs.append((self.name, self.case.workload.num_requests, options["output_len"]))
        values = {"output_throughput": 2.0, "total_throughput": 3.0, "resident_memory": 4.0}
        return RunResult({name: Metric(value, "tokens/s", "higher") for name, value in values.items()}, {})


def make_cases(tmp_path: Path, shape: str = "e60") -> dict[str, Any]:
    for name in (f"{shape}-1", f"{shape}-1-gptq"):
        (tmp_path / name).mkdir()  # stands for a model that is there already
    return engine_speed.make_models(shape, 1, (3.25,), tmp_path)


def test_engines_take_turns_within_every_load(tmp_path: Path) -> None:
    runs: list[tuple[str, int, int]] = []
    engines: Any = {name: FakeEngine(name, case, runs) for name, case in make_cases(tmp_path).items()}
    first = engine_speed.measure_repetition(engines, 0)
    assert list(engines) == ["bf16", "gptq-4", "mxmoe-3.25"]
    assert [name for name, _, _ in runs] == list(engines) * 6
    assert [run[1:] for run in runs[::3]] == [run[1:] for run in runs[2::3]]
    runs.clear()
    engine_speed.measure_repetition(engines, 1)
    assert [name for name, _, _ in runs] == list(engines)[::-1] * 6
    assert first["bf16"]["decode_batch_8"].value == 2.0
    assert first["bf16"]["prefill_batch_32"].value == 3.0
    assert len(first["bf16"]) == 7


def test_only_the_packed_arms_are_quantized(tmp_path: Path) -> None:
    cases = make_cases(tmp_path)
    assert cases["bf16"].pack.quantize == cases["gptq-4"].pack.quantize == ()
    assert str(cases["gptq-4"].stock.model).endswith("e60-1-gptq")
    assert cases["mxmoe-3.25"].pack.quantize == ("--bits", "3.25")


@pytest.mark.parametrize("arguments", [["e61"], ["--layers", "0"], ["--repetitions", "0"]])
def test_bad_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        engine_speed.main(arguments)


@pytest.mark.slow
@pytest.mark.engine
def test_small_shape_from_model_to_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_speed.SHAPES, "small", SMALL)
    monkeypatch.setattr(engine_speed, "BATCHES", (1, 2))
    options = ["--layers", "1", "--bits", "3.25", "--repetitions", "2", "--out", str(tmp_path / "out")]
    assert engine_speed.main(["small", *options, "--work", str(tmp_path / "work")]) == 0
    records = load_records(tmp_path / "out")
    measured = [record for record in records if record.status == "ok"]
    assert {("bf16", 0), ("bf16", 1), ("mxmoe-3.25", 0), ("mxmoe-3.25", 1)} <= {(r.arm, r.repetition) for r in measured}
    assert all(record.metrics["decode_batch_2"].value for record in measured)
    # Where vLLM has no 4-bit experts for this machine, the record says it in vLLM's words.
    assert all(r.arm == "gptq-4" and "Error:" in str(r.error) for r in records if r.status == "failed")
    assert all(str(tmp_path) not in str(record.settings) for record in records)
