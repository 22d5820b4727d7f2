# SPDX-License-Identifier: Apache-2.0
"""Turns between clients in vLLM's queue."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.scheduling.semipd.fair_queue import LONGEST, FairQueue, find_client


def make_request(rid: str, client: str | None = None, tokens: int = 10, salt: str | None = None) -> Any:
    extra = {} if client is None else {"client": client}
    return SimpleNamespace(
        request_id=rid, num_tokens=tokens, cache_salt=salt, sampling_params=SimpleNamespace(extra_args=extra)
    )


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (make_request("a", "alice"), "alice"),
        (make_request("a", "alice", salt="s"), "alice"),
        (make_request("a", salt="s"), "s"),
        (make_request("a"), ""),
        (SimpleNamespace(sampling_params=None, cache_salt=None), ""),
        (make_request("a", "x" * 999), "x" * LONGEST),
    ],
)
def test_whose_a_request_is(request_: Any, expected: str) -> None:
    assert find_client(request_) == expected


def list_ids(queue: deque[Any]) -> str:
    return "".join(request.request_id for request in queue)


def test_clients_take_turns() -> None:
    fair, queue = FairQueue(2.0), deque[Any]()
    for rid, client in (("1", "a"), ("2", "a"), ("3", "a"), ("4", "b"), ("5", "c")):
        queue.append(make_request(rid, client))
        fair.enter(queue[-1])
    fair.arrange(queue, 2)
    assert list_ids(queue) == "14235"
    fair.note_scheduled([("1", 10), ("4", 10)])
    queue.popleft()
    queue.popleft()
    # c was served nothing; a pays for its output.
    fair.note_tokens("1", 3)
    fair.arrange(queue, 4)
    assert list_ids(queue) == "523"
    fair.note_scheduled([("5", 10)])
    assert (fair.num_overtakes, fair.num_clients) == (2, 3)


def test_who_was_preempted_goes_first() -> None:
    fair = FairQueue(2.0)
    begun, fresh = make_request("1", "a"), make_request("2", "b")
    for request in (begun, fresh):
        fair.enter(request)
    fair.note_scheduled([("1", 500)])
    queue = deque([begun, fresh])
    fair.arrange(queue, 1)
    assert list_ids(queue) == "12"
    # It is not charged again.
    fair.note_scheduled([("1", 500)])
    fair.leave("1")
    fair.enter(make_request("3", "a"))
    queue = deque([make_request("3", "a"), fresh])
    fair.arrange(queue, 0)
    assert list_ids(queue) == "23"


def test_who_leaves_is_forgotten() -> None:
    fair = FairQueue(2.0)
    for rid in ("1", "2"):
        fair.enter(make_request(rid, "a"))
    for rid in ("1", "1", "never"):
        fair.leave(rid)
    fair.note_tokens("1", 4)
    fair.note_scheduled([("1", 10), ("2", 10)])
    assert fair.num_overtakes == 0
    fair.leave("2")
    assert fair._clients == {}


def test_output_must_cost_something() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        FairQueue(0.0)
