# SPDX-License-Identifier: Apache-2.0
"""What the controller is told of a running engine, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext.scheduling.phases.controller import Decision, Objectives, Split, SplitController
from vllm_ext.scheduling.phases.pacer import PERIOD, Pacer
from vllm_ext.scheduling.phases.view import Lane

SPLITS = [Split(0.25, 0.75), Split(0.5, 0.5), Split(0.75, 0.25)]


class Recorder:
    """A controller that keeps what it is told, and switches when asked."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.split = SPLITS[0]
        self.following = SPLITS[0]

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))

    def decide(self, now: float, queued_tokens: int) -> Decision:
        is_switch = self.following != self.split
        self.split = self.following
        return Decision(self.split, 0.0, 0.0, None, is_switch)


def test_requests_and_batches_are_told() -> None:
    controller = Recorder()
    pacer = Pacer(controller, SPLITS, Objectives(1.0, 0.1))
    pacer.note_arrival("a", 10.0, 100)
    pacer.note_batch(Lane.PREFILL, 10.1, 10.4, 100, 0.25)
    pacer.note_tokens("a", 10.5, 1, False)
    pacer.note_batch(Lane.DECODE, 10.5, 10.6, 1, 0.75)
    pacer.note_tokens("a", 10.6, 1, False)
    pacer.note_tokens("a", 10.9, 1, True)
    assert controller.told == [
        ("observe_arrival", 10.0, 100),
        ("observe_prefill", 10.1, 10.4, 100, 0.25),
        ("observe_first_token", 10.0, 10.5),
        ("observe_decode", 10.5, 10.6, 0.75),
        ("observe_finished", 10.5, 10.9, 2),
    ]
    counts = pacer.counts
    assert (counts.first_tokens, counts.first_tokens_in_time) == (1, 1)
    assert (counts.finished, counts.finished_in_time) == (1, 0)
    assert counts.busy == (pytest.approx(0.3), pytest.approx(0.1))
    # Gone: what comes late is nobody's.
    pacer.note_tokens("a", 11.0, 1, True)
    assert counts.finished == 1


def test_one_token_and_aborts_have_no_pace() -> None:
    pacer = Pacer(None, SPLITS, Objectives(1.0, 0.1))
    pacer.note_arrival("a", 0.0, 5)
    pacer.note_arrival("b", 0.0, 5)
    pacer.note_tokens("a", 2.0, 1, True)
    pacer.forget("b")
    pacer.note_tokens("b", 3.0, 4, True)
    assert (pacer.counts.first_tokens, pacer.counts.first_tokens_in_time, pacer.counts.finished) == (1, 0, 0)


def test_overlap_is_counted_once() -> None:
    pacer = Pacer(None, SPLITS, Objectives(1.0, 0.1))
    # A prompt from 0 to 10 beside steps of 2 with 1 between them; outputs are read in the order of their ends.
    for start in (1.0, 4.0, 7.0):
        pacer.note_batch(Lane.DECODE, start, start + 2, 1, 0.5)
    pacer.note_batch(Lane.PREFILL, 0.0, 10.0, 100, 0.5)
    pacer.note_batch(Lane.DECODE, 9.5, 11.5, 1, 0.5)
    pacer.note_batch(Lane.DECODE, 12.0, 13.0, 1, 0.5)
    pacer.note_batch(Lane.PREFILL, 11.0, 20.0, 100, 0.5)
    assert pacer.counts.overlap == pytest.approx(3 * 2 + 0.5 + 0.5 + 1)


def test_batches_of_both_phases_are_told_as_what_they_are() -> None:
    controller = Recorder()
    pacer = Pacer(controller, SPLITS, Objectives(1.0, 0.1))
    pacer.note_mixed(0.0, 1.0, 90, 6, 1.0)
    pacer.note_mixed(1.0, 2.0, 90, 0, 1.0)
    pacer.note_mixed(2.0, 3.0, 0, 6, 1.0)
    assert controller.told == [
        ("observe_mixed", 0.0, 1.0, 90),
        ("observe_prefill", 1.0, 2.0, 90, 1.0),
        ("observe_decode", 2.0, 3.0, 1.0),
    ]
    assert (pacer.counts.busy, pacer.counts.mixed_busy) == ((0.0, 3.0), 3.0)


def test_who_is_held_back_says_nothing_about_the_device() -> None:
    controller = Recorder()
    pacer = Pacer(controller, SPLITS, Objectives(1.0, 0.1))
    pacer.note_arrival("a", 0.0, 100)
    pacer.note_late("a")
    pacer.note_late("gone")
    pacer.note_tokens("a", 30.0, 1, False)
    assert [name for name, *_ in controller.told] == ["observe_arrival"]
    # But it is late, and counts as that.
    counts = pacer.counts
    assert (counts.late, counts.first_tokens, counts.first_tokens_in_time) == (2, 1, 0)


def test_what_is_decided_beside_the_split() -> None:
    controller = Recorder()
    pacer = Pacer(controller, SPLITS, Objectives(1.0, 0.1))
    answers = iter([Decision(SPLITS[0], 0, 0, 500, True, True), Decision(SPLITS[0], 0, 0, None, False, True)])
    controller.decide = lambda now, queued_tokens: next(answers)  # type: ignore[method-assign]
    pacer.decide(0.0, 0)
    assert (pacer.is_mixing, pacer.max_queued_tokens, pacer.counts.switches) == (True, 500, 1)
    pacer.decide(PERIOD, 0)
    assert (pacer.is_mixing, pacer.max_queued_tokens, pacer.counts.switches) == (True, None, 1)
    paced = Decision(SPLITS[0], 0, 0, None, True, False, 0.04)
    answers = iter([paced, paced._replace(is_switch=False, decode_interval=0.0)])
    for interval in (0.04, 0.0):
        pacer.decide(pacer._decided + PERIOD, 0)
        # Steps that fill an interval end it, which is no switch.
        assert (pacer.is_mixing, pacer.decode_interval) == (False, interval)


def test_what_prompts_have_of_a_device_beside_steps() -> None:
    pacer = Pacer(Recorder(), SPLITS, Objectives(1.0, 0.1))
    prefill = SPLITS[pacer.index].prefill
    assert pacer.measure_share(1.0, 2.0, None) == 1.0
    pacer.note_batch(Lane.DECODE, 0.9, 1.1, 4, 0.5)
    pacer.note_batch(Lane.DECODE, 1.4, 1.5, 4, 0.5)
    # A tenth of the time beside a step, and another one; and three more tenths beside one that still runs.
    assert pacer.measure_share(1.0, 2.0, None) == pytest.approx(1 - 0.2 * (1 - prefill))
    assert pacer.measure_share(1.0, 2.0, 1.7) == pytest.approx(1 - 0.5 * (1 - prefill))
    assert pacer.measure_share(1.0, 1.0, 0.5) == 1.0
    assert pacer.measure_share(3.0, 4.0, 2.0) == pytest.approx(prefill)


def test_decisions_are_seldom_and_counted() -> None:
    controller = Recorder()
    pacer = Pacer(controller, SPLITS, Objectives(1.0, 0.1))
    assert pacer.decide(0.0, 0) == 0
    controller.following = SPLITS[2]
    assert pacer.decide(PERIOD / 2, 0) == 0
    assert pacer.decide(PERIOD, 0) == 2
    assert pacer.counts.switches == 1
    assert controller.told[-1] == ("note_switch", PERIOD)
    assert Pacer(None, SPLITS, Objectives(1.0, 0.1)).decide(0.0, 0) == 0


def test_with_the_real_controller() -> None:
    """Tokens that are too slow move cores to decode."""
    objectives = Objectives(50.0, 0.08)
    controller = SplitController(SPLITS, objectives, start=2, full_when_alone=False, refuses=False)
    pacer = Pacer(controller, SPLITS, objectives)
    assert pacer.index == 2
    now = 0.0
    for number in range(400):
        pacer.note_arrival(str(number), now, 200)
        share = SPLITS[pacer.index]
        pacer.note_batch(Lane.PREFILL, now, now + 0.05 / share.prefill, 200, share.prefill)
        step = 0.05 / share.decode
        pacer.note_batch(Lane.DECODE, now, now + step, 4, share.decode)
        pacer.note_tokens(str(number), now + 0.1, 1, False)
        pacer.note_tokens(str(number), now + 0.1 + step, 1, True)
        now += 0.2
        pacer.decide(now, 0)
    assert pacer.index == 0
    assert pacer.counts.switches == 2
