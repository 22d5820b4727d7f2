# SPDX-License-Identifier: Apache-2.0
"""Drafts of a source and of a drafter in one list, and what counts as a trial of the drafter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.draft_source import Draft, DraftToken, count_trials, merge_drafts


def sure(*tokens: int) -> list[DraftToken]:
    return [DraftToken(token, True) for token in tokens]


def guess(*tokens: int) -> list[DraftToken]:
    return [DraftToken(token, False) for token in tokens]


@pytest.mark.parametrize(
    ("forced", "drafted", "most", "merged"),
    [
        ([], [4, 5], 8, Draft([4, 5], 0)),
        (sure(1, 2), [], 8, Draft([1, 2], 2)),
        # The drafter agrees and goes on behind.
        (sure(1, 2), [1, 2, 3, 4], 8, Draft([1, 2, 3, 4], 2)),
        # It drafted for another text: nothing of it is left.
        (sure(1, 2), [1, 9, 3, 4], 8, Draft([1, 2], 2)),
        (sure(1, 2, 3), [1, 2], 8, Draft([1, 2, 3], 3)),
        # Guesses of the source stand before those of the drafter; what is certain behind a guess is one too.
        (sure(1) + guess(2) + sure(3), [1, 7, 8], 8, Draft([1, 2, 3], 1)),
        (guess(2) + sure(3), [2, 3, 4], 8, Draft([2, 3, 4], 0)),
        (sure(1, 2, 3), [1, 2, 3, 4], 2, Draft([1, 2], 2)),
        (sure(1), [1, 2, 3], 2, Draft([1, 2], 1)),
        (sure(1), [1], 0, Draft([], 0)),
    ],
)
def test_merge(forced: list[DraftToken], drafted: list[int], most: int, merged: Draft) -> None:
    assert merge_drafts(forced, drafted, most) == merged


def test_merge_refuses() -> None:
    with pytest.raises(ValueError, match="got -1"):
        merge_drafts([], [1], -1)
    with pytest.raises(ValueError, match="not known yet"):
        merge_drafts(sure(1), [-1, -1], 4)


@given(
    st.lists(st.builds(DraftToken, st.integers(0, 2), st.booleans()), max_size=6),
    st.lists(st.integers(0, 2), max_size=6),
    st.lists(st.integers(0, 2), min_size=8, max_size=8),
    st.integers(0, 8),
)
def test_what_is_certain_is_accepted_and_the_rest_is_as_good_as_each(
    proposed: list[DraftToken], drafted: list[int], truth: list[int], most: int
) -> None:
    """Against the tokens that really follow, at the places where the source is certain taken from it."""
    for place, draft in enumerate(proposed):
        if not draft.certain:
            break
        truth[place] = draft.token

    def count_right(tokens: list[int]) -> int:
        return next((place for place, token in enumerate(tokens) if token != truth[place]), len(tokens))

    tokens, num_certain = merge_drafts(proposed, drafted, most)
    assert len(tokens) <= most
    right = count_right(tokens)
    assert num_certain <= right
    assert right >= min(most, count_right([draft.token for draft in proposed]))
    if all(draft.certain for draft in proposed):
        assert right >= min(most, count_right(drafted))
    trials, accepted = count_trials(len(tokens), right, num_certain)
    assert (trials, accepted) == (len(tokens) - num_certain, right - num_certain)


@pytest.mark.parametrize(
    ("drafted", "accepted", "num_certain", "trials"),
    [
        (5, 3, 0, (5, 3)),
        (5, 3, 2, (3, 1)),
        (5, 5, 5, (0, 0)),
        # The scheduler cut some of them for want of room.
        (2, 2, 4, (0, 0)),
        # A source was wrong: what came behind was never looked at.
        (5, 1, 2, (0, 0)),
    ],
)
def test_trials(drafted: int, accepted: int, num_certain: int, trials: tuple[int, int]) -> None:
    assert count_trials(drafted, accepted, num_certain) == trials
