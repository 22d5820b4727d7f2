# SPDX-License-Identifier: Apache-2.0
"""The time that one request's grammar may take from everybody's steps: its masks, its moves, and looks at it.

Masks of a step are filled one after the other, so a slow grammar makes every request of the batch wait. Grammars are
timed whose size makes it possible, or that were written by hand (`Plan.is_budgeted`). A request may be slow for a
while, and its masks are filled beside the steps then (scheduling/slow_masks.py); over its budget it ends with an error,
as vLLM ends a request whose grammar fails.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, wait
from typing import Any

from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_ext import observability

logger = logging.getLogger("vllm.vllm_ext")

#: Milliseconds that every mask adds to what a request may use, and what it may have used ahead of that.
MASK_MS = 1.0
CREDIT_MS = 250.0
#: Milliseconds that timed grammars may take together in a step; above it every mask adds less.
STEP_MS = 16.0
#: Milliseconds of a mask, and share of a step, after which the next one of its request is better filled beside the
#: steps; steps count as no longer than LONGEST_STEP_MS.
SLOW_MS, SLOW_SHARE, LONGEST_STEP_MS = 2.0, 0.1, 100.0


class StepTimes:
    """What the timed grammars of an engine took together in a step, and so what a mask of the next one may take."""

    def __init__(self) -> None:
        self.total_ms = 0.0
        self.mask_ms = MASK_MS
        #: Whether any of them had a slow mask; whoever finds that none has one any more takes it back.
        self.has_slow = False
        #: Above it a mask is slow.
        self.slow_ms = SLOW_MS
        self._began = time.perf_counter()

    def begin(self) -> None:
        """A step ends and another begins."""
        now = time.perf_counter()
        self.slow_ms = max(SLOW_MS, SLOW_SHARE * min((now - self._began) * 1e3, LONGEST_STEP_MS))
        self._began = now
        self.mask_ms = MASK_MS * min(1.0, STEP_MS / max(self.total_ms, 1e-9))
        self.total_ms = 0.0


class Budgeted:
    """What a timed grammar has beside vLLM's: the sum of its times over the allowance, in milliseconds."""

    debt_ms = 0.0
    is_exhausted = False
    rank = 0
    steps: StepTimes
    #: What grammars share that lock each other out.
    family: object
    #: Whether the last mask was slow, and the next one where it is being filled beside the steps.
    is_slow = False
    ahead: Future[tuple[Any, float]] | None = None

    def charge(self, milliseconds: float) -> None:
        """Count time that the grammar took."""
        self.steps.total_ms += milliseconds
        self._owe(milliseconds)

    def _owe(self, milliseconds: float) -> None:
        self.debt_ms += milliseconds
        if self.debt_ms > CREDIT_MS and not self.is_exhausted:
            self.is_exhausted = True
            observability.add("vllm_ext:structured_over_budget_total", 1, self.rank)

    def _time(self, function: Callable[..., Any], *given: Any) -> Any:
        self._drop_ahead()
        # Of this thread alone: a busy machine makes no grammar slow.
        began = time.thread_time()
        try:
            return function(*given)
        finally:
            self.charge((time.thread_time() - began) * 1e3)

    def _drop_ahead(self) -> None:
        """Wait until nobody looks at the grammar: it is about to leave the state that a mask was filled for."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None and not ahead.cancel():
            wait([ahead])

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        """vLLM's, with the time it takes charged; what was filled ahead is only copied."""
        self.debt_ms = max(0.0, self.debt_ms - self.steps.mask_ms)
        # What has not begun is quicker here.
        if self.ahead is not None and not self.ahead.cancel():
            row, milliseconds = self.ahead.result()
            self.ahead = None
            bitmask[idx] = row
            # Of no step's time.
            self._owe(milliseconds)
        else:
            before = self.debt_ms
            self._time(super().fill_bitmask, bitmask, idx)  # type: ignore[misc]
            milliseconds = self.debt_ms - before
        self.is_slow = milliseconds > self.steps.slow_ms
        self.steps.has_slow |= self.is_slow

    def fill_ahead(self, executor: Executor, masks: Any) -> None:
        """Have the next mask filled by an executor. masks: int32 [1, words], for this alone."""
        reference = weakref.ref(self)

        def run() -> tuple[Any, float]:
            grammar = reference()
            if grammar is None:
                raise CancelledError("the request is gone")
            began = time.thread_time()
            super(Budgeted, grammar).fill_bitmask(masks, 0)  # type: ignore[misc]
            return masks[0], (time.thread_time() - began) * 1e3

        self.ahead = executor.submit(run)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """vLLM's; False, which ends the request, where its grammar has used up its time."""
        if self.is_exhausted:
            logger.warning("vllm-ext: request %s ends, its grammar takes more than %g ms a token", request_id, MASK_MS)
            return False
        return bool(self._time(super().accept_tokens, request_id, tokens))  # type: ignore[misc]

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """vLLM's, with the time it takes charged."""
        valid: list[int] = self._time(super().validate_tokens, tokens)  # type: ignore[misc]
        return valid

    def rollback(self, num_tokens: int) -> None:
        """vLLM's, with the time it takes charged."""
        self._time(super().rollback, num_tokens)  # type: ignore[misc]

    def reset(self) -> None:
        """vLLM's."""
        self._time(super().reset)  # type: ignore[misc]


class BudgetedXgrammar(Budgeted, XgrammarGrammar):
    """A timed grammar of xgrammar."""


class BudgetedGuidance(Budgeted, GuidanceGrammar):
    """A timed grammar of llguidance."""


def make_budgeted(
    grammar: StructuredOutputGrammar, steps: StepTimes, rank: int = 0, family: object | None = None
) -> StructuredOutputGrammar:
    """The same grammar, timed.

    steps: shared by the engine's grammars. rank: data-parallel, for the metrics. family: shared by those grammars of
    which one has to wait while another is looked at; None for a grammar by itself.
    """
    kind = BudgetedXgrammar if isinstance(grammar, XgrammarGrammar) else BudgetedGuidance
    timed: StructuredOutputGrammar = kind.__new__(kind)
    timed.__dict__.update(grammar.__dict__, steps=steps, rank=rank, family=grammar if family is None else family)
    return timed
