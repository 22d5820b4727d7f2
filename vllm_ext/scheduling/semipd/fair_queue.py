# SPDX-License-Identifier: Apache-2.0
"""vLLM's waiting requests, in the order of virtual token counters by client."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm_ext.scheduling.phases.fairness import VirtualTokenCounter

#: The name under which a request says whose it is: `vllm_xargs` of HTTP requests, `extra_args` of SamplingParams.
CLIENT = "client"
#: Characters of a client's name that count.
LONGEST = 256


def find_client(request: Any) -> str:
    """Whose a vLLM request is: its extra argument `client`, else its cache_salt; all others are one client."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    name = extra.get(CLIENT)
    return str(name if name is not None else request.cache_salt or "")[:LONGEST]


class FairQueue:
    """Keeps a vLLM queue in fair order, and the counters it is ordered by."""

    def __init__(self, output_weight: float) -> None:
        """output_weight: what a token of output costs, in tokens of a prompt. Raises ValueError unless positive."""
        self._counter = VirtualTokenCounter(output_weight=output_weight)
        self._clients: dict[str, str] = {}  # by request, until it is over
        self._waiting: dict[str, None] = {}  # requests that never began, oldest first
        self.num_overtakes = 0

    @property
    def num_clients(self) -> int:
        """Clients whose service is counted."""
        return self._counter.count_clients()

    def enter(self, request: Any) -> None:
        """A request begins to wait."""
        client = self._clients[request.request_id] = find_client(request)
        self._waiting[request.request_id] = None
        self._counter.add_waiting(client)

    def arrange(self, waiting: deque[Any], room: int) -> None:
        """Put those in front who should begin next, `room` of them; who was preempted comes before, charged already."""
        if len(waiting) < 2:
            return
        before = list(waiting)
        begun = [request for request in before if request.request_id not in self._waiting]
        fresh = [request for request in before if request.request_id in self._waiting]
        entries = ((self._clients[request.request_id], request.num_tokens, request) for request in fresh)
        chosen = self._counter.order(entries, max(room, 1))
        ids = {request.request_id for request in chosen}
        after = [*begun, *chosen, *(request for request in fresh if request.request_id not in ids)]
        if after != before:
            waiting.clear()
            waiting.extend(after)

    def note_scheduled(self, scheduled: Iterable[tuple[str, int]]) -> None:
        """Requests with tokens in a batch: (id, tokens of the prompt); who begins is charged its prompt."""
        for rid, tokens in scheduled:
            if rid in self._waiting:
                self.num_overtakes += rid != next(iter(self._waiting))
                del self._waiting[rid]
                self._counter.admit(self._clients[rid], tokens)

    def note_tokens(self, request_id: str, tokens: int) -> None:
        """A request has so many more tokens of output."""
        if tokens and request_id in self._clients:
            self._counter.charge_output(self._clients[request_id], tokens)

    def leave(self, request_id: str) -> None:
        """A request is over, or aborted."""
        client = self._clients.pop(request_id, None)
        if client is not None and request_id in self._waiting:
            del self._waiting[request_id]
            self._counter.drop_waiting(client)
