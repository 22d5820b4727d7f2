# SPDX-License-Identifier: Apache-2.0
"""Who begins first: fairness between clients, and decode before prefill. Both are off unless asked for."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from typing import TypeVar

Waiting = TypeVar("Waiting")


class VirtualTokenCounter:
    """Who has been served how much; waiting requests are taken from the client who was served least.

    A client who comes back is not owed what it did not ask for: its counter is lifted to the smallest of those who
    wait, or to that of the last one who did.

    Source: Sheng et al., Fairness in Serving Large Language Models (arXiv:2401.00588, Algorithm 2), whose weights, 1
    for a prompt's token and 2 for an output's, are the defaults.
    """

    def __init__(self, prompt_weight: float = 1.0, output_weight: float = 2.0, max_clients: int = 4096) -> None:
        """max_clients: above so many, those are forgotten who would be lifted anyway. Raises ValueError for a weight
        that is not positive.
        """
        if min(prompt_weight, output_weight) <= 0:
            raise ValueError(f"weights {prompt_weight} and {output_weight} of tokens must be positive")
        self._prompt_weight, self._output_weight = prompt_weight, output_weight
        self._max_clients = max_clients
        self._served: dict[Hashable, float] = {}
        self._waiting: Counter[Hashable] = Counter()
        self._last: Hashable = None

    def add_waiting(self, client: Hashable) -> None:
        """A request of a client came in."""
        if not self._waiting[client]:
            others = [self._served[other] for other, count in self._waiting.items() if count and other != client]
            floor = min(others) if others else self._served.get(self._last, 0.0)
            self._served[client] = max(self._served.get(client, 0.0), floor)
        self._waiting[client] += 1
        if len(self._served) > self._max_clients:
            self._forget()

    def drop_waiting(self, client: Hashable) -> None:
        """A waiting request was aborted. Raises ValueError where the client has none."""
        if not self._waiting[client]:
            raise ValueError(f"client {client!r} has no waiting request")
        self._waiting[client] -= 1
        if not self._waiting[client]:
            self._last = client

    def admit(self, client: Hashable, prompt_tokens: int) -> None:
        """A waiting request begins; its prompt is charged at once. Raises ValueError where the client has none."""
        self.drop_waiting(client)
        self._served[client] += self._prompt_weight * prompt_tokens

    def charge_output(self, client: Hashable, tokens: int) -> None:
        """Tokens were put out for a client."""
        self._served[client] = self._served.get(client, 0.0) + self._output_weight * tokens

    def _forget(self) -> None:
        # Who waits for nothing and was served no more than all who do comes back at their level, known or not.
        self._waiting = +self._waiting  # without those who wait for nothing
        floor = min(self._served[client] for client in self._waiting)
        self._served = {
            client: served for client, served in self._served.items() if served > floor or client in self._waiting
        }

    def measure(self, client: Hashable) -> float:
        """What a client was served, in weighted tokens."""
        return self._served.get(client, 0.0)

    def count_clients(self) -> int:
        """Clients of whom something is known."""
        return len(self._served)

    def order(self, waiting: Iterable[tuple[Hashable, int, Waiting]], limit: int | None = None) -> list[Waiting]:
        """Waiting requests in the order in which they should begin; waiting: (client, prompt tokens, request), each
        client's own in its order. Every request taken is charged before the next is chosen. limit: so many of them.
        """
        queues: dict[Hashable, deque[tuple[int, Waiting]]] = {}
        for client, tokens, request in waiting:
            queues.setdefault(client, deque()).append((tokens, request))
        # Ties go to whoever comes first in the queue.
        heap = [(self.measure(client), place, client) for place, client in enumerate(queues)]
        heapq.heapify(heap)
        ordered: list[Waiting] = []
        while heap and (limit is None or len(ordered) < limit):
            served, place, client = heapq.heappop(heap)
            tokens, request = queues[client].popleft()
            ordered.append(request)
            if queues[client]:
                heapq.heappush(heap, (served + self._prompt_weight * tokens, place, client))
        return ordered


class DecodePriority:
    """Holds the prefill lane back while decode is behind its objective.

    For devices without a partition, where batches that run beside each other slow each other down, and wherever tokens
    matter more than prompts: every gap above the objective is a debt, every gap below it pays, and no prefill batch
    begins while there is debt. A prompt is never held longer than `max_hold` seconds, so that decode that is too slow
    by itself does not starve it.
    """

    def __init__(self, tpot: float, max_hold: float) -> None:
        """tpot: seconds between tokens. Raises ValueError for one that is not positive, or a negative max_hold."""
        if tpot <= 0 or max_hold < 0:
            raise ValueError(f"tpot {tpot} must be positive seconds and max_hold {max_hold} not negative")
        self._tpot, self._max_hold = tpot, max_hold
        self._debt = 0.0
        self._held: float | None = None
        self.num_holds = 0

    def observe_gap(self, seconds: float) -> None:
        """Time between two steps of the decode lane."""
        # What can be owed is bounded: a long pause of the machine is over when it is over.
        self._debt = min(max(self._debt + seconds - self._tpot, 0.0), 10 * self._tpot)

    def stop_holding(self) -> None:
        """No prefill batch is ready any more: the next one is held for its own time."""
        self._held = None

    def may_prefill(self, now: float) -> bool:
        """Whether a prefill batch that is ready may begin at `now`, in seconds of the caller's clock."""
        begins = self._held is None
        held = now if self._held is None else self._held
        if self._debt > 0 and now - held < self._max_hold:
            self._held = held
            self.num_holds += begins
            return False
        self._held = None
        return True
