# SPDX-License-Identifier: Apache-2.0
"""Which requests belong to which lane, and how a lane's part of them is scheduled as if it were all there is."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar


class Lane(enum.IntEnum):
    """A stream of batches that complete in the order in which they were launched."""

    PREFILL = 0
    DECODE = 1


class LaneRequest(Protocol):
    """What lanes read of a request; `vllm.v1.request.Request` has all of it."""

    request_id: str
    num_computed_tokens: int  # tokens of batches in flight included
    num_output_placeholders: int  # tokens that batches in flight will sample (asynchronous scheduling), else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output that are known."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output that are known."""


Request = TypeVar("Request", bound=LaneRequest)


class LaneView(NamedTuple, Generic[Request]):
    """The running requests of a scheduler, as one lane may see them."""

    mine: list[Request]  # what this lane may schedule, and preempt, in the order of `running`
    others: list[Request]  # what it must not touch
    running: list[Request]  # both, oldest first

    def limit_active(self, max_active: int) -> int:
        """How many requests may run in this lane, where `max_active` may run in the engine."""
        return max(0, max_active - len(self.others))

    def merge(self, after: Iterable[Request]) -> list[Request]:
        """`running` again, from what scheduling left of `mine`.

        The order stays, with new requests at the end: the scheduler preempts the last, so an order of lanes would
        preempt an old request before a young one of the other lane's past.
        """
        left = {request.request_id: request for request in after}
        kept = {request.request_id for request in self.others}
        old = {request.request_id for request in self.running}
        stayed = [request for request in self.running if request.request_id in kept or request.request_id in left]
        return stayed + [request for rid, request in left.items() if rid not in old]


def find_phase(request: LaneRequest) -> Lane:
    """The lane that computes a request's next token.

    DECODE from the first output token on, once all but the newest token is in the KV cache: a preempted request that
    recomputes its tokens is in PREFILL again.
    """
    placeholders = request.num_output_placeholders
    remaining = request.num_tokens + placeholders - request.num_computed_tokens
    return Lane.DECODE if request.num_output_tokens + placeholders > 0 and remaining <= 1 else Lane.PREFILL


def split_running(running: Sequence[Request], mine: Iterable[Request]) -> LaneView[Request]:
    """A view of `running` with `mine` of them for the lane."""
    chosen = list(mine)
    ids = {request.request_id for request in chosen}
    others = [request for request in running if request.request_id not in ids]
    return LaneView(chosen, others, list(running))
