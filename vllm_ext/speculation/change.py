# SPDX-License-Identifier: Apache-2.0
"""When what was learned no longer holds: a change is told from luck, so that the past can be forgotten at once."""

from __future__ import annotations

import numpy as np

from vllm_ext.speculation.goodput import load_compiled

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
        #: As `compiled.detect_change` takes them.
        self.limits = reference, threshold, float(MOST_WITNESSES), LARGEST_SURPRISE
        #: The two sums: outcomes better than expected, and worse.
        self.sums = np.zeros(2)
        self._detect = load_compiled().detect_change

    @property
    def above(self) -> float:
        """How far outcomes were better than expected."""
        return float(self.sums[0])

    @property
    def below(self) -> float:
        """How far they were worse."""
        return float(self.sums[1])

    def observe(self, count: int, expected: float, squares: float, succeeded: int) -> bool:
        """Whether outcomes have changed, after one more step.

        count: first drafts that were tried; expected: sum of the chances that were believed in; squares: sum of these
        chances squared; succeeded: how many were accepted. After an alarm the sums begin anew, with a head start where
        outcomes became better (Lucas and Crosier 1982).
        """
        alarm: bool = self._detect(self.sums, count, float(expected), float(squares), succeeded, self.limits)
        return alarm
