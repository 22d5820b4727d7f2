# SPDX-License-Identifier: Apache-2.0
"""The controllers on a device whose best split is known, with noise, switches, steps of load and overload."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.scheduling.phases.controller import Decision, Objectives, PhaseController, Split, SplitController
from vllm_ext.scheduling.phases.latency import find_ttft_quantile
from vllm_ext.scheduling.phases.published import NearestPublishedController, PublishedController, fit_tpot, fit_ttft

SPLITS = [Split(tenth / 10, 1 - tenth / 10) for tenth in range(2, 9)]
OBJECTIVES = Objectives(ttft=0.5, tpot=0.04)


class Device:
    """Both lanes always busy beside each other: seconds per prompt token and per step as shares give them."""

    def __init__(self, controller: PhaseController, *, noise: float = 0.05, token_time: float = 5e-5) -> None:
        self.controller, self.noise, self.token_time = controller, noise, token_time
        self.rng = np.random.default_rng(0)
        self.step_time = 1.0
        self.now = 0.0
        self.decisions: list[Decision] = []

    def measure(self, split: Split, rate: float, prompts: np.ndarray) -> tuple[float, float]:
        """The truth: (TTFT, TPOT) at the quantile."""
        services = prompts * self.token_time / split.prefill
        return float(find_ttft_quantile(services, rate, 0.9)), (0.008 / split.decode + 0.006) * self.step_time

    def run(self, seconds: int, rate: float, mean: float = 800) -> None:
        """Serve, with one decision a second; requests are over after two seconds."""
        for _ in range(seconds):
            split, count = self.controller.split, self.rng.poisson(rate)
            prompts = np.maximum(1, self.rng.exponential(mean, count)).astype(int)
            jitter = lambda: float(np.exp(self.rng.normal(0, self.noise)))  # noqa: E731
            ttft, tpot = self.measure(split, rate, self.rng.exponential(mean, 300))
            for tokens in prompts.tolist():
                self.controller.observe_arrival(self.now, tokens)
                service = tokens * self.token_time / split.prefill * jitter()
                self.controller.observe_prefill(self.now, self.now + service, tokens, split.prefill)
                # About a tenth of the requests is above the quantile.
                first = ttft * float(self.rng.uniform(0.2, 1.09))
                self.controller.observe_first_token(self.now, self.now + first)
                self.controller.observe_finished(self.now, self.now + 2, round(2 / tpot))
            for _ in range(8):
                self.controller.observe_decode(self.now, self.now + tpot * jitter(), split.decode)
            self.now += 1
            decision = self.controller.decide(self.now, 0)
            self.decisions.append(decision)
            if decision.is_switch:
                self.controller.note_switch(self.now)

    def measure_cost(self, split: Split, rate: float, prompts: np.ndarray) -> float:
        """The worse latency over its objective."""
        first, further = self.measure(split, rate, prompts)
        return max(first / OBJECTIVES.ttft, further / OBJECTIVES.tpot)

    def find_best(self, rate: float, mean: float = 800) -> Split:
        prompts = np.random.default_rng(9).exponential(mean, 4000)
        return min(SPLITS, key=lambda split: self.measure_cost(split, rate, prompts))


@pytest.mark.parametrize("start", [0, len(SPLITS) - 1])
@pytest.mark.parametrize("rate", [4.0, 9.0])
def test_both_objectives_are_met_from_either_end(rate: float, start: int) -> None:
    device = Device(SplitController(SPLITS, OBJECTIVES, start=start, full_when_alone=False))
    prompts = np.random.default_rng(9).exponential(800, 4000)
    assert device.measure_cost(SPLITS[start], rate, prompts) > 1
    assert device.measure_cost(device.find_best(rate), rate, prompts) < 0.95
    device.run(40, rate)
    assert device.measure_cost(device.controller.split, rate, prompts) < 1
    # One split at a time, and no wandering about where all is well.
    assert sum(decision.is_switch for decision in device.decisions) <= len(SPLITS)


def test_follows_the_load_both_ways() -> None:
    device = Device(SplitController(SPLITS, OBJECTIVES, start=1, full_when_alone=False))
    chosen = []
    for rate, mean in ((1.0, 800), (11.0, 800), (1.0, 800)):
        device.run(60, rate, mean)
        chosen.append(device.controller.split.prefill)
        device.step_time *= 1.25  # what decodes grows: in the end decode needs more than it has
    assert chosen[1] > chosen[0]
    assert chosen[2] < chosen[1]


def test_noise_alone_switches_nothing() -> None:
    device = Device(SplitController(SPLITS, OBJECTIVES, full_when_alone=False), noise=0.3)
    device.run(40, 8.0)
    before = len(device.decisions)
    device.run(40, 8.0)
    assert sum(decision.is_switch for decision in device.decisions[before:]) <= 6


def test_predictions_are_those_of_the_device() -> None:
    controller = SplitController(SPLITS, OBJECTIVES, full_when_alone=False)
    device = Device(controller)
    for rate in (3.0, 10.0, 8.0):  # several splits are seen
        device.run(40, rate)
    prompts = np.random.default_rng(1).exponential(800, 500)
    for split, (ttft, tpot) in zip(SPLITS[2:6], controller.predict(SPLITS[2:6], prompts, 8.0), strict=True):
        true_ttft, true_tpot = device.measure(split, 8.0, prompts)
        assert tpot == pytest.approx(true_tpot, rel=0.2)
        assert ttft == pytest.approx(true_ttft, rel=0.5)


def test_samples_that_span_a_switch_are_left_out() -> None:
    controllers = [SplitController(SPLITS, OBJECTIVES, start=3) for _ in range(2)]
    for index, controller in enumerate(controllers):
        Device(controller).run(20, 8.0)
        controller.note_switch(30.0)
        if index:
            controller.observe_prefill(29.9, 90.0, 10, 0.5)
            controller.observe_decode(29.9, 90.0, 0.5)
            for _ in range(20):
                controller.observe_first_token(29.9, 90.0)
                controller.observe_finished(29.9, 90.0, 3)
    first, second = (controller.decide(31.0, 0) for controller in controllers)
    assert first == second
    for _ in range(20):
        controllers[1].observe_decode(30.1, 90.0, 0.5)
    assert controllers[1].decide(32.0, 0).tpot > 10 * first.tpot


def test_overload_is_refused_at_the_door_and_over_when_it_is_over() -> None:
    device = Device(SplitController(SPLITS, OBJECTIVES, full_when_alone=False))
    device.run(40, 40.0)
    limits = [decision.max_queued_tokens for decision in device.decisions[-10:]]
    assert all(limit is not None for limit in limits)
    # What may wait can be computed in time, at the split that was chosen.
    split = device.controller.split
    assert max(limit or 0 for limit in limits) * device.token_time / split.prefill <= OBJECTIVES.ttft
    assert 0.008 / split.decode + 0.006 <= OBJECTIVES.tpot * 1.1
    device.run(120, 2.0)
    assert device.decisions[-1].max_queued_tokens is None
    assert device.measure_cost(device.controller.split, 2.0, np.random.default_rng(9).exponential(800, 4000)) < 1


def test_nothing_is_refused_unless_asked() -> None:
    device = Device(SplitController(SPLITS, OBJECTIVES, full_when_alone=False, refuses=False))
    device.run(40, 40.0)
    assert {decision.max_queued_tokens for decision in device.decisions} == {None}


def test_who_waits_already_counts() -> None:
    controller = SplitController(SPLITS, OBJECTIVES, full_when_alone=False)
    Device(controller).run(30, 3.0)
    assert controller.decide(31.0, 0).ttft < controller.decide(32.0, 20_000).ttft


def test_nothing_is_decided_before_anything_is_known() -> None:
    controller = SplitController(SPLITS, OBJECTIVES)
    assert controller.decide(1.0, 0) == Decision(SPLITS[3], 0.0, 0.0, None, False)


@pytest.mark.parametrize(
    ("splits", "objectives", "match"),
    [
        ([], OBJECTIVES, "splits"),
        ([Split(0.0, 1.0)], OBJECTIVES, "shares in"),
        (SPLITS, Objectives(0.0, 0.1), "positive seconds"),
        (SPLITS, Objectives(0.1, 0.1, 90), "quantile between 0 and 1"),
    ],
)
def test_what_is_refused(splits: list[Split], objectives: Objectives, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SplitController(splits, objectives)


class MixingDevice:
    """Serves by whatever is in force: lanes at their shares, or full batches of both phases. Times are exact."""

    def __init__(self, objectives: Objectives, *, mixed_ratio: float = 1.0, start: int = 2) -> None:
        splits = SPLITS[1:6]
        self.controller = SplitController(splits, objectives, start=start, mix_budget=512)
        self.objectives, self.mixed_ratio = objectives, mixed_ratio
        self.token_time, self.step_time = 1e-4, 0.01
        self.now, self.mixes = 0.0, False
        self.decisions: list[Decision] = []

    def time_token(self, share: float) -> float:
        return self.token_time * (0.95 / share + 0.05)

    def time_step(self, share: float) -> float:
        return self.step_time * (0.4 / share + 0.6)

    def run(self, seconds: int, rate: int, tokens: int = 800) -> None:
        for _ in range(seconds):
            split = self.controller.split
            for _ in range(rate):
                self.controller.observe_arrival(self.now, tokens)
                if self.mixes:
                    time = (self.time_step(1.0) + 500 * self.time_token(1.0)) * self.mixed_ratio
                    self.controller.observe_mixed(self.now, self.now + time, 500)
                else:
                    time = tokens * self.time_token(split.prefill)
                    self.controller.observe_prefill(self.now, self.now + time, tokens, split.prefill)
            share = 1.0 if self.mixes else split.decode
            for _ in range(8):
                self.controller.observe_decode(self.now, self.now + self.time_step(share), share)
            pace = self.time_step(share)
            if self.mixes:
                pace *= self.mixed_ratio / (1 - min(rate * tokens * self.time_token(1.0) * self.mixed_ratio, 0.9))
            for _ in range(rate):
                self.controller.observe_finished(self.now, self.now + 200 * pace, 200)
            self.now += 1
            decision = self.controller.decide(self.now, 0)
            self.decisions.append(decision)
            if decision.is_switch:
                self.mixes = decision.mixes
                self.controller.note_switch(self.now)


def test_prompts_and_tokens_are_mixed_where_that_is_better() -> None:
    # Tokens may come slowly, and a first token is due before a share of the device can make it.
    device = MixingDevice(Objectives(ttft=0.3, tpot=0.2))
    device.run(10, 5)
    assert device.mixes
    assert device.decisions[-1].ttft < 0.3
    assert sum(decision.is_switch for decision in device.decisions) == 1
    # And where tokens must come at little more than the pace of a step alone, lanes are.
    device = MixingDevice(Objectives(ttft=3.0, tpot=0.018), start=4)
    device.run(20, 6)
    assert not device.mixes
    assert device.decisions[-1].tpot < 0.018


def test_mixing_ends_when_its_batches_are_too_slow() -> None:
    device = MixingDevice(Objectives(ttft=0.15, tpot=0.06))
    device.run(10, 5)
    assert device.mixes
    device.mixed_ratio = 2.0  # what the phases cost each other is measured
    device.run(40, 5)
    assert any(decision.is_switch and not decision.mixes for decision in device.decisions[10:])


def test_what_mixed_batches_really_take_is_learned_of_them() -> None:
    device = MixingDevice(Objectives(ttft=0.3, tpot=0.2))
    device.run(10, 5)
    assert device.mixes
    before = device.decisions[-1]
    for _ in range(8):
        for _ in range(5):
            device.controller.observe_arrival(device.now, 800)
        for _ in range(20):
            device.controller.observe_first_token(device.now, device.now + 1.4 * before.ttft)
            device.controller.observe_finished(device.now, device.now + 200 * 1.4 * before.tpot, 200)
        device.now += 1
        after = device.controller.decide(device.now, 0)
    assert after.ttft > 1.2 * before.ttft
    assert after.tpot > 1.2 * before.tpot


class WaitingDevice:
    """Two lanes of half of a device each, whose decode may wait for prompts. Times are exact."""

    def __init__(self, objectives: Objectives) -> None:
        self.controller = SplitController(
            [Split(0.5, 0.5)], objectives, intervals=[part * objectives.tpot for part in (0.8, 0.4, 0.6)]
        )
        self.token_time, self.step_time, self.now = 1e-4, 0.01, 0.0
        self.decision = self.controller.decide(0.0, 0)
        self.num_switches = 0

    def run(self, seconds: int, rate: int, tokens: int = 800) -> None:
        for _ in range(seconds):
            interval, step = self.decision.decode_interval, self.step_time * (0.4 / 0.5 + 0.6)
            share = 1 - 0.5 * min(1.0, step / interval) if interval else 0.5
            for _ in range(rate):
                self.controller.observe_arrival(self.now, tokens)
                time = tokens * self.token_time * (0.95 / share + 0.05)
                self.controller.observe_prefill(self.now, self.now + time, tokens, share)
            for _ in range(8):
                self.controller.observe_decode(self.now, self.now + step, 0.5)
            self.now += 1
            self.decision = self.controller.decide(self.now, 0)
            if self.decision.is_switch:
                self.num_switches += 1
                self.controller.note_switch(self.now)


def test_decode_waits_where_first_tokens_are_late_and_others_are_early() -> None:
    device = WaitingDevice(Objectives(ttft=0.3, tpot=0.1))
    device.run(1, 4)
    assert device.decision.decode_interval == 0
    device.run(11, 4)
    assert round(device.decision.decode_interval, 9) in (0.04, 0.06, 0.08)
    # Not for longer than it takes: from there it may only come down.
    switches = device.num_switches
    assert switches <= 3
    device.run(20, 4)
    assert device.num_switches == switches
    assert device.decision.ttft < 0.3
    assert device.decision.tpot < 0.1
    # Steps become longer than that: nothing is left to wait for, and prompts are told so.
    device.step_time *= 8
    device.run(40, 4)
    assert device.decision.decode_interval == 0


def test_tokens_come_sooner_again_where_that_makes_nobody_late() -> None:
    device = WaitingDevice(Objectives(ttft=0.3, tpot=0.1))
    device.run(12, 4)
    assert device.decision.decode_interval > 0
    device.run(120, 1)
    assert device.decision.decode_interval == 0
    assert device.decision.ttft < 0.3


def test_the_best_of_split_and_interval_is_found_from_afar() -> None:
    """Both change at once, one split at a time."""
    splits = [Split(tenth / 10, 1 - tenth / 10) for tenth in (3, 5, 7)]
    controller = SplitController(splits, Objectives(ttft=0.3, tpot=0.1), start=0, intervals=[0.05, 0.08])
    decisions = []
    for now in range(12):
        for _ in range(4):
            controller.observe_arrival(now, 800)
            controller.observe_prefill(now, now + 800e-4 * (0.95 / 0.5 + 0.05), 800, 0.5)
            controller.observe_decode(now, now + 0.014, 0.5)
        decisions.append(controller.decide(now + 0.5, 0))
        if decisions[-1].is_switch:
            controller.note_switch(now + 0.5)
    moves = np.diff([splits.index(decision.split) for decision in decisions])
    assert np.abs(moves).max() == 1
    assert decisions[-1].decode_interval > 0
    assert decisions[-1].ttft < 0.3


def test_decode_never_waits_where_that_helps_nobody() -> None:
    early, tight = WaitingDevice(Objectives(ttft=3.0, tpot=0.1)), WaitingDevice(Objectives(ttft=0.3, tpot=0.016))
    for device in (early, tight):
        device.run(30, 4)
        assert (device.decision.decode_interval, device.num_switches) == (0, 0)
    with pytest.raises(ValueError, match=r"intervals \[0.0\] must be positive seconds"):
        SplitController(SPLITS, OBJECTIVES, intervals=[0.0])


def test_mixing_is_off_unless_there_is_a_budget() -> None:
    assert SplitController(SPLITS, OBJECTIVES)._mixed is None
    with pytest.raises(ValueError, match="mix_budget 0 must be at least one token"):
        SplitController(SPLITS, OBJECTIVES, mix_budget=0)
    device = Device(SplitController(SPLITS, OBJECTIVES, full_when_alone=False))
    device.run(40, 40.0)
    assert not any(decision.mixes for decision in device.decisions)


def test_overload_limits_the_queue_of_mixed_batches_too() -> None:
    device = MixingDevice(Objectives(ttft=0.15, tpot=0.2))
    device.run(10, 5)
    device.run(40, 40)
    decision = device.decisions[-1]
    assert decision.mixes
    assert decision.max_queued_tokens is not None
    assert decision.max_queued_tokens * device.time_token(1.0) <= 0.15


def decide_published(controller: PublishedController, ttft: float, tpot: float, steps: int = 50) -> Decision:
    for _ in range(20):
        controller.observe_first_token(0.0, ttft)
    for _ in range(steps):
        controller.observe_decode(0.0, tpot, controller.split.decode)
    return controller.decide(0.0, 0)


@pytest.mark.parametrize(
    ("ttft", "tpot", "expected"),
    [
        (1.0, 0.01, Split(70 / 120, 50 / 120)),  # four steps up
        (0.52, 0.01, Split(55 / 105, 50 / 105)),  # one is enough
        (1.0, 0.039, Split(70 / 120, 50 / 120)),  # whatever the other objective suffers
        (0.1, 0.2, Split(50 / 120, 70 / 120)),
        (0.1, 0.01, Split(0.5, 0.5)),
        (1.0, 0.2, Split(0.5, 0.5)),  # both violated: nothing is changed
    ],
)
def test_algorithm_1(ttft: float, tpot: float, expected: Split) -> None:
    controller = PublishedController(OBJECTIVES)
    decision = decide_published(controller, ttft, tpot)
    assert tuple(decision.split) == pytest.approx(tuple(expected))
    assert decision.is_switch == (expected != Split(0.5, 0.5))


def test_algorithm_1_waits_for_its_window_and_takes_from_the_other_at_100() -> None:
    controller = PublishedController(OBJECTIVES, x=95, y=100)
    assert not decide_published(controller, 1.0, 0.01, steps=49).is_switch
    assert tuple(decide_published(controller, 1.0, 0.01, steps=1).split) == pytest.approx((100 / 185, 85 / 185))


def test_algorithm_1_takes_the_nearest_split_that_there_is() -> None:
    splits = [Split(0.25, 0.75), Split(0.5, 0.5), Split(0.75, 0.25)]
    controller = NearestPublishedController(splits, OBJECTIVES)
    assert controller.split == splits[1]
    # 55 of 105 percent is still the middle one.
    assert not decide_published(controller, 0.52, 0.01).is_switch
    decisions = [decide_published(controller, 5.0, 0.01) for _ in range(6)]
    assert decisions[-1].split == controller.split == splits[2]
    assert sum(decision.is_switch for decision in decisions) == 1
    with pytest.raises(ValueError, match="at least one split"):
        NearestPublishedController([], OBJECTIVES)


def test_fits_of_algorithm_1() -> None:
    shares = [30.0, 45.0, 60.0, 80.0]
    a, free, b = fit_ttft([(share, 12 / (share - 15) + 0.1) for share in shares])
    assert (a, free, b) == pytest.approx((12, 15, 0.1), rel=0.05)
    assert fit_tpot([(share, 2 / share + 0.01) for share in shares]) == pytest.approx((2, 0, 0.01))
    assert fit_tpot([(50.0, 0.04), (50.0, 0.04)]) == pytest.approx((2, 0, 0))
