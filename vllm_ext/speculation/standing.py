# SPDX-License-Identifier: Apache-2.0
"""A plan of draft lengths that several steps share: what of it is another step's too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

#: A plan stands while the number of running requests is within this part of what it was made for.
BATCH_CHANGE = 0.25


class Standing(NamedTuple):
    """A plan that the steps after the one it was made in may have too (`pace.Pace`)."""

    steps: int
    #: Requests that it was made for, and what those get that came later: as much as these on average.
    num_requests: int
    usual: int
    request_ids: Sequence[Hashable]
    lengths: Mapping[Hashable, int]
    longest: int
    total: int
    #: Whether its steps verify only those drafts that are still worth it.
    trims: bool

    @classmethod
    def begin(cls, steps: int, lengths: Mapping[Hashable, int], trims: bool = True) -> Standing:
        """A plan of these draft lengths by request, of whom there are some, for so many steps."""
        count, total = len(lengths), sum(lengths.values())
        return cls(steps, count, round(total / count), list(lengths), lengths, max(lengths.values()), total, trims)

    def lasts(self, stood: int) -> bool:
        """Whether it is another step's too, after so many that had it."""
        return stood < self.steps

    def covers(self, num_requests: int) -> bool:
        """Whether a batch is about as large as the one that this was made for."""
        return abs(num_requests / self.num_requests - 1) <= BATCH_CHANGE

    def keeps_all(self, num_drafts: int) -> bool:
        """Whether a step with so many drafts verifies them untrimmed: no more than were asked for."""
        return not self.trims and num_drafts <= self.total

    def follow(self, ids: Sequence[Hashable]) -> Standing:
        """The same for the requests of another step."""
        if ids == self.request_ids:
            return self
        known, usual = self.lengths, self.usual
        lengths = {rid: known.get(rid, usual) for rid in ids}
        return self._replace(
            request_ids=ids, lengths=lengths, longest=max(lengths.values()), total=sum(lengths.values())
        )
