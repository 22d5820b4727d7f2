# SPDX-License-Identifier: Apache-2.0
"""What becomes of prompts that come too late to be in time, where no way to share the device meets both objectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Generic, NamedTuple, Protocol, TypeVar


class LateRequest(Protocol):
    """What is read of a request; `vllm.v1.request.Request` has it."""

    request_id: str

    @property
    def num_tokens(self) -> int:
        """Tokens to compute until the first one of the output."""


Late = TypeVar("Late", bound=LateRequest)


class _Entry(NamedTuple, Generic[Late]):
    since: float
    request: Late


class LateQueue(Generic[Late]):
    """Prompts that are held back, oldest first: those who can still be in time go before them.

    A prompt that comes in behind more tokens than can be computed until its first token is due misses its objective
    wherever it stands in the queue; and those behind it would miss theirs, as they wait for it. So it is let in when no
    prompt waits that could be in time, or after `patience`: late, but served.

    Source: the exit that semi-PD's Algorithm 1 (arXiv:2504.19867) lacks where both objectives are violated, where it
    changes nothing.
    """

    def __init__(self, patience: float) -> None:
        """patience: seconds after which nobody is held back any more. Raises ValueError for a negative one."""
        if patience < 0:
            raise ValueError(f"patience {patience} must not be negative seconds")
        self._patience = patience
        self._entries: deque[_Entry[Late]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def hold(self, request: Late, now: float) -> None:
        """Hold a request back that came in at `now`, in seconds of a clock that does not go back."""
        self._entries.append(_Entry(now, request))

    def release(self, now: float, queued_tokens: int, limit: int | None) -> list[Late]:
        """Who is let in, oldest first. queued_tokens: prompt tokens that wait; limit: how many may, None for any."""
        released: list[Late] = []
        while self._entries:
            since, request = self._entries[0]
            if limit is not None and queued_tokens > 0 and now - since < self._patience:
                break
            self._entries.popleft()
            queued_tokens += request.num_tokens
            released.append(request)
        return released

    def remove(self, request_ids: Collection[str] | None) -> list[Late]:
        """Take requests out that are over, None for all; returns them."""
        is_gone = [request_ids is None or entry.request.request_id in request_ids for entry in self._entries]
        gone = [entry.request for entry, gone in zip(self._entries, is_gone, strict=True) if gone]
        if gone:
            self._entries = deque(entry for entry, gone in zip(self._entries, is_gone, strict=True) if not gone)
        return gone
