# SPDX-License-Identifier: Apache-2.0
"""Costly grammars in a process that can be killed: outcomes, limits, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import psutil
import pytest
import xgrammar as xgr

from vllm_ext.structured.compile_worker import Supervisor, read_message, write_message
from vllm_ext.structured.routing import Plan
from vllm_ext.structured.trials import MOST_WAITING, TrialPool

#: Starts of the supervisor, which imports torch; test_validation.py has one of them in every run.
pytestmark = pytest.mark.slow

#: Explodes in xgrammar's compiler: minutes, if it is let.
ENDLESS = Plan("json", "xgrammar", json.dumps({"enum": [f"word number {i}" for i in range(20_000)]}), 10**6)


def make_setup() -> dict[str, Any]:
    vocabulary = [bytes([number]) for number in range(256)] + [f"word{i}" for i in range(3000)] + ["</s>"]
    info = xgr.TokenizerInfo(vocabulary, vocab_type=xgr.VocabType.RAW, stop_token_ids=[len(vocabulary) - 1])
    return {"xgrammar": info.serialize_json(), "guidance": None, "whitespace": "any"}


@pytest.fixture(scope="module")
def pool() -> Iterator[TrialPool]:
    pool = TrialPool(make_setup, limit_ms=1500, limit_mib=512)
    yield pool
    pool.close()
    assert list_children() == set()


def list_children() -> set[int]:
    """The supervisor of this process, and its forks."""
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if "vllm_ext.structured.compile_worker" in child.cmdline()}


def test_outcomes(pool: TrialPool) -> None:
    ok = pool.submit(Plan("regex", "xgrammar", "[a-z]+", 1)).result(60)
    assert ok["outcome"] == "ok"
    refused = pool.submit(Plan("json", "xgrammar", '{"type": "colour"}', 1)).result(60)
    assert refused["outcome"] == "refused"
    assert "colour" in refused["message"]


def test_what_takes_too_long_is_killed_and_the_next_is_served(pool: TrialPool) -> None:
    began = time.monotonic()
    slow = pool.submit(ENDLESS).result(60)
    assert slow["outcome"] in ("slow", "memory")
    assert time.monotonic() - began < 15
    assert pool.submit(Plan("regex", "xgrammar", "[a-z]+", 1)).result(60)["outcome"] == "ok"
    assert len(list_children()) == 1, "only the supervisor is left"


def test_memory_is_limited(pool: TrialPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_limit_ms", 60_000)
    monkeypatch.setattr(pool, "_limit_mib", 8)
    assert pool.submit(ENDLESS).result(60)["outcome"] == "memory"


def test_cancelling_ends_the_trial_and_a_flood_is_answered(pool: TrialPool) -> None:
    first = pool.submit(ENDLESS)
    others = [pool.submit(ENDLESS) for _ in range(MOST_WAITING + 4)]
    assert [one.result(1)["outcome"] for one in others[MOST_WAITING - 1 :]] == ["busy"] * 5
    for one in [first, *others]:
        one.cancel()
    with pytest.raises(CancelledError):
        first.result(0)
    began = time.monotonic()
    assert pool.submit(Plan("regex", "xgrammar", "[a-z]+", 1)).result(60)["outcome"] == "ok"
    assert time.monotonic() - began < 10


def test_a_lost_supervisor_is_replaced(pool: TrialPool) -> None:
    (supervisor,) = list_children()
    waiting = pool.submit(ENDLESS)
    os.kill(supervisor, signal.SIGKILL)
    # Lost with the process, or given to the next one.
    assert waiting.result(30)["outcome"] in ("busy", "slow", "memory")
    assert pool.submit(Plan("regex", "xgrammar", "[a-z]+", 1)).result(60)["outcome"] == "ok"


def test_neither_trying_nor_withdrawing_waits_for_the_process() -> None:
    """Its start takes seconds, and its pipe holds 64 KB; a withdrawal comes from the event loop."""
    release = threading.Event()

    def wait_and_fail() -> dict[str, Any]:
        release.wait(30)
        raise OSError("no process")

    pool = TrialPool(wait_and_fail, limit_ms=1500, limit_mib=512)
    began = time.monotonic()
    pool.start()
    first, second = (pool.submit(Plan("regex", "xgrammar", "x" * 100_000, 1)) for _ in range(2))
    assert first.cancel()
    assert time.monotonic() - began < 5
    release.set()
    assert second.result(30)["outcome"] == "busy"
    writer = pool._writer
    pool.close()
    assert writer is not None
    assert not writer.is_alive()


def test_exceptions_are_told_by_name() -> None:
    """In a fork without the rest of the supervisor: neither memory nor a refusal."""

    def fail(plan: Plan) -> None:
        raise TypeError(f"not for {plan.kind}")

    inbox, to_supervisor = os.pipe()
    from_supervisor, outbox = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(to_supervisor)
            Supervisor(fail, inbox, outbox, 1).run()
        finally:
            os._exit(0)
    os.close(inbox)
    plan = {"kind": "regex", "engine": "xgrammar", "text": "a", "states": 1, "reason": ""}
    write_message(to_supervisor, {"id": 7, "plan": plan, "limit_ms": 20_000, "limit_mib": 512, "wait_ms": 20_000})
    answer = read_message(from_supervisor)
    os.close(to_supervisor)
    os.waitpid(pid, 0)
    for descriptor in (from_supervisor, outbox):
        os.close(descriptor)
    assert answer is not None
    assert (answer["id"], answer["outcome"], answer["message"]) == (7, "defect", "TypeError: not for regex")
