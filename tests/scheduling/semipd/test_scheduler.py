# SPDX-License-Identifier: Apache-2.0
"""The lane mixin around vLLM's real scheduler: mixed batches, late prompts, turns of clients, decode first."""

from __future__ import annotations

import time
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.scheduling.phases.real_lanes import build_lanes, make_request
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneStep


def finish(scheduler: Any, launch: LaneLaunch) -> dict[str, list[int]]:
    """The batch has run; whoever has all of its tokens computed gets another one."""
    known = {rid: scheduler.requests.get(rid) for rid in launch.batch.tokens}
    return scheduler.complete_lane(
        launch,
        {
            rid: 7 if request is not None and request.num_computed_tokens >= request.num_tokens else None
            for rid, request in known.items()
        },
    )


def turn(scheduler: Any) -> list[tuple[Lane, dict[str, int]]]:
    """A turn whose batches run at once: lane and tokens of each."""
    step = scheduler.schedule()
    for launch in step.launches:
        finish(scheduler, launch)
    return [(launch.batch.lane, dict(launch.batch.tokens)) for launch in step.launches]


def begin_decoding(scheduler: Any, *rids: str) -> None:
    for number, rid in enumerate(rids):
        scheduler.add_request(make_request(rid, [number + 1] * 5, 30))
    turn(scheduler)


def limit_queue(scheduler: Any, tokens: int | None) -> None:
    """As if the controller said so, for good."""
    scheduler.pacer._controller = None
    scheduler.pacer.max_queued_tokens = tokens


def list_lanes(step: LaneStep) -> list[Lane]:
    return [launch.batch.lane for launch in step.launches]


def test_both_phases_in_one_batch() -> None:
    scheduler = build_lanes(40, 64, asynchronous=False)
    begin_decoding(scheduler, "a")
    scheduler.pacer.is_mixing = True
    scheduler.add_request(make_request("b", [9] * 100, 3))
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1, "b": 63})]
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1, "b": 37})]
    # Nothing of two phases is left: an ordinary step, whose hashes are delayed.
    step = scheduler.schedule()
    assert [launch.batch.is_mixed for launch in step.launches] == [False]
    finish(scheduler, step.launches[0])
    assert scheduler.lanes.counts.mixed == 2
    assert scheduler.pacer.counts.mixed_busy == 0.0  # batches of this device take no time
    # Who never was in the prefill lane need not be told there.
    while scheduler.has_requests():
        turned = turn(scheduler)
        assert [lane for lane, tokens in turned if tokens] in ([Lane.DECODE], [])
    assert scheduler.reset_prefix_cache()


def test_a_prompt_goes_from_lane_to_lane() -> None:
    scheduler = build_lanes(40, 64, asynchronous=False)
    begin_decoding(scheduler, "a")
    scheduler.add_request(make_request("b", list(range(300)), 3))
    step = scheduler.schedule()
    assert list_lanes(step) == [Lane.DECODE, Lane.PREFILL]
    scheduler.pacer.is_mixing = True
    finish(scheduler, step.launches[0])
    # The prefill lane ends what it has; decode goes on.
    between = scheduler.schedule()
    assert [(launch.batch.lane, launch.batch.is_mixed) for launch in between.launches] == [(Lane.DECODE, False)]
    finish(scheduler, between.launches[0])
    finish(scheduler, step.launches[1])
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1, "b": 63})]
    mixed = scheduler.schedule()
    scheduler.pacer.is_mixing = False
    # The other way as well: nothing runs beside a batch of both phases.
    assert scheduler.schedule().launches == []
    finish(scheduler, mixed.launches[0])
    after = scheduler.schedule()
    assert list_lanes(after) == [Lane.DECODE, Lane.PREFILL]
    # What the prefill lane's runner knows of "b" is old: it is sent all tokens, and so is the other one.
    assert after.launches[1].output.scheduled_cached_reqs.all_token_ids.keys() == {"b"}


def test_late_prompts_wait_until_they_delay_nobody() -> None:
    scheduler = build_lanes(80, 64, asynchronous=False, slo_ttft_ms=1000)
    limit_queue(scheduler, 50)
    for rid in ("a", "b", "c", "d"):
        scheduler.add_request(make_request(rid, [ord(rid)] * 100, 2))
    # The first one found nobody waiting.
    assert [request.request_id for request in scheduler.waiting] == ["a"]
    assert scheduler.get_request_counts() == (0, 4)
    assert scheduler.pacer.counts.late == 3
    assert scheduler.finish_requests("c", RequestStatus.FINISHED_ABORTED)[0].request_id == "c"
    assert turn(scheduler) == [(Lane.PREFILL, {"a": 64})]
    # What is left of it waits as well, and is less than the limit: who comes now is in time.
    scheduler.add_request(make_request("e", [5] * 20, 2))
    assert turn(scheduler) == [(Lane.PREFILL, {"a": 36, "e": 20})]
    assert turn(scheduler)[-1] == (Lane.PREFILL, {"b": 64})
    # Nobody is late any more.
    limit_queue(scheduler, None)
    assert turn(scheduler)[-1] == (Lane.PREFILL, {"b": 36, "d": 28})
    while scheduler.has_requests():
        turn(scheduler)
    assert scheduler.pacer.counts.first_tokens == 4


def test_nobody_is_held_for_ever() -> None:
    scheduler = build_lanes(80, 16, asynchronous=False, slo_ttft_ms=1)
    limit_queue(scheduler, 10)
    scheduler.add_request(make_request("long", [1] * 200, 2))
    scheduler.add_request(make_request("late", [2] * 100, 2))
    assert scheduler.get_request_counts() == (0, 2)
    turn(scheduler)
    assert "late" not in scheduler.requests
    time.sleep(0.02)  # ten objectives are ten milliseconds
    turn(scheduler)
    assert "late" in scheduler.requests


def test_a_pause_does_not_wait_for_late_prompts() -> None:
    scheduler = build_lanes(80, 64, asynchronous=False, slo_ttft_ms=1000)
    limit_queue(scheduler, 0)
    for rid in ("a", "b"):
        scheduler.add_request(make_request(rid, [3] * 20, 2))
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert not scheduler.has_requests()
    assert turn(scheduler) == []
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.has_requests()
    aborted = scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert {request.request_id for request in aborted} == {"a", "b"}
    while scheduler.has_requests():
        turn(scheduler)


def test_clients_take_turns() -> None:
    scheduler = build_lanes(80, 32, asynchronous=False, fairness=2.0)
    for rid, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
        scheduler.add_request(make_request(rid, [ord(rid[0]), int(rid[1])] * 16, 1, client))
    begun = [rid for _ in range(4) for _, tokens in turn(scheduler) for rid in tokens]
    assert begun == ["a1", "b1", "a2", "a3"]
    assert scheduler.policies.fair.num_overtakes == 1
    scheduler.add_request(make_request("c1", [1] * 8, 4, "c"))
    scheduler.finish_requests("c1", RequestStatus.FINISHED_ABORTED)
    while scheduler.has_requests():
        turn(scheduler)
    assert scheduler.policies.fair._clients == {}


def test_prompts_wait_for_decode_that_is_late() -> None:
    scheduler = build_lanes(80, 64, asynchronous=False, slo_tpot_ms=10, decode_priority_ms=30)
    begin_decoding(scheduler, "a")
    scheduler.add_request(make_request("b", [9] * 100, 2))
    scheduler.policies.priority.observe_gap(1.0)
    for is_mixing in (False, True):
        scheduler.pacer.is_mixing = is_mixing
        assert turn(scheduler) == [(Lane.DECODE, {"a": 1})]
    assert scheduler.policies.priority.num_holds == 1
    scheduler.policies.priority.observe_gap(1.0)
    time.sleep(0.04)
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1, "b": 63})]
    # Nobody decodes: there is nothing to wait for.
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    scheduler.pacer.is_mixing = False
    scheduler.policies.priority.observe_gap(1.0)
    assert (Lane.PREFILL, {"b": 37}) in turn(scheduler)


def test_decode_waits_while_prompts_have_the_device() -> None:
    scheduler = build_lanes(80, 64, asynchronous=False)
    begin_decoding(scheduler, "a")
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1})]
    scheduler.pacer.decode_interval = 60.0
    # Nobody waits for nothing.
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1})]
    scheduler.add_request(make_request("b", [9] * 100, 3))
    step = scheduler.schedule()
    assert [(launch.batch.lane, launch.has_all) for launch in step.launches] == [(Lane.PREFILL, True)]
    assert 50 < step.wake - time.perf_counter() <= 60
    # In good time, beside the prompt; and the one after that waits again.
    scheduler._decode_began -= 60
    second = scheduler.schedule()
    assert [(launch.batch.lane, launch.has_all) for launch in second.launches] == [(Lane.DECODE, False)]
    assert second.wake is None
    finish(scheduler, second.launches[0])
    assert scheduler.schedule().launches == []
    finish(scheduler, step.launches[0])
    # The prompt goes on at once, and when it has its token both decode without waiting.
    assert turn(scheduler) == [(Lane.PREFILL, {"b": 36})]
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1, "b": 1})]
    while scheduler.has_requests():
        assert all(lane is Lane.DECODE or not tokens for lane, tokens in turn(scheduler))
    assert scheduler.reset_prefix_cache()


def test_what_prompts_had_of_the_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build_lanes(80, 64, asynchronous=False)
    scheduler.pacer.decode_interval = 60.0
    asked, shares = [], []
    monkeypatch.setattr(scheduler.pacer, "measure_share", lambda *times: asked.append(times[2]) or 0.7)
    monkeypatch.setattr(scheduler.pacer, "note_batch", lambda *batch: shares.append((batch[0], batch[-1])))
    # Nobody decodes beside the first one; beside the second one runs a step, and the device itself says what that had.
    begin_decoding(scheduler, "a")
    scheduler.add_request(make_request("b", [9] * 40, 3))
    scheduler._decode_began = float("-inf")
    step = scheduler.schedule()
    assert list_lanes(step) == [Lane.DECODE, Lane.PREFILL]
    finish(scheduler, step.launches[1])
    finish(scheduler, step.launches[0])
    assert asked == [None, scheduler._decode_began]
    assert [share for lane, share in shares if lane is Lane.PREFILL] == [0.7, 0.7]
    assert [lane for lane, _ in shares] == [Lane.PREFILL, Lane.PREFILL, Lane.DECODE]
    # Without an interval the executor's word counts.
    scheduler.pacer.decode_interval = 0.0
    scheduler.add_request(make_request("c", [8] * 40, 3))
    turn(scheduler)
    assert len(asked) == 2


def test_decode_does_not_wait_for_prompts_that_cannot_run() -> None:
    scheduler = build_lanes(8, 64, asynchronous=False)
    begin_decoding(scheduler, "a")
    scheduler.pacer.decode_interval = 60.0
    assert turn(scheduler) == [(Lane.DECODE, {"a": 1})]
    # More blocks than there are beside the first one's.
    scheduler.add_request(make_request("b", [9] * 120, 2))
    assert (Lane.DECODE, {"a": 1}) in turn(scheduler) + turn(scheduler) + turn(scheduler)


def test_sessions_of_several_inputs() -> None:
    """A client that sends its prompt in parts: the session keeps its blocks, and the decode lane leaves it alone."""
    scheduler = build_lanes(80, 64, asynchronous=False)
    begin_decoding(scheduler, "other")
    scheduler.add_request(make_request("s", [4] * 40, 2, resumable=True))
    while scheduler.num_waiting_for_streaming_input == 0:
        turn(scheduler)
    assert (Lane.DECODE, {"other": 1}) in turn(scheduler)
    scheduler.add_request(make_request("s", [5] * 30, 2, resumable=True))
    turned = turn(scheduler)
    assert (Lane.DECODE, {"other": 1}) in turned
    assert any(lane is Lane.PREFILL and tokens.get("s", 0) >= 30 for lane, tokens in turned)
    while scheduler.num_waiting_for_streaming_input == 0:
        turn(scheduler)
    scheduler.add_request(make_request("s", [], 1))
    for _ in range(60):
        turn(scheduler)
    assert not scheduler.has_requests()
    assert scheduler.reset_prefix_cache()


def test_a_grammar_that_fails_is_told_while_nothing_runs() -> None:
    scheduler = build_lanes(80, 64, asynchronous=False)
    scheduler.add_request(make_request("a", [4] * 10, 2))
    scheduler.grammar_compile_error_reqs.add("a")
    outputs = scheduler.update_from_output(LaneStep.make_empty(), [])
    [output] = outputs[0].outputs
    assert (output.request_id, output.finish_reason) == ("a", FinishReason.ERROR)
    while scheduler.has_requests():
        turn(scheduler)


def test_preempted_requests_keep_their_order() -> None:
    scheduler = build_lanes(5, 64, asynchronous=False)
    for rid, length in (("a", 16), ("b", 16), ("c", 5), ("d", 5)):
        scheduler.add_request(make_request(rid, [ord(rid)] * length, 8))
    turn(scheduler)
    assert turn(scheduler)[0] == (Lane.DECODE, {"a": 1, "b": 1})
    assert [request.request_id for request in scheduler.waiting] == ["c", "d"]


def test_a_lane_of_whose_work_nothing_came_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """While decode runs alone the engine takes a turn every two milliseconds."""
    scheduler = build_lanes(80, 64, asynchronous=False)
    begin_decoding(scheduler, "a", "b", "c", "d")
    scheduler.add_request(make_request("e", [9] * 10, 2))  # four may run at a time
    opened: list[Lane] = []
    schedule_lane = scheduler.schedule_lane
    monkeypatch.setattr(
        scheduler, "schedule_lane", lambda lane, *rest: (opened.append(lane), schedule_lane(lane, *rest))[1]
    )
    step = scheduler.schedule()
    for _ in range(3):
        assert scheduler.schedule().launches == []
    assert opened == [Lane.DECODE, Lane.PREFILL]
    scheduler.finish_requests("d", RequestStatus.FINISHED_ABORTED)
    assert list_lanes(scheduler.schedule()) == [Lane.PREFILL]
    finish(scheduler, step.launches[0])
