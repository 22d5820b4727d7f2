# SPDX-License-Identifier: Apache-2.0
"""Drafts for a batch of requests from tries: one per running request, and one over the outputs of finished ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit  # type: ignore[import-untyped]

from vllm_ext.speculation import trie
from vllm_ext.speculation.trie import BEST, CAPACITY, INSERTED, LAST_TOKEN, NUM_ACTIVE, START, USED, Pool

#: Nodes of the smallest segment.
SMALLEST_SEGMENT = 512
#: Tokens of the longest n-gram. A segment that was pruned to half has room for the nodes of one more token.
LONGEST_NGRAM = SMALLEST_SEGMENT // 8
#: Tokens that one step may put into tries: others wait while a long prompt is inserted.
INSERT_AT_MOST = 16384


@dataclass
class TrieCounts:
    """What a TrieDrafter has done so far.

    inserted: tokens put into tries, of finished requests again into the shared one. searched, matched: rows of a batch
    that wanted drafts, and those that got some. drafted: tokens. prunes: tries that were cut to make room.
    """

    inserted: int = 0
    searched: int = 0
    matched: int = 0
    drafted: int = 0
    prunes: int = 0


class TrieDrafter:
    """Drafts for a batch of requests: the longest match of each one's last tokens, and its most frequent continuation.

    Both tries are asked: that of the request, over its prompt and output, and the shared one, over outputs of finished
    requests. The longer match wins, and the request's own among equal ones; then the more frequent token, and the more
    recent among equals.

    Source: Lookahead (arXiv:2312.12728), which inserts, counts and eliminates n-grams, and drops those of a prompt with
    its request. One branch here, since vLLM verifies one; draft lengths come from smartspec; the longest suffix is
    matched; a request has a trie of its own. As with any drafter over other requests' text, drafts never change tokens,
    but how fast they come can tell that someone had the same text.
    """

    def __init__(
        self,
        k_max: int,
        *,
        min_match: int = 2,
        max_match: int = 8,
        vocab_size: int = 2**31 - 1,
        request_nodes: int = 2**17,
        total_nodes: int = 2**22,
        shared_nodes: int = 2**18,
        shared_tokens: int = 2**19,
    ) -> None:
        """k_max: longest draft. min_match, max_match: tokens that must, and at most will, match.

        request_nodes: most of one running request; total_nodes: of all of them; shared_nodes, shared_tokens: of the
        trie over finished ones. A node takes 40 bytes, a token 4. Raises ValueError for values that cannot work.
        """
        if not 1 <= min_match <= max_match or k_max < 1:
            raise ValueError(f"need 1 <= min_match <= max_match and k_max >= 1, got {min_match}, {max_match}, {k_max}")
        sizes = {"request_nodes": request_nodes, "total_nodes": total_nodes, "shared_nodes": shared_nodes}
        for name, size in sizes.items():
            if size < SMALLEST_SEGMENT or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from {SMALLEST_SEGMENT} on, got {size}")
        self.depth = k_max + max_match
        if self.depth > LONGEST_NGRAM or 8 * self.depth > shared_tokens or request_nodes > total_nodes:
            raise ValueError(
                f"max_match + k_max is {self.depth} and must be {LONGEST_NGRAM} at most, shared_tokens "
                f"({shared_tokens}) 8 times that, and total_nodes ({total_nodes}) at least request_nodes "
                f"({request_nodes})"
            )
        self.k_max = k_max
        self._min_match, self._max_match, self._vocab_size = min_match, max_match, vocab_size
        self._request_nodes = request_nodes
        self.shared = trie.SharedTrie(self.depth, shared_nodes, shared_tokens)
        self._counts = TrieCounts()
        self._pool = trie.make_pool(total_nodes)
        self._segments = trie.SegmentAllocator(total_nodes, SMALLEST_SEGMENT)
        self._slots: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._heads = np.zeros((0, 6), np.int64)
        self._active = np.zeros((0, self.depth), np.int32)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request_id: Hashable) -> bool:
        return request_id in self._slots

    def compile(self) -> None:
        """Compile what numba compiles, on throw-away tries: about three seconds that no request has to wait for."""
        scratch = TrieDrafter(1, max_match=2, request_nodes=512, total_nodes=512, shared_nodes=512, shared_tokens=512)
        text = np.arange(1024, dtype=np.int32)[None]
        scratch.propose([0], text, np.array([1024]), np.array([1]))
        scratch.finish(0, text[0])
        scratch.shared.prune()

    def propose(
        self, request_ids: Sequence[Hashable], texts: np.ndarray, lengths: np.ndarray, wanted: np.ndarray
    ) -> list[list[int]]:
        """Drafts of each request, at most `wanted` of them.

        texts: int32 [rows, tokens]; row i begins with prompt and output of request i. lengths: int64 [n], their tokens.
        wanted: int64 [n]. A request that wants none costs nothing; its new tokens are inserted when it wants some
        again. A text that is not the one inserted before is inserted anew. None are drafted while a long text is not
        yet in.
        """
        count = len(request_ids)
        wanted = np.minimum(wanted, self.k_max)
        if not wanted.any():
            return [[] for _ in range(count)]
        slots = self._find_slots(request_ids, lengths, wanted)
        row, allowance = 0, INSERT_AT_MOST
        while row < count:
            row, allowance = _advance(
                self._pool, self._heads, self._active, texts, slots, lengths, wanted, row, allowance
            )
            if row < count:
                self._make_room(int(slots[row]))
        self._counts.inserted += INSERT_AT_MOST - allowance
        drafts, counts = np.empty((count, self.k_max), np.int32), np.empty(count, np.int64)
        shared = self.shared
        _draft(
            self._pool, self._heads, self._active, texts, slots, lengths, wanted,
            shared.pool, int(shared.head[CAPACITY]), shared.text, shared.num_tokens,
            self._min_match, self._max_match, self._vocab_size, drafts, counts,
        )  # fmt: skip
        self._counts.searched += int(np.count_nonzero(wanted))
        self._counts.matched += int(np.count_nonzero(counts))
        self._counts.drafted += int(counts.sum())
        return [draft[:length] for draft, length in zip(drafts.tolist(), counts.tolist(), strict=True)]

    def finish(self, request_id: Hashable, output: Sequence[int] | np.ndarray) -> None:
        """Drop a request's trie and put its output into the shared one. One that never drafted is no error."""
        self.remove(request_id)
        self.shared.insert(output)
        self._counts.inserted += len(output)

    def remove(self, request_id: Hashable) -> None:
        """Drop a request's trie; one that was never seen is no error."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._segments.release(int(self._heads[slot, START]), int(self._heads[slot, CAPACITY]))
            self._free.append(slot)

    @property
    def counts(self) -> TrieCounts:
        """What was done so far."""
        return replace(self._counts, prunes=self._counts.prunes + self.shared.num_prunes)

    def count_nodes(self) -> int:
        """Nodes in use by running requests and by the shared trie."""
        return int(self._heads[list(self._slots.values()), USED].sum()) + int(self.shared.head[USED])

    def count_tokens(self) -> int:
        """Tokens that are held: those inserted for running requests, and the text of the shared trie."""
        return int(self._heads[list(self._slots.values()), INSERTED].sum()) + self.shared.num_tokens

    def _find_slots(self, request_ids: Sequence[Hashable], lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Slots, int64 [n]; requests that want drafts for the first time get a trie, or lose their drafts."""
        known = self._slots
        slots = np.array([known.get(rid, -1) for rid in request_ids], np.int64)
        for row in np.flatnonzero((slots < 0) & (wanted > 0)).tolist():
            start, size = self._take_segment(int(lengths[row]), request_ids)
            if start is None:
                wanted[row] = 0
                continue
            slots[row] = known[request_ids[row]] = self._take_slot()
            self._heads[slots[row]] = (start, size, 1, 0, 0, -1)
            trie.clear(self._pool, start, size)
        return slots

    def _take_slot(self) -> int:
        if not self._free:
            known = len(self._heads)
            self._free = list(range(known + max(16, known) - 1, known - 1, -1))
            self._heads = np.concatenate([self._heads, np.zeros((len(self._free), 6), np.int64)])
            self._active = np.concatenate([self._active, np.zeros((len(self._free), self.depth), np.int32)])
        return self._free.pop()

    def _take_segment(self, length: int, batch: Sequence[Hashable]) -> tuple[int | None, int]:
        """(start, size) of a segment for so many tokens, smaller where the pool is full; start None where none is."""
        full = SMALLEST_SEGMENT
        while full < 2 * length and full < self._request_nodes:
            full *= 2
        size = full
        while (start := self._segments.allocate(size)) is None:
            if size > SMALLEST_SEGMENT:
                size //= 2
            elif self._free_segments(batch):
                size = full
            else:
                return None, 0
        return start, size

    def _free_segments(self, batch: Sequence[Hashable]) -> bool:
        """Drop tries of requests that wait, preempted; where none does, halve the largest. False if all are small."""
        present = set(batch)
        absent = [rid for rid in self._slots if rid not in present]
        for rid in absent:
            # Their texts are inserted again when they return.
            self.remove(rid)
        if absent:
            return True
        slots = list(self._slots.values())
        if not slots or int(self._heads[slots, CAPACITY].max()) == SMALLEST_SEGMENT:
            return False
        slot = slots[int(self._heads[slots, CAPACITY].argmax())]
        head = self._heads[slot]
        head[CAPACITY] //= 2
        start, capacity = int(head[START]), int(head[CAPACITY])
        self._prune(slot, capacity // 2)
        self._segments.release(start + capacity, capacity)
        return True

    def _make_room(self, slot: int) -> None:
        """Move a full trie to a larger segment; prune it where it may not grow or the pool has none."""
        head = self._heads[slot]
        start, capacity, used = int(head[START]), int(head[CAPACITY]), int(head[USED])
        larger = self._segments.allocate(2 * capacity) if capacity < self._request_nodes else None
        if larger is None:
            self._prune(slot, capacity // 2)
            return
        self._pool.nodes[larger : larger + used] = self._pool.nodes[start : start + used]
        head[START], head[CAPACITY] = larger, 2 * capacity
        trie.rehash(self._pool, larger, 2 * capacity, used)
        self._segments.release(start, capacity)

    def _prune(self, slot: int, most: int) -> None:
        self._counts.prunes += 1
        head, active = self._heads[slot], self._active[slot]
        numbers = trie.prune(self._pool, head, most)
        # The n-grams that end here may be among those that went, the longest ones first.
        moved = numbers[active[1 : int(head[NUM_ACTIVE]) + 1]]
        longest = int(np.argmax(moved < 0)) if (moved < 0).any() else len(moved)
        active[1 : longest + 1] = moved[:longest]
        head[NUM_ACTIVE] = longest


@njit
def _advance(
    pool: Pool,
    heads: np.ndarray,
    active: np.ndarray,
    texts: np.ndarray,
    slots: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
    first: int,
    allowance: int,
) -> tuple[int, int]:
    """Insert the new tokens of rows from `first` on. Returns (row that needs room, tokens still allowed)."""
    for row in range(first, len(slots)):
        if wanted[row] == 0:
            continue
        head, text = heads[slots[row]], texts[row]
        if head[INSERTED] > lengths[row] or (head[INSERTED] and text[head[INSERTED] - 1] != head[LAST_TOKEN]):
            # A session went on with another prompt, or tokens were taken back.
            trie.clear(pool, head[START], head[CAPACITY])
            head[USED], head[INSERTED], head[NUM_ACTIVE] = 1, 0, 0
        before = head[INSERTED]
        end = min(lengths[row], before + allowance)
        if end == before:
            continue
        trie.insert(pool, head, active[slots[row]], text, end, 0)
        if head[INSERTED] > before:
            allowance -= head[INSERTED] - before
            head[LAST_TOKEN] = text[head[INSERTED] - 1]
        if head[INSERTED] < end:
            return row, allowance
    return len(slots), allowance


@njit
def _draft(
    pool: Pool,
    heads: np.ndarray,
    active: np.ndarray,
    texts: np.ndarray,
    slots: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
    shared: Pool,
    shared_capacity: int,
    shared_text: np.ndarray,
    shared_end: int,
    min_match: int,
    max_match: int,
    vocab_size: int,
    drafts: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Drafts of every row whose text is inserted: drafts int32 [n, k_max], counts int64 [n]."""
    for row in range(len(slots)):
        counts[row] = 0
        length, most = lengths[row], wanted[row]
        if most == 0:
            continue
        head = heads[slots[row]]
        if head[INSERTED] != length:
            continue
        start, longest = head[START], min(head[NUM_ACTIVE], max_match)
        while longest >= min_match and pool.nodes[start + active[slots[row], longest], BEST] < 0:
            longest -= 1
        if longest >= min_match:
            node = active[slots[row], longest]
            counts[row] = trie.follow(pool, start, node, -1, texts[row], length, drafts[row], most, vocab_size)
        for level in range(max(longest + 1, min_match), min(max_match, length) + 1):
            query = texts[row, length - level : length]
            node, position = trie.match(shared, shared_capacity, shared_text, shared_end, query)
            if node < 0:
                # A longer match would have this one in it.
                break
            found = trie.follow(shared, 0, node, position, shared_text, shared_end, drafts[row], most, vocab_size)
            if found:
                counts[row] = found
