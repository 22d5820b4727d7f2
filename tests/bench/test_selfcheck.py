# SPDX-License-Identifier: Apache-2.0
"""The check of the benchmark itself: its judgement, its slowdown, and (slow) the whole of it on real engines."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import slowdown
from bench.case import parse_case
from bench.selfcheck import ARMS, CASE, append_values, count_verdicts, judge, read_values
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
    assert read_values(path, CASE_OF_PASSES) == []
    for slower in (1.1, 1.2):
        append_values(path, CASE_OF_PASSES, make_values(slower, 0.01))
    assert read_values(path, CASE_OF_PASSES) == [make_values(1.1, 0.01), make_values(1.2, 0.01)]
    with pytest.raises(ValueError, match="trial 1, was measured with other settings"):
        read_values(path, parse_case(CASE, "selfcheck"))


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
