# SPDX-License-Identifier: Apache-2.0
"""Decoding after long contexts: who runs when, what is no measurement, and one small run of everything."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench import kv_cache_speed
from bench.arms import RunResult
from bench.client import RunFailed
from bench.records import Metric, load_records


class FakeEngine:
    """Notes its runs in a list that all share; `cached`: whether its prompts are prefix hits."""

    def __init__(self, name: str, case: Any, runs: list[tuple[str, int, int, int]], cached: bool = True) -> None:
        self.name, self.case, self.runs, self.cached = name, case, runs, cached

    def run(self, seed: int) -> RunResult:
        workload = self.case.workload
        length, tokens = workload.options["input_len"], workload.options["output_len"]
        self.runs.append((self.name, seed, length, tokens))
        computed = workload.num_requests * (tokens + (1 if self.cached else length))
        values = {
            "output_throughput": 2.0, "duration": 3.0, "computed_tokens": computed, "resident_memory": 4.0,
        }  # fmt: skip
        return RunResult({name: Metric(float(value), "") for name, value in values.items()}, {})


def make_engines(tmp_path: Path, **cached: bool) -> tuple[dict[str, Any], list[tuple[str, int, int, int]]]:
    (tmp_path / "kv-1").mkdir()  # stands for a model that is there already
    options = argparse.Namespace(layers=1, batch=[1, 2], tokens=8)
    runs: list[tuple[str, int, int, int]] = []
    cases = kv_cache_speed.make_cases(["skvq_k2v2"], [256, 1024], options, tmp_path)
    return {case.name: FakeEngine(case.name, case, runs, **cached) for case in cases}, runs


def test_only_the_arms_of_the_pack_name_a_preset(tmp_path: Path) -> None:
    engines, _ = make_engines(tmp_path)
    assert list(engines) == ["bf16", "fp8", "skvq_k2v2"]
    assert engines["bf16"].case.pack.args == engines["bf16"].case.stock.args == ()
    assert engines["fp8"].case.stock.args == ("--kv-cache-dtype", "fp8")
    assert engines["skvq_k2v2"].case.stock.args == ()
    assert engines["skvq_k2v2"].case.pack.args == ("--kv-cache-dtype", "skvq_k2v2")
    assert engines["fp8"].case.stock.env == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert "1032" in engines["bf16"].case.args


def test_caches_hold_all_prompts_and_little_more() -> None:
    # 8 prompts of 32k tokens: 2 layers of 16 heads of K and V, 128 each, are 8 KiB a token in bf16.
    found = [kv_cache_speed.count_cache_gib(bits, [32768], 8, 2) for bits in (16, 8, 4.25, 2.125)]
    assert found == [3, 2, 1, 1]
    assert kv_cache_speed.estimate_bits("kvplan") == kv_cache_speed.estimate_bits("kv4") == 4.25
    assert kv_cache_speed.estimate_bits("k4v15") < 4


def test_engines_take_turns_on_one_prompt(tmp_path: Path) -> None:
    engines, runs = make_engines(tmp_path)
    measured = kv_cache_speed.measure_repetition(engines, 2, 1024, 8, 0)
    kv_cache_speed.measure_repetition(engines, 2, 1024, 8, 1)
    assert [name for name, *_ in runs] == ["bf16", "fp8", "skvq_k2v2", "skvq_k2v2", "fp8", "bf16"]
    # One token after whole blocks, so that one is computed.
    assert {run[1:] for run in runs} == {(1024, 1024 - 127, 8)}
    assert measured["bf16"]["decode"].value == 2.0


def test_prompts_that_were_computed_are_no_measurement(tmp_path: Path) -> None:
    engines, _ = make_engines(tmp_path, cached=False)
    with pytest.raises(RunFailed, match=r"bf16 computed 1810\.0 tokens for 16 decoded ones after 1024: its prompts"):
        kv_cache_speed.measure_repetition(engines, 2, 1024, 8, 0)


def test_prefill_counts_what_is_computed(tmp_path: Path) -> None:
    engines, _ = make_engines(tmp_path, cached=False)
    found = kv_cache_speed.measure_prefill(engines["fp8"], 2, 1024)
    assert found is not None
    # The fake counts the decoded token, too.
    assert found.value == 2 * (1024 - 127 + 1) / 3.0
    # The larger batch asks the smaller one's prompts again: all of them there is no prefill.
    engines["fp8"].cached = True
    assert kv_cache_speed.measure_prefill(engines["fp8"], 2, 1024) is None


@pytest.mark.parametrize("arguments", [["--contexts", "255"], ["--batch", "1", "0"], ["--tokens", "7"]])
def test_bad_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kv_cache_speed.main(arguments)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(600)
def test_small_run_from_model_to_records(tmp_path: Path) -> None:
    options = ["--contexts", "512", "--layers", "1", "--tokens", "8", "--repetitions", "2", "--presets", "skvq_k2v2"]
    options += ["--batch", "1", "2"]
    arguments = [*options, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert kv_cache_speed.main(arguments) == 0
    records = load_records(tmp_path / "out")
    assert {(record.case, record.arm, record.repetition) for record in records} == {
        (f"engine_kv_b{batch}_512", arm, repetition)
        for batch in (1, 2)
        for arm in ("bf16", "fp8", "skvq_k2v2")
        for repetition in (0, 1)
    }
    assert all(record.metrics["decode"].value for record in records)
    assert all("prefill" in record.metrics for record in records if record.repetition == 0)
    assert all(str(tmp_path) not in str(record.settings) for record in records)
