# SPDX-License-Identifier: Apache-2.0
"""The fixture `gated`: pytest-benchmark beside a reference operator, compared with the committed baselines.

    make bench, or: pytest --benchmark-only bench/kernels -o python_files='bench_*.py' -o python_functions='bench_*'
    ... --update-baselines     # accept what this machine measures now

The reference runs directly before every round of the operator, so both see the same noise of the machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch

from bench.kernels.baselines import (
    BUSY_LIMIT,
    BusyMeter,
    describe_machine_class,
    find_loss,
    read_baselines,
    take_block_minima,
    update_baselines,
)
from bench.statistics import Comparison, compare

ROUNDS = 40
WARMUP_ROUNDS = 4
#: A loss must show in so many measurements in a row: other programs on the machine come and go.
ATTEMPTS = 3


class Gated(Protocol):
    """Time `operator(inputs)` beside `reference(inputs)`."""

    def __call__(
        self,
        operator: Callable[[Any], object],
        reference: Callable[[Any], object],
        make_inputs: Callable[[int], Any],
        rounds: int = ROUNDS,
    ) -> None:
        """`make_inputs(round)` gives the inputs of a round; it is not timed. Fails when the operator lost speed."""


class PairTimer:
    """Seconds of a reference and an operator, called in turn on the same inputs."""

    def __init__(
        self,
        operator: Callable[[Any], object],
        reference: Callable[[Any], object],
        make_inputs: Callable[[int], Any],
    ) -> None:
        self.operator, self.reference, self.make_inputs = operator, reference, make_inputs
        self.operator_seconds: list[float] = []
        self.reference_seconds: list[float] = []

    def set_up(self) -> tuple[tuple[Any], dict[str, Any]]:
        """Make inputs and time the reference on them; what pytest-benchmark calls before each round."""
        inputs = self.make_inputs(len(self.reference_seconds))
        began = time.perf_counter()
        self.reference(inputs)
        self.reference_seconds.append(time.perf_counter() - began)
        return (inputs,), {}

    def time_operator(self, inputs: Any) -> object:
        """One round."""
        began = time.perf_counter()
        result = self.operator(inputs)
        self.operator_seconds.append(time.perf_counter() - began)
        return result

    def run(self, rounds: int) -> None:
        """Further rounds without pytest-benchmark."""
        for _ in range(rounds):
            (inputs,), _unused = self.set_up()
            self.time_operator(inputs)

    def compare_last(self, rounds: int) -> Comparison:
        """Speed of the operator relative to the reference over the last rounds."""
        reference, operator = (seconds[-rounds:] for seconds in (self.reference_seconds, self.operator_seconds))
        return compare(take_block_minima(reference), take_block_minima(operator), "lower")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-baselines` writes bench/kernels/baselines.json instead of comparing with it."""
    parser.addoption("--update-baselines", action="store_true", help="write the ratios of this machine as baselines")
    parser.addoption(
        "--busy-limit",
        type=float,
        default=BUSY_LIMIT,
        help="judge only while other processes use less than this part of the machine",
    )


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Ratios of this run by suite; written at the end where that was asked for."""
    ratios: dict[str, float] = {}
    yield ratios
    if request.config.getoption("--update-baselines") and ratios:
        update_baselines(describe_machine_class(torch.get_num_threads()), ratios)


@pytest.fixture
def gated(request: pytest.FixtureRequest, benchmark: Any, measured: dict[str, float]) -> Gated:
    """See `Gated`. The suite's name in the baselines is the test's."""
    suite = request.node.name

    def run(
        operator: Callable[[Any], object],
        reference: Callable[[Any], object],
        make_inputs: Callable[[int], Any],
        rounds: int = ROUNDS,
    ) -> None:
        timer = PairTimer(operator, reference, make_inputs)
        meter = BusyMeter()
        limit = request.config.getoption("--busy-limit")
        benchmark.group = suite
        benchmark.pedantic(timer.time_operator, setup=timer.set_up, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
        result = timer.compare_last(rounds)
        busy = meter.read()
        benchmark.extra_info |= {"ratio": result.ratio, "ratio_low": result.low, "ratio_high": result.high}
        benchmark.extra_info["busy"] = busy
        if request.config.getoption("--update-baselines"):
            if busy > limit:
                pytest.fail(f"other processes use {busy:.0%} of the machine; baselines need a quiet one")
            measured[suite] = result.ratio
            return
        machine = describe_machine_class(torch.get_num_threads())
        baseline = read_baselines().get(machine, {}).get(suite)
        benchmark.extra_info["baseline"] = baseline
        if baseline is None:
            # Another machine's ratio says nothing here: there is nothing to compare with, which is no failure.
            return
        for _ in range(ATTEMPTS - 1):
            if find_loss(result.high, baseline) is None:
                return
            meter = BusyMeter()
            timer.run(rounds)
            result, busy = timer.compare_last(rounds), meter.read()
        if busy > limit:
            warnings.warn(f"{suite} is not judged: other processes use {busy:.0%} of the machine", stacklevel=2)
            return
        loss = find_loss(result.high, baseline)
        if loss is not None:
            pytest.fail(
                f"{suite} lost {loss:.0%} of its speed: {result.ratio:.3f} times its reference "
                f"[{result.low:.3f}, {result.high:.3f}], the baseline of '{machine}' is {baseline:.3f}. "
                "If that is meant, run again with --update-baselines and commit baselines.json"
            )

    return run
