# SPDX-License-Identifier: Apache-2.0
"""The trie against a search through all texts, what pruning keeps, and that nothing grows for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.speculation import trie
from vllm_ext.speculation.trie import BEST, CAPACITY, COUNT, PARENT, POSITION, STAMP, TOKEN, USED, SharedTrie
from vllm_ext.speculation.trie_drafter import TrieDrafter

MIN_MATCH, MAX_MATCH, K = 1, 4, 5
DEPTH = MAX_MATCH + K


def find_continuations(texts: list[list[int]], ngram: list[int]) -> list[int]:
    """Tokens that followed an n-gram, in the order in which its occurrences begin."""
    found = []
    for text in texts:
        for begin in range(len(text) - len(ngram)):
            if text[begin : begin + len(ngram)] == ngram:
                found.append(text[begin + len(ngram)])
    return found


def search(texts: list[list[int]], context: list[int], most: int) -> tuple[int, list[int]]:
    """(length of the longest match with a continuation, its most frequent branch), by looking everywhere."""
    for length in range(min(MAX_MATCH, len(context)), MIN_MATCH - 1, -1):
        branch: list[int] = []
        while len(branch) < most:
            followers = find_continuations(texts, context[len(context) - length :] + branch)
            if not followers:
                break
            last = {token: place for place, token in enumerate(followers)}
            branch.append(max(last, key=lambda token: (followers.count(token), last[token])))
        if branch:
            return length, branch
    return 0, []


def draft_slowly(text: list[int], finished: list[list[int]], most: int) -> list[int]:
    own_length, own = search([text], text, most)
    shared_length, shared = search(finished, text, most)
    return shared if shared_length > own_length else own


def make_drafter(**sizes: int) -> TrieDrafter:
    given_sizes = {"request_nodes": 2**12, "total_nodes": 2**15, "shared_nodes": 2**12, "shared_tokens": 2**12, **sizes}
    return TrieDrafter(K, min_match=MIN_MATCH, max_match=MAX_MATCH, **given_sizes)


texts_of_few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@given(
    st.lists(texts_of_few_tokens, min_size=1, max_size=3),
    st.lists(texts_of_few_tokens, max_size=4),
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, K)), min_size=3, max_size=20),
    st.booleans(),
)
def test_drafts_are_those_of_a_search(
    texts: list[list[int]], finished: list[list[int]], steps: list[tuple[int, int]], late: bool
) -> None:
    """Requests grow by pieces, want all numbers of drafts, and share what others left, before or in the middle."""
    drafter = make_drafter()
    if not late:
        for one in finished:
            drafter.finish("gone", one)
    matrix = np.zeros((len(texts), 40), np.int32)
    lengths = np.zeros(len(texts), np.int64)
    for step, (tokens, wanted) in enumerate(steps):
        if late and step == len(steps) // 2:
            for one in finished:
                drafter.finish("gone", one)
        for row, text in enumerate(texts):
            lengths[row] = min(lengths[row] + tokens + row, len(text))
            matrix[row, : lengths[row]] = text[: lengths[row]]
        # One row wants less than the others, or nothing.
        wants = np.array([max(wanted - row, 0) for row in range(len(texts))], np.int64)
        drafts = drafter.propose(range(len(texts)), matrix, lengths, wants)
        known = finished if not late or step >= len(steps) // 2 else []
        expected = [
            draft_slowly(text[:length], known, int(most)) if most else []
            for text, length, most in zip(texts, lengths, wants, strict=True)
        ]
        assert drafts == expected


def read_paths(pool: trie.Pool, used: int) -> list[list[int]]:
    """The n-gram of every node of a segment at 0."""
    paths: list[list[int]] = [[]]
    for row in pool.nodes[1:used].tolist():
        paths.append([*paths[row[PARENT]], row[TOKEN]])
    return paths


def check_shape(shared: SharedTrie, finished: list[list[int]]) -> None:
    """The invariants that the kernels rely on, and that every n-gram in the trie is one that was seen."""
    used, capacity = int(shared.head[USED]), int(shared.head[CAPACITY])
    rows = shared.pool.nodes[:used].tolist()
    paths = read_paths(shared.pool, used)
    assert len({tuple(path) for path in paths}) == used
    seen = {tuple(text[i : i + n]) for text in finished for n in range(DEPTH + 1) for i in range(len(text) - n + 1)}
    best: dict[int, tuple[int, int]] = {}
    for node, row in list(enumerate(rows))[1:]:
        parent = row[PARENT]
        assert 0 <= parent < node
        assert parent == 0 or rows[parent][POSITION] < 0
        assert trie.find_child(shared.pool, 0, capacity, parent, row[TOKEN]) == node
        best[parent] = max(best.get(parent, (-1, -1)), (row[COUNT], row[STAMP]))
        ngram = list(paths[node])
        if row[POSITION] >= 0:
            assert row[POSITION] < shared.num_tokens
            assert shared.text[row[POSITION]] == row[TOKEN]
            for token in shared.text[row[POSITION] + 1 : row[POSITION] + 1 + DEPTH - len(ngram)].tolist():
                if token < 0:
                    break
                ngram.append(token)
        assert tuple(ngram) in seen
    for node, row in enumerate(rows):
        if row[POSITION] < 0:
            assert (row[BEST] < 0) == (node not in best)
            # Stamps of long ago are all 0.
            assert row[BEST] < 0 or (rows[row[BEST]][COUNT], rows[row[BEST]][STAMP]) == best[node]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=150), min_size=1, max_size=15))
def test_the_shared_trie_stays_small_and_right(finished: list[list[int]]) -> None:
    shared = SharedTrie(DEPTH, 512, 256)
    for text in finished:
        shared.insert(text)
        assert shared.head[USED] <= 512
        assert shared.num_tokens <= 256
    check_shape(shared, finished)


def test_pruning_keeps_what_is_frequent_and_then_what_is_recent() -> None:
    shared = SharedTrie(DEPTH, 1024, 4096)
    generator = np.random.default_rng(0)
    frequent = generator.integers(0, 1000, 20)
    for _ in range(40):
        shared.insert(frequent)
        shared.insert(generator.integers(1000, 10**6, 60))
    last = generator.integers(1000, 10**6, 60)
    shared.insert(last)
    drafter = make_drafter()
    drafter.shared = shared
    for text, number in ((frequent, 10), (last, 30)):
        context = text[None, :number].astype(np.int32)
        drafts = drafter.propose(["new"], context, np.array([number]), np.array([K]))
        assert drafts == [text[number : number + K].tolist()]
        drafter.remove("new")
    assert shared.head[USED] <= 1024


def test_stamps_start_again_before_they_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie, "LATEST_STAMP", 3000)
    shared = SharedTrie(DEPTH, 512, 512)
    generator = np.random.default_rng(1)
    finished = [generator.integers(0, 5, 50).tolist() for _ in range(300)]
    for text in finished:
        shared.insert(text)
        assert shared._clock + shared.num_tokens <= 3000 + 512
        assert int(shared.pool.nodes[: int(shared.head[USED]), STAMP].max()) <= 3000 + 512
    check_shape(shared, finished)


def test_texts_with_unknown_tokens() -> None:
    """-1 stands for a token that is not known, and no n-gram has it. Ids beyond the vocabulary are not drafted."""
    text = np.array([[1, 2, 3, -1, 2, 3, 900, 1, 2, 3]], np.int32)
    drafter = TrieDrafter(4, vocab_size=900)
    assert drafter.propose(["a"], text, np.array([10]), np.array([4])) == [[]]
    larger = TrieDrafter(4, vocab_size=901)
    assert larger.propose(["a"], text, np.array([10]), np.array([4])) == [[900, 1, 2, 3]]
    shared = SharedTrie(DEPTH, 512, 256)
    shared.insert(text[0])
    check_shape(shared, [[1, 2, 3], [2, 3, 900, 1, 2, 3]])


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(10, 300))
def test_a_pool_that_is_full_still_drafts_what_was_seen(seed: int, alphabet: int, piece: int) -> None:
    """Long texts in 512 or 1024 nodes: tries are pruned again and again, and cursors follow their nodes."""
    generator = np.random.default_rng(seed)
    drafter = make_drafter(request_nodes=1024, total_nodes=2048)
    matrix = generator.integers(0, alphabet, (3, 2000)).astype(np.int32)
    matrix[:, 1000:] = matrix[:, :1000]
    drafted = 0
    for length in range(piece, 2000, piece):
        lengths = np.full(3, length, np.int64)
        for row, draft in enumerate(drafter.propose(range(3), matrix, lengths, np.full(3, K))):
            text = bytes(matrix[row, :length].tolist())
            # Some end of the text was followed by the draft somewhere before.
            assert not draft or any(text[-n:] + bytes(draft) in text for n in range(1, MAX_MATCH + 1))
            drafted += len(draft)
        assert drafter.count_nodes() <= 2048
        for start, _, used in drafter._heads[list(drafter._slots.values()), :3].tolist():
            parents = drafter._pool.nodes[start + 1 : start + used, PARENT]
            assert ((parents >= 0) & (parents < np.arange(1, used))).all()
    assert drafted
    for row in range(3):
        drafter.remove(row)
    assert drafter._segments.count_free() == 2048
