# SPDX-License-Identifier: Apache-2.0
"""The time that one request's masks may take from everybody's steps.

Masks of a step are filled one after the other, so a grammar with slow masks makes every request of the batch wait. Only
grammars whose size makes it possible are timed (`Plan.is_plain` is False). A request may be slow for a while; over its
budget it ends with an error, as vLLM ends a request whose grammar fails.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_ext import observability

logger = logging.getLogger("vllm.vllm_ext")

#: Milliseconds that every mask adds to what a request may use, and what it may have used ahead of that.
MASK_MS = 1.0
CREDIT_MS = 250.0


class _Budgeted:
    """What a timed grammar has beside vLLM's: the sum of its masks over the allowance, in milliseconds."""

    debt_ms = 0.0
    is_exhausted = False
    rank = 0

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        """vLLM's, with the time it takes charged."""
        began = time.perf_counter()
        super().fill_bitmask(bitmask, idx)  # type: ignore[misc]
        self.charge((time.perf_counter() - began) * 1e3)

    def charge(self, milliseconds: float) -> None:
        """Count the time of one mask."""
        self.debt_ms = max(0.0, self.debt_ms + milliseconds - MASK_MS)
        if self.debt_ms > CREDIT_MS and not self.is_exhausted:
            self.is_exhausted = True
            observability.add("vllm_ext:structured_over_budget_total", 1, self.rank)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """vLLM's; False, which ends the request, where its masks have used up their time."""
        if self.is_exhausted:
            logger.warning("vllm-ext: request %s ends, its masks take more than %g ms each", request_id, MASK_MS)
            return False
        return bool(super().accept_tokens(request_id, tokens))  # type: ignore[misc]


class BudgetedXgrammar(_Budgeted, XgrammarGrammar):
    """A timed grammar of xgrammar."""


class BudgetedGuidance(_Budgeted, GuidanceGrammar):
    """A timed grammar of llguidance."""


def make_budgeted(grammar: StructuredOutputGrammar, rank: int = 0) -> StructuredOutputGrammar:
    """The same grammar, timed. rank: vLLM's data-parallel rank, for the metrics."""
    kind = BudgetedXgrammar if isinstance(grammar, XgrammarGrammar) else BudgetedGuidance
    timed: StructuredOutputGrammar = kind.__new__(kind)
    timed.__dict__.update(grammar.__dict__, rank=rank)
    return timed
