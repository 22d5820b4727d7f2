# SPDX-License-Identifier: Apache-2.0
"""The check of the benchmark itself: its judgement, its slowdown, and (slow) the whole of it on real engines."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import slowdown
from bench.case import parse_case
from bench.records import load_records, write_record
from bench.selfcheck import (
    ARMS,
    CASE,
    append_values,
    count_verdicts,
    describe_check,
    judge,
    make_record,
    read_values,
)
from bench.slowdown import make_environment, slow_down, write_plugin

PASSES = 3
CASE_OF_PASSES = parse_case({**CASE, "passes": PASSES}, "selfcheck")


def make_values(slower: float, scatter: float, pairs: int = 5) -> dict[str, dict[str, list[float]]]:
    rng = np.random.default_rng(3)
    factors = dict(zip(ARMS, (1.0, 1.0, slower), strict=True))
    values = {
        name: (factor * np.exp(scatter * rng.normal(size=pairs * PASSES))).tolist() for name, factor in factors.items()
    }
    return {"wall_per_step": values}


def test_judgement_knows_equal_from_slower() -> None:
    trial = judge(make_values(1.1, 0.01), CASE_OF_PASSES)
    assert trial["wall_per_step"]["equal"].verdict == "no difference"
    assert trial["wall_per_step"]["slower"].verdict == "loss"
    assert trial["wall_per_step"]["slower"].pairs == 5
    hidden = judge(make_values(1.1, 0.3), CASE_OF_PASSES)
    assert count_verdicts([trial, hidden], "wall_per_step") == {"equal": 2, "found": 1}


def test_one_disturbed_pass_of_three_does_not_count() -> None:
    values = make_values(1.1, 0.01)
    values["wall_per_step"]["equal"][4] *= 10
    trial = judge(values, CASE_OF_PASSES)
    assert trial["wall_per_step"]["equal"].verdict == "no difference"
    assert trial["wall_per_step"]["equal"].ratio == pytest.approx(1, abs=0.02)


def test_trials_are_kept_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "values.jsonl"
    check = describe_check(CASE_OF_PASSES, 5, 0.1)
    assert read_values(path, check) == []
    for slower in (1.1, 1.2):
        append_values(path, check, make_values(slower, 0.01))
    assert read_values(path, check) == [make_values(1.1, 0.01), make_values(1.2, 0.01)]


@pytest.mark.parametrize("name", ["case_digest", "pairs", "slowdown", "versions", "device", "git_hash"])
def test_trials_of_another_check_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "values.jsonl"
    check = describe_check(CASE_OF_PASSES, 5, 0.1)
    append_values(path, check, make_values(1.1, 0.01))
    append_values(path, {**check, name: "other"}, make_values(1.1, 0.01))
    with pytest.raises(ValueError, match=f"trial 2, was measured with {name} 'other', this check has"):
        read_values(path, check)


def test_record_has_the_counts_and_what_they_were_counted_from(tmp_path: Path) -> None:
    case = replace(CASE_OF_PASSES, metrics={"wall_per_step": CASE_OF_PASSES.metrics["wall_per_step"]})
    trials = [judge(make_values(1.1, scatter), case) for scatter in (0.01, 0.3)]
    write_record(tmp_path, make_record(case, trials, describe_check(case, 5, 0.1)))
    (record,) = load_records(tmp_path)
    values = {name: metric.value for name, metric in record.metrics.items()}
    assert values == {"trials": 2, "wall_per_step_equal": 2, "wall_per_step_found": 1}
    ratios = record.settings["ratios"]["wall_per_step"]
    assert [len(ratios["equal"]), len(ratios["slower"])] == [2, 2]
    assert ratios["slower"][0]["ratio"] == pytest.approx(1 / 1.1, rel=0.02)
    # The verdicts can be counted again from the record alone.
    assert sum(one["high"] < 1 for one in ratios["slower"]) == 1
    assert (record.settings["pairs"], record.settings["slowdown"]) == (5, 0.1)


def test_slowed_step_takes_longer_by_the_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    worked: list[float] = []

    def work(deadline: float) -> None:
        worked.append(deadline - clock[0])
        clock[0] = deadline

    def step() -> str:
        clock[0] += 0.02
        return "result"

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(slowdown, "work_until", work)
    slowed = slow_down(step, 0.1)
    assert slowed() == "result"
    assert worked == [], "before the first step the engine was idle"
    clock[0] += 0.01  # scheduling and sampling
    slowed()
    clock[0] += 0.01
    slowed()
    # 10 % of the whole 30 ms between two steps, without the extra work itself.
    assert worked == pytest.approx([0.003, 0.003])
    clock[0] += 5.0
    slowed()
    assert len(worked) == 2, "an idle engine is not slower"


def test_plugin_is_found_by_its_metadata(tmp_path: Path) -> None:
    write_plugin(tmp_path)
    distribution = importlib.metadata.PathDistribution(tmp_path / f"{slowdown.NAME}-0.dist-info")
    (point,) = distribution.entry_points
    assert (point.group, point.name) == ("vllm.general_plugins", slowdown.NAME)
    assert point.load() is slowdown.register
    assert make_environment(tmp_path, 0.1)["VLLM_PLUGINS"] == slowdown.NAME


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_check_on_real_engines(repository: Path) -> None:
    command = [sys.executable, "-m", "bench.selfcheck", "--trials", "20", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    assert done.returncode == 0, (result, done.stderr[-3000:])
    assert result["trials"] == 20
