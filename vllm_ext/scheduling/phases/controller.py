# SPDX-License-Identifier: Apache-2.0
"""Which share of the device prefill and decode get, or one batch for both, so that both meet their objectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vllm_ext.scheduling.phases.latency import ArrivalRate, ShareModel, find_quantile, find_ttft_quantile, follow
from vllm_ext.scheduling.phases.mixing import MixedModel

#: Before anything is measured: prefill computes, so nearly all of its time scales with its share; decode reads memory,
#: which a part of the cores can do.
PREFILL_SCALING, DECODE_SCALING = 0.9, 0.4
#: Prompts and gaps that count in the fits; a change of load is followed within so many.
PREFILL_MEMORY, DECODE_MEMORY = 64, 400
#: Seconds over which arrivals count.
RATE_MEMORY = 30.0
#: Latest prompts and requests whose distribution is looked at.
SAMPLES = 128
#: A split must be this much better to be switched to, in so many decisions one after the other ...
GAIN, PATIENCE = 0.05, 2
#: Mixed batches must be this much better than the split: of them, all is prediction before they are tried.
MIX_GAIN = 0.15
#: ... and while no latency is above this part of its objective, none is: models err more than that far from where the
#: device has been.
COMFORT = 0.9
#: Parts of the objective between tokens that steps of decode may be apart while prompts are computed. The last one
#: leaves room for steps that take longer.
INTERVALS = (0.4, 0.6, 0.8)
#: Steps that take this part of an interval leave prompts no time worth speaking of.
FILLED = 0.9
#: Tokens come sooner again where no latency would be above this part of its objective.
RELAX = 0.75
#: How far measured latency may move the model's, either way.
CORRECTION = 2.0
#: The ratio of the quantile of requests' TPOT to its mean where too few requests are over.
SPREAD = 1.1


class Split(NamedTuple):
    """Shares of the device, each in (0, 1]. Their sum is above 1 where lanes compete for some of it."""

    prefill: float
    decode: float


class Objectives(NamedTuple):
    """What requests are promised: seconds to the first token and per further token, for a share of the requests."""

    ttft: float
    tpot: float
    quantile: float = 0.9


class Decision(NamedTuple):
    """The split from now on, and what is expected of it."""

    split: Split
    ttft: float  # seconds, at the objectives' quantile
    tpot: float
    #: Who comes in while more prompt tokens wait would miss its objective, and should be refused; None for nobody.
    max_queued_tokens: int | None
    is_switch: bool
    #: Whether prompts go into the batches of decode, on the whole device; the split is what comes after that.
    mixes: bool = False
    #: Seconds from the beginning of a decode step to that of the next while prompts are computed, which have the whole
    #: device between them; 0 where decode does not wait, and prompts stay on their share.
    decode_interval: float = 0.0


class PhaseController(Protocol):
    """What the engine and the simulator call; times are seconds of one clock that does not go back."""

    @property
    def split(self) -> Split:
        """The split that was decided last."""

    def observe_arrival(self, now: float, tokens: int) -> None:
        """A prompt came in, with so many tokens to compute."""

    def observe_prefill(self, started: float, finished: float, tokens: int, share: float) -> None:
        """A batch of the prefill lane ran, at this share of the device."""

    def observe_first_token(self, arrived: float, now: float) -> None:
        """A request has its first token."""

    def observe_decode(self, started: float, finished: float, share: float) -> None:
        """A step of the decode lane ran, at this share of the device."""

    def observe_mixed(self, started: float, finished: float, prompt_tokens: int) -> None:
        """A batch of so many prompt tokens and a token of everyone who decodes ran, on the whole device."""

    def observe_finished(self, first_token: float, now: float, tokens: int) -> None:
        """A request is over; so many tokens came after its first."""

    def decide(self, now: float, queued_tokens: int) -> Decision:
        """The split from now on; queued_tokens: prompt tokens that wait to be computed."""

    def note_switch(self, now: float) -> None:
        """The split that was decided is in force from now on."""


class SplitController:
    """Moves, among given splits, to the one that minimises max(TTFT / objective, TPOT / objective) by its models.

    TTFT is the quantile of an M/G/1 queue whose services are measured prompts at measured times per token; TPOT is
    a/y + b, of the time that prefill runs beside decode. Both are corrected by what is measured. Samples that span a
    switch belong to no split and are left out. Where no split meets both objectives, tokens come first and waiting
    prompts are bounded. Mixed batches are one candidate more, whose latencies follow from the times of both phases on
    the whole device; so are its costs compared with those of splits.

    Steps of decode, which take about as long for many requests as for few, may be held apart while prompts are
    computed, which have the whole device in between: tokens that come before anybody asked for them cost prompts more
    than any split gives back where there are few to choose from.

    Source: semi-PD, Algorithm 1 (`published.PublishedController`). It moves in steps towards the objective that is
    violated without asking what the other one suffers, and does nothing while both are or none is. There are no
    intervals.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        objectives: Objectives,
        *,
        start: int | None = None,
        full_when_alone: bool = True,
        refuses: bool = True,
        mix_budget: int | None = None,
        intervals: Sequence[float] = (),
    ) -> None:
        """splits: what the device can do. start: the index of the first one, default the middle.
        full_when_alone: a lane has the whole device while the other is idle. refuses: whether prompts may be refused.
        mix_budget: tokens of a mixed batch, None where there are none. intervals: seconds that decode steps may be
        held apart; not at all is always one choice.

        Raises ValueError for no splits, a share outside (0, 1], objectives or intervals that are not positive, or a
        budget below 1.
        """
        if not splits or not all(0 < share <= 1 for split in splits for share in split):
            raise ValueError(f"splits {[tuple(split) for split in splits]} must be shares in (0, 1], at least one pair")
        if min(objectives.ttft, objectives.tpot) <= 0 or not 0 < objectives.quantile < 1:
            raise ValueError(f"{objectives} must be positive seconds and a quantile between 0 and 1")
        if not all(interval > 0 for interval in intervals):
            raise ValueError(f"intervals {list(intervals)} must be positive seconds")
        self._splits = sorted(set(splits))
        self._objectives = objectives
        self._index = self._splits.index(splits[len(splits) // 2 if start is None else start])
        self._full_when_alone, self._refuses = full_when_alone, refuses
        self._token_time = ShareModel(PREFILL_SCALING, memory=PREFILL_MEMORY)
        self._step_time = ShareModel(DECODE_SCALING, memory=DECODE_MEMORY)
        self._intervals, self._interval = (0.0, *sorted(intervals)), 0.0
        self._mixed, self._mixes = None, False
        if mix_budget is not None:
            self._mixed = MixedModel(mix_budget, objectives.quantile, self._token_time, self._step_time)
        self._rate = ArrivalRate(RATE_MEMORY)
        self._prompts: deque[int] = deque(maxlen=SAMPLES)
        self._ttft: deque[float] = deque(maxlen=SAMPLES)
        self._tpot: deque[float] = deque(maxlen=SAMPLES)
        self._outputs: deque[int] = deque(maxlen=SAMPLES)
        self._switched = float("-inf")
        self._correction = 1.0
        self._candidate: tuple[int, int, bool] | None = None
        self._agreed = 0

    @property
    def split(self) -> Split:
        """The split that was decided last."""
        return self._splits[self._index]

    def observe_arrival(self, now: float, tokens: int) -> None:
        """See PhaseController."""
        self._rate.observe(now)
        self._prompts.append(tokens)

    def observe_prefill(self, started: float, finished: float, tokens: int, share: float) -> None:
        """See PhaseController."""
        if started >= self._switched and tokens > 0:
            self._token_time.observe(share, (finished - started) / tokens, weight=tokens)

    def observe_first_token(self, arrived: float, now: float) -> None:
        """See PhaseController."""
        if arrived >= self._switched:
            self._ttft.append(now - arrived)

    def observe_decode(self, started: float, finished: float, share: float) -> None:
        """See PhaseController."""
        if started >= self._switched:
            self._step_time.observe(share, finished - started)

    def observe_mixed(self, started: float, finished: float, prompt_tokens: int) -> None:
        """See PhaseController."""
        if self._mixed is not None and started >= self._switched:
            self._mixed.observe(finished - started, prompt_tokens)

    def observe_finished(self, first_token: float, now: float, tokens: int) -> None:
        """See PhaseController."""
        if tokens > 0:
            self._outputs.append(tokens)
        if first_token >= self._switched and tokens > 0:
            self._tpot.append((now - first_token) / tokens)

    def note_switch(self, now: float) -> None:
        """See PhaseController."""
        self._switched = now
        self._ttft.clear()
        self._tpot.clear()

    def decide(self, now: float, queued_tokens: int) -> Decision:
        """See PhaseController. Call it at intervals, not at every step: patience counts decisions."""
        if not self._prompts or not (self._token_time.num_observed and self._step_time.num_observed):
            return self._describe(0.0, 0.0, None, False)
        rate = self._rate.measure(now)
        prompts = np.array(self._prompts, np.float64)
        self._correct(prompts, rate)
        predicted = []
        for interval in self._intervals:
            predicted += self.predict(self._splits, prompts, rate, queued_tokens, interval)
        if self._mixed is not None:
            predicted.append(self._mixed.predict(prompts, rate, queued_tokens, self._outputs))
        ttft, tpot = self._objectives.ttft, self._objectives.tpot
        costs = [max(first / ttft, further / tpot) for first, further in predicted]
        best = int(np.argmin(costs))
        limit = None
        if costs[best] > 1:
            # Slow tokens keep requests longer, which makes tokens slower still and leaves no room for prompts: so the
            # split is the one that serves most prompts of those at which tokens come in time.
            costs = [first / ttft if further <= tpot else 1e3 * further / tpot for first, further in predicted]
            best = int(np.argmin(costs))
            limit = self._limit_queue(best, prompts, predicted[best][1]) if self._refuses else None
        is_switch = self._agree(best, costs)
        return self._describe(*predicted[self._current], limit, is_switch)

    def predict(
        self, splits: Sequence[Split], prompts: np.ndarray, rate: float, queued_tokens: int = 0, interval: float = 0.0
    ) -> list[tuple[float, float]]:
        """(TTFT, TPOT) at the quantile, in seconds, of each split with decode's steps held apart; prompts: tokens of
        samples of who comes in."""
        token_times = np.array([self._time_token(split, interval) for split in splits])
        first = find_ttft_quantile(token_times[:, None] * prompts, rate, self._objectives.quantile) * self._correction
        means = token_times * float(prompts.mean())
        # Who comes now waits for those who are here, however seldom there are so many.
        first = np.maximum(first, queued_tokens * token_times + means)
        busy = np.minimum(1.0, rate * means) if self._full_when_alone else np.ones(len(splits))
        beside = np.array([max(self._step_time.predict(split.decode), interval) for split in splits])
        further = (busy * beside + (1 - busy) * self._step_time.predict(1.0)) * self._measure_spread()
        return list(zip(first.tolist(), further.tolist(), strict=True))

    @property
    def _current(self) -> int:
        """The place of what is in force among the candidates: all splits with the first interval, with the next one,
        and then mixed batches."""
        place = len(self._intervals) if self._mixes else self._intervals.index(self._interval)
        return len(self._splits) * place + (0 if self._mixes else self._index)

    def _describe(self, ttft: float, tpot: float, limit: int | None, is_switch: bool) -> Decision:
        """What is in force, with what is expected of it."""
        interval = 0.0 if self._mixes or not self._has_pauses(self.split, self._interval) else self._interval
        return Decision(self.split, ttft, tpot, limit, is_switch, self._mixes, interval)

    def _has_pauses(self, split: Split, interval: float) -> bool:
        return self._step_time.predict(split.decode) < FILLED * interval

    def _time_token(self, split: Split, interval: float) -> float:
        """Seconds of a prompt token: prompts have the whole device between two steps of decode, and about their share
        beside one, whose cores are taken from their team."""
        if not self._has_pauses(split, interval):
            return self._token_time.predict(split.prefill)
        waiting = 1 - self._step_time.predict(split.decode) / interval
        return self._token_time.predict(waiting + (1 - waiting) * split.prefill)

    def _measure_spread(self) -> float:
        high = find_quantile(self._tpot, self._objectives.quantile)
        if high is None:
            return SPREAD
        return min(max(high / float(np.mean(self._tpot)), 1.0), CORRECTION)

    def _correct(self, prompts: np.ndarray, rate: float) -> None:
        """Move the models' latencies towards what is measured of what is in force."""
        quantile = self._objectives.quantile
        measured = find_quantile(self._ttft, quantile)
        if self._mixes and self._mixed is not None:
            self._mixed.correct(prompts, rate, self._outputs, measured, find_quantile(self._tpot, quantile))
        elif measured is not None:
            services = prompts * self._time_token(self.split, self._interval)
            predicted = float(find_ttft_quantile(services, rate, quantile))
            self._correction = follow(self._correction, measured / predicted, 0.3, CORRECTION)

    def _limit_queue(self, index: int, prompts: np.ndarray, tpot: float) -> int:
        """Tokens that can wait with a candidate, and still have their first token in time."""
        place, number = divmod(index, len(self._splits))
        if place == len(self._intervals) and self._mixed is not None:
            token_time, tpot = self._mixed.token, self._mixed.pace
        else:
            token_time = self._time_token(self._splits[number], self._intervals[place])
        own = float(np.quantile(prompts, self._objectives.quantile)) * token_time
        tokens = max(0.0, self._objectives.ttft - own) / token_time
        # Decode that is too slow as well is slow because too many are served.
        return int(tokens * min(1.0, self._objectives.tpot / tpot))

    def _agree(self, best: int, costs: Sequence[float]) -> bool:
        """Whether to switch: one split towards one that was clearly better often enough, to its interval, or to or from
        mixed batches; and back to a shorter interval where that is comfortable too.

        Not further: what models say about splits far from where the device has been is a guess, and the next one is
        measured before the one after it is tried.
        """
        current, count = self._current, len(self._splits)
        mixed = count * len(self._intervals)
        if costs[current] <= COMFORT:
            shorter = current - count
            following = shorter if not self._mixes and self._interval and costs[shorter] <= RELAX else current
        elif mixed in (best, current):
            gain = MIX_GAIN if best == mixed else GAIN
            following = best if costs[best] <= (1 - gain) * costs[current] else current
        else:
            place, wanted = divmod(best, count)
            nearer = self._index + (wanted > self._index) - (wanted < self._index)
            here = current - self._index
            # The split, the interval, or both: whichever is best.
            following = min((here + nearer, count * place + self._index, count * place + nearer), key=costs.__getitem__)
            if costs[best] > (1 - GAIN) * costs[current] or costs[following] >= costs[current]:
                following = current
        if following == current:
            self._candidate, self._agreed = None, 0
            return False
        # The same direction is agreement: how far the best one is moves with the queue.
        direction = _sign(following // count - current // count), _sign(best % count - self._index), following == mixed
        self._agreed = self._agreed + 1 if direction == self._candidate else 1
        self._candidate = direction
        if self._agreed < PATIENCE:
            return False
        self._mixes, self._candidate, self._agreed = following == mixed, None, 0
        if not self._mixes:
            place, self._index = divmod(following, count)
            self._interval = self._intervals[place]
        return True


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
