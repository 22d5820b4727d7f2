# SPDX-License-Identifier: Apache-2.0
"""vLLM's forward context by thread, and nothing half done where it cannot be had."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import pytest
import vllm
import vllm.forward_context

from vllm_ext.patches.lane_threads import separate_threads


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh copy of vLLM's module, which the record finds in its place: engines of this process keep theirs."""
    spec = importlib.util.find_spec("vllm.forward_context")
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(vllm, "forward_context", copy)
    return copy


def test_threads_have_contexts_of_their_own(module: Any) -> None:
    separate_threads()
    separate_threads()
    mine: Any = object()
    inside, outside = threading.Event(), threading.Event()
    seen: list[Any] = []

    def run() -> None:
        seen.append(module.is_forward_context_available())
        theirs: Any = object()
        with module.override_forward_context(theirs):
            seen.append(module.get_forward_context() is theirs)
            inside.set()
            assert outside.wait(10)
            seen.append(module.get_forward_context() is theirs)
        seen.append(module.is_forward_context_available())

    thread = threading.Thread(target=run)
    with module.override_forward_context(mine):
        thread.start()
        assert inside.wait(10)
        assert module.get_forward_context() is mine
    assert not module.is_forward_context_available()
    outside.set()
    thread.join()
    assert seen == [False, True, True, False]


def test_contexts_nest_and_end_with_errors(module: Any) -> None:
    separate_threads()
    outer: Any = object()

    def fail() -> None:
        with module.override_forward_context(None):
            assert not module.is_forward_context_available()
            raise ZeroDivisionError

    with module.override_forward_context(outer):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert module.get_forward_context() is outer
    with pytest.raises(AssertionError, match="Forward context is not set"):
        module.get_forward_context()


def test_nothing_is_half_done(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker takes the attribute for all three functions."""
    before = module.get_forward_context.__code__
    monkeypatch.setattr(module, "override_forward_context", lambda context: None)
    with pytest.raises(AttributeError, match="__wrapped__"):
        separate_threads()
    assert not hasattr(module, "_vllm_ext_context")
    assert module.get_forward_context.__code__ is before
