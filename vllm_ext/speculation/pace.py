# SPDX-License-Identifier: Apache-2.0
"""How often lengths are chosen: the less a step takes, the more steps share one choice."""

from __future__ import annotations

import math

#: What choosing and learning may take, as a share of the steps' time.
SHARE = 0.01
#: Steps that one choice stands for at most: longer, and changes of the text would be followed late. Simulated, with
#: control for nothing, these cost 0.1 % of the goodput against 1.
HOLD_STEPS = 8
#: What the newest of measured times counts for.
RATE = 0.1
#: Control of a step that only trims, over that of a step with a plan of its own.
TRIM_CONTROL = 0.25


class Pace:
    """For how many steps a plan of drafts stands, by what control takes and what steps take.

    Where a step takes a tenth of a second, control is nothing and every step has a plan of its own. Where it takes six
    milliseconds, half of one for control is more than most choices of lengths are worth.

    Source: ours; SmartSpec (arXiv:2406.14066) chooses at every step.
    """

    def __init__(self, most: int = HOLD_STEPS, share: float = SHARE) -> None:
        """most: steps that a plan stands for at most; share: of the steps' time that control may take.

        Raises ValueError for fewer steps than one and for a share that is not positive.
        """
        if most < 1 or not share > 0:
            raise ValueError(f"a plan stands for at least 1 step and takes some share, got {most} and {share}")
        self._most, self._share = most, share
        self._control: float | None = None
        self._step = 0.0

    @property
    def steps(self) -> int:
        """Steps that the next plan stands for; 1 before anything was measured."""
        if self._control is None:
            return 1
        allowed = self._share * self._step
        # Not through a quotient: the allowed time may be too small to divide by.
        return self._most if self._control >= self._most * allowed else max(1, math.ceil(self._control / allowed))

    @property
    def trim_time(self) -> float:
        """Milliseconds that drafts take to be trimmed in each step under the next plan; 0 where each has its own."""
        return TRIM_CONTROL * self._control if self._control is not None and self.steps > 1 else 0.0

    def observe(self, control: float, step: float) -> None:
        """Milliseconds of control in a step that had a plan of its own, and of the rest of that step."""
        if self._control is None:
            self._control, self._step = control, step
            return
        self._control += RATE * (control - self._control)
        self._step += RATE * (step - self._step)
