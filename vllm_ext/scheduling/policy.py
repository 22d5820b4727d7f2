# SPDX-License-Identifier: Apache-2.0
"""`smartspec.policy`: reads priorities and deadlines of vLLM's requests and weighs the requests of a batch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_ext.speculation.policy import normalize, weigh_deadlines, weigh_priorities

logger = logging.getLogger("vllm.vllm_ext")

#: Key of a deadline in SamplingParams.extra_args, `vllm_xargs` of an HTTP request: milliseconds from its arrival.
DEADLINE_KEY = "vllm_ext_deadline_ms"
#: What `smartspec.policy` may name, and what each one looks at: (priorities, deadlines).
POLICIES: Mapping[str, tuple[bool, bool]] = {
    "equal": (False, False),
    "priority": (True, False),
    "deadline": (False, True),
    "priority+deadline": (True, True),
}


class _Due(NamedTuple):
    """A request's deadline and where its decoding was first seen."""

    arrival: float  # seconds of time.time, which tells a request from another of the same id
    deadline: float  # seconds of time.time; infinite for none
    started: float
    tokens_at_start: int


class _Batch(NamedTuple):
    """What does not change about the requests of a batch: read once, for a batch stays the same for many steps."""

    requests: list[Any]
    #: Weights by priority, float64 [n]; None where priorities do not count.
    urgency: np.ndarray | None
    #: Whether any has a deadline. If so, of each: tokens that it put out (the list that vLLM appends to), deadline
    #: (infinite for none) and start of decoding in seconds of time.time, output tokens at that start, and the most
    #: tokens that it may put out, float64 [n].
    has_deadlines: bool
    outputs: list[list[int]]
    deadlines: np.ndarray
    started: np.ndarray
    tokens_at_start: np.ndarray
    max_tokens: np.ndarray


class RequestPolicy:
    """Weights of a batch's requests, for `GoodputController(policy=...)`."""

    def __init__(
        self, requests: Mapping[str, Any], priorities: bool, deadlines: bool, clock: Callable[[], float] = time.time
    ) -> None:
        """requests: the scheduler's own, by id. priorities, deadlines: whether these count. clock: seconds, that of
        `Request.arrival_time`."""
        self._requests, self._priorities, self._deadlines = requests, priorities, deadlines
        self._clock = clock
        self._due: dict[Hashable, _Due] = {}
        self._batch = self._read_batch([])
        self._is_warned = False

    def __call__(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """float64 [n], mean 1."""
        requests = list(map(self._requests.__getitem__, request_ids))  # type: ignore[arg-type]
        # By identity: another request of the same id is another request.
        if requests != self._batch.requests:
            self._batch = self._read_batch(requests)
        weights = self._batch.urgency
        if self._batch.has_deadlines:
            hurry = self._weigh_deadlines(self._batch)
            weights = hurry if weights is None else weights * hurry
        return np.ones(len(requests)) if weights is None else normalize(weights)

    def _weigh_deadlines(self, batch: _Batch) -> np.ndarray:
        now = self._clock()
        made = np.array(list(map(len, batch.outputs)), np.float64)
        since = made - batch.tokens_at_start
        pace = (now - batch.started) / np.where(since > 0, since, np.inf)
        return weigh_deadlines(batch.deadlines - now, batch.max_tokens - made, pace)

    def _read_batch(self, requests: list[Any]) -> _Batch:
        urgency = None
        if self._priorities:
            priorities = [request.priority for request in requests]
            # By rank: a priority may be any integer of Python's.
            ranks = {priority: rank for rank, priority in enumerate(sorted(set(priorities)))}
            urgency = weigh_priorities(np.array([ranks[priority] for priority in priorities], np.int64))
        now = self._clock()
        dues = [self._find_due(request, now) for request in requests if self._deadlines]
        return _Batch(
            requests,
            urgency,
            any(due.deadline < math.inf for due in dues),
            # vLLM's read-only view of it counts on its being the same list for the request's whole life, too.
            [request._output_token_ids for request in requests],
            np.array([due.deadline for due in dues]),
            np.array([due.started for due in dues]),
            np.array([due.tokens_at_start for due in dues], np.float64),
            np.array([request.max_tokens for request in requests], np.float64),
        )

    def _find_due(self, request: Any, now: float) -> _Due:
        due = self._due.get(request.request_id)
        return due if due is not None and due.arrival == request.arrival_time else self._note_due(request, now)

    def _note_due(self, request: Any, now: float) -> _Due:
        if len(self._due) > 2 * len(self._requests) + 64:
            self._due = {rid: due for rid, due in self._due.items() if rid in self._requests}
        arrival = request.arrival_time
        due = _Due(arrival, arrival + self._read_deadline(request) / 1e3, now, request.num_output_tokens)
        self._due[request.request_id] = due
        return due

    def _read_deadline(self, request: Any) -> float:
        """Milliseconds from arrival, infinite where there are none that can be used.

        What is wrong in one request must not stop the engine for all: it is named in a warning and does not count.
        """
        parameters = request.sampling_params
        value = (parameters.extra_args or {}).get(DEADLINE_KEY) if parameters is not None else None
        if value is None:
            return math.inf
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "smartspec: %s of request %s is %r and does not count: give milliseconds from the request's arrival, "
                "a number above 0 (this is said once)",
                DEADLINE_KEY,
                request.request_id,
                value,
            )
        return math.inf


def make_policy(name: str, requests: Mapping[str, Any]) -> RequestPolicy | None:
    """The policy of this name over the scheduler's requests; None where all weigh the same."""
    priorities, deadlines = POLICIES[name]
    return RequestPolicy(requests, priorities, deadlines) if priorities or deadlines else None
