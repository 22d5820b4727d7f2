# SPDX-License-Identifier: Apache-2.0
"""Plans that stand for several steps: trimmed by the newest outcomes, which are all learned before the next plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from tests.scheduling.real_scheduler import add_request, build_scheduler, run_model
from tests.scheduling.test_goodput_accounting import record_observed, run_step
from vllm_ext import observability
from vllm_ext.speculation.controller import Batch, Decision
from vllm_ext.speculation.pace import Pace

K, HOLD = 4, 5


class Script:
    """A controller's plans, one after another, and when it was asked for them."""

    def __init__(self, scheduler: Any, length: int = 2) -> None:
        self.length, self.is_probe, self.may_stand, self.trims = length, False, True, True
        #: Of each request, where these differ.
        self.lengths: list[int] | None = None
        #: Step at which each plan was made, and steps that there were since the one before.
        self.asked: list[tuple[int, int]] = []
        #: Steps whose drafts were trimmed, with a plan of their own and under one that stands.
        self.trimmed: list[int] = []
        self.trimmed_again: list[int] = []
        self.learned: list[int] = []
        self.step = -1
        controller = scheduler._controller
        controller.plan_drafts, controller.trim_drafts, controller.trim_again = self.plan, self.trim, self.trim_again
        observe = controller.observe

        def note(steps: Any) -> None:
            self.learned += [self.step] * len(steps)
            observe(steps)

        controller.observe = note

    def plan(self, batch: Batch, steps: int, trim_time: float) -> Decision:
        self.asked.append((self.step, steps))
        lengths = np.full(len(batch.request_ids), self.length, np.int64)
        if self.lengths is not None:
            lengths = np.array(self.lengths)
        return Decision(lengths, 1.0, 1.0, self.is_probe, self.may_stand, self.trims)

    def trim(self, batch: Batch, drafted: np.ndarray, is_probe: bool) -> np.ndarray:
        self.trimmed.append(self.step)
        return drafted

    def trim_again(self, batch: Batch, drafted: np.ndarray) -> np.ndarray:
        self.trimmed_again.append(self.step)
        return np.minimum(drafted, 2)

    def run(self, scheduler: Any, steps: int, drafts: dict[str, int] | None = None) -> list[Any]:
        """Steps in which one draft of each request passes; drafts: how many are made, None for as many as asked for."""
        outputs = []
        for _ in range(steps):
            self.step += 1
            outputs.append(run_step(scheduler, drafts, accepted=1))
        return outputs


class Steady(Pace):
    """As many steps for a plan as it may stand."""

    @property
    def steps(self) -> int:
        return HOLD


def build(tmp_path: Path, **settings: Any) -> tuple[Any, Script]:
    scheduler = build_scheduler(K, tmp_path, hold_steps=HOLD, **settings)
    scheduler._pace = Steady()
    return scheduler, Script(scheduler)


def test_a_plan_stands_for_its_steps(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    seen = record_observed(scheduler)
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    outputs = script.run(scheduler, 12)
    assert script.asked == [(0, 1), (5, 5), (10, 5)]
    assert script.trimmed == [5, 10]
    assert all(output.draft_lengths == {"a": 2, "b": 2} for output in outputs)
    assert all(output.num_spec_tokens_to_schedule == 2 for output in outputs)
    # Nothing of what was learned is lost: each decoding step verified two drafts of each and accepted one.
    assert script.learned == [*[4] * 5, *[9] * 5]
    assert [told["drafted"] for told in seen] == [[0, 0], *[[2, 2]] * 9]
    assert [told["accepted"] for told in seen] == [[0, 0], *[[1, 1]] * 9]
    assert seen[0]["milliseconds"] is None
    assert [told["features"].context_tokens for told in seen[1:]] == [16 + 4 * step for step in range(9)]
    assert all((told["features"].tokens, told["features"].drafted) == (6, 4) for told in seen[1:])


def test_requests_come_and_go_under_a_plan(tmp_path: Path) -> None:
    """A newcomer gets what the others have on average; a batch of another size gets a plan of its own."""
    scheduler, script = build(tmp_path)
    script.lengths = [1, 3, 3, 3]
    for rid in "abcd":
        add_request(scheduler, rid, max_tokens=4 if rid == "a" else 1000)
    script.run(scheduler, 3)
    assert "a" not in scheduler.requests
    add_request(scheduler, "e")
    # With its prompt in it, and after that.
    outputs = script.run(scheduler, 2)
    assert [output.draft_lengths for output in outputs] == [{"b": 3, "c": 3, "d": 3, "e": 2}] * 2
    assert outputs[0].num_spec_tokens_to_schedule == 3
    assert [step for step, _ in script.asked] == [0]
    # Outcomes of those that have gone are learned too.
    assert script.learned == [4] * 5
    assert set(scheduler._controller.acceptance._slots) == set("bcde")
    script.run(scheduler, 1)
    assert [step for step, _ in script.asked] == [0, 5]
    script.lengths = None
    add_request(scheduler, "f")
    add_request(scheduler, "g")
    # Six where four were planned for.
    script.run(scheduler, 2)
    assert script.asked[2:] == [(6, 1)]


def test_a_prompt_that_goes_on_ends_it(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a")
    script.run(scheduler, 2)
    scheduler.max_num_scheduled_tokens = 50
    add_request(scheduler, "long", 120)
    script.run(scheduler, 4)
    # Two chunks leave some of it; the plan of the last one stands again.
    assert [step for step, _ in script.asked] == [0, 2, 3, 4]


def test_trials_do_not_stand(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    script.may_stand = False
    add_request(scheduler, "a")
    script.run(scheduler, 6)
    assert [step for step, _ in script.asked] == list(range(6))
    assert script.learned == list(range(6))


def test_no_drafts_stand_as_well(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    script.length = 0
    add_request(scheduler, "a")
    outputs = script.run(scheduler, 7)
    assert script.asked == [(0, 1), (5, 5)]
    assert all(output.num_spec_tokens_to_schedule == 0 for output in outputs)


def test_what_is_left_is_learned_when_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, float] = {}

    def count(name: str, value: float, engine_index: int) -> None:
        counted[name] = counted.get(name, 0) + value

    monkeypatch.setattr(observability, "add", count)
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a", max_tokens=7)
    script.run(scheduler, 4)
    assert not scheduler.running
    assert script.learned == [3, 3, 3, 3]
    assert counted["vllm_ext:smartspec_verified_tokens_total"] == counted["vllm_ext:smartspec_planned_tokens_total"] - 2
    assert counted["vllm_ext:smartspec_accepted_tokens_total"] == 3
    assert not scheduler._controller.acceptance._slots


def test_outcomes_count_at_once_and_are_learned_later(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a")
    script.run(scheduler, 3)
    scheduler.schedule()
    model = scheduler._controller.acceptance
    (slot,) = model.find_slots(["a"])
    # Of two drafts one passed, twice; the first step had none. Requests here are sampled: the second group's histories.
    assert (model._histories[slot] - 16, model._learned_histories[slot] - 16) == (4 * 2 + 2, 0)
    assert script.learned == []


def test_few_drafts_are_not_trimmed(tmp_path: Path) -> None:
    """Neither under a plan that says so nor by the step that ends it, unless others make more than it asked for."""
    scheduler, script = build(tmp_path)
    seen = record_observed(scheduler)
    script.trims = False
    add_request(scheduler, "a")
    script.run(scheduler, 6)
    assert [step for step, _ in script.asked] == [0, 5]
    assert not script.trimmed
    assert not script.trimmed_again
    assert script.learned == [4] * 5
    assert [told["drafted"] for told in seen] == [[0], [2], [2], [2], [2]]
    assert not any(told["is_noted"] for told in seen)
    scheduler.requests["a"].spec_token_ids = [7] * 4
    script.run(scheduler, 1)
    assert script.trimmed_again == [6]
    script.run(scheduler, 4)
    assert [told["is_noted"] for told in seen[5:]] == [True, False, False, False, False]


def test_the_output_of_aborted_requests_is_no_trial(tmp_path: Path) -> None:
    """Aborts come between a step and its output, which still has their tokens."""
    scheduler, script = build(tmp_path)
    seen = record_observed(scheduler)
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    script.run(scheduler, 2)
    scheduled = scheduler.schedule()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    scheduler.update_from_output(scheduled, run_model(scheduled, lambda rid, tokens: [*tokens[:1], 9]))
    script.run(scheduler, 1)
    assert [told["request_ids"] for told in seen] == [["a", "b"], ["a", "b"], ["b"]]


def test_asynchronous_output_of_aborted_requests_is_no_trial(tmp_path: Path) -> None:
    scheduler = build_scheduler(K, tmp_path, base="AsyncScheduler", method="ngram_gpu")
    seen = record_observed(scheduler)
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    flying = [scheduler.schedule(), scheduler.schedule()]
    assert [list(output.num_scheduled_tokens) for output in flying] == [["a", "b"]] * 2
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    for output in flying:
        scheduler.update_from_output(output, run_model(output, lambda rid, tokens: [*tokens[:1], 9]))
    assert [told["request_ids"] for told in seen] == [["b"], ["b"]]


def test_a_model_that_drafts_more_than_asked_is_trimmed_at_every_step(tmp_path: Path) -> None:
    """It makes the longest number for all, so what a shorter length asks for is up to the trim."""
    scheduler, script = build(tmp_path)
    script.lengths = [1, 3]
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    outputs = script.run(scheduler, 4, {"a": 3, "b": 3})
    assert [step for step, _ in script.asked] == [0]
    assert script.trimmed_again == [1, 2, 3]
    assert not script.trimmed
    assert {len(drafts) for drafts in outputs[-1].scheduled_spec_decode_tokens.values()} == {2}


def test_asynchronous_steps_share_plans(tmp_path: Path) -> None:
    """Two steps in flight: outcomes come after the next plan, and all of them come."""
    scheduler = build_scheduler(K, tmp_path, base="AsyncScheduler", method="ngram_gpu", hold_steps=HOLD)
    scheduler._plan = scheduler._plan._replace(plans_drafts=True)
    scheduler._pace = Steady()
    script = Script(scheduler)
    seen = record_observed(scheduler)
    add_request(scheduler, "a")
    flying: list[Any] = []
    for _ in range(16):
        script.step += 1
        flying.append(scheduler.schedule())
        if len(flying) == 2:
            output = flying.pop(0)
            scheduler.update_from_output(output, run_model(output, lambda rid, tokens: [*tokens[:1], 9]))
    gaps = [steps for _, steps in script.asked]
    assert max(gaps) == HOLD
    # Of fifteen finished steps those since the last plan are still to be learned from.
    assert len(seen) + len(scheduler._outcomes) + len(scheduler._unread) == 15
    assert all(told["drafted"] == [2] for told in seen[2:])


def test_the_pace_follows_what_was_measured(tmp_path: Path) -> None:
    """Steps without a model take next to nothing: control is most of them, and plans stand as long as they may."""
    scheduler = build_scheduler(K, tmp_path, hold_steps=3)
    script = Script(scheduler)
    add_request(scheduler, "a")
    script.run(scheduler, 20)
    assert [steps for _, steps in script.asked][-4:] == [3, 3, 3, 3]
    # A forward pass of a second leaves room for a plan at every step.
    for _ in range(200):
        scheduler._pace.observe(0.1, 1000.0)
    script.asked.clear()
    script.run(scheduler, 6)
    assert [steps for _, steps in script.asked][1:] == [1] * (len(script.asked) - 1)


def test_a_burst_ends_it_at_once(tmp_path: Path) -> None:
    """Prompts that are admitted while a plan stands: as many drafts for all of them was not what was chosen."""
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a")
    script.run(scheduler, 2)
    for rid in "bcdef":
        add_request(scheduler, rid)
    script.run(scheduler, 1)
    assert [step for step, _ in script.asked] == [0, 2]


def test_drafts_of_others_are_trimmed(tmp_path: Path) -> None:
    """More drafts than the plan asked for, from whatever source, are not verified because a plan stands."""
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a")
    script.run(scheduler, 2)
    scheduler.requests["a"].spec_token_ids = [7] * 4
    (output,) = script.run(scheduler, 1)
    assert script.trimmed_again == [1, 2]
    assert len(output.scheduled_spec_decode_tokens["a"]) == 2


def test_aborted_requests_are_learned_from(tmp_path: Path) -> None:
    scheduler, script = build(tmp_path)
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    script.run(scheduler, 3)
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert script.learned == []
    scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    assert script.learned == [2, 2, 2]
    assert not scheduler._controller.acceptance._slots
