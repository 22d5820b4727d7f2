# SPDX-License-Identifier: Apache-2.0
"""How often lengths are chosen: the less a step takes, the more steps share one choice."""

from __future__ import annotations

import math

#: Where choosing and learning take less than this share of the steps' time, every step has a plan of its own: older
#: plans would save less than that, and follow changes later.
SHARE = 0.01
#: Goodput that each step costs for which a plan stands longer: simulated, with control for nothing, plans of 8 and 16
#: steps had 0.2 and 0.4 % less than those of one.
LOSS = 0.00025
#: Steps that one choice stands for at most: longer, and changes of the text would be followed late.
HOLD_STEPS = 16
#: What the newest of measured times counts for.
RATE = 0.1
#: What trimming takes in a step, with reading the outcomes that it goes by, over what making a plan takes: 67 to 95 us
#: over 110 to 190 at 1 and 16 requests.
TRIM_OVER_PLAN = 0.6


class Pace:
    """For how many steps a plan of drafts stands, by what control takes and what steps take.

    Where a step takes a tenth of a second, control is nothing and every step has a plan of its own. Where it takes six
    milliseconds, half of one for control is more than most choices of lengths are worth. A plan of n steps costs
    control / (n * step) of the time for being made, and LOSS * n of the goodput for being old: least at the root of
    control / (step * LOSS).

    Source: ours; SmartSpec (arXiv:2406.14066) chooses at every step.
    """

    def __init__(self, most: int = HOLD_STEPS) -> None:
        """most: steps that a plan stands for at most. Raises ValueError for fewer than one."""
        if most < 1:
            raise ValueError(f"a plan stands for at least 1 step, got {most}")
        self._most = most
        self._control: float | None = None
        self._step = self._planning = 0.0

    @property
    def steps(self) -> int:
        """Steps that the next plan stands for; 1 before anything was measured."""
        if self._control is None:
            return 1
        if self._control <= SHARE * self._step:
            return 1
        # Not through a quotient: the step's time may be too small to divide by.
        if self._control >= LOSS * self._step * self._most**2:
            return self._most
        return max(1, round(math.sqrt(self._control / (LOSS * self._step))))

    @property
    def trim_time(self) -> float:
        """Milliseconds that drafts take to be trimmed in each step under the next plan; 0 where each has its own."""
        return TRIM_OVER_PLAN * self._planning if self.steps > 1 else 0.0

    def observe_plan(self, milliseconds: float) -> None:
        """What making a plan took. Not so what learning took: that is more where nothing is trimmed, and would keep
        things so."""
        self._planning += RATE * (milliseconds - self._planning) if self._planning else milliseconds

    def observe(self, control: float, step: float) -> None:
        """Milliseconds of control in a step that had a plan of its own, and of the rest of that step."""
        if self._control is None:
            self._control, self._step = control, step
            return
        self._control += RATE * (control - self._control)
        self._step += RATE * (step - self._step)
