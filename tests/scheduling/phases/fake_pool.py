# SPDX-License-Identifier: Apache-2.0
"""A small block pool with what makes vLLM's hard: reference counts, cached blocks on the free list, partial hits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BLOCK_SIZE = 4
#: Prefixes are cached at every so many tokens: a hit that ends inside a block is copied before it is written.
HASH_SIZE = 2


class FakeBlock:
    """A block of the pool: how many requests and batches hold it, and the prefixes that end in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.references = 0
        self.prefixes: set[tuple[int, ...]] = set()


class FakePool:
    """Blocks in the order in which they are taken next; a freed block stays cached until it is taken again."""

    def __init__(self, size: int) -> None:
        self.blocks = [FakeBlock(number) for number in range(size)]
        self._free: dict[FakeBlock, None] = dict.fromkeys(self.blocks)  # ordered
        self._cache: dict[tuple[int, ...], FakeBlock] = {}
        #: Published while the batch that writes them is scheduled: it cannot copy them, as copies run first.
        self.published_now: set[tuple[int, ...]] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[FakeBlock]:
        """Blocks of nobody; what they cached is gone."""
        taken = list(self._free)[:count]
        assert len(taken) == count, "took more blocks than are free"
        for block in taken:
            del self._free[block]
            for prefix in block.prefixes:
                del self._cache[prefix]
            block.prefixes.clear()
            block.references = 1
        return taken

    def share(self, blocks: Iterable[FakeBlock]) -> None:
        for block in blocks:
            self._free.pop(block, None)
            block.references += 1

    def give_back(self, blocks: Iterable[FakeBlock]) -> None:
        for block in blocks:
            assert block.references > 0, f"block {block.number} was freed twice"
            block.references -= 1
            if block.references == 0:
                self._free[block] = None

    def publish(self, tokens: Sequence[int], blocks: Sequence[FakeBlock]) -> None:
        """Make the prefixes of `tokens` that end at HASH_SIZE findable."""
        for end in range(HASH_SIZE, len(tokens) + 1, HASH_SIZE):
            prefix = tuple(tokens[:end])
            if prefix not in self._cache:
                block = blocks[(end - 1) // BLOCK_SIZE]
                self._cache[prefix] = block
                block.prefixes.add(prefix)
                self.published_now.add(prefix)

    def find(self, tokens: Sequence[int]) -> tuple[list[FakeBlock], int]:
        """(blocks, tokens) of the longest cached prefix that leaves a token to compute; the last can be partial."""
        blocks: list[FakeBlock] = []
        hit = 0
        for end in range(HASH_SIZE, len(tokens), HASH_SIZE):
            block = self._cache.get(tuple(tokens[:end]))
            if end % BLOCK_SIZE == 0:
                if block is None:
                    break
                blocks[hit // BLOCK_SIZE :] = [block]
                hit = end
            elif block is not None and tuple(tokens[:end]) not in self.published_now:
                blocks[hit // BLOCK_SIZE :] = [block]
                hit = end
        return blocks, hit
