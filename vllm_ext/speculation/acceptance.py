# SPDX-License-Identifier: Apache-2.0
"""How likely drafts are accepted, per request and position, learned from the steps that verified them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ext.speculation.change import ChangeDetector
from vllm_ext.speculation.goodput import load_compiled

#: Groups of requests that learn nothing of each other (`AcceptanceModel`).
NUM_GROUPS = 2
#: Estimates stay inside: nothing observed in a finite number of steps is impossible or certain.
LOWEST, HIGHEST = 0.01, 0.995
#: What a request's totals keep at each step that verified a draft of it, and at each that did not.
REQUEST_MEMORY, IDLE_MEMORY = 0.97, 0.99
#: Trials after one outcome that the chance of all counts for, and after two outcomes that of the newer one.
HISTORY_STRENGTH = 6.0
#: Steps that are learned from together by the same chances: predictions never wait for that many.
REFRESH_EVERY = 3
#: Weights of what is known of a hazard (`AcceptanceModel`) before anything was seen, and how fast they follow.
FIRST_WEIGHTS, WEIGHT_RATE = (1.0, 0.8, 0.6, 0.5), 0.03
#: What a step moves the averages of `find_usual` by; more at first.
USUAL_RATE = 0.05
#: Trials that all counts together are worth after a change, at one position.
TRIALS_AFTER_CHANGE = 1.0


def find_usual_rate(num_steps: int) -> float:
    """What the newest of so many steps counts for in an average of usual steps."""
    return max(USUAL_RATE, 1 / num_steps)


class Verified(NamedTuple):
    """A step whose outcome is to be learned: slots of its requests, int64 [n], and of each the drafts verified and
    accepted and the tokens put out. Drafts of length 0 let a request drift to what all do. is_noted: whether
    `AcceptanceModel.note` was told of it."""

    slots: np.ndarray
    drafted: Sequence[int]
    accepted: Sequence[int]
    made: Sequence[int]
    is_noted: bool


class AcceptanceModel:
    """Chances of acceptance of every running request, as discounted counts in arrays indexed by slot.

    Position j of a draft is tried only where the j-1 before it were accepted, so what is estimated is the hazard
    h[j] = P(j accepted | j-1 accepted); the chance that a draft of length k survives is the product of the first k. A
    step that drafted k and accepted a < k saw a successes, one failure, and nothing of the positions behind: censored.

    Texts come in stretches: a request all of whose drafts passed has the next ones passed too, and one that had none to
    verify, or only wrong ones, seldom. So what is known of a hazard is mixed,

        logit h = of anybody at any position
                + w0 * (at this position                 - that)
                + w1 * (there after the last outcome     - that)
                + w2 * (there after the last two of them - that)
                + w3 * (of what the request had accepted - of what anybody would have had there)

    each from discounted counts, with an outcome one of: no draft verified, the first one wrong, some right, all right.
    The weights are learned with the counts, by the gradient of the log loss: where requests differ for good, the last
    counts most; where all are alike but their texts change, w1 and w2; and where nothing differs all of them vanish.

    `note` has the newest outcomes count at once, for a few microseconds; `observe` learns, and may come later.

    Counts fade with time; where outcomes change at once (`ChangeDetector`), they are forgotten at once.

    Requests that are sampled have fewer drafts accepted than greedy ones on the same text: a draft passes with the
    chance that the model gives it, not whenever it is the likeliest token. Such groups, known before a request has its
    first draft, learn nothing of each other, and one that comes back after a while finds what it knew.

    Source: SmartSpec keeps one moving average of accepted / drafted for all requests (section 4.2), which is biased by
    the censoring and blind to positions and requests. Mixing in the logistic domain with weights learned online is that
    of the PAQ compressors (Mahoney 2005, "Adaptive weighing of context models").
    """

    def __init__(
        self,
        k_max: int,
        *,
        initial: float = 0.6,
        shared_strength: float = 0.8,
        shared_memory: float = 0.985,
        untried_memory: float = 0.995,
        find_group: Callable[[Hashable], int] | None = None,
    ) -> None:
        """k_max: longest draft. initial: chance before anything was seen.

        shared_strength: trials that the chance over all positions counts for at one position; shared_memory: what
        counts keep at each later step; untried_memory: what the counts of all requests keep of a position that a step
        did not try. find_group: the group of a request that has just come, 0 to NUM_GROUPS - 1; None for one of all.
        Raises ValueError for a k_max below 1.
        """
        if k_max < 1:
            raise ValueError(f"k_max must be at least 1, got {k_max}")
        self.k_max = k_max
        #: As `compiled.learn_steps` takes them.
        self._rates = (
            initial,
            shared_strength,
            HISTORY_STRENGTH,
            float(REFRESH_EVERY),
            USUAL_RATE,
            WEIGHT_RATE,
            REQUEST_MEMORY,
            IDLE_MEMORY,
            shared_memory,
            untried_memory,
            TRIALS_AFTER_CHANGE,
        )
        self._find_group = find_group
        self._compiled = compiled = load_compiled()
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        groups = NUM_GROUPS
        #: `ChangeDetector.sums` of each group.
        self._change_sums, self._change_limits = np.zeros((groups, 2)), ChangeDetector().limits
        #: Requests of each group that have a slot.
        self._group_sizes = [0] * groups
        #: Discounted successes and trials: after each history of two outcomes, and of all requests of a group together,
        #: by the number of requests.
        self._state_counts = np.zeros((groups * compiled.NUM_HISTORIES, k_max, 2))
        self._shared_counts = np.zeros((groups, k_max, 2))
        self._weights = np.tile(FIRST_WEIGHTS, (groups, 1))
        #: Of each slot: successes, trials, successes that were expected of anybody.
        self._totals = np.zeros((0, 3))
        #: Group and last two outcomes of each slot: with those only noted, and as far as they are learned from.
        self._histories, self._learned_histories = np.zeros(0, np.int64), np.zeros(0, np.int64)
        #: Tokens that a step makes on average, [slots].
        self._usual = np.zeros(0)
        #: Tokens that a step makes of an average request of each group, and steps learned from.
        self._averages = np.tile([1.0, 0.0], (groups, 1))
        #: How often a group's past was forgotten because outcomes had changed.
        self.num_forgotten = 0
        #: The requests asked for last and their slots: a step asks for the same ones when it trims, plans and learns.
        self._last_ids: list[Hashable] = []
        self._last_slots = np.zeros(0, np.int64)
        #: What is predicted of these until something is noted or learned.
        self._last_survival: np.ndarray | None = None
        #: As `compiled.find_chances` sets them, and steps that each group was learned from since then.
        self._chances = (
            np.zeros((*self._state_counts.shape[:2], 3)),
            np.zeros(self._state_counts.shape[:2]),
            np.zeros((groups, k_max)),
            np.zeros(groups),
        )
        self._stale = np.ones(groups, np.int64)
        self._refresh()

    def __len__(self) -> int:
        return len(self._slots)

    def find_slots(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """Slots of requests, int64 [n], not to be written to; an unknown request gets one, at the prior."""
        ids = list(request_ids)
        if ids != self._last_ids:
            slots = self._slots
            found = np.array([slots[rid] if rid in slots else self._add(rid) for rid in ids], np.int64)
            self._last_ids, self._last_slots = ids, found
            self._last_survival = None
        return self._last_slots

    def keep_only(self, request_ids: Container[Hashable]) -> None:
        """Forget every request that is not among these."""
        gone = [rid for rid in self._slots if rid not in request_ids]
        for rid in gone:
            self.remove(rid)

    def remove(self, request_id: Hashable) -> None:
        """Forget a request; one that was never seen is no error."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
            self._group_sizes[self._histories[slot] // self._compiled.NUM_HISTORIES] -= 1
            self._last_ids, self._last_slots = [], np.zeros(0, np.int64)
            self._last_survival = None

    @property
    def hope(self) -> float:
        """How far recent outcomes were better than expected, of the requests asked for last: `ChangeDetector.above`."""
        groups = self._histories[self._last_slots] // self._compiled.NUM_HISTORIES
        return float(self._change_sums[groups, 0].max(initial=0.0))

    def note(self, slots: np.ndarray, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Have a step's outcomes count as the last ones, before they are learned from.

        slots: int64 [n]; drafted, accepted: of each. The step is to be observed later.
        """
        self._compiled.advance_histories(self._histories, slots, *np.array((drafted, accepted), np.int64))
        self._last_survival = None

    def observe(
        self, slots: np.ndarray, drafted: np.ndarray, accepted: np.ndarray, made: np.ndarray | None = None
    ) -> None:
        """Learn from one verified step; arguments as of `Verified`, made None for accepted + 1."""
        if len(slots):
            columns = drafted, accepted, accepted + 1 if made is None else made
            drafts, passed, tokens = (column.tolist() for column in columns)
            self.observe_all([Verified(slots, drafts, passed, tokens, is_noted=False)])

    def observe_all(self, steps: Sequence[Verified]) -> None:
        """Learn from verified steps, in their order.

        Raises ValueError where a request accepted more than it drafted, or drafted more than k_max.
        """
        steps = [step for step in steps if len(step.slots)]
        if not steps:
            return
        # Over lists: a few numbers of many steps become arrays at once.
        slots = np.concatenate([step.slots for step in steps])
        drafted, accepted, made = (
            np.fromiter(itertools.chain(*columns), np.int64, len(slots))
            for columns in zip(*[(step.drafted, step.accepted, step.made) for step in steps], strict=True)
        )
        if (accepted > drafted).any() or drafted.max() > self.k_max or accepted.min() < 0:
            raise ValueError(f"accepted {accepted.tolist()} of drafted {drafted.tolist()} with k_max {self.k_max}")
        self.num_forgotten += self._compiled.learn_steps(
            self._state_counts,
            self._shared_counts,
            self._totals,
            self._histories,
            self._learned_histories,
            self._usual,
            self._weights,
            self._change_sums,
            self._chances,
            self._stale,
            self._averages,
            np.cumsum([len(step.slots) for step in steps]),
            np.array([step.is_noted for step in steps], np.int64),
            slots,
            drafted,
            accepted,
            made,
            self._rates,
            self._change_limits,
        )
        self._last_survival = None

    def predict_survival(self, slots: np.ndarray) -> np.ndarray:
        """P(the first j drafts are all accepted), j = 1..k_max: float64 [n, k_max], falling along j; not to be written
        to."""
        if slots is self._last_slots and self._last_survival is not None:
            return self._last_survival
        survival: np.ndarray = self._compiled.predict_survival(*self.describe(slots))
        if slots is self._last_slots:
            self._last_survival = survival
        return survival

    def predict_best(self, slots: np.ndarray) -> np.ndarray:
        """The most that `predict_survival` may say after one more step, whatever its outcome, by what is learned now:
        float64 [n, k_max]."""
        best: np.ndarray = self._compiled.predict_best(*self.describe(slots))
        return best

    def predict_mean(self, slots: np.ndarray) -> np.ndarray:
        """`predict_survival` of a step that may come after any two outcomes, by how often drafts of anybody were tried
        after them: float64 [n, k_max]."""
        mean: np.ndarray = self._compiled.predict_mean(self._state_counts, *self.describe(slots))
        return mean

    def describe(self, slots: np.ndarray) -> tuple[object, ...]:
        """What chances of requests are predicted from, as the compiled loops take it."""
        self._refresh()
        _, odds, _, pooled = self._chances
        return odds, self._totals, self._histories, slots, self._weights, pooled, LOWEST, HIGHEST

    @property
    def usual(self) -> np.ndarray:
        """`find_usual` of every slot: float64 [slots]."""
        return self._usual

    def find_usual(self, slots: np.ndarray) -> np.ndarray:
        """Tokens that a step of each request makes on average, float64 [n], at least 1; of a request that has just
        come, what those of its group make."""
        return self._usual[slots]

    def _refresh(self) -> None:
        """Have chances say what the counts do now."""
        self._compiled.find_chances(
            self._chances, self._stale, 1.0, self._state_counts, self._shared_counts, self._weights, self._rates
        )

    def _add(self, request_id: Hashable) -> int:
        if not self._free:
            size = len(self._totals)
            more = max(16, size)
            self._free = list(range(size + more - 1, size - 1, -1))
            self._totals = np.concatenate([self._totals, np.zeros((more, 3))])
            self._histories, self._learned_histories = (
                np.concatenate([known, np.zeros(more, np.int64)])
                for known in (self._histories, self._learned_histories)
            )
            self._usual = np.concatenate([self._usual, np.ones(more)])
        slot = self._free.pop()
        self._slots[request_id] = slot
        group = 0 if self._find_group is None else self._find_group(request_id)
        self._group_sizes[group] += 1
        for other, size in enumerate(self._group_sizes):
            if not size:
                # What an absent group was in the middle of noticing will be a while ago when it comes back.
                self._change_sums[other] = 0.0
        self._totals[slot], self._usual[slot] = 0.0, self._averages[group, 0]
        self._histories[slot] = self._learned_histories[slot] = group * self._compiled.NUM_HISTORIES
        return slot
