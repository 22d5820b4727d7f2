# SPDX-License-Identifier: Apache-2.0
"""What may happen to requests and KV blocks while batches of two lanes are in flight.

One thread schedules for both lanes, so taking blocks is atomic. What breaks is the order of the device: batches of one
lane run in the order of launch, batches of two lanes in any. vLLM frees, reuses, publishes and forgets when it
schedules, which is right for one stream. Every place where it is wrong for two is a method here, a fence:

    may_schedule     a request is computed by one lane at a time, and changes lanes when its batch is complete
    may_preempt      only requests without a batch in flight are preempted
    holds_blocks     blocks of a request with a batch in flight go back to the pool when that batch is complete
    retains_copies   so do the ends of copy-on-write copies that a batch makes
    delays_hashes    blocks that the decode lane fills are found by prefix lookups once they are written
    count_written    ... up to the tokens that no batch in flight still writes
    is_deliverable   a lane is told that a request is over when no other lane still computes it
    tells_all_lanes  and both lanes are told
    is_settled       the id of a request that is over is used again when both know

A batch of both phases, as vLLM has them without lanes, is a batch of the decode lane that has the other to itself:

    may_mix          it begins when nothing of the prefill lane is in flight
    waits_for_mixed  and the prefill lane goes on when it is complete

The scheduler mixin calls these around vLLM's own scheduler; tests call them around a small one.

Source: the hazards are those of semi-PD's shared block table (arXiv:2504.19867, section 4.2 and Fig. 7), which is one
lock there since two processes allocate; the rest follows from prefix caching, aborts and preemption, which its released
code switches off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vllm_ext.scheduling.phases.view import Lane, LaneRequest, LaneView, Request, find_phase, split_running

Block = TypeVar("Block")


@dataclass(frozen=True, eq=False)
class LaneBatch(Generic[Block]):
    """A batch from launch to completion."""

    lane: Lane
    tokens: Mapping[str, int]  # scheduled, by request id; empty for a batch that only tells of finished requests
    finished: frozenset[str]  # ids of requests that the runner forgets when the batch begins
    is_mixed: bool = False  # of both phases
    num_decoding: int = 0  # of a mixed one: requests that decode
    copied: list[Sequence[Block]] = field(default_factory=list)  # ends of its copies
    freed: list[Sequence[Block]] = field(default_factory=list)  # of requests that ended while it was in flight


@dataclass
class LaneCounts:
    """What happened so far, for metrics and for tests that a fence was ever needed."""

    batches: list[int] = field(default_factory=lambda: [0] * len(Lane))
    mixed: int = 0  # batches with prompts and decoding requests in them
    overlapping: int = 0  # batches launched while the other lane had one in flight
    deferred_frees: int = 0
    retained_copies: int = 0
    withheld_finishes: int = 0


class Lanes(Generic[Block]):
    """Batches in flight, and what waits for them.

    A batch is opened, scheduled and launched, and later completed. Lanes complete in any order to each other:

        view = lanes.open_batch(lane, running)   # schedule view.mine; running = view.merge(what is left of them)
        view = lanes.open_mixed(running)         # or, where lanes.may_mix()
        batch = lanes.launch(num_scheduled_tokens)
        ...
        lanes.complete(batch)                    # before the scheduler reads the batch's output

    Not thread-safe: the engine's thread calls everything.
    """

    def __init__(self, give_back: Callable[[Sequence[Block]], None], depths: Sequence[int] = (1, 1)) -> None:
        """give_back: returns blocks to the pool, in the order given. depths: batches in flight by lane; more than
        one only under asynchronous scheduling. Raises ValueError for a depth below 1.
        """
        if len(depths) != len(Lane) or min(depths) < 1:
            raise ValueError(f"depths {tuple(depths)} must be a positive number for each of {len(Lane)} lanes")
        self._give_back = give_back
        self._depths = tuple(depths)
        self._queues: tuple[deque[LaneBatch[Block]], ...] = tuple(deque() for _ in Lane)
        self._batches: dict[str, list[LaneBatch[Block]]] = {}  # in flight, by request id, oldest first
        self._pending: tuple[set[str], ...] = tuple(set() for _ in Lane)  # finished ids that a lane has not heard of
        self._known: tuple[set[str], ...] = tuple(set() for _ in Lane)  # ids that a lane's runner has rows of
        self._open: Lane | None = None
        self._is_mixed = False  # the open batch
        self._copied: list[Sequence[Block]] = []  # of the open batch
        self._finished: frozenset[str] = frozenset()  # of the open batch
        self.counts = LaneCounts()

    # Scheduling a batch

    def has_room(self, lane: Lane) -> bool:
        """Whether a lane may have one more batch in flight."""
        if lane is Lane.PREFILL and self.waits_for_mixed():
            return False
        return len(self._queues[lane]) < self._depths[lane]

    def open_batch(self, lane: Lane, running: Sequence[Request]) -> LaneView[Request]:
        """Begin to schedule a batch: what the lane may see of the running requests.

        Raises ValueError while another batch is open or the lane has no room.
        """
        if self._open is not None or not self.has_room(lane):
            raise ValueError(f"no batch of lane {lane.name} can be opened: {self.describe()}")
        self._open = lane
        return split_running(running, [request for request in running if self.may_schedule(lane, request)])

    def open_mixed(self, running: Sequence[Request]) -> LaneView[Request]:
        """Begin to schedule a batch of both phases, in the decode lane: it sees all running requests.

        That lane, as its runner has the rows of all requests but those in prefill. Raises ValueError where the batch
        may not be opened, and while another one is open.
        """
        if self._open is not None or not self.has_room(Lane.DECODE) or not self.may_mix():
            raise ValueError(f"no batch of both phases can be opened: {self.describe()}")
        self._open, self._is_mixed = Lane.DECODE, True
        return split_running(running, running)

    def may_mix(self) -> bool:
        """Fence: whether a batch of both phases may be scheduled. Not beside requests in flight in the prefill lane: it
        would compute them too, and find blocks by their prefix that they have not written yet.
        """
        return not any(batch.tokens for batch in self._queues[Lane.PREFILL])

    def waits_for_mixed(self) -> bool:
        """Fence: whether the prefill lane waits for a batch of both phases, whose blocks are published when it is
        scheduled, as prompts in one batch share them.
        """
        return any(batch.is_mixed for batch in self._queues[Lane.DECODE])

    def may_schedule(self, lane: Lane, request: LaneRequest) -> bool:
        """Fence: whether a lane may compute the next tokens of a running request now.

        A request changes lanes only when nothing of it is in flight: the other stream would read KV before it is
        written, or sample a token twice.
        """
        return find_phase(request) is lane and all(b.lane is lane for b in self._batches.get(request.request_id, ()))

    def may_preempt(self, request_id: str) -> bool:
        """Fence: whether a request's blocks can be had by preempting it. Not while a batch of it is in flight: its
        blocks would come too late, and its token would be lost or counted twice.
        """
        return request_id not in self._batches

    def expects_blocks(self) -> bool:
        """Whether blocks of ended requests come back without preempting anyone, once batches complete."""
        return any(batch.freed for queue in self._queues for batch in queue)

    def retain_copies(self, blocks: Sequence[Block]) -> None:
        """Both ends of the copies that the open batch makes, which vLLM would release now, in the order of release.

        Raises ValueError where no batch is open.
        """
        if self._open is None:
            raise ValueError("copies are made by a batch, and none is open")
        if blocks and self.retains_copies():
            self.counts.retained_copies += 1
            self._copied.append(blocks)
        else:
            self._give_back(blocks)

    def retains_copies(self) -> bool:
        """Fence: the source of a copy must not be given to the other lane before the copy has run."""
        return True

    def launch(self, tokens: Mapping[str, int], num_decoding: int = 0) -> LaneBatch[Block]:
        """The open batch goes to its lane with so many tokens of each request, of which so many decode in a batch of
        both phases. Raises ValueError where none is open.
        """
        if self._open is None:
            raise ValueError("no batch is open")
        batch = LaneBatch[Block](
            self._open, dict(tokens), self._finished, self._is_mixed, num_decoding, copied=self._copied
        )
        self._known[batch.lane].update(batch.tokens)
        self.counts.mixed += batch.is_mixed and 0 < num_decoding < len(batch.tokens)
        if any(queue for lane, queue in enumerate(self._queues) if lane != batch.lane):
            self.counts.overlapping += 1
        self.counts.batches[batch.lane] += 1
        self._queues[batch.lane].append(batch)
        for rid in batch.tokens:
            self._batches.setdefault(rid, []).append(batch)
        self._open, self._copied, self._finished, self._is_mixed = None, [], frozenset(), False
        return batch

    def drop_batch(self) -> None:
        """The open batch is not sent. Raises ValueError for one with copies or finishes, and where none is open."""
        if self._open is None or self._copied or self._finished:
            raise ValueError(
                f"no batch to drop, or one with {len(self._copied)} copies and {len(self._finished)} finishes: "
                f"{self.describe()}"
            )
        self._open, self._is_mixed = None, False

    # Completing it

    def complete(self, batch: LaneBatch[Block]) -> None:
        """The batch has run: what waited for it goes back to the pool.

        Raises ValueError for a batch that is not the oldest of its lane: lanes complete in order.
        """
        queue = self._queues[batch.lane]
        if not queue or queue[0] is not batch:
            raise ValueError(f"a batch of lane {batch.lane.name} is not its oldest in flight: {self.describe()}")
        queue.popleft()
        for rid in batch.tokens:
            left = self._batches[rid]
            left.remove(batch)
            if not left:
                del self._batches[rid]
        for blocks in (*batch.copied, *batch.freed):
            self._give_back(blocks)

    def delays_hashes(self, lane: Lane) -> bool:
        """Fence: whether blocks that a lane's batch fills are published when it completes, not when it is scheduled.

        Prefix lookups are made for the prefill lane, whose own blocks are written before it reads them; those of the
        decode lane may not be. For the open batch where it is of both phases, nobody looks up until it is written.
        """
        return lane is Lane.DECODE and not self._is_mixed

    def count_written(self, request: LaneRequest) -> int:
        """Fence: tokens of a request whose KV is surely written, and known, so that their blocks can be published.

        Call after `complete`; where drafts are verified, after the scheduler took the rejected ones back.
        """
        in_flight = sum(batch.tokens[request.request_id] for batch in self._batches.get(request.request_id, ()))
        return min(request.num_computed_tokens - in_flight, request.num_tokens)

    # Requests that end

    def holds_blocks(self, request_id: str) -> bool:
        """Fence: whether batches in flight still write or read the blocks of a request."""
        return request_id in self._batches

    def defer_free(self, request_id: str, blocks: Sequence[Block]) -> None:
        """Blocks of a request that ended in flight go back, in this order, when its last batch is complete.

        Raises ValueError where nothing of the request is in flight.
        """
        if request_id not in self._batches:
            raise ValueError(f"request {request_id!r} is not in flight: free its blocks at once")
        self.counts.deferred_frees += 1
        self._batches[request_id][-1].freed.append(blocks)

    def take_finished(self, fresh: Iterable[str]) -> set[str]:
        """Ids of requests that are over, to be sent with the open batch; `fresh`: new ones since the last call.

        Raises ValueError where no batch is open.
        """
        if self._open is None:
            raise ValueError("finishes are told with a batch, and none is open")
        lane, fresh = self._open, set(fresh)
        for other in Lane:
            if other is lane:
                self._pending[other].update(fresh)
            elif self.tells_all_lanes():
                self._pending[other].update(fresh & self._known[other])
        ready = {rid for rid in self._pending[lane] if self.is_deliverable(lane, rid)}
        self.counts.withheld_finishes += len(self._pending[lane]) - len(ready)
        self._pending[lane].difference_update(ready)
        self._known[lane].difference_update(ready)
        self._finished |= ready
        return ready

    def has_finished(self, lane: Lane) -> bool:
        """Whether there are ids that the lane can be told now."""
        return any(self.is_deliverable(lane, rid) for rid in self._pending[lane])

    def is_deliverable(self, lane: Lane, request_id: str) -> bool:
        """Fence: whether a lane may forget a request. Runners share its state, so not while the other computes it; its
        own batches come before.
        """
        return all(batch.lane is lane for batch in self._batches.get(request_id, ()))

    def tells_all_lanes(self) -> bool:
        """Fence: each runner keeps rows of its own for a request that went through it; who has none is not told."""
        return True

    def is_settled(self, request_id: str) -> bool:
        """Fence: whether an id can be used for a new request: outputs and finishes of the old one would hit it.

        A finish counts until its batch is complete: the runner of a slow lane reads it after another lane has begun
        the new request.
        """
        return request_id not in self._batches and not any(
            request_id in pending or any(request_id in batch.finished for batch in queue)
            for pending, queue in zip(self._pending, self._queues, strict=True)
        )

    # State

    def is_idle(self) -> bool:
        """Whether nothing is in flight and no lane has to be told anything."""
        return not any(self._queues) and not any(self._pending)

    def list_in_flight(self, lane: Lane) -> list[LaneBatch[Block]]:
        """Batches of a lane, oldest first."""
        return list(self._queues[lane])

    def describe(self) -> str:
        """One line for logs and errors."""
        lanes = ", ".join(
            f"{lane.name} {len(self._queues[lane])}/{self._depths[lane]} in flight, "
            f"{len(self._pending[lane])} finishes to tell"
            for lane in Lane
        )
        return f"{lanes}; open: {'none' if self._open is None else self._open.name}"
