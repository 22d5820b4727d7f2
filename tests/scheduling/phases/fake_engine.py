# SPDX-License-Identifier: Apache-2.0
"""Two runners over one memory, whose reads and writes an adversary interleaves, and the engine loop around them.

Memory holds the token of every slot, and the next token is a digest of all tokens that attention reads: a block reused
too early, read too early or forgotten changes an output.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.scheduling.phases.fake_pool import BLOCK_SIZE, FakePool
from tests.scheduling.phases.fake_scheduler import FakeRequest, LaneScheduler, Step
from vllm_ext.scheduling.phases.lanes import LaneBatch
from vllm_ext.scheduling.phases.view import Lane

NOTHING = -1


def sample_next(tokens: Sequence[int]) -> int:
    """The model."""
    return zlib.crc32(",".join(map(str, tokens)).encode())


def generate(prompt: Sequence[int], max_tokens: int, stop_every: int) -> list[int]:
    """What a request puts out where nothing goes wrong."""
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] % stop_every == 0):
        output.append(sample_next([*prompt, *output]))
    return output


@dataclass(eq=False)
class Flight:
    """A batch on its way through a lane's runner."""

    batch: LaneBatch[Any]
    step: Step
    work: Iterator[None]
    sampled: dict[str, int | None] = field(default_factory=dict)
    is_done: bool = False


class FakeDevice:
    """Runs batches, one operation at a time; the lanes share memory and what is known of requests."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.memory = [[NOTHING] * block_size for _ in range(num_blocks)]
        self.known: dict[str, list[int]] = {}  # tokens by request, sampled ones included
        self.rows: tuple[set[str], ...] = (set(), set())  # requests that a lane's runner holds
        self.flights: tuple[list[Flight], ...] = ([], [])

    def launch(self, batch: LaneBatch[Any], step: Step) -> None:
        flight = Flight(batch, step, iter(()))
        flight.work = self._run(flight)
        self.flights[batch.lane].append(flight)

    def advance(self, lane: Lane) -> None:
        """One operation of the oldest batch of a lane that is not done."""
        flight = next(flight for flight in self.flights[lane] if not flight.is_done)
        if next(flight.work, self) is self:
            flight.is_done = True

    def _run(self, flight: Flight) -> Iterator[None]:
        step, rows = flight.step, self.rows[flight.batch.lane]
        for rid in step.finished:
            rows.discard(rid)
            self.known.pop(rid, None)
        for rid in step.scheduled:
            rows.add(rid)
            if rid in step.new:
                self.known[rid] = list(step.new[rid])
        yield
        for source, copy in step.copies:
            self.memory[copy] = list(self.memory[source])
            yield
        for rid, (start, count) in step.scheduled.items():
            known = self.known[rid]
            slots = [
                (step.tables[rid][position // self.block_size], position % self.block_size)
                for position in range(start + count)
            ]
            for position in range(start, start + count):
                block, slot = slots[position]
                self.memory[block][slot] = known[position]
            yield
            read = [self.memory[block][slot] for block, slot in slots]
            yield
            flight.sampled[rid] = None
            if start + count == len(known):
                flight.sampled[rid] = sample_next(read)
                known.append(sample_next(read))
            yield


@dataclass(frozen=True)
class Scenario:
    """Requests and a machine to serve them on."""

    prompts: Sequence[tuple[str, Sequence[int], int]]  # (id, prompt, tokens to put out)
    num_blocks: int
    budget: int = 8
    max_active: int = 4
    depths: tuple[int, int] = (1, 1)
    whole_prompt_fits: bool = True
    publishes_last: bool = False
    abort_chance: float = 0.0
    stop_every: int = 13
    mix_chance: float = 0.0  # that prompts begin, or cease, to go into the batches of decode
    seed: int = 0


class LaneError(AssertionError):
    """Something that must never happen, happened."""


def serve(scenario: Scenario, max_actions: int = 40_000) -> LaneScheduler:
    """Serve a scenario to its end, in an order that the seed chooses; raises LaneError where an invariant breaks."""
    rng = random.Random(scenario.seed)
    pool = FakePool(scenario.num_blocks)
    scheduler = LaneScheduler(
        pool,
        scenario.budget,
        scenario.max_active,
        scenario.depths,
        whole_prompt_fits=scenario.whole_prompt_fits,
        publishes_last=scenario.publishes_last,
    )
    device = FakeDevice(scenario.num_blocks)
    arrivals = [
        FakeRequest(rid, number, list(prompt), max_tokens, scenario.stop_every)
        for number, (rid, prompt, max_tokens) in enumerate(scenario.prompts)
    ]
    requests = list(arrivals)
    aborted: set[int] = set()
    # How fast lanes run differs between schedules, and a slow lane is where fences are needed.
    speed = [rng.choice((1, 4, 16)) for _ in Lane]
    idle = 0
    for _ in range(max_actions):
        if not arrivals and scheduler.is_over():
            break
        if scenario.mix_chance and rng.random() < scenario.mix_chance:
            scheduler.is_mixing = not scheduler.is_mixing
        actions: list[tuple[str, Lane | None, int]] = []
        for lane in Lane:
            flights = device.flights[lane]
            if scheduler.lane_has_work(lane):
                actions.append(("schedule", lane, 8))
            if any(not flight.is_done for flight in flights):
                actions.append(("advance", lane, speed[lane]))
            if flights and flights[0].is_done:
                actions.append(("complete", lane, 8))
        # A client does not use an id again before it has seen the end of the request that had it.
        if arrivals and all(
            request.status == "finished" or request.request_id != arrivals[0].request_id
            for request in requests[: arrivals[0].number]
        ):
            actions.append(("add", None, 2))
        live = [request for request in scheduler.requests.values() if request.number not in aborted]
        if live and rng.random() < scenario.abort_chance:
            actions.append(("abort", None, 8))
        if not actions:
            raise LaneError(f"deadlock: nothing can happen, {scheduler.lanes.describe()}")
        [(action, lane, _)] = rng.choices(actions, [weight for *_, weight in actions])
        happened = True
        if action == "add":
            scheduler.add_request(arrivals.pop(0))
        elif action == "abort":
            request = rng.choice(live)
            aborted.add(request.number)
            scheduler.finish_requests(request)
        elif action == "schedule" and lane is not None:
            launched = scheduler.schedule_lane(lane)
            happened = launched is not None
            if launched is not None:
                device.launch(*launched)
        elif action == "advance" and lane is not None:
            device.advance(lane)
        elif lane is not None:
            flight = device.flights[lane].pop(0)
            scheduler.update_lane(flight.batch, flight.step, flight.sampled)
        idle = 0 if happened else idle + 1
        if idle > 200:
            raise LaneError(f"deadlock: only empty batches, {scheduler.lanes.describe()}")
        check_blocks(pool, device)
    else:
        raise LaneError(f"no end after {max_actions} actions: {scheduler.lanes.describe()}")
    check_end(scenario, scheduler, device, aborted)
    return scheduler


def check_blocks(pool: FakePool, device: FakeDevice) -> None:
    """No batch in flight touches a block that anyone may take."""
    for flights in device.flights:
        for flight in flights:
            for number in flight.step.blocks:
                if pool.blocks[number].references == 0:
                    raise LaneError(f"block {number} is free while a {flight.batch.lane.name} batch uses it")


def check_end(scenario: Scenario, scheduler: LaneScheduler, device: FakeDevice, aborted: set[int]) -> None:
    """Every token once, and nothing left over."""
    for number, (rid, prompt, max_tokens) in enumerate(scenario.prompts):
        expected = generate(prompt, max_tokens, scenario.stop_every)
        delivered = scheduler.delivered[number]
        if number in aborted:
            expected = expected[: len(delivered)]
        if delivered != expected:
            raise LaneError(f"request {rid} ({number}) put out {delivered}, not {expected}")
    if scheduler.pool.num_free != scenario.num_blocks:
        raise LaneError(f"{scenario.num_blocks - scheduler.pool.num_free} blocks leaked")
    if device.known or any(device.rows):
        raise LaneError(f"runners still know {sorted(device.known)}, rows {device.rows}")
