# SPDX-License-Identifier: Apache-2.0
"""A trie of n-grams with frequencies, in flat arrays: insert, match, follow the best branch, prune; and the shared one.

A node is an n-gram of at most `depth` tokens. An n-gram seen once is a leaf that points into its text; only when it is
seen again does it become an inner node with children. So text without repetition costs about one node per token instead
of `depth`, and what was seen once can still be drafted.

Tries lie in segments of one pool, so that one compiled call serves a whole batch (trie_drafter.py). The
functions are compiled by numba, which vLLM brings: the same trie in dicts of Python takes many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit  # type: ignore[import-untyped]

#: What counts keep when a trie is pruned, as a shift: half.
AGING = 1
#: One occurrence. Counts are integers with eight bits of fraction: seldom n-grams fade over eight prunings.
ONE = 256
#: Stamps are moved back before they reach this.
LATEST_STAMP = 2**30

#: Columns of a node. Node numbers count from the start of their segment: 0 is the root, -1 is none.
TOKEN, PARENT = 0, 1
#: The most frequent child, and the most recent among equals.
BEST = 2
#: Where in the text the token of a leaf stands; the text behind it is its only continuation. -1 for an inner node.
POSITION = 3
#: Occurrences, and where the most recent one starts.
COUNT, STAMP = 4, 5
#: Two columns are spare: a node then lies in one cache line.
NUM_COLUMNS = 8

#: Columns of a head: where a trie lies, its nodes, inserted tokens, and the longest of its active n-grams.
START, CAPACITY, USED, INSERTED, NUM_ACTIVE, LAST_TOKEN = range(6)


class Pool(NamedTuple):
    """Nodes of all segments. A segment of n nodes from s has the slots 2s to 2(s + n) of the table."""

    nodes: np.ndarray  # int32 [nodes, NUM_COLUMNS]
    table: np.ndarray  # int32 [2 * nodes]: node numbers by hash of (parent, token), linear probing, -1 where free


def make_pool(count: int) -> Pool:
    """Room for `count` nodes of 40 bytes; pages of memory are taken as segments use them."""
    return Pool(np.empty((count, NUM_COLUMNS), np.int32), np.empty(2 * count, np.int32))


class SegmentAllocator:
    """Ranges of a pool in powers of two; free neighbours join again (a buddy allocator)."""

    def __init__(self, size: int, smallest: int) -> None:
        """size, smallest: powers of two, of the pool and of its smallest segment."""
        self._size = size
        self._free: dict[int, set[int]] = {}
        while smallest <= size:
            self._free[smallest] = set()
            smallest *= 2
        self._free[size].add(0)

    def allocate(self, size: int) -> int | None:
        """Start of a free segment, None where there is none so large."""
        if size > self._size:
            return None
        free = self._free[size]
        if not free:
            whole = self.allocate(2 * size)
            if whole is not None:
                free.add(whole + size)
            return whole
        # The lowest: memory above the highest segment ever used stays untouched.
        start = min(free)
        free.remove(start)
        return start

    def release(self, start: int, size: int) -> None:
        """Give a segment back, or a half of one."""
        while size < self._size and start ^ size in self._free[size]:
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free[size].add(start)

    def count_free(self) -> int:
        """Nodes in free segments."""
        return sum(size * len(starts) for size, starts in self._free.items())


@njit
def _hash(parent: int, token: int, capacity: int) -> int:
    mixed = np.int64(parent) * 40503 + np.int64(token) * 2654435
    return int((mixed ^ (mixed >> 15)) & (2 * capacity - 1))


@njit
def find_child(pool: Pool, start: int, capacity: int, parent: int, token: int) -> int:
    """Number of the child of `parent` by this token, -1 where there is none."""
    slot = _hash(parent, token, capacity)
    while True:
        node = pool.table[2 * start + slot]
        if node < 0 or (pool.nodes[start + node, PARENT] == parent and pool.nodes[start + node, TOKEN] == token):
            return node
        slot = (slot + 1) & (2 * capacity - 1)


@njit
def _link(pool: Pool, start: int, capacity: int, node: int) -> None:
    slot = _hash(pool.nodes[start + node, PARENT], pool.nodes[start + node, TOKEN], capacity)
    while pool.table[2 * start + slot] >= 0:
        slot = (slot + 1) & (2 * capacity - 1)
    pool.table[2 * start + slot] = node


@njit
def clear(pool: Pool, start: int, capacity: int) -> None:
    """Make a segment an empty trie: the root alone."""
    pool.table[2 * start : 2 * (start + capacity)] = -1
    pool.nodes[start] = -1


@njit
def rehash(pool: Pool, start: int, capacity: int, used: int) -> None:
    """Build the hash table of a segment's nodes."""
    pool.table[2 * start : 2 * (start + capacity)] = -1
    for node in range(1, used):
        _link(pool, start, capacity, node)


@njit
def insert(pool: Pool, head: np.ndarray, active: np.ndarray, text: np.ndarray, end: int, clock: int) -> None:
    """Count every n-gram that ends at a token of text[head[INSERTED]:end]. Stops early where the segment is full.

    active: int32 [depth]; active[l] is the inner node of the last l tokens, for l up to head[NUM_ACTIVE]; the others
    were not seen before and continue as leaves. clock: added to positions to make stamps.
    """
    start, capacity, used = head[START], head[CAPACITY], head[USED]
    nodes, depth, num_active = pool.nodes, len(active), head[NUM_ACTIVE]
    i = head[INSERTED]
    while i < end and used + 2 * (num_active + 1) <= capacity:
        token = text[i]
        if token < 0:
            num_active = 0
            i += 1
            continue
        # Longest first: each entry is replaced by one that is made from the entry before it.
        for length in range(num_active, -1, -1):
            parent, stamp = active[length] if length else 0, clock + i - length
            node = find_child(pool, start, capacity, parent, token)
            following = -1
            if node < 0:
                node = used
                used += 1
                _write(pool, start, capacity, node, parent, token, i, ONE, stamp)
            else:
                at = start + node
                if length + 1 < depth:
                    following = node
                    if nodes[at, POSITION] >= 0:
                        # Seen for the second time: what came after the first time becomes a child.
                        position = nodes[at, POSITION] + 1
                        nodes[at, POSITION] = -1
                        if text[position] >= 0:
                            count, earlier = nodes[at, COUNT], nodes[at, STAMP]
                            _write(pool, start, capacity, used, node, text[position], position, count, earlier)
                            nodes[at, BEST] = used
                            used += 1
                nodes[at, COUNT] += ONE
                nodes[at, STAMP] = stamp
            best = nodes[start + parent, BEST]
            if best < 0 or nodes[start + node, COUNT] >= nodes[start + best, COUNT]:
                nodes[start + parent, BEST] = node
            if length + 1 < depth:
                active[length + 1] = following
        longest = min(num_active + 1, depth - 1)
        num_active = 0
        while num_active < longest and active[num_active + 1] >= 0:
            num_active += 1
        i += 1
    head[USED], head[NUM_ACTIVE], head[INSERTED] = used, num_active, i


@njit
def _write(
    pool: Pool, start: int, capacity: int, node: int, parent: int, token: int, position: int, count: int, stamp: int
) -> None:
    row = pool.nodes[start + node]
    row[TOKEN], row[PARENT], row[BEST] = token, parent, -1
    row[POSITION], row[COUNT], row[STAMP] = position, count, stamp
    _link(pool, start, capacity, node)


@njit
def follow(
    pool: Pool,
    start: int,
    node: int,
    position: int,
    text: np.ndarray,
    end: int,
    drafts: np.ndarray,
    most: int,
    vocab_size: int,
) -> int:
    """Write the best branch behind an n-gram into drafts, at most `most` tokens; returns how many.

    position: where in text[:end] the n-gram ends, or -1 where it is the inner node `node`. The n-gram and the branch
    together are at most `depth` tokens: what a shared text holds behind a leaf beyond that may be another text.
    """
    count = 0
    while count < most:
        if position >= 0:
            position += 1
            if position >= end:
                break
            token = text[position]
        else:
            node = pool.nodes[start + node, BEST]
            if node < 0:
                break
            token = pool.nodes[start + node, TOKEN]
            position = pool.nodes[start + node, POSITION]
        # Places of images and the like may hold ids outside of the vocabulary; -1 ends a text.
        if token < 0 or token >= vocab_size:
            break
        drafts[count] = token
        count += 1
    return count


@njit
def match(pool: Pool, capacity: int, text: np.ndarray, end: int, query: np.ndarray) -> tuple[int, int]:
    """(node, position) of an n-gram in the segment at 0, as `follow` takes them; node -1 where it was not seen."""
    node, position = 0, -1
    for token in query:
        if position >= 0:
            position += 1
            if position >= end or text[position] != token:
                return -1, -1
        else:
            node = find_child(pool, 0, capacity, node, token)
            if node < 0:
                return -1, -1
            position = pool.nodes[node, POSITION]
    return node, position


@njit
def _compact(pool: Pool, start: int, capacity: int, used: int, kept: np.ndarray, numbers: np.ndarray) -> int:
    """Move kept nodes whose parents stay to the front; numbers: int32 [used], filled with new numbers, or -1."""
    nodes, count = pool.nodes, 0
    for node in range(used):
        numbers[node] = -1
        # Aged between two tokens of an n-gram, its count can fall below that of the n-gram one longer.
        if kept[node] and (node == 0 or numbers[nodes[start + node, PARENT]] >= 0):
            numbers[node] = count
            count += 1
    for node in range(used):
        if numbers[node] < 0:
            continue
        row = nodes[start + numbers[node]]
        row[:] = nodes[start + node]
        row[BEST] = -1
        if node:
            row[PARENT] = numbers[row[PARENT]]
            parent = nodes[start + row[PARENT]]
            best = parent[BEST]
            if best < 0 or (row[COUNT], row[STAMP]) > (nodes[start + best, COUNT], nodes[start + best, STAMP]):
                parent[BEST] = numbers[node]
    rehash(pool, start, capacity, count)
    return count


def prune(pool: Pool, head: np.ndarray, most: int) -> np.ndarray:
    """Age the counts of a segment and keep its most frequent nodes, at most `most`, the recent ones among equals.

    Returns the new numbers of the nodes, int32 [used], -1 for those that went.
    """
    start, used = int(head[START]), int(head[USED])
    rows = pool.nodes[start : start + used]
    rows[1:, COUNT] >>= AGING
    # In one number: counts before stamps, which are below 2^31.
    rank = rows[:, COUNT].astype(np.int64) << 31 | rows[:, STAMP]
    rank[0] = np.iinfo(np.int64).max
    kept = np.ones(used, np.bool_)
    if used > most:
        # An n-gram and its beginning may be equal in both: none of those at the border stay.
        kept = rank > np.partition(rank, used - most - 1)[used - most - 1]
    numbers = np.empty(used, np.int32)
    head[USED] = _compact(pool, start, int(head[CAPACITY]), used, kept, numbers)
    return numbers


@njit
def _mark_leaf_texts(pool: Pool, used: int, depth: int, marks: np.ndarray) -> None:
    """Add the stretch of text that each leaf may be read for to `marks`, int32 [tokens + 1], as differences."""
    levels = np.zeros(used, np.int32)
    for node in range(1, used):
        # A parent is older than its children and has a lower number.
        levels[node] = levels[pool.nodes[node, PARENT]] + 1
        position = pool.nodes[node, POSITION]
        if position >= 0:
            marks[position] += 1
            marks[min(position + depth - levels[node] + 1, len(marks) - 1)] -= 1


class SharedTrie:
    """The trie over outputs of finished requests, and the text that its leaves point to. Both are bounded.

    Full, it ages its counts and keeps half: n-grams that come again stay, those that came once go by age.
    """

    def __init__(self, depth: int, num_nodes: int, num_tokens: int) -> None:
        """num_nodes: a power of two."""
        self.pool = make_pool(num_nodes)
        self.text = np.full(num_tokens, -1, np.int32)
        self.num_tokens = 0
        self.head = np.array([0, num_nodes, 1, 0, 0, -1], np.int64)
        self.num_prunes = 0
        self._depth = depth
        self._clock = 0
        clear(self.pool, 0, num_nodes)

    def insert(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Count the n-grams of a finished text; of one longer than half of the room, those of its end."""
        rest = np.asarray(tokens, np.int32)[-(len(self.text) // 2 - 1) :]
        active = np.zeros(self._depth, np.int32)
        while len(rest):
            if self.num_tokens + len(rest) + 1 > len(self.text):
                self.prune()
            begin, end = self.num_tokens, self.num_tokens + len(rest)
            self.text[begin:end] = rest
            self.head[INSERTED], self.head[NUM_ACTIVE] = begin, 0
            insert(self.pool, self.head, active, self.text, end, self._clock)
            done = int(self.head[INSERTED])
            self.text[done] = -1
            self.num_tokens = done + 1
            # Where nodes ran out, the rest begins anew: n-grams across the cut are lost.
            rest = rest[done - begin :]
            if len(rest):
                self.prune()

    def prune(self) -> None:
        """Age the counts and keep half of the nodes, or fewer where their leaves need more than half of the text."""
        most = int(self.head[CAPACITY]) // 2
        self.num_prunes += 1
        while True:
            prune(self.pool, self.head, most)
            rows = self.pool.nodes[: int(self.head[USED])]
            marks = np.zeros(self.num_tokens + 1, np.int32)
            _mark_leaf_texts(self.pool, len(rows), self._depth, marks)
            needed = np.cumsum(marks[:-1]) > 0
            moved = np.cumsum(needed, dtype=np.int32) - 1
            leaves = rows[:, POSITION] >= 0
            rows[leaves, POSITION] = moved[rows[leaves, POSITION]]
            length = int(needed.sum())
            self.text[:length] = self.text[: self.num_tokens][needed]
            # Texts move to lower positions; stamps go on as if they had not.
            self._clock += self.num_tokens - length
            self.num_tokens = length
            if self._clock + len(self.text) >= LATEST_STAMP:
                rows[1:, STAMP] = np.maximum(rows[1:, STAMP] - self._clock, 0)
                self._clock = 0
            if length <= len(self.text) // 2:
                return
            most = len(rows) // 2
