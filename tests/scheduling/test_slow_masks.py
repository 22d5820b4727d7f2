# SPDX-License-Identifier: Apache-2.0
"""Which requests wait for slow masks, and that vLLM's scheduler finds its list of running requests in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_ext.scheduling.slow_masks import SlowMasks, has_room, leave_out
from vllm_ext.structured import budgets
from vllm_ext.structured.budgets import Budgeted, StepTimes


class Grammar(StructuredOutputGrammar):
    """Its mask is the number of tokens it took, and takes as long as it is told."""

    def __init__(self) -> None:
        self.tokens, self.go, self.begun = 0, threading.Event(), threading.Event()
        self.go.set()
        self.is_over = self.is_broken = False

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        self.begun.set()
        assert self.go.wait(30)
        if self.is_broken:
            raise RuntimeError("no mask")
        bitmask[idx] = self.tokens

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.tokens += len(tokens)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        self.tokens -= num_tokens

    def is_terminated(self) -> bool:
        return self.is_over

    def reset(self) -> None:
        self.tokens = 0


class Timed(Budgeted, Grammar):
    """The same with a budget."""


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one:
        yield one


def make_grammar(steps: StepTimes, is_slow: bool = True, family: object | None = None) -> Any:
    grammar = Timed()
    grammar.steps, grammar.is_slow, grammar.family = steps, is_slow, family or object()
    steps.has_slow |= is_slow
    return grammar


def make_request(rid: str, grammar: Any, **given: Any) -> Any:
    values = {"num_tokens": 5, "num_computed_tokens": 4, "num_output_placeholders": 0, "spec_token_ids": [7], **given}
    structured = None if grammar is None else SimpleNamespace(grammar=grammar)
    return SimpleNamespace(request_id=rid, structured_output_request=structured, **values)


def make_slow_masks(steps: StepTimes | None, starts: int = 0, **config: Any) -> SlowMasks:
    """starts: draft positions until a constraint begins, as while a request thinks."""
    values = {
        "speculative_config": None,
        "model_config": SimpleNamespace(is_hybrid=False),
        "parallel_config": SimpleNamespace(distributed_executor_backend="mp"),
        **config,
    }
    backend = SimpleNamespace(steps=steps, allocate_token_bitmask=lambda rows: [[None]] * rows)
    bounds = SimpleNamespace(constraint_start=starts)
    manager: Any = SimpleNamespace(
        backend=backend,
        _get_constraint_bounds=lambda request, tokens: bounds,
        vllm_config=SimpleNamespace(**values),
    )
    return SlowMasks(manager)


def test_a_slow_request_waits_until_its_mask_is_there() -> None:
    steps = StepTimes()
    slow, quick = make_grammar(steps), make_grammar(steps, is_slow=False)
    running = [make_request("plain", None), make_request("slow", slow), make_request("quick", quick)]
    masks = make_slow_masks(steps)
    found = masks.find(running)
    assert list(found) == ["slow"]
    slow.go.clear()
    for _ in range(3):
        assert masks.hold(found, len(running)) == {"slow"}
    slow.go.set()
    slow.ahead.result(30)
    assert masks.hold(found, len(running)) == set()
    assert [request.spec_token_ids for request in running] == [[7], [], [7]], "there is one mask"
    row: list[Any] = [None, None]
    slow.fill_bitmask(row, 1)
    assert row == [None, 0]
    # The mask was quick.
    assert not slow.is_slow
    assert masks.find(running) == {}
    assert not steps.has_slow


def test_whose_masks_are_not_filled_ahead() -> None:
    steps = StepTimes()
    over = make_grammar(steps)
    over.is_over = True
    others = [make_request("plain", None), make_request("over", over), make_request("failed", ValueError("grammar"))]
    prompt = make_request("prompt", make_grammar(steps), num_tokens=9)
    assert make_slow_masks(steps).find([*others, prompt]) == {}
    steps.has_slow = True
    assert make_slow_masks(steps, starts=9).find([make_request("thinks", make_grammar(steps))]) == {}
    assert make_slow_masks(None).find(others) == {}
    # Recurrent layers lose count of the drafts that were accepted of a request that leaves the batch.
    hybrid = SimpleNamespace(is_hybrid=True)
    waits = [make_request("waits", make_grammar(steps))]
    assert make_slow_masks(steps, model_config=hybrid, speculative_config=object()).find(waits) == {}
    assert list(make_slow_masks(steps, model_config=hybrid).find(waits)) == ["waits"]
    # Its ranks have a scheduler each, which must not go by times.
    launcher = SimpleNamespace(distributed_executor_backend="external_launcher")
    assert make_slow_masks(steps, parallel_config=launcher).find(waits) == {}


def test_copies_of_a_grammar_wait_together() -> None:
    """They lock each other out: one that is looked at in a step would wait for another's mask."""
    steps, shared = StepTimes(), object()
    slow, other, quick = (make_grammar(steps, is_slow, shared) for is_slow in (True, True, False))
    stranger = make_grammar(steps)
    grammars = {"slow": slow, "other": other, "quick": quick, "stranger": stranger}
    running = [make_request("plain", None), *(make_request(rid, one) for rid, one in grammars.items())]
    masks = make_slow_masks(steps)
    for one in (slow, other):
        one.go.clear()
    found = masks.find(running)
    assert found.keys() == grammars.keys()
    assert masks.hold(found, len(running)) >= {"slow", "other", "quick"}
    slow.go.set()
    slow.ahead.result(30)
    assert masks.hold(found, len(running)) >= {"slow", "other", "quick"}
    assert quick.ahead is None
    other.go.set()
    for one in (other, stranger):
        one.ahead.result(30)
    assert masks.hold(found, len(running)) == set()
    # One goes on: the others' next masks wait until its token is there.
    slow.fill_bitmask([None], 0)
    slow.is_slow = True
    running[1].num_output_placeholders = 1
    assert masks.hold(found, len(running)) == {"slow", "other", "quick"}
    assert slow.ahead is None


def test_nobody_waits_where_all_are_slow() -> None:
    steps = StepTimes()
    running = [make_request(rid, make_grammar(steps)) for rid in "ab"]
    masks = make_slow_masks(steps)
    found = masks.find(running)
    assert masks.hold(found, 2) == set()
    assert all(request.structured_output_request.grammar.ahead is None for request in running)
    for request in running:
        request.structured_output_request.grammar.go.clear()
    assert masks.hold(found, 3) == {"a", "b"}
    for request in running:
        request.structured_output_request.grammar.go.set()


def test_a_token_in_flight_comes_first() -> None:
    """Asynchronously scheduled, the grammar's next state is not known yet."""
    steps = StepTimes()
    request = make_request("slow", make_grammar(steps), num_computed_tokens=5, num_output_placeholders=1)
    masks = make_slow_masks(steps)
    found = masks.find([request])
    assert masks.hold(found, 2) == {"slow"}
    assert request.structured_output_request.grammar.ahead is None


@pytest.mark.parametrize("move", ["accept", "rollback", "validate", "reset"])
def test_moves_wait_for_a_mask_that_is_being_filled(move: str, executor: ThreadPoolExecutor) -> None:
    grammar = make_grammar(StepTimes())
    grammar.tokens = 3
    grammar.go.clear()
    masks: list[Any] = [None]
    grammar.fill_ahead(executor, masks)
    assert grammar.begun.wait(30)
    moves = {
        "accept": lambda: grammar.accept_tokens("r", [1]),
        "rollback": lambda: grammar.rollback(1),
        "validate": lambda: grammar.validate_tokens([1]),
        "reset": grammar.reset,
    }
    timer = threading.Timer(0.05, grammar.go.set)
    timer.start()
    moves[move]()
    timer.join()
    # It was filled before the move, and is for no later state.
    assert masks == [3]
    grammar.fill_bitmask(masks, 0)
    assert masks == [grammar.tokens]


def test_a_failed_mask_fails_where_it_is_used(executor: ThreadPoolExecutor) -> None:
    grammar = make_grammar(StepTimes())
    grammar.is_broken = True
    grammar.fill_ahead(executor, [None])
    assert grammar.ahead.exception(30)
    with pytest.raises(RuntimeError, match="no mask"):
        grammar.fill_bitmask([None], 0)


def test_time_beside_the_steps_is_owed_and_none_of_theirs(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1.0, 1.0 + 2 * budgets.CREDIT_MS / 1e3])
    monkeypatch.setattr(budgets.time, "thread_time", lambda: next(clock))
    grammar = make_grammar(StepTimes())
    grammar.fill_ahead(executor, [None])
    grammar.ahead.result(30)
    grammar.fill_bitmask([None], 0)
    assert grammar.is_slow
    assert grammar.is_exhausted
    assert grammar.debt_ms == pytest.approx(2 * budgets.CREDIT_MS)
    assert grammar.steps.total_ms == 0


def test_what_is_slow_depends_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.0]
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: now[0])
    steps = StepTimes()
    for milliseconds, slow_ms in ((5, 2.0), (50, 5.0), (3000, 10.0)):
        now[0] += milliseconds / 1e3
        # Every step counts, those without structured requests too.
        make_slow_masks(steps).begin_step()
        assert steps.slow_ms == pytest.approx(slow_ms)


def test_a_mask_that_has_not_begun_is_filled_where_it_is_needed(executor: ThreadPoolExecutor) -> None:
    first, second = (make_grammar(StepTimes()) for _ in range(2))
    first.go.clear()
    second.tokens = 4
    first.fill_ahead(executor, [None])
    second.fill_ahead(executor, [None])
    row: list[Any] = [None]
    second.fill_bitmask(row, 0)
    assert row == [4]
    assert second.ahead is None
    # Who is gone is not filled for.
    gone = make_grammar(StepTimes())
    gone.fill_ahead(executor, [None])
    ahead = gone.ahead
    del gone
    first.go.set()
    with pytest.raises(CancelledError, match="gone"):
        ahead.result(30)


@given(st.lists(st.sampled_from(["held", "stays", "preempted"]), max_size=8), st.integers(0, 3))
def test_running_requests_keep_their_order(fates: list[str], admitted: int) -> None:
    running = [SimpleNamespace(request_id=str(number), fate=fate) for number, fate in enumerate(fates)]
    new = [SimpleNamespace(request_id=f"new {number}", fate="new") for number in range(admitted)]
    scheduler = SimpleNamespace(running=list(running), max_num_active_reqs=8)
    held = {request.request_id for request in running if request.fate == "held"}
    with leave_out(scheduler, held):
        assert [request.fate for request in scheduler.running] == [fate for fate in fates if fate != "held"]
        assert scheduler.max_num_active_reqs == 8 - len(held)
        # As vLLM's schedule() does: in place, or a list anew.
        scheduler.running = [request for request in scheduler.running if request.fate != "preempted"]
        scheduler.running.extend(new)
    assert scheduler.running == [request for request in running if request.fate != "preempted"] + new
    assert scheduler.max_num_active_reqs == 8


def test_nothing_is_lost_where_scheduling_fails() -> None:
    running = [SimpleNamespace(request_id=rid) for rid in "abc"]
    scheduler = SimpleNamespace(running=running, max_num_active_reqs=4)
    with pytest.raises(ValueError, match="no"), leave_out(scheduler, {"b"}):
        raise ValueError("no")
    assert scheduler.running == running


@pytest.mark.parametrize(("free", "most", "expected"), [(3, 64, False), (4, 64, True), (2, 8, True), (1, 8, False)])
def test_nobody_is_held_back_where_blocks_are_scarce(free: int, most: int, expected: bool) -> None:
    """A prompt of 33 more tokens, in blocks of 16, of which a step has no more than `most`; and one that goes on."""
    running = [make_request("prompt", None, num_tokens=40, num_computed_tokens=7), make_request("goes on", None)]
    scheduler = SimpleNamespace(
        running=running,
        block_size=16,
        num_lookahead_tokens=0,
        num_spec_tokens=0,
        max_num_scheduled_tokens=most,
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
        kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: free)),
    )
    assert has_room(scheduler) == expected
