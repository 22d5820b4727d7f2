# SPDX-License-Identifier: Apache-2.0
"""When drafts are tried although they do not seem to pay, and how many requests are asked."""

from __future__ import annotations

#: Steps between two probes: at first, and once they tell nothing new.
PROBE_EVERY, PROBE_WANTED = 8, 16
#: What probes may lose in the long run, as a share of the time: what they take, less what they are believed to bring.
PROBE_SHARE = 0.008
#: A probe costs no less than this share of the time that it takes: beliefs are what it is there to correct.
LEAST_LOSS = 0.2
#: Better outcomes than expected, in the sum of `ChangeDetector`, that are worth another look at once ...
HOPE = 1.2
#: ... for which so much may be borrowed, as a number of steps.
DEBT = 2.0
#: Requests that are asked at such a second look at least; twice as many as before, from then on.
FEWEST_AGAIN = 4
#: Steps after which the outcome of a probe is no longer waited for.
LONGEST_WAIT = 4


class ProbeBudget:
    """A bucket of milliseconds that fills with a share of every step's time and that probes are paid from.

    A cheap probe comes every `PROBE_WANTED` steps and asks as many requests as those steps have earned. Where one draft
    of one request costs more than that, probes wait until it is earned. What looks like a change for the better may
    borrow, so that it is followed quickly; luck that looks so is paid back by fewer probes, so the share holds.
    """

    def __init__(self, every: int = PROBE_EVERY) -> None:
        """every: steps before the first probe."""
        self._every = self._interval = every
        self._credit = 0.0
        self._idle = self._awaited = 0
        self._last_width = 0

    def earn(self, milliseconds: float, cheapest: float, steps: int = 1) -> None:
        """So many steps take that long each. Nothing is saved beyond the next probe.

        cheapest: milliseconds of the least one.
        """
        most = max(PROBE_SHARE * PROBE_WANTED * milliseconds, cheapest)
        self._credit = min(self._credit + PROBE_SHARE * milliseconds * steps, most)

    def rest(self) -> None:
        """A step that speculates: nothing is to be found out."""
        self._idle = self._awaited = 0
        self._interval = self._every

    def wait(self, steps: int = 1) -> None:
        """So many steps that do not speculate."""
        self._idle += steps
        self._awaited = max(0, self._awaited - steps)

    @property
    def is_awaited(self) -> bool:
        """Whether the outcome of the last probe has yet to arrive."""
        return self._awaited > 0

    @staticmethod
    def find_loss(milliseconds: float, gain: float) -> float:
        """What a probe of so many milliseconds costs that is believed to save others worth `gain` milliseconds."""
        return max(milliseconds - gain, LEAST_LOSS * milliseconds)

    def find_width(self, count: int, milliseconds: float, common: float, each: float, hope: float) -> int:
        """How many of `count` requests to ask now, 0 for none.

        milliseconds: of a step without drafts; common, each: what a probe adds to it, for all and for each request;
        hope: `AcceptanceModel.hope`.
        """
        is_hopeful = hope > HOPE
        if self._awaited or not count or self._idle < (1 if is_hopeful else self._interval):
            return 0
        if is_hopeful:
            if self._credit < -DEBT * milliseconds:
                return 0
            budget = self._credit + DEBT * milliseconds
            count = min(count, max(FEWEST_AGAIN, 2 * self._last_width))
        else:
            if self._credit < common + each:
                return 0
            budget = min(self._credit, PROBE_SHARE * PROBE_WANTED * milliseconds)
        if each * count <= budget - common:
            return count
        return min(count, max(1, int((budget - common) / each)))

    def pay(self, milliseconds: float, width: int) -> None:
        """A probe of so many requests was made."""
        self._last_width = width
        self._credit -= milliseconds
        self._idle, self._awaited = 0, LONGEST_WAIT
        self._interval = min(2 * self._interval, max(PROBE_WANTED, self._every))

    def offer(self, milliseconds: float) -> None:
        """Drafts were asked for and may not come: what that cost."""
        self._credit -= milliseconds

    def hear(self) -> None:
        """The outcome of the last probe has arrived."""
        self._awaited = 0
