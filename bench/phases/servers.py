# SPDX-License-Identifier: Apache-2.0
"""Simulated servers: two lanes under a controller, and one stream of mixed or of separate batches.

Time is in seconds. Every request that decodes gets a token from every decode step, so a request of n tokens is over
n - 1 steps after its first; that makes a step cost the same however many requests run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from bench.phases.costs import Cost, Work
from bench.phases.workload import Arrival, Served
from vllm_ext.scheduling.phases.controller import PhaseController, Split

#: Requests at a time: vLLM's default max_num_seqs of the day.
MAX_REQUESTS = 256
#: Seconds between two decisions of a controller.
INTERVAL = 1.0
#: Tokens of a batch of the prefill lane.
LANE_BUDGET = 2048


class Decoding:
    """The requests that decode, as a count, their tokens in the KV cache, and when each is over."""

    def __init__(self) -> None:
        self.count = 0
        self.context = 0
        self.num_steps = 0
        self._ends: list[tuple[int, float, Served]] = []

    def add(self, one: Served, now: float, *, is_stepping: bool = False) -> None:
        """A request has its first token; is_stepping: a step without it is under way."""
        one.first_token = now
        if one.arrival.output <= 1:
            one.last_token = now
            return
        self.count += 1
        self.context += one.arrival.prompt + 1
        # Arrival times break ties, and no two are the same.
        end = self.num_steps + is_stepping + one.arrival.output - 1
        heapq.heappush(self._ends, (end, one.arrival.time, one))

    def step(self, now: float, count: int) -> list[Served]:
        """A step of `count` requests, those there were when it began, is over at `now`; returns who is over."""
        self.num_steps += 1
        self.context += count
        over = []
        while self._ends and self._ends[0][0] <= self.num_steps:
            one = heapq.heappop(self._ends)[2]
            one.last_token = now
            self.count -= 1
            self.context -= one.arrival.prompt + one.arrival.output
            over.append(one)
        return over


class Prompts:
    """Prompts that wait for or are in prefill, first come, first served."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Served, int]] = deque()  # (request, tokens computed)
        self.tokens = 0  # that are still to be computed

    def add(self, one: Served) -> None:
        self.waiting.append((one, 0))
        self.tokens += one.arrival.prompt

    def take(self, budget: int, room: int, *, is_whole: bool = False) -> tuple[int, int, list[Served]]:
        """(tokens, pairs, requests whose prompt is then computed) of a batch within a budget of tokens, for so many
        requests; is_whole: prompts are not cut, and one alone may be longer than the budget.
        """
        tokens = pairs = 0
        finished: list[Served] = []
        while self.waiting and tokens < budget and len(finished) < room:
            one, done = self.waiting[0]
            left = one.arrival.prompt - done
            if is_whole and tokens and tokens + left > budget:
                break
            chunk = left if is_whole else min(left, budget - tokens)
            tokens += chunk
            pairs += chunk * (chunk + 2 * done)
            if chunk == left:
                self.waiting.popleft()
                finished.append(one)
            else:
                self.waiting[0] = (one, done + chunk)
        self.tokens -= tokens
        return tokens, pairs, finished


def serve_mixed(arrivals: Sequence[Arrival], cost: Cost, budget: int, limit: int | None = None) -> list[Served]:
    """Chunked prefill, as vLLM: each batch has a token of every decoding request and prompt tokens up to the budget.

    limit: who comes in while more prompt tokens wait is refused, None for nobody.
    """
    return _serve_one_stream(arrivals, cost, budget, limit, is_mixed=True)


def serve_separate(arrivals: Sequence[Arrival], cost: Cost, budget: int) -> list[Served]:
    """Prefill first, whole prompts in batches of their own, as vLLM without chunked prefill."""
    return _serve_one_stream(arrivals, cost, budget, None, is_mixed=False)


def _serve_one_stream(
    arrivals: Sequence[Arrival], cost: Cost, budget: int, limit: int | None, *, is_mixed: bool
) -> list[Served]:
    served = [Served(arrival) for arrival in arrivals]
    prompts, decoding = Prompts(), Decoding()
    now, index = 0.0, 0
    while index < len(served) or prompts.waiting or decoding.count:
        if index < len(served) and not prompts.waiting and not decoding.count:
            now = max(now, served[index].arrival.time)
        while index < len(served) and served[index].arrival.time <= now:
            if limit is None or prompts.tokens <= limit:
                prompts.add(served[index])
            index += 1
        count = decoding.count
        room = MAX_REQUESTS - count
        if is_mixed:
            tokens, pairs, finished = prompts.take(max(0, budget - count), room)
        else:
            tokens, pairs, finished = prompts.take(budget, room, is_whole=True)
            count = 0 if tokens else count
        if not tokens and not count:
            continue  # all who came in were refused
        now += cost.measure_mixed(tokens, pairs, count, decoding.context if count else 0) / 1e3
        if count:
            decoding.step(now, count)
        for one in finished:
            decoding.add(one, now)
    return served


class LaneServer:
    """Two lanes beside each other; how fast a batch runs changes whenever the other lane begins or ends one."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        cost: Cost,
        controller: PhaseController | None,
        split: Split,
        *,
        budget: int = LANE_BUDGET,
        full_when_alone: bool = True,
        interval: float = INTERVAL,
    ) -> None:
        """controller: None for a fixed split. split: what to begin with. full_when_alone: a lane whose batch begins
        while the other is idle has the whole device; without it, shares are what they are, as MPS has them.
        """
        self._served = [Served(arrival) for arrival in arrivals]
        self._cost, self._controller, self._budget = cost, controller, budget
        self._split = split
        self._full_when_alone, self._interval = full_when_alone, interval
        self._prompts, self._decoding = Prompts(), Decoding()
        self._work: list[Work | None] = [None, None]  # in flight, by lane
        self._left = [0.0, 0.0]  # share of the batch that is not done
        self._share = [0.0, 0.0]
        self._times = [0.0, 0.0]  # seconds of the whole batch, as things are now
        self._began = [0.0, 0.0]
        self._computed: list[Served] = []
        self._tokens = 0
        self._stepping = 0
        self._limit: int | None = None
        self.num_switches = 0
        self.splits: list[tuple[float, Split]] = [(0.0, split)]

    def serve(self) -> list[Served]:
        """Serve all of them; a request that is refused has no first token."""
        now, index = 0.0, 0
        decide_at = self._interval
        while True:
            while index < len(self._served) and self._served[index].arrival.time <= now + 1e-12:
                self._admit(self._served[index])
                index += 1
            if self._controller is not None and now >= decide_at:
                decide_at = now + self._interval
                self._decide(now)
            self._launch(now)
            upto = min(
                now + self._left[0] * self._times[0] if self._work[0] is not None else float("inf"),
                now + self._left[1] * self._times[1] if self._work[1] is not None else float("inf"),
                self._served[index].arrival.time if index < len(self._served) else float("inf"),
            )
            if upto == float("inf"):
                return self._served
            for lane in (0, 1):
                if self._work[lane] is not None:
                    self._left[lane] -= (upto - now) / self._times[lane]
            now = upto
            # Both are read before either ends: an end changes the other's speed.
            for lane in [lane for lane in (0, 1) if self._work[lane] is not None and self._left[lane] <= 1e-9]:
                self._complete(lane, now)
                self._pace()

    def _admit(self, one: Served) -> None:
        # What is refused did come in: the controller would lift the limit if it did not know.
        if self._controller is not None:
            self._controller.observe_arrival(one.arrival.time, one.arrival.prompt)
        if self._limit is None or self._prompts.tokens <= self._limit:
            self._prompts.add(one)

    def _decide(self, now: float) -> None:
        assert self._controller is not None
        decision = self._controller.decide(now, self._prompts.tokens)
        self._limit = decision.max_queued_tokens
        if decision.split != self._split:
            self._split = decision.split
            self._controller.note_switch(now)
            self.num_switches += 1
            self.splits.append((now, decision.split))

    def _launch(self, now: float) -> None:
        room = MAX_REQUESTS - self._decoding.count
        prefill = self._work[0] is None and bool(self._prompts.waiting) and room > 0
        decode = self._work[1] is None and self._decoding.count > 0
        if prefill:
            tokens, pairs, self._computed = self._prompts.take(self._budget, room)
            self._tokens = tokens
            self._begin(0, self._cost.measure_prefill(tokens, pairs), now, not decode)
        if decode:
            self._stepping = self._decoding.count
            self._begin(1, self._cost.measure_decode(self._stepping, self._decoding.context), now, not prefill)
        if prefill or decode:
            self._pace()

    def _begin(self, lane: int, work: Work, now: float, is_first: bool) -> None:
        is_alone = self._full_when_alone and is_first and self._work[1 - lane] is None
        self._work[lane], self._left[lane], self._began[lane] = work, 1.0, now
        self._share[lane] = 1.0 if is_alone else self._split[lane]

    def _pace(self) -> None:
        """How long batches take from now on: one of them began or ended."""
        is_beside = self._work[0] is not None and self._work[1] is not None
        shares = self._cost.divide(self._share) if is_beside else self._share
        for lane, work in enumerate(self._work):
            if work is not None:
                time = self._cost.slow_down(work, shares[lane], is_prefill=lane == 0, is_beside=is_beside)
                self._times[lane] = time / 1e3

    def _complete(self, lane: int, now: float) -> None:
        self._work[lane] = None
        began, share, controller = self._began[lane], self._share[lane], self._controller
        if lane == 1:
            if controller is not None:
                controller.observe_decode(began, now, share)
            for one in self._decoding.step(now, self._stepping):
                if controller is not None and one.first_token is not None:
                    controller.observe_finished(one.first_token, now, one.arrival.output - 1)
            return
        if controller is not None:
            controller.observe_prefill(began, now, self._tokens, share)
        for one in self._computed:
            self._decoding.add(one, now, is_stepping=self._work[1] is not None)
            if controller is not None:
                controller.observe_first_token(one.arrival.time, now)


def serve_lanes(
    arrivals: Sequence[Arrival],
    cost: Cost,
    controller: PhaseController | None = None,
    split: Split | None = None,
    *,
    full_when_alone: bool = True,
) -> list[Served]:
    """Two lanes under a controller, or with a fixed split. Raises ValueError where neither is given."""
    if split is None:
        if controller is None:
            raise ValueError("a server of two lanes needs a controller or a split")
        split = controller.split
    return LaneServer(arrivals, cost, controller, split, full_when_alone=full_when_alone).serve()
