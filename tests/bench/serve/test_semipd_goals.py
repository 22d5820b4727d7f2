# SPDX-License-Identifier: Apache-2.0
"""Goals of semi-PD: met, missed or open by the interval, and what the other settings of stock had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.case import find_case, load_cases
from bench.records import Direction, Metric, Record, write_record
from bench.serve import semipd_goals
from bench.serve.semipd_goals import GOALS, compare_settings, judge_case

UNITS: dict[str, tuple[str, Direction]] = {
    "itl_p99": ("ms", "lower"),
    "ttft_p90": ("ms", "lower"),
    "output_throughput": ("tokens/s", "higher"),
}
STOCK = {"itl_p99": 200.0, "ttft_p90": 1000.0, "output_throughput": 50.0}
TRIALS = [
    {"args": [], "metrics": {name: [value, value * 2, value] for name, value in STOCK.items()}},
    {"args": ["--max-num-batched-tokens", "256"], "metrics": {}},
]


def make_records(pack: dict[str, float], noise: float = 0.01, case: str = "semipd_dense") -> list[Record]:
    records = []
    for repetition in range(6):
        # Both directions, and not the same in all pairs.
        shaken = 1 + noise * (repetition % 3 - 1)
        for arm, values, by in (("stock", STOCK, 1.0), ("pack", pack, shaken)):
            metrics = {name: Metric(values[name] * by, *UNITS[name]) for name in UNITS}
            settings: dict[str, Any] = {"kind": "server", "stock_arm": "stock", "tuning": {"trials": TRIALS}}
            records.append(Record(case, arm, repetition, metrics, {}, {"name": "x"}, "unknown", settings=settings))
    return records


@pytest.mark.parametrize(
    ("pack", "noise", "states"),
    [
        ({"itl_p99": 80.0, "ttft_p90": 1000.0, "output_throughput": 50.0}, 0.01, ["met", "met", "met"]),
        ({"itl_p99": 150.0, "ttft_p90": 1500.0, "output_throughput": 40.0}, 0.01, ["missed", "missed", "missed"]),
        ({"itl_p99": 99.0, "ttft_p90": 1090.0, "output_throughput": 45.5}, 0.2, ["open", "open", "open"]),
    ],
)
def test_goals_by_the_interval(pack: dict[str, float], noise: float, states: list[str]) -> None:
    judged = judge_case(make_records(pack, noise))
    assert [one.metric for one in judged] == list(GOALS)
    assert [one.state for one in judged] == states
    assert judged[0].ratio == pytest.approx(200 / pack["itl_p99"], rel=0.05)


def test_other_settings_stand_beside() -> None:
    found = compare_settings(make_records({"itl_p99": 100.0, "ttft_p90": 500.0, "output_throughput": 100.0}, 0.0))
    assert found["no further option"] == pytest.approx({"itl_p99": 2.0, "ttft_p90": 2.0, "output_throughput": 2.0})
    assert found["--max-num-batched-tokens 256"] == {}


@pytest.mark.parametrize(("itl", "code"), [(80.0, 0), (150.0, 1)])
def test_command_line(itl: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in make_records({**STOCK, "itl_p99": itl}):
        write_record(tmp_path, record)
    assert semipd_goals.main(["--results", str(tmp_path), "--json"]) == code
    said = capsys.readouterr()
    states = {goal["metric"]: goal["state"] for goal in json.loads(said.out)["semipd_dense"]["goals"]}
    assert states == {"itl_p99": "met" if code == 0 else "missed", "ttft_p90": "met", "output_throughput": "met"}
    assert "while tuned, --max-num-batched-tokens 256: it failed" in said.err


def test_without_records_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        semipd_goals.main(["--results", str(tmp_path)])
    assert raised.value.code == 2
    assert "run python -m bench.run first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(find_case("semipd_dense").parent.glob("semipd_*.yaml")), ids=lambda one: one.stem
)
def test_shipped_cases_measure_what_the_goals_need(path: Path) -> None:
    (case,) = load_cases(path)
    assert set(GOALS) <= set(case.metrics)
    assert case.tune_metric == "itl_p99"
    sizes = {args[args.index("--max-num-batched-tokens") + 1] for args in (case.stock.args, *case.tune)}
    assert sizes == {"256", "512", "1024", "2048"}
    assert case.workload.options["request_rate"] > 0
    assert "--no-enable-prefix-caching" in case.args
