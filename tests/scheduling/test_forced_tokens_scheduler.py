# SPDX-License-Identifier: Apache-2.0
"""Forced tokens in vLLM's real scheduler: the tokens stay, the steps become fewer."""

from __future__ import annotations

import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, ParallelConfig
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import ConstraintBounds

from tests.scheduling.real_scheduler import MODEL
from tests.scheduling.structured_scheduler import END, Model, add_request, build_scheduler, run_all
from vllm_ext.scheduling import forced_tokens
from vllm_ext.structured import carrier
from vllm_ext.structured.spellings import LONGEST_TEXT


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, list[int]], int]:
    outputs, model = run_all(build_scheduler(features=()))
    assert not any(model.scheduled[0].values())
    assert all(output[-1] == END for output in outputs.values())
    return outputs, model.steps


def test_the_tokens_are_those_without_drafts_in_fewer_steps(expected: tuple[dict[str, list[int]], int]) -> None:
    scheduler = build_scheduler()
    outputs, model = run_all(scheduler)
    assert outputs == expected[0]
    cold = model.steps
    assert cold < expected[1]
    # How this model spells is known now.
    outputs, model = run_all(scheduler)
    assert outputs == expected[0]
    assert model.steps <= expected[1] / 2
    assert model.steps < cold
    assert all(0 < len(drafts) <= carrier.MOST_DRAFTS for step in model.scheduled for drafts in step.values())
    assert not any(token < 0 for step in model.scheduled for drafts in step.values() for token in drafts)
    # vLLM schedules once more after the last request, to tell the workers.
    assert scheduler._grammars == {}
    scheduler.forget_spellings()
    outputs, model = run_all(scheduler)
    assert (outputs, model.steps) == (expected[0], cold)


def test_the_workers_of_a_v2_runner_are_told_which_drafts_are_ours(expected: tuple[dict[str, list[int]], int]) -> None:
    scheduler = build_scheduler()
    # The model runner matters to the workers alone: patches/structured_v2.py puts the drafts onto their device.
    scheduler._is_v2 = True
    steps: list[Any] = []
    schedule = scheduler.schedule

    def record(*arguments: Any) -> Any:
        steps.append(schedule(*arguments))
        return steps[-1]

    scheduler.schedule = record
    outputs, _ = run_all(scheduler)
    assert outputs == expected[0]
    told = [step for step in steps if getattr(step, "forced_drafts", ())]
    assert 0 < len(told) < len(steps)
    for step in steps:
        assert set(getattr(step, "forced_drafts", ())) == set(step.scheduled_spec_decode_tokens)
    # As it is when it travels to a worker.
    assert pickle.loads(pickle.dumps(told[0])).forced_drafts == told[0].forced_drafts


def test_switched_off_nothing_is_drafted(expected: tuple[dict[str, list[int]], int]) -> None:
    outputs, model = run_all(build_scheduler(forced="off"))
    assert outputs == expected[0]
    assert model.steps == expected[1]
    assert not any(model.scheduled)


def test_asynchronous_scheduling_drafts_nothing(expected: tuple[dict[str, list[int]], int]) -> None:
    scheduler = build_scheduler(base="AsyncScheduler")
    assert scheduler.vllm_config.speculative_config is None
    outputs, model = run_all(scheduler)
    assert outputs == expected[0]
    assert not any(model.scheduled)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17])
def test_drafts_end_with_max_tokens(max_tokens: int, expected: tuple[dict[str, list[int]], int]) -> None:
    scheduler = build_scheduler()
    run_all(scheduler)
    outputs, model = run_all(scheduler, max_tokens=max_tokens)
    assert outputs == {rid: output[:max_tokens] for rid, output in expected[0].items()}
    # What is sampled behind the drafts is a token too.
    assert all(len(drafts) < max_tokens for step in model.scheduled for drafts in step.values())


def test_other_requests_are_left_alone() -> None:
    scheduler = build_scheduler()
    add_request(scheduler, "a")
    add_request(scheduler, "b", schema=None, max_tokens=12)
    add_request(scheduler, "c", min_p=0.1)
    add_request(scheduler, "d", logit_bias={5: 1.0})
    model = Model(scheduler)
    model.run()
    assert {rid for step in model.scheduled for rid in step} == {"a"}
    assert len(model.outputs["b"]) == 12


def test_requests_that_rejection_sampling_would_not_serve_stop_drafts_meanwhile() -> None:
    scheduler = build_scheduler()
    add_request(scheduler, "a")
    add_request(scheduler, "b", schema=None, max_tokens=6, logprob_token_ids=[1, 2])
    model = Model(scheduler)
    while "b" in scheduler.requests:
        model.step()
    assert not any(model.scheduled)
    model.run()
    assert any(model.scheduled)


def test_drafts_leave_tokens_for_others() -> None:
    scheduler = build_scheduler(tokens=64)
    for rid in "abcdefgh":
        add_request(scheduler, rid)
    model = Model(scheduler)
    model.run()
    assert 0 < max(sum(map(len, step.values())) for step in model.scheduled) <= 32


def test_thinking_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the reasoning ends, whatever the grammar would force."""
    scheduler = build_scheduler()
    request = add_request(scheduler, "a")
    manager = scheduler.structured_output_manager
    bounds, accept = manager._get_constraint_bounds, manager.accept_tokens

    def get_bounds(request: Any, tokens: Any, **arguments: Any) -> ConstraintBounds:
        return bounds(request, tokens, **arguments) if request.num_output_tokens >= 5 else ConstraintBounds(9, 9)

    monkeypatch.setattr(manager, "_get_constraint_bounds", get_bounds)
    monkeypatch.setattr(manager, "accept_tokens", lambda r, t: accept(r, t) if r.num_output_tokens > 5 else True)
    model = Model(scheduler)
    while request.num_output_tokens < 5:
        model.step()
    assert not any(model.scheduled)
    model.run()
    assert any(model.scheduled)


def test_beside_a_drafter_and_the_goodput_mixin(tmp_path: Path, expected: tuple[dict[str, list[int]], int]) -> None:
    """Certain drafts are verified whatever goodput says; the drafter's own go on where the grammar ends."""
    from vllm.config import SpeculativeConfig

    model_config = ModelConfig(model=str(MODEL), dtype="float32", max_model_len=2048)
    speculative = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=6,
        target_model_config=model_config,
        target_parallel_config=ParallelConfig(),
    )
    scheduler = build_scheduler(features=("structured", "smartspec"), speculative_config=speculative)
    assert scheduler._has_drafter
    # A drafter of noise, of which nothing is worth its time.
    for rid in "abc":
        add_request(scheduler, rid)
    trimmed: list[tuple[dict[str, int], dict[str, list[int]]]] = []
    update = scheduler._update_after_schedule

    def record(output: Any) -> None:
        trimmed.append((dict(scheduler.certain_drafts), dict(output.scheduled_spec_decode_tokens)))
        update(output)

    scheduler._update_after_schedule = record
    outputs = Model(scheduler).run(drafts=lambda rid: [77, 78, 79])
    assert outputs == expected[0]
    assert any(certain for certain, _ in trimmed)
    for certain, scheduled in trimmed:
        for rid, count in certain.items():
            assert len(scheduled[rid]) >= count
    assert all(len(drafts) <= 6 for _, scheduled in trimmed for drafts in scheduled.values())


def test_preemption_and_abort_leave_no_drafts_behind(expected: tuple[dict[str, list[int]], int]) -> None:
    scheduler = build_scheduler()
    for rid in "abc":
        add_request(scheduler, rid)
    model = Model(scheduler)
    for _ in range(4):
        model.step()
    aborted = weakref.ref(scheduler.requests["b"].structured_output_request.grammar)
    scheduler.finish_requests(["b"], RequestStatus.FINISHED_ABORTED)
    model.step()
    assert aborted() is None, "grammars may be large, and full garbage collections are rare"
    victim = next(request for request in scheduler.running if request.request_id == "c")
    scheduler.running.remove(victim)
    scheduler._preempt_request(victim, 0.0)
    outputs = model.run()
    assert {rid: outputs[rid] for rid in "ac"} == {rid: expected[0][rid] for rid in "ac"}


def test_a_grammar_that_is_slow_to_look_at_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request of the batch waits for a look."""
    scheduler = build_scheduler()
    model = Model(scheduler)
    add_request(scheduler, "a")
    add_request(scheduler, "b")
    looks: list[Any] = []
    original = forced_tokens.find_forced_tokens
    slow: list[Any] = []

    def look(state: Any, *given: Any) -> Any:
        looks.append(state)
        if not slow:
            slow.append(state)
        if state is slow[0]:
            began = time.thread_time()
            while time.thread_time() - began < 0.012:
                pass
        return original(state, *given)

    monkeypatch.setattr(forced_tokens, "find_forced_tokens", look)
    for _ in range(8):
        model.step()
    assert looks.count(slow[0]) == 1
    assert len(looks) > 4
    assert model.outputs["a"]
    assert model.outputs["b"]


def test_of_a_long_text_only_the_beginning_is_spelled() -> None:
    scheduler = build_scheduler()
    model = Model(scheduler)
    text = "".join(chr(97 + i * i % 26) for i in range(1900))
    add_request(scheduler, "a", {"const": text}, max_tokens=1900)
    encoded: list[int] = []
    encode = scheduler._spellings._encode
    scheduler._spellings._encode = lambda text: encoded.append(len(text)) or encode(text)
    for _ in range(40):
        model.step()
    assert encoded
    assert max(encoded) <= LONGEST_TEXT + 1
    assert len(model.outputs["a"]) > 2 * 40


def test_a_grammar_that_forces_too_much_is_not_looked_at() -> None:
    scheduler = build_scheduler()
    model = Model(scheduler)
    request = add_request(scheduler, "a")
    request.structured_output_request.grammar.forces_little = False
    for _ in range(5):
        model.step()
    assert not any(drafts for step in model.scheduled for drafts in step.values())
    assert len(model.outputs["a"]) == 5
