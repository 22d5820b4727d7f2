# SPDX-License-Identifier: Apache-2.0
"""Prompts that are held back: they delay nobody who can be in time, and are served."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.scheduling.phases.admission import LateQueue


class Prompt(NamedTuple):
    request_id: str
    num_tokens: int = 100


def test_who_is_late_waits_until_nobody_in_time_does() -> None:
    late = LateQueue[Prompt](patience=10.0)
    for number in range(3):
        late.hold(Prompt(str(number)), float(number))
    assert late.release(5.0, 40, 500) == []
    # One at a time: the next one waits for it.
    assert late.release(5.0, 0, 500) == [Prompt("0")]
    assert late.release(10.9, 40, 500) == []
    assert late.release(11.0, 40, 500) == [Prompt("1")]  # waited long enough
    assert late.release(11.0, 40, None) == [Prompt("2")]  # nobody is late any more
    assert len(late) == 0
    assert late.release(11.0, 0, None) == []


def test_who_is_over_is_taken_out() -> None:
    late = LateQueue[Prompt](patience=10.0)
    for number in range(4):
        late.hold(Prompt(str(number)), 0.0)
    assert late.remove({"1", "3", "other"}) == [Prompt("1"), Prompt("3")]
    assert late.remove({"1"}) == []
    assert late.remove(None) == [Prompt("0"), Prompt("2")]
    assert len(late) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200), st.booleans()), max_size=60))
@settings(max_examples=60)
def test_everybody_is_served_in_order_and_within_patience(events: list[tuple[int, int, bool]]) -> None:
    """Whatever waits beside them, nobody is held longer than patience plus the time to the next look."""
    late, now, held, released = LateQueue[Prompt](5.0), 0.0, {}, []
    for number, (gap, queued, is_limited) in enumerate(events):
        now += gap
        prompt = Prompt(str(number))
        held[prompt] = now
        late.hold(prompt, now)
        given_out = late.release(now, queued, 50 if is_limited else None)
        assert is_limited or not len(late)
        released += given_out
        assert all(now - since < 5.0 for one, since in held.items() if one not in released)
    assert released == list(held)[: len(released)]
    assert len(released) + len(late) == len(events)


def test_bad_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="patience -1 must not be negative"):
        LateQueue[Prompt](-1)
