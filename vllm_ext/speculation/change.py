# SPDX-License-Identifier: Apache-2.0
"""When what was learned no longer holds: a change is told from luck, so that the past can be forgotten at once."""

from __future__ import annotations

import math

#: Requests of a batch that count as independent witnesses at most: their estimates share what is wrong with them.
MOST_WITNESSES = 8
#: Standard deviations that one step counts for at most: outcomes of few requests are far from normal.
LARGEST_SURPRISE = 3.0


class ChangeDetector:
    """Two-sided cumulative sum of standardized surprises.

    A surprise is the share of first drafts that were accepted less the share that was expected. Sums of luck drift to
    zero; those of a change grow by its size at each step. A change by three standard deviations raises the
    alarm after four steps with the default numbers.

    Source: Page 1954, "Continuous inspection schemes"; reference value and threshold as in Montgomery, "Statistical
    quality control", chapter 9.
    """

    def __init__(self, reference: float = 0.5, threshold: float = 8.0) -> None:
        """reference: standard deviations that each surprise is reduced by; threshold: sum that raises the alarm."""
        self._reference, self._threshold = reference, threshold
        #: The two sums: outcomes better than expected, and worse.
        self.above = self.below = 0.0

    def observe(self, count: int, expected: float, squares: float, succeeded: int) -> bool:
        """Whether outcomes have changed, after one more step.

        count: first drafts that were tried; expected: sum of the chances that were believed in; squares: sum of these
        chances squared; succeeded: how many were accepted. After an alarm the sums begin anew, with a head start where
        outcomes became better (Lucas and Crosier 1982).
        """
        if not count:
            return False
        variance = (expected - squares) / count / min(count, MOST_WITNESSES)
        surprise = (succeeded - expected) / count / math.sqrt(max(variance, 1e-6))
        surprise = min(max(surprise, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        self.above = max(0.0, self.above + surprise - self._reference)
        self.below = max(0.0, self.below - surprise - self._reference)
        if max(self.above, self.below) < self._threshold:
            return False
        # Half way to the next alarm: what became better may be better still than it seems after one forgotten past.
        self.above, self.below = (self._threshold / 2 if self.above >= self._threshold else 0.0), 0.0
        return True
