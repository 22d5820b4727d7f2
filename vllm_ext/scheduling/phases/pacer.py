# SPDX-License-Identifier: Apache-2.0
"""The controller's view of a running engine: when requests came, had their tokens and left, and when lanes ran."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vllm_ext.scheduling.phases.controller import Objectives, PhaseController, Split
from vllm_ext.scheduling.phases.view import Lane

#: Seconds between two decisions.
PERIOD = 1.0
#: Batches kept of a lane that runs alone.
MOST_UNMATCHED = 4096


@dataclass
class _Clock:
    arrived: float
    first_token: float | None = None
    later_tokens: int = 0
    is_late: bool = False


@dataclass
class PaceCounts:
    """Since the start; times in seconds."""

    switches: int = 0
    late: int = 0  # requests that were held back
    first_tokens: int = 0
    first_tokens_in_time: int = 0
    finished: int = 0  # requests with a second token
    finished_in_time: int = 0
    busy: tuple[float, float] = (0.0, 0.0)  # by lane
    mixed_busy: float = 0.0  # of the decode lane's, in batches of both phases
    overlap: float = 0.0


class Pacer:
    """Feeds a controller and asks it once in a while. Times are seconds of one clock that does not go back."""

    def __init__(self, controller: PhaseController | None, splits: list[Split], objectives: Objectives) -> None:
        """controller: None where there is nothing to decide. splits: what the device can do; their order is that of
        `index`."""
        self.counts = PaceCounts()
        self.index = 0 if controller is None else splits.index(controller.split)
        #: Whether prompts go into the batches of decode.
        self.is_mixing = False
        #: Seconds between the beginnings of two decode steps while prompts are computed, 0 where none waits.
        self.decode_interval = 0.0
        #: Prompt tokens beyond which who comes in is late, None where nobody is.
        self.max_queued_tokens: int | None = None
        self._controller, self._splits, self._objectives = controller, splits, objectives
        self._clocks: dict[str, _Clock] = {}
        self._decided = float("-inf")
        #: Batches of each lane since the other one had its latest.
        self._unmatched: tuple[deque[tuple[float, float]], ...] = tuple(deque(maxlen=MOST_UNMATCHED) for _ in Lane)

    def note_arrival(self, request_id: str, now: float, tokens: int) -> None:
        """A request came in with a prompt of so many tokens."""
        self._clocks[request_id] = _Clock(now)
        if self._controller is not None:
            self._controller.observe_arrival(now, tokens)

    def note_late(self, request_id: str) -> None:
        """A request is held back: it is late by decision, which says nothing about the device."""
        self.counts.late += 1
        if request_id in self._clocks:
            self._clocks[request_id].is_late = True

    def note_mixed(self, started: float, finished: float, prompt_tokens: int, decode_tokens: int, share: float) -> None:
        """A batch of both phases ran in the decode lane; one of them may have had no tokens in it."""
        if self._controller is not None and prompt_tokens and decode_tokens:
            self._controller.observe_mixed(started, finished, prompt_tokens)
        elif self._controller is not None and prompt_tokens:
            self._controller.observe_prefill(started, finished, prompt_tokens, share)
        elif self._controller is not None:
            self._controller.observe_decode(started, finished, share)
        self.counts.mixed_busy += finished - started
        self._count_busy(Lane.DECODE, started, finished)

    def note_batch(self, lane: Lane, started: float, finished: float, tokens: int, share: float) -> None:
        """A batch of so many tokens ran at this share of the device."""
        if self._controller is not None and lane is Lane.PREFILL:
            self._controller.observe_prefill(started, finished, tokens, share)
        elif self._controller is not None:
            self._controller.observe_decode(started, finished, share)
        self._count_busy(lane, started, finished)

    def measure_share(self, started: float, finished: float, since: float | None) -> float:
        """What a prefill batch that was given the whole device had of it, beside steps that took their cores from it.
        Ask before the batch is noted. since: when the decode batch that still runs began, None for none."""
        steps = [*self._unmatched[Lane.DECODE], *([] if since is None else [(since, finished)])]
        beside = sum(max(0.0, min(finished, end) - max(started, begin)) for begin, end in steps)
        return 1 - (1 - self._splits[self.index].prefill) * min(1.0, beside / max(finished - started, 1e-9))

    def _count_busy(self, lane: Lane, started: float, finished: float) -> None:
        # Of two batches that overlap, the one that is noted second finds the first, and no later one can overlap that.
        other = self._unmatched[1 - lane]
        self.counts.overlap += sum(max(0.0, min(finished, end) - max(started, begin)) for begin, end in other)
        other.clear()
        self._unmatched[lane].append((started, finished))
        busy = list(self.counts.busy)
        busy[lane] += finished - started
        self.counts.busy = (busy[0], busy[1])

    def note_tokens(self, request_id: str, now: float, tokens: int, is_over: bool) -> None:
        """A request has so many more tokens, and with them perhaps its last."""
        clock = self._clocks.get(request_id)
        if clock is None:
            return
        if tokens and clock.first_token is None:
            clock.first_token = now
            tokens -= 1
            self.counts.first_tokens += 1
            self.counts.first_tokens_in_time += now - clock.arrived <= self._objectives.ttft
            if self._controller is not None and not clock.is_late:
                self._controller.observe_first_token(clock.arrived, now)
        clock.later_tokens += tokens
        if is_over:
            del self._clocks[request_id]
            if clock.first_token is not None and clock.later_tokens:
                self.counts.finished += 1
                took = now - clock.first_token
                self.counts.finished_in_time += took / clock.later_tokens <= self._objectives.tpot
                if self._controller is not None:
                    self._controller.observe_finished(clock.first_token, now, clock.later_tokens)

    def forget(self, request_id: str) -> None:
        """A request was aborted."""
        self._clocks.pop(request_id, None)

    def is_due(self, now: float) -> bool:
        """Whether there is something to decide now: counting what is queued takes time."""
        return self._controller is not None and now - self._decided >= PERIOD

    def decide(self, now: float, queued_tokens: int) -> int:
        """The number of the split from now on; asks the controller at most once a period. Sets `is_mixing`,
        `decode_interval` and `max_queued_tokens` too.
        """
        if self._controller is not None and self.is_due(now):
            self._decided = now
            decision = self._controller.decide(now, queued_tokens)
            self.max_queued_tokens, self.decode_interval = decision.max_queued_tokens, decision.decode_interval
            if decision.is_switch:
                self.index, self.is_mixing = self._splits.index(decision.split), decision.mixes
                self.counts.switches += 1
                self._controller.note_switch(now)
        return self.index
