# SPDX-License-Identifier: Apache-2.0
"""Drafts from beside vLLM's drafter, some of them certain: what a grammar forces is a draft that cannot be rejected."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol


class DraftToken(NamedTuple):
    """One drafted token; `certain` where the target model cannot put out another at its place."""

    token: int
    certain: bool


class Draft(NamedTuple):
    """Drafts of a request for its next step. The first `num_certain` tokens are certain."""

    tokens: list[int]
    num_certain: int


class DraftSource(Protocol):
    """Drafts that the scheduler's process knows of, such as tokens that a grammar forces."""

    def propose(self, request_id: Hashable, most: int) -> Sequence[DraftToken]:
        """At most `most` tokens that follow the last output of a request; empty where nothing is known of it.

        Only the certain tokens at the front count as certain: one behind a guess is as likely as the guess.
        """
        ...


def merge_drafts(given: Sequence[DraftToken], drafted: Sequence[int], most: int) -> Draft:
    """Put a drafter's tokens behind those of a source, as far as they fit together.

    given: what a source proposed. drafted: what the drafter proposed for the same place, without knowing of it. The
    source's tokens come first: the certain ones are right, and its guesses know what may follow. The drafter's go on
    behind them where it drafted the same tokens up to there; drafts behind another token are worth nothing and go. A
    token that is certain only behind a guess counts as a guess.

    Raises ValueError for a negative `most` and for the drafts of -1 that asynchronous scheduling holds in the place of
    tokens it does not know.
    """
    if most < 0:
        raise ValueError(f"the number of drafts must not be negative, got {most}")
    if any(token < 0 for token in drafted):
        raise ValueError("drafts of -1 stand for tokens that are not known yet; merge where the tokens are")
    num_certain = next((place for place, draft in enumerate(given) if not draft.certain), len(given))
    tokens = [draft.token for draft in given]
    shared = min(len(tokens), len(drafted))
    if list(drafted[:shared]) == tokens[:shared]:
        tokens += drafted[len(tokens) :]
    return Draft(tokens[:most], min(num_certain, most))


def count_trials(drafted: int, accepted: int, num_certain: int) -> tuple[int, int]:
    """(drafts, accepted ones) of a verified step that say something about the drafter.

    drafted, accepted: of the whole step; num_certain: drafts at the front that were certain. These are left out: they
    are accepted whatever the drafter is like. Where one of them was rejected after all, nothing behind it was tried.
    """
    num_certain = min(num_certain, drafted)
    if accepted < num_certain:
        return 0, 0
    return drafted - num_certain, accepted - num_certain
