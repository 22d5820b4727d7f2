# SPDX-License-Identifier: Apache-2.0
"""Requests of slow grammars in vLLM's real scheduler: they wait for their masks, others do not, and tokens stay."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.v1.request import RequestStatus

from tests.scheduling.real_scheduler import MODEL
from tests.scheduling.structured_scheduler import Model, add_request, build_scheduler
from vllm_ext.structured import budgets
from vllm_ext.structured.budgets import Budgeted, StepTimes, make_budgeted

WORDS = {"type": "array", "items": {"enum": [f"word {n}" for n in range(20)]}, "minItems": 2, "maxItems": 4}


@pytest.fixture(autouse=True)
def every_timed_mask_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "SLOW_MS", -1.0)
    monkeypatch.setattr(budgets, "SLOW_SHARE", 0.0)
    monkeypatch.setattr(budgets, "CREDIT_MS", 1e6)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """As vLLM's own scheduler has it."""
    scheduler = build_scheduler(features=())
    add_requests(scheduler)
    return Model(scheduler).run()


def add_requests(scheduler: Any, rids: str = "abcd", max_tokens: int = 60) -> None:
    """Requests of which b and d have a grammar, timed as those of the pack's backend."""
    for rid in rids:
        request = add_request(scheduler, rid, WORDS if rid in "bd" else None, max_tokens=max_tokens)
        if rid in "bd" and hasattr(scheduler, "_slow_masks"):
            backend = scheduler.structured_output_manager.backend
            backend.steps = getattr(backend, "steps", StepTimes())
            structured = request.structured_output_request
            structured.grammar = make_budgeted(structured.grammar, backend.steps)


def make_ngram() -> dict[str, Any]:
    model = ModelConfig(model=str(MODEL), dtype="float32", max_model_len=2048)
    parallel = ParallelConfig()
    return {
        "speculative_config": SpeculativeConfig(
            method="ngram", num_speculative_tokens=4, target_model_config=model, target_parallel_config=parallel
        )
    }


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Open or not: masks beside the steps are filled while it is."""
    event, fill = threading.Event(), Budgeted.fill_ahead

    def fill_ahead(grammar: Any, executor: Any, masks: Any) -> None:
        executor.submit(event.wait, 60)
        fill(grammar, executor, masks)

    monkeypatch.setattr(Budgeted, "fill_ahead", fill_ahead)
    yield event
    event.set()


@pytest.mark.parametrize("case", ["sync", "async", "drafter", "goodput"])
def test_the_tokens_are_those_of_vllm(case: str, expected: dict[str, list[int]]) -> None:
    features = ("structured", "smartspec") if case == "goodput" else ("structured",)
    config = make_ngram() if case in ("drafter", "goodput") else {}
    scheduler = build_scheduler(features=features, base="AsyncScheduler" if case == "async" else "Scheduler", **config)
    add_requests(scheduler)
    model = Model(scheduler)
    aside = count_aside(scheduler)
    drafts = (lambda rid: [77, 78, 79]) if config else None
    made: list[int] = []
    for _ in range(2000):
        if not scheduler.has_requests():
            break
        model.step(drafts)
        made += [len(model.outputs["b"])] if "a" in scheduler.requests else []
    assert model.outputs == expected
    # Who is slow has a token every other step here: before the others end, after 60 steps.
    assert len(aside) > 20
    assert max(made) > 10


def count_aside(scheduler: Any) -> list[str]:
    """Filled as the run goes on: requests whose masks were filled beside a step, which takes as long as they do."""
    aside: list[str] = []
    hold = scheduler._slow_masks.hold

    def record(slow: dict[str, Any], num_running: int) -> set[str]:
        before = {rid: request.structured_output_request.grammar.ahead for rid, request in slow.items()}
        held: set[str] = hold(slow, num_running)
        for rid in held:
            ahead = slow[rid].structured_output_request.grammar.ahead
            if before[rid] is None and ahead is not None:
                ahead.result(30)
                aside.append(rid)
        return held

    scheduler._slow_masks.hold = record
    return aside


def test_others_go_on_while_a_mask_is_filled(gate: threading.Event, expected: dict[str, list[int]]) -> None:
    scheduler = build_scheduler()
    add_requests(scheduler)
    model = Model(scheduler)
    for _ in range(12):
        model.step()
    made = {rid: len(output) for rid, output in model.outputs.items()}
    assert made["a"] == made["c"] == 12
    # One mask inline, which showed that they are slow.
    assert made["b"] == made["d"] == 1
    assert [request.request_id for request in scheduler.running] == ["a", "b", "c", "d"]
    gate.set()
    assert model.run(2000) == expected


def test_its_row_is_not_given_away(gate: threading.Event) -> None:
    scheduler = build_scheduler()
    add_requests(scheduler, "abcefghijk", max_tokens=40)
    model = Model(scheduler)
    for _ in range(6):
        model.step()
    assert len(model.outputs["b"]) == 1
    assert [request.request_id for request in scheduler.running] == list("abcefghi")
    gate.set()
    assert set(model.run(2000)) == set("abcefghijk")


@pytest.mark.parametrize("free", [0, 100])
def test_nobody_is_held_for_whom_another_would_be_preempted(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are never filled beside the steps here: who is held stands still."""
    monkeypatch.setattr(Budgeted, "fill_ahead", lambda grammar, executor, masks: setattr(grammar, "ahead", Future()))
    scheduler = build_scheduler()
    add_requests(scheduler, "ab")
    model = Model(scheduler)
    model.step()
    monkeypatch.setattr(scheduler.kv_cache_manager.block_pool, "get_num_free_blocks", lambda: free)
    for _ in range(3):
        model.step()
    assert [len(model.outputs[rid]) for rid in "ab"] == ([4, 4] if not free else [4, 1])


def test_a_step_is_timed_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build_scheduler()
    add_requests(scheduler, "ab", max_tokens=2)
    model = Model(scheduler)
    model.run()
    add_requests(scheduler, "c", max_tokens=3)
    begun: list[StepTimes] = []
    monkeypatch.setattr(StepTimes, "begin", lambda steps: begun.append(steps))
    model.run()
    # Not the one more that finds nothing to schedule.
    assert begun == [scheduler.structured_output_manager.backend.steps] * 3


def test_aborts_and_preemptions_of_who_waits(gate: threading.Event, expected: dict[str, list[int]]) -> None:
    scheduler = build_scheduler()
    add_requests(scheduler)
    model = Model(scheduler)
    for _ in range(4):
        model.step()
    aborted = weakref.ref(scheduler.requests["b"].structured_output_request.grammar)
    scheduler.finish_requests(["b"], RequestStatus.FINISHED_ABORTED)
    victim = next(request for request in scheduler.running if request.request_id == "d")
    scheduler.running.remove(victim)
    scheduler._preempt_request(victim, 0.0)
    gate.set()
    outputs = model.run(2000)
    assert {rid: outputs[rid] for rid in "acd"} == {rid: expected[rid] for rid in "acd"}
    assert aborted() is None


def test_alone_it_does_not_wait(gate: threading.Event) -> None:
    """The gate is closed: a mask beside the steps would never come."""
    scheduler = build_scheduler()
    add_requests(scheduler, "bd", max_tokens=20)
    model = Model(scheduler)
    model.run(100)
    assert model.steps <= 21


def test_two_steps_in_flight(expected: dict[str, list[int]]) -> None:
    """Asynchronously, the next step is scheduled before the output of the one before it has come."""
    scheduler = build_scheduler(base="AsyncScheduler")
    add_requests(scheduler)
    model = PipelinedModel(scheduler)
    aside = count_aside(scheduler)
    assert model.run(3000) == expected
    assert len(aside) > 10


class PipelinedModel(Model):
    """As EngineCore.step_with_batch_queue: between a step's masks and its output the next step is scheduled."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        schedule, update = scheduler.schedule, scheduler.update_from_output
        following: list[Any] = []

        def update_later(output: Any, result: Any) -> Any:
            following.append(schedule())
            return update(output, result)

        scheduler.schedule = lambda: following.pop(0) if following else schedule()
        scheduler.update_from_output = update_later
