# SPDX-License-Identifier: Apache-2.0
"""Threads beside the engine have a priority of their own."""

from __future__ import annotations

import os
import threading

import pytest

from vllm_ext.structured.threads import LAST, NICENESS, start_thread


def test_threads_give_way_by_themselves() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def read() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    for niceness in (NICENESS, LAST):
        with start_thread("test", niceness) as thread:
            assert thread.submit(read).result(30) == max(niceness, own)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_thread_works_where_priorities_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "setpriority", refuse)
    with start_thread("test") as thread:
        assert thread.submit(lambda: 7).result(30) == 7


def test_a_thread_gives_way_no_less_than_who_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda kind, thread: 10)
    monkeypatch.setattr(os, "setpriority", lambda kind, thread, niceness: asked.append(niceness))
    with start_thread("test", NICENESS) as thread:
        thread.submit(int).result(30)
    assert asked == [10]
