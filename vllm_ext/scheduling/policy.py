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
        self._is_warned = False

    def __call__(self, request_ids: Sequence[Hashable]) -> np.ndarray:
        """float64 [n], mean 1."""
        requests = [self._requests[rid] for rid in request_ids]  # type: ignore[index]
        weights = np.ones(len(requests))
        if self._priorities:
            weights *= weigh_priorities(np.array([request.priority for request in requests], np.int64))
        if self._deadlines:
            weights *= self._weigh_deadlines(requests)
        return normalize(weights)

    def _weigh_deadlines(self, requests: Sequence[Any]) -> np.ndarray:
        now, known = self._clock(), self._due
        weights = np.ones(len(requests))
        rows, deadlines, paces, tokens = [], [], [], []
        for row, request in enumerate(requests):
            due = known.get(request.request_id)
            if due is None or due.arrival != request.arrival_time:
                due = self._note_due(request, now)
                known = self._due
            if due.deadline == math.inf:
                continue
            made = request.num_output_tokens
            rows.append(row)
            deadlines.append(due.deadline)
            tokens.append(request.max_tokens - made)
            made -= due.tokens_at_start
            paces.append((now - due.started) / made if made > 0 else 0.0)
        if rows:
            left = (np.array(deadlines) - now) * 1e3
            weights[rows] = weigh_deadlines(left, np.array(tokens, np.float64), np.array(paces) * 1e3)
        return weights

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
