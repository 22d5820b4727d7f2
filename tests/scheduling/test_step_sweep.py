# SPDX-License-Identifier: Apache-2.0
"""The start-up sweep: passes of the target and of the drafter timed apart, and what becomes of the times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams

from tests.scheduling.real_scheduler import build_scheduler
from vllm_ext.scheduling import step_sweep, step_times
from vllm_ext.scheduling.goodput_setup import make_controller, plan_control


class Clock:
    """Seconds that pass where a model says that they do."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Drafter:
    """V1's: `dummy_run` runs every pass."""

    def __init__(self, clock: Clock, passes: int) -> None:
        self._clock, self._passes = clock, passes

    def dummy_run(self, num_tokens: int) -> None:
        self._clock.seconds += self._passes * (2e-3 + 1e-4 * num_tokens)


class Speculator(Drafter):
    """V2's: `propose`."""

    def propose(self, num_tokens: int) -> None:
        self.dummy_run(num_tokens)


class ModelRunner:
    """Of either kind: a dummy run of the target, and the drafter's behind it."""

    def __init__(self, clock: Clock, **drafter: Any) -> None:
        self._clock = clock
        self.__dict__.update(drafter)

    def _dummy_run(self, num_tokens: int) -> None:
        self._clock.seconds += 5e-3 + 3e-4 * num_tokens
        if isinstance(drafter := getattr(self, "drafter", None), Drafter):
            drafter.dummy_run(num_tokens)
        if speculator := getattr(self, "speculator", None):
            speculator.propose(num_tokens)


class Executor:
    """Two ranks, the second slower by a fifth."""

    def __init__(self, vllm_config: Any, runner: ModelRunner) -> None:
        self.vllm_config, self._runner = vllm_config, runner
        self.calls = 0

    def collective_rpc(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self.calls += 1
        times = function(SimpleNamespace(model_runner=self._runner), *args)
        slower = {size: tuple(1.2 * each for each in both) for size, both in times.items()}
        return [times, slower]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_sweep.time, "perf_counter", clock)
    monkeypatch.setattr(step_times, "_measured", {})
    return clock


@pytest.fixture
def vllm_config(tmp_path: Path) -> Any:
    return build_scheduler(4, tmp_path).vllm_config


def test_a_lookup_is_no_part_of_a_pass(vllm_config: Any, clock: Clock) -> None:
    executor = Executor(vllm_config, ModelRunner(clock, drafter=object()))
    step_sweep.store_measured_prior(executor)
    times = step_times.find_step_times(vllm_config)
    assert times is not None
    assert times["step"] == pytest.approx(1.2 * 5.0)
    assert times["tokens"] == pytest.approx(1.2 * 0.3)
    # Known now: neither this engine nor the next one measures.
    step_sweep.store_measured_prior(executor)
    assert executor.calls == 1
    requests = {
        rid: SimpleNamespace(sampling_params=SamplingParams(temperature=temperature))
        for rid, temperature in {"greedy": 0.0, "sampled": 1.0}.items()
    }
    controller = make_controller(vllm_config, plan_control(vllm_config), requests)
    # What one kind of requests does is not learned of the other.
    slots, none = controller.acceptance.find_slots(["sampled", "greedy"]), np.zeros(1, np.int64)
    for _ in range(20):
        controller.acceptance.observe(slots[:1], none + 1, none)
    sampled, greedy = controller.acceptance.predict_survival(slots)[:, 0]
    assert sampled < 0.2
    assert greedy == pytest.approx(0.6, abs=0.01)
    assert controller.step_time.is_prior_measured
    assert controller.step_time.coefficients == pytest.approx(times)


@pytest.mark.parametrize("kind", ["drafter", "speculator"])
def test_a_drafter_is_timed_apart(kind: str, vllm_config: Any, clock: Clock) -> None:
    vllm_config.speculative_config.method = "draft_model"
    drafter = {"drafter": Drafter, "speculator": Speculator}[kind](clock, passes=4)
    step_sweep.store_measured_prior(Executor(vllm_config, ModelRunner(clock, **{kind: drafter})))
    times = step_times.find_step_times(vllm_config)
    assert times is not None
    assert times["step"] == pytest.approx(1.2 * 5.0)
    assert times["tokens"] == pytest.approx(1.2 * 0.3)
    assert times["passes"] == pytest.approx(1.2 * 2.0)
    assert times["drafted"] == pytest.approx(1.2 * 0.1)
    # The class's method is back.
    assert vars(drafter).keys() == {"_clock", "_passes"}


def test_a_failing_pass_leaves_the_drafter_as_it_was(clock: Clock) -> None:
    runner = ModelRunner(clock, drafter=Drafter(clock, 1))

    def fail(num_tokens: int) -> None:
        raise RuntimeError("out of memory")

    runner._dummy_run = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        step_sweep.measure_passes(SimpleNamespace(model_runner=runner), [1, 2])
    assert "dummy_run" not in vars(runner.drafter)  # type: ignore[attr-defined]


def test_one_size_is_too_few(vllm_config: Any, clock: Clock) -> None:
    vllm_config.scheduler_config.max_num_batched_tokens = 1
    executor = Executor(vllm_config, ModelRunner(clock))
    step_sweep.store_measured_prior(executor)
    assert executor.calls == 0
    assert not make_controller(vllm_config, plan_control(vllm_config), {}).step_time.is_prior_measured


def test_times_that_show_nothing_are_not_kept(
    vllm_config: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock that stands still, as where a runner's dummy run does nothing."""
    runner = ModelRunner(clock)
    runner._dummy_run = lambda num_tokens: None  # type: ignore[method-assign]
    monkeypatch.setattr(step_sweep.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        step_sweep.store_measured_prior(Executor(vllm_config, runner))
    assert "starts from guessed step times: times of passes must be positive" in caplog.text
    assert step_times.find_step_times(vllm_config) is None


def test_the_median_of_real_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass in five is disturbed."""
    count = [0]

    def run(num_tokens: int) -> None:
        count[0] += 1
        time.sleep(0.05 if count[0] % 5 == 0 else 0.002)

    runner = SimpleNamespace(_dummy_run=run)
    measured = step_sweep.measure_passes(SimpleNamespace(model_runner=runner), [1, 2])
    assert all(2.0 <= target < 40.0 and drafter == 0.0 for target, drafter in measured.values())
