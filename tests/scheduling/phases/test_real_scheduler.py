# SPDX-License-Identifier: Apache-2.0
"""The lanes around vLLM's real scheduler and block pool, under the adversary of test_lanes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.scheduling.phases.fake_engine import FakeDevice, LaneError, generate
from tests.scheduling.phases.real_lanes import BLOCK_SIZE, build_lanes, make_request
from tests.scheduling.phases.test_lanes import WITHOUT
from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.view import Lane

NEVER = 1 << 40


def serve(seed: int, *, asynchronous: bool) -> Any:
    """Serve random requests in a random order of events; every output is checked, and nothing may be left."""
    rng = random.Random(seed)
    prompts: list[tuple[list[int], int]] = []
    common = [rng.randrange(3) for _ in range(rng.randrange(16, 80))]
    for _ in range(rng.randrange(3, 8)):
        max_tokens = rng.randrange(1, 40)
        if prompts and rng.random() < 0.5:
            earlier, length = rng.choice(prompts)
            prompt = earlier + generate(earlier, length, NEVER)[: rng.randrange(length + 1)] + [rng.randrange(3)]
        else:
            prompt = common[: rng.randrange(len(common))] + [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        prompts.append((prompt[:200], max_tokens))
    largest = max(-(-(len(prompt) + tokens) // BLOCK_SIZE) for prompt, tokens in prompts)
    num_blocks = largest + 2 + rng.choice((0, 1, 4, 40))
    scheduler = build_lanes(num_blocks, rng.choice((8, 32, 128)), asynchronous=asynchronous)
    device = FakeDevice(num_blocks, BLOCK_SIZE)
    launches: dict[int, Any] = {}
    delivered: dict[str, list[int]] = {f"r{number}": [] for number in range(len(prompts))}
    arrivals, aborted = list(delivered), set()
    abort_chance, mix_chance, idle = rng.choice((0.0, 0.02)), rng.choice((0.0, 0.02, 0.1)), 0
    for _ in range(40_000):
        if not arrivals and scheduler.is_over():
            break
        if mix_chance and rng.random() < mix_chance:
            scheduler.pacer.is_mixing = not scheduler.pacer.is_mixing
        actions: list[tuple[str, Any, int]] = []
        for lane in Lane:
            flights = device.flights[lane]
            actions += [("schedule", lane, 8)] if scheduler.has_work(lane) else []
            actions += [("advance", lane, 8)] if any(not flight.is_done for flight in flights) else []
            actions += [("complete", lane, 8)] if flights and flights[0].is_done else []
        actions += [("add", None, 3)] if arrivals else []
        live = [rid for rid in scheduler.requests if rid not in aborted]
        actions += [("abort", None, 8)] if live and rng.random() < abort_chance else []
        assert actions, f"deadlock: {scheduler.lanes.describe()}"
        [(action, lane, _)] = rng.choices(actions, [weight for *_, weight in actions])
        happened = True
        if action == "add":
            rid = arrivals.pop(0)
            scheduler.add_request(make_request(rid, *prompts[int(rid[1:])]))
        elif action == "abort":
            aborted.add(rid := rng.choice(live))
            scheduler.finish_requests(rid, RequestStatus.FINISHED_ABORTED)
        elif action == "advance":
            device.advance(lane)
        elif action == "complete":
            flight = device.flights[lane].pop(0)
            made = scheduler.complete_lane(launches.pop(id(flight.batch)), flight.sampled)
            for rid, tokens in made.items():
                delivered[rid] += tokens
        elif (launched := scheduler.launch_lane(lane)) is not None:
            launch, step = launched
            launches[id(launch.batch)] = launch
            device.launch(launch.batch, step)
        else:
            happened = False
        idle = 0 if happened else idle + 1
        assert idle < 200, f"deadlock: only empty batches, {scheduler.lanes.describe()}"
        pool = scheduler.kv_cache_manager.block_pool
        for flights in device.flights:
            for flight in flights:
                free = [number for number in flight.step.blocks if pool.blocks[number].ref_cnt == 0]
                assert not free, f"blocks {free} are free while a {flight.batch.lane.name} batch uses them"
    else:
        raise LaneError(f"no end: {scheduler.lanes.describe()}")
    for rid, tokens in delivered.items():
        expected = generate(*prompts[int(rid[1:])], NEVER)
        assert tokens == (expected[: len(tokens)] if rid in aborted else expected), f"seed {seed}, request {rid}"
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks - 1
    assert scheduler.reset_prefix_cache()
    assert not device.known
    assert not any(device.rows)
    return scheduler


@pytest.mark.parametrize("asynchronous", [False, True])
def test_any_order_of_events(asynchronous: bool) -> None:
    schedulers = [serve(seed, asynchronous=asynchronous) for seed in range(16)]
    counts = [scheduler.lanes.counts for scheduler in schedulers]
    # Silence would prove nothing: lanes did overlap, frees were deferred, and requests were preempted.
    assert sum(count.overlapping for count in counts) > 100
    assert sum(count.mixed for count in counts) > 30
    assert sum(count.deferred_frees for count in counts) > 3
    assert sum(scheduler.num_preemptions for scheduler in schedulers) > 3


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_thousand_orders_of_events(asynchronous: bool) -> None:
    for seed in range(1000):
        serve(seed, asynchronous=asynchronous)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fence",
    [
        "may_schedule",
        "holds_blocks",
        "delays_hashes",
        "is_deliverable",
        "tells_all_lanes",
        "may_mix",
        "waits_for_mixed",
    ],
)
def test_fences_are_needed_around_the_real_scheduler(fence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others need ids that come back, partial hits or drafts, which this scheduler is not given here."""
    monkeypatch.setattr(Lanes, fence, WITHOUT[fence])
    for seed in range(400):
        try:
            serve(seed, asynchronous=seed % 2 == 0)
        except (AssertionError, KeyError, IndexError, ValueError):
            return
    pytest.fail(f"nothing goes wrong without {fence}")
