# SPDX-License-Identifier: Apache-2.0
"""Single rules of the lanes: what a lane sees, in which order, and what it refuses."""

from __future__ import annotations

import pytest

from tests.child import run_child
from tests.scheduling.phases.fake_pool import FakeBlock, FakePool
from tests.scheduling.phases.fake_scheduler import FakeRequest, LaneScheduler
from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.view import Lane, find_phase, split_running


def make_request(
    rid: str, *, prompt: int = 6, output: int = 0, computed: int = 0, placeholders: int = 0
) -> FakeRequest:
    request = FakeRequest(rid, 0, list(range(prompt)), max_tokens=8, stop_every=1 << 40)
    request.output = list(range(output))
    request.num_computed_tokens, request.num_output_placeholders = computed, placeholders
    return request


def make_lanes(depths: tuple[int, int] = (1, 1)) -> tuple[Lanes[str], list[str]]:
    returned: list[str] = []
    return Lanes[str](returned.extend, depths), returned


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        ({}, Lane.PREFILL),
        ({"computed": 5}, Lane.PREFILL),  # the last prompt token, without output
        ({"computed": 6, "placeholders": 1}, Lane.DECODE),  # asynchronous: the first token is on its way
        ({"output": 1, "computed": 6}, Lane.DECODE),
        ({"output": 3, "computed": 0}, Lane.PREFILL),  # preempted: computes its output again
        ({"output": 3, "computed": 7}, Lane.PREFILL),
        ({"output": 3, "computed": 8}, Lane.DECODE),
    ],
)
def test_phase(state: dict[str, int], phase: Lane) -> None:
    assert find_phase(make_request("a", **state)) is phase


def test_a_lane_sees_its_phase_without_what_the_other_computes() -> None:
    lanes, _ = make_lanes((1, 2))
    prefill, decode = make_request("p"), make_request("d", output=1, computed=6)
    moving = make_request("m", computed=6, placeholders=1)
    running = [prefill, decode, moving]
    lanes.open_batch(Lane.PREFILL, [moving])
    first = lanes.launch({"m": 6})
    view = lanes.open_batch(Lane.DECODE, running)
    assert (view.mine, view.others) == ([decode], [prefill, moving])
    lanes.launch({"d": 1})
    lanes.complete(first)
    assert lanes.open_batch(Lane.DECODE, running).mine == [decode, moving]


def test_running_keeps_its_order() -> None:
    a, b, c, d, new = (make_request(rid) for rid in "abcd" + "n")
    view = split_running([a, b, c, d], [a, c])
    assert view.merge([c, new]) == [b, c, d, new]
    assert view.limit_active(3) == 1
    assert view.limit_active(1) == 0


def test_lanes_complete_in_order_and_in_any_to_each_other() -> None:
    lanes, _ = make_lanes((1, 2))
    lanes.open_batch(Lane.DECODE, [])
    first = lanes.launch({"a": 1})
    lanes.open_batch(Lane.DECODE, [])
    second = lanes.launch({"a": 1})
    lanes.open_batch(Lane.PREFILL, [])
    prefill = lanes.launch({"b": 9})
    with pytest.raises(ValueError, match="not its oldest in flight: PREFILL 1/1 in flight"):
        lanes.complete(second)
    for batch in (prefill, first, second):
        lanes.complete(batch)
    with pytest.raises(ValueError, match="not its oldest"):
        lanes.complete(second)
    assert lanes.is_idle()
    assert lanes.counts.batches == [1, 2]
    assert lanes.counts.overlapping == 1


def test_what_a_batch_holds_comes_back_with_the_last_batch_of_the_request() -> None:
    lanes, returned = make_lanes((1, 2))
    lanes.open_batch(Lane.DECODE, [])
    lanes.retain_copies(["source", "copy"])
    first = lanes.launch({"a": 1, "b": 1})
    lanes.open_batch(Lane.DECODE, [])
    second = lanes.launch({"a": 1})
    lanes.defer_free("a", ["tail", "head"])
    lanes.defer_free("b", ["b0"])
    assert lanes.expects_blocks()
    lanes.complete(first)
    assert returned == ["source", "copy", "b0"]
    lanes.complete(second)
    assert returned == ["source", "copy", "b0", "tail", "head"]
    assert not lanes.expects_blocks()


def test_finishes_wait_for_the_other_lane_and_reach_both() -> None:
    lanes, _ = make_lanes()
    lanes.open_batch(Lane.PREFILL, [])
    lanes.complete(lanes.launch({"a": 2, "b": 4}))
    lanes.open_batch(Lane.PREFILL, [])
    prefill = lanes.launch({"a": 4})
    lanes.open_batch(Lane.DECODE, [])
    assert lanes.take_finished({"a", "b"}) == {"b"}
    told = lanes.launch({})
    assert not lanes.has_finished(Lane.DECODE)
    lanes.complete(told)
    assert not lanes.is_settled("b")
    lanes.complete(prefill)
    assert lanes.has_finished(Lane.DECODE)
    for lane, expected in ((Lane.DECODE, {"a"}), (Lane.PREFILL, {"a", "b"})):
        lanes.open_batch(lane, [])
        assert lanes.take_finished(()) == expected
        batch = lanes.launch({})
        assert not lanes.is_settled("a")  # told, but not heard
        lanes.complete(batch)
    assert lanes.is_settled("a")
    assert lanes.is_idle()


def test_written_tokens_are_those_that_nothing_in_flight_writes() -> None:
    lanes, _ = make_lanes((1, 2))
    request = make_request("a", output=3, computed=8)
    for _ in range(2):
        lanes.open_batch(Lane.DECODE, [request])
        lanes.launch({"a": 1})
        request.num_computed_tokens += 1
    assert lanes.count_written(request) == 8
    lanes.complete(lanes.list_in_flight(Lane.DECODE)[0])
    assert lanes.count_written(request) == 9
    lanes.complete(lanes.list_in_flight(Lane.DECODE)[0])
    assert lanes.count_written(request) == request.num_tokens == 9


def test_a_batch_of_both_phases_has_the_prefill_lane_to_itself() -> None:
    lanes, _ = make_lanes((1, 2))
    prefill, decode = make_request("p"), make_request("d", output=1, computed=6)
    lanes.open_batch(Lane.PREFILL, [prefill])
    first = lanes.launch({"p": 3})
    assert not lanes.may_mix()
    with pytest.raises(ValueError, match="no batch of both phases can be opened: PREFILL 1/1 in flight"):
        lanes.open_mixed([prefill, decode])
    lanes.complete(first)
    view = lanes.open_mixed([prefill, decode])
    assert (view.mine, view.others, view.limit_active(2)) == ([prefill, decode], [], 2)
    assert not lanes.delays_hashes(Lane.DECODE)
    mixed = lanes.launch({"p": 3, "d": 1}, num_decoding=1)
    assert lanes.delays_hashes(Lane.DECODE)
    assert not lanes.has_room(Lane.PREFILL)
    # In its own lane, batches are in order.
    assert lanes.open_batch(Lane.DECODE, [prefill, decode]).mine == [decode]
    lanes.drop_batch()
    lanes.open_mixed([prefill, decode])
    lanes.drop_batch()
    assert lanes.delays_hashes(Lane.DECODE)
    lanes.complete(mixed)
    assert lanes.has_room(Lane.PREFILL)
    assert (lanes.counts.mixed, lanes.counts.batches) == (1, [1, 1])
    # One phase alone is not what was asked for.
    lanes.open_mixed([prefill])
    lanes.complete(lanes.launch({"p": 3}))
    assert lanes.counts.mixed == 1


def test_batches_of_both_phases_run_beside_what_is_only_told() -> None:
    lanes, _ = make_lanes()
    lanes.open_batch(Lane.PREFILL, [])
    lanes.launch({})
    assert lanes.may_mix()


def test_lanes_are_told_of_what_they_know() -> None:
    lanes, _ = make_lanes()
    for rid in ("a", "b"):
        lanes.open_batch(Lane.DECODE, [])
        lanes.complete(lanes.launch({rid: 1}))
    lanes.open_batch(Lane.PREFILL, [])
    lanes.complete(lanes.launch({"b": 1}))
    lanes.open_batch(Lane.DECODE, [])
    assert lanes.take_finished({"a", "b", "never"}) == {"a", "b", "never"}
    lanes.complete(lanes.launch({}))
    assert lanes.is_settled("a")
    assert lanes.is_settled("never")
    assert not lanes.is_settled("b")
    lanes.open_batch(Lane.PREFILL, [])
    assert lanes.take_finished(()) == {"b"}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depths \(0, 1\)"):
        make_lanes((0, 1))
    lanes, _ = make_lanes()
    for call in (lambda: lanes.launch({}), lambda: lanes.take_finished(()), lambda: lanes.retain_copies(["a"])):
        with pytest.raises(ValueError, match="open"):
            call()
    with pytest.raises(ValueError, match="request 'a' is not in flight"):
        lanes.defer_free("a", ["block"])
    lanes.open_batch(Lane.PREFILL, [])
    with pytest.raises(ValueError, match="no batch of lane DECODE can be opened"):
        lanes.open_batch(Lane.DECODE, [])
    lanes.retain_copies(["source"])
    with pytest.raises(ValueError, match="1 copies"):
        lanes.drop_batch()
    lanes.launch({})
    with pytest.raises(ValueError, match="no batch of lane PREFILL can be opened: PREFILL 1/1"):
        lanes.open_batch(Lane.PREFILL, [])


def test_nobody_is_preempted_while_blocks_are_on_their_way() -> None:
    """An aborted prefill's blocks come back soon; preempting a request for them would waste all it computed."""
    scheduler = LaneScheduler(FakePool(6), 16, 4, (1, 1), whole_prompt_fits=True, publishes_last=False)
    short, long = make_request("short", prompt=3), make_request("long", prompt=15)
    long.number = 1
    scheduler.add_request(short)
    launched = scheduler.schedule_lane(Lane.PREFILL)
    assert launched is not None
    scheduler.update_lane(*launched, {"short": 7})
    scheduler.add_request(long)
    in_flight = scheduler.schedule_lane(Lane.PREFILL)
    assert in_flight is not None
    for token in (8, 9, 10, 11, 12):
        launched = scheduler.schedule_lane(Lane.DECODE)
        assert launched is not None
        scheduler.update_lane(*launched, {"short": token})
    assert scheduler.pool.num_free == 0
    scheduler.finish_requests(long)
    blocked = scheduler.schedule_lane(Lane.DECODE)
    assert blocked is None
    assert scheduler.running == [short]
    scheduler.update_lane(*in_flight, {"long": 5})
    resumed = scheduler.schedule_lane(Lane.DECODE)
    assert resumed is not None
    assert set(resumed[1].scheduled) == {"short"}
    assert scheduler.num_preemptions == 0


def test_what_decides_loads_without_vllm_and_torch() -> None:
    """Simulators and the API process use it where neither is wanted."""
    names = ("lanes", "view", "controller", "latency", "published", "fairness", "admission", "pacer", "mixing")
    code = "".join(f"import vllm_ext.scheduling.phases.{name}\n" for name in names)
    code += "import json, sys\nprint(json.dumps([name for name in ('vllm', 'torch') if name in sys.modules]))"
    result = run_child(code)
    assert result.value == [], result.stderr


def test_pool_catches_a_double_free() -> None:
    pool = FakePool(2)
    blocks: list[FakeBlock] = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.give_back(blocks)
