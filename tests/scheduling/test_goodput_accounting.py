# SPDX-License-Identifier: Apache-2.0
"""What the goodput mixin tells its controller: drafts of which plan, beside which prompts, in how many passes."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from tests.scheduling.real_scheduler import add_request, build_scheduler, hand_drafts, run_model
from vllm_ext import observability
from vllm_ext.scheduling import goodput
from vllm_ext.speculation.controller import Batch, Decision, GoodputController
from vllm_ext.speculation.step_time import COEFFICIENTS, StepTimeModel

K = 4


def freeze_step_time(token: float) -> StepTimeModel:
    """A step of 5 ms and so many for each token, whatever the machine takes."""
    model = StepTimeModel({name: {"step": 5.0, "tokens": token}.get(name, 0.0) for name in COEFFICIENTS})
    model.observe = lambda features, milliseconds: None  # type: ignore[method-assign]
    return model


def run_step(scheduler: Any, drafts: dict[str, int] | None = None, accepted: int = 0) -> Any:
    """One synchronous step: `accepted` drafts of each request pass, and `drafts` are made, those planned for None."""
    output = scheduler.schedule()

    def sample(rid: str, tokens: list[int]) -> list[int]:
        return [] if scheduler.requests[rid].is_prefill_chunk else [*tokens[:accepted], 9]

    scheduler.update_from_output(output, run_model(output, sample))
    lengths = output.draft_lengths if drafts is None else drafts
    hand_drafts(scheduler, {rid: [7] * lengths.get(rid, 0) for rid in scheduler.requests})
    return output


def record_observed(scheduler: Any) -> list[dict[str, Any]]:
    """What the controller is told of each step, as a list that grows."""
    seen: list[dict[str, Any]] = []
    observe = scheduler._controller.observe

    def note(steps: Any) -> None:
        seen.extend(step._asdict() for step in steps)
        observe(steps)

    scheduler._controller.observe = note
    return seen


def script_plans(scheduler: Any, plans: list[tuple[int, bool]]) -> None:
    """Have the controller plan these (length of all, whether it is a probe) one after another, then nothing."""
    left = iter(plans)

    def plan(batch: Batch, steps: int, trim_time: float) -> Decision:
        length, is_probe = next(left, (0, False))
        return Decision(np.full(len(batch.request_ids), length, np.int64), 1.0, 1.0, is_probe)

    scheduler._controller.plan_drafts = plan
    scheduler._controller.trim_drafts = lambda batch, drafted, is_probe: drafted


PLANS = [(0, False), (2, True), (0, False), (3, False), (1, True), (2, False), (0, False)]


def test_outcomes_belong_to_the_plan_that_made_the_drafts(tmp_path: Path) -> None:
    scheduler = build_scheduler(K, tmp_path)
    seen = record_observed(scheduler)
    script_plans(scheduler, PLANS)
    add_request(scheduler, "a")
    for _ in range(len(PLANS) + 1):
        run_step(scheduler)
    # The first step is the prompt's; each later one verifies what the one before planned.
    assert [told["is_probe"] for told in seen] == [False, *(is_probe for _, is_probe in PLANS)]
    assert [told["drafted"] for told in seen[1:]] == [[length] for length, _ in PLANS]


def test_asynchronous_outcomes_belong_to_their_plan(tmp_path: Path) -> None:
    """Two steps in flight: when an outcome comes, two more plans were made."""
    scheduler = build_scheduler(K, tmp_path, base="AsyncScheduler", method="ngram_gpu")
    seen = record_observed(scheduler)
    # As a drafter that is told: ngram_gpu is not, and is what this machine's vLLM accepts asynchronously.
    scheduler._plan = scheduler._plan._replace(plans_drafts=True)
    script_plans(scheduler, PLANS)
    add_request(scheduler, "a")
    flying: list[Any] = []
    for _ in range(len(PLANS) + 2):
        flying.append(scheduler.schedule())
        if len(flying) == 2:
            output = flying.pop(0)
            scheduler.update_from_output(output, run_model(output, lambda rid, tokens: [9]))
    told = [(told["drafted"], told["is_probe"]) for told in seen]
    assert told == [([0], False), *(([length], is_probe) for length, is_probe in PLANS)]


def test_more_drafts_than_k_max_end_nothing(tmp_path: Path) -> None:
    """Where full graphs forbid a trim, drafters that are not told make the full number."""
    scheduler = build_scheduler(6, tmp_path, k_max=3)
    seen = record_observed(scheduler)
    scheduler._plan = scheduler._plan._replace(plans_drafts=False, trims=False)
    add_request(scheduler, "a")
    for accepted in (0, 4, 6, 2):
        run_step(scheduler, {"a": 6}, accepted)
    assert [(told["drafted"], told["accepted"]) for told in seen[1:]] == [([3], [3]), ([3], [3]), ([3], [2])]


@pytest.mark.parametrize(
    ("method", "passes", "drafted"), [("ngram", 0, 2), ("draft_model", 2, 4), ("suffix", 0, 8), ("medusa", 1, 2)]
)
def test_features_are_what_the_drafter_does(method: str, passes: int, drafted: int, tmp_path: Path) -> None:
    """Two requests, one of which gets two drafts."""
    scheduler = build_scheduler(K, tmp_path)
    scheduler.vllm_config.speculative_config.method = method
    scheduler = type(scheduler)(
        vllm_config=scheduler.vllm_config,
        kv_cache_config=scheduler.kv_cache_config,
        structured_output_manager=scheduler.structured_output_manager,
        block_size=scheduler.block_size,
    )
    seen = record_observed(scheduler)
    lengths = np.array([2, 0])
    scheduler._controller.plan_drafts = lambda batch, steps, trim_time: Decision(
        lengths[: len(batch.request_ids)], 1.0, 1.0, False
    )
    scheduler._controller.trim_drafts = lambda batch, drafted, is_probe: drafted
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    run_step(scheduler, {"a": 2})
    run_step(scheduler, {"a": 2})
    assert seen[0]["milliseconds"] is None
    features = seen[1]["features"]
    assert (features.tokens, features.requests, features.passes, features.drafted) == (4, 2, passes, drafted)


def test_prompts_beside_the_drafts_count(tmp_path: Path) -> None:
    scheduler = build_scheduler(K, tmp_path)
    scheduler._controller.step_time = freeze_step_time(1.0)
    trimmed: list[int] = []
    planned: list[int] = []
    trim, plan = scheduler._controller.trim_drafts, scheduler._controller.plan_drafts
    scheduler._controller.trim_drafts = lambda batch, *rest: (trimmed.append(batch.tokens), trim(batch, *rest))[1]
    scheduler._controller.plan_drafts = lambda batch, steps, trim_time: (planned.append(batch.tokens), plan(batch))[1]
    add_request(scheduler, "a")
    run_step(scheduler, {"a": 2})
    run_step(scheduler, {"a": 2})
    assert (trimmed, planned) == ([1], [1, 1])
    # 100 tokens a step from now on: what "a" leaves of them is the long prompt's.
    scheduler.max_num_scheduled_tokens = 100
    add_request(scheduler, "long", 250)
    steps = [run_step(scheduler, {"a": 0}).num_scheduled_tokens for _ in range(4)]
    assert [step.get("long") for step in steps] == [99, 99, 52, 1]
    # Known when planning: after the first chunk 151 tokens are left, which is more than a step has room for.
    assert planned[2:] == [100, 53, 2, 2]
    run_step(scheduler, {"a": 2, "long": 2})
    scheduler.max_num_scheduled_tokens = 40
    add_request(scheduler, "second", 60)
    run_step(scheduler, {"a": 2, "long": 2})
    trimmed.clear()
    run_step(scheduler, {"a": 0, "long": 0})
    # Two that decode had one token each: 60 - 38 of the prompt are left beside them.
    assert trimmed == [2 + 22]


def test_a_prompt_beside_them_changes_no_draft(tmp_path: Path) -> None:
    """The prompt takes its time whatever is verified; a draft takes as long as without it."""
    verified = []
    for token, has_prompt in itertools.product((4.0, 0.02), (False, True)):
        scheduler = build_scheduler(K, tmp_path)
        scheduler._controller.step_time = freeze_step_time(token)
        for rid in "abc":
            add_request(scheduler, rid)
        run_step(scheduler, {})
        scheduler.max_num_scheduled_tokens = 500
        if has_prompt:
            add_request(scheduler, "long", 2000)
        run_step(scheduler, dict.fromkeys("abc", K))
        verified.append(sum(map(len, scheduler.schedule().scheduled_spec_decode_tokens.values())))
    dear, beside, cheap, cheap_beside = verified
    assert dear == beside < cheap == cheap_beside


def test_new_rows_are_not_padded(tmp_path: Path) -> None:
    """vLLM schedules drafts of -1 for a row of one token, for graphs that there are not here."""
    scheduled = []
    for is_stock in (True, False):
        scheduler = build_scheduler(K, tmp_path)
        if is_stock:
            scheduler.dynamic_sd_lookup = None
        add_request(scheduler, "a")
        run_step(scheduler, {})
        add_request(scheduler, "b", 1)
        scheduled.append(scheduler.schedule().num_scheduled_tokens)
    assert scheduled == [{"a": 1, "b": 1 + K}, {"a": 1, "b": 1}]


def test_drafts_that_are_all_cut_are_tried_again(tmp_path: Path) -> None:
    """A drafter whose number of drafts is not ours: no plan ever probes, so the trim has to."""
    scheduler = build_scheduler(K, tmp_path)
    scheduler._plan = scheduler._plan._replace(plans_drafts=False)
    scheduler._controller = GoodputController(K, step_time=freeze_step_time(1.0), plans_drafts=False)
    ids = [str(number) for number in range(4)]
    for rid in ids:
        add_request(scheduler, rid, max_tokens=1900)
    drafts = dict.fromkeys(ids, K)
    run_step(scheduler, drafts)

    def count(steps: int, accepted: int) -> list[int]:
        outputs = [run_step(scheduler, drafts, accepted) for _ in range(steps)]
        return [sum(map(len, output.scheduled_spec_decode_tokens.values())) for output in outputs]

    bad = count(300, 0)
    assert np.mean([total == 0 for total in bad[150:]]) > 0.7
    assert sum(bad[150:]) > 0
    good = count(100, K)
    assert np.mean(good[-20:]) > 0.8 * K * len(ids)


def test_measured_goodput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, float] = {}
    monkeypatch.setattr(
        observability, "add", lambda name, amount, index=0: counted.update({name: counted.get(name, 0.0) + amount})
    )
    scheduler = build_scheduler(K, tmp_path)
    add_request(scheduler, "a")
    run_step(scheduler, {"a": 3})
    prefix = "vllm_ext:smartspec_"
    assert f"{prefix}decoded_tokens_total" not in counted
    for accepted in (2, 0, 3):
        run_step(scheduler, {"a": 3}, accepted)
    verified = counted[f"{prefix}verified_tokens_total"]
    assert verified > 0
    assert counted[f"{prefix}decoded_tokens_total"] == 3 + counted[f"{prefix}accepted_tokens_total"]
    assert 0 < counted[f"{prefix}decode_seconds_total"] < 60


def test_what_the_engine_does_between_steps_is_the_next_ones_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it goes on at once: neither a pause nor the time in which nothing ran."""
    scheduler = build_scheduler(K, tmp_path)
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    seen = record_observed(scheduler)

    def serve(gap: float) -> float | None:
        clock.now += gap / 1e3
        output = scheduler.schedule()
        clock.now += 5e-3
        scheduler.update_from_output(output, run_model(output, lambda rid, tokens: [9]))
        return seen[-1]["milliseconds"]

    add_request(scheduler, "a")
    assert serve(50.0) is None  # A prompt's step.
    assert serve(2.0) == pytest.approx(7.0)
    assert serve(0.0) == pytest.approx(5.0)
    # Paused, asleep, or stepped by hand.
    assert serve(6000.0) == pytest.approx(5.0)
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    clock.now += 60.0
    add_request(scheduler, "b")
    serve(0.0)
    assert serve(3.0) == pytest.approx(8.0)


def test_tokens_that_were_certain_are_progress_too(tmp_path: Path) -> None:
    """They are no trials, but a request that gets them is not a slow one."""
    scheduler = build_scheduler(K, tmp_path)
    seen = record_observed(scheduler)
    for rid in "ab":
        add_request(scheduler, rid)
    run_step(scheduler, dict.fromkeys("ab", K))
    scheduler.certain_drafts = {"a": 2}
    scheduler._controller.step_time = freeze_step_time(0.001)
    run_step(scheduler, {}, accepted=2)
    assert seen[-1]["accepted"] == [0, 2]
    assert seen[-1]["made"] == [3, 3]
    acceptance = scheduler._controller.acceptance
    usual = acceptance.find_usual(acceptance.find_slots(["a", "b"]))
    assert usual[0] == usual[1] > 1
