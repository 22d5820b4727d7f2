# SPDX-License-Identifier: Apache-2.0
"""Full-precision pages of recent tokens and sinks: a KV-cache group of their own, found by content like any other.

The group is a sliding window whose first blocks stay (sinks) and whose interior is never materialised: in a prefill
step the backend reads the step's own keys from the model, so a chunk needs blocks only for what later steps read.

    blocks   [ sinks ][ null ... null ][ window before this step ][ null ... ][ window before the next ]

Where the quantized pages of a longer prefix are found than windows are, a request shares that prefix with an earlier
one that kept no window there: it keeps the window before the end of the prefix, too, and the next such request hits.

Importing this module registers the spec with vLLM; unpickling one in EngineCore does that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_ext.kv_cache.capacity import count_recent_pages


@dataclass(frozen=True, kw_only=True)
class RecentSpec(SlidingWindowSpec):
    """Full-precision K and V of the last `sliding_window` tokens, the query's own included, and the first `sinks`.

    block_size: of these pages, less than that of the quantized ones. draft_tokens: most drafts of a step; rejected ones
    move a request's end back, and its window with it. vLLM sets its own `extra_retained_tokens` back to 0 for drafters
    without layers.
    """

    sinks: int = 0
    draft_tokens: int = 0

    @property
    def kept_window(self) -> int:
        """Last tokens of a step that are kept, drafts included."""
        return self.sliding_window + self.draft_tokens

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold sinks."""
        return cdiv(self.sinks, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks of a request; `RecentManager` keeps to it.

        vLLM's bound for a sliding window adds all tokens of a step (`max_in_flight_tokens`), which are never stored
        here: with 2048 of them it would cost more than the quantized pages save.
        """
        return count_recent_pages(self.kept_window, self.sinks, self.block_size, max_model_len)


class Lookup(NamedTuple):
    """A search for a prefix. hit: tokens whose window is cached; shared: tokens whose quantized pages are."""

    hashes: Any
    hit: int
    shared: int


class KeptRanges(NamedTuple):
    """New blocks to materialise besides sinks: those from `first` on, and those of `junction`, a range before."""

    first: int
    junction: range = range(0)


#: The last search in each pool. vLLM tells managers of a type what it searches for, and not for which request; the
#: request that asks for blocks next is the one that searched.
_lookups: WeakKeyDictionary[Any, Lookup] = WeakKeyDictionary()


class RecentManager(SlidingWindowManager):
    """Blocks of the window and the sinks of every request.

    Differs from `SlidingWindowManager`: sinks are kept, touched and required for a prefix hit; a long step gets blocks
    for its last window and that of a prefix it shares alone; and blocks beside holes are freed, too.
    """

    def __init__(self, kv_cache_spec: RecentSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks
        self.kept_window = kv_cache_spec.kept_window
        # What to materialise, decided when vLLM asks how many are needed, followed when it asks for them.
        self._first_kept: dict[str, KeptRanges] = {}
        # Where the prefix ends that a request shares with earlier ones, in tokens; 0: no further than its hit.
        self._shared_prefix: dict[str, int] = {}
        # Blocks of a request below which everything but sinks is freed already.
        self._first_held: dict[str, int] = {}

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens before the window of the next query."""
        return max(0, num_computed_tokens - self.kept_window + 1)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what lies before the window, sinks excepted. Holes do not end the search, as they do in vLLM's."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        end = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        begin = max(self._first_held.get(request_id, 0), self.sink_blocks)
        if end <= begin:
            return
        freed = [blocks[i] for i in range(end - 1, begin - 1, -1) if blocks[i] is not self._null_block]
        blocks[begin:end] = [self._null_block] * (end - begin)
        self._first_held[request_id] = end
        self.block_pool.free_blocks(freed)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose window and sinks are cached."""
        if kv_cache_spec.sliding_window > 1:
            blocks, hit = super().find_longest_cache_hit(
                block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block,
                alignment_tokens, dcp_world_size, pcp_world_size,
            )  # fmt: skip
        else:
            # Without a window any prefix will do; vLLM's search would want one cached block at its end.
            hit = max_length // alignment_tokens * alignment_tokens
            count = hit // kv_cache_spec.block_size
            blocks = tuple([block_pool.null_block] * count for _ in kv_cache_group_ids)
        hit = cls._find_sinks(
            blocks, hit, block_hashes, kv_cache_group_ids, block_pool, kv_cache_spec, alignment_tokens
        )
        last = _lookups.get(block_pool)
        # With several quantized groups, vLLM searches again within what was found.
        shared = max_length // alignment_tokens * alignment_tokens
        if last is not None and last.hashes is block_hashes:
            shared = max(shared, last.shared)
        _lookups[block_pool] = Lookup(block_hashes, hit, shared)
        return (blocks, hit) if hit else (tuple([] for _ in kv_cache_group_ids), 0)

    @staticmethod
    def _find_sinks(
        blocks: tuple[list[KVCacheBlock], ...],
        hit: int,
        block_hashes: Any,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        alignment_tokens: int,
    ) -> int:
        """Put the cached sinks in; the length of the hit, 0 where one is missing."""
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        for i in range(min(kv_cache_spec.sink_blocks, len(blocks[0]))):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if cached is None:
                return 0
            for found, block in zip(blocks, cached, strict=True):
                found[i] = block
        return hit

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *args: Any, kv_cache_spec: Any, **kwargs: Any
    ) -> list[bool] | None:
        """vLLM's mask of blocks worth caching, with the sinks."""
        mask: list[bool] | None = super().reachable_block_mask(
            start_block, end_block, *args, kv_cache_spec=kv_cache_spec, **kwargs
        )
        if mask is not None:
            for i in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[i - start_block] = True
        return mask

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the blocks of a prefix hit. vLLM drops all before the window; sinks stay."""
        sinks = list(new_computed_blocks[: self.sink_blocks])
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        blocks = self.req_to_blocks[request_id]
        for i, sink in enumerate(sinks):
            if blocks[i] is self._null_block and sink is not self._null_block:
                self.block_pool.touch([sink])
                blocks[i] = sink

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that `allocate_new_blocks` will take, and those of a prefix hit that leave the free queue."""
        held, evictable = len(self.req_to_blocks.get(request_id, ())), 0
        main_blocks = cdiv(num_tokens, self.scheduler_block_size)
        if request_id in self.num_cached_block:
            main_blocks -= held * self.block_size // self.scheduler_block_size
        else:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            held = max(skipped, len(new_computed_blocks) + held)
            self._shared_prefix[request_id] = self._find_shared_prefix(num_local_computed_tokens)
            evictable = self._get_num_evictable_blocks(
                [block for i, block in enumerate(new_computed_blocks) if i < self.sink_blocks or i >= skipped]
            )
        end = cdiv(num_tokens, self.block_size)
        if apply_admission_cap:
            needed = max(end - held, 0) + evictable
            cap = self.max_admission_blocks_per_request
            return needed if cap is None else min(needed, cap)
        # What the quantized pages of the step may take from the free ones; those of a prefix hit may all be among them.
        free = self.block_pool.get_num_free_blocks() - evictable - main_blocks
        kept = self._choose_kept(num_tokens, self._shared_prefix.get(request_id, 0), held, free)
        self._first_kept[request_id] = kept
        return len(self._list_kept(kept, held, end)) + evictable

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Blocks for the sinks and the last window of `num_tokens`; the null block in between."""
        blocks = self.req_to_blocks[request_id]
        held, end = len(blocks), cdiv(num_tokens, self.block_size)
        kept = self._list_kept(self._first_kept.pop(request_id, KeptRanges(0)), held, end)
        fresh = self.block_pool.get_new_blocks(len(kept)) if kept else []
        added = [self._null_block] * max(0, end - held)
        for i, block in zip(kept, fresh, strict=True):
            added[i - held] = block
        blocks.extend(added)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in added if block is not self._null_block)
        return added

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; forgets the request."""
        self._first_kept.pop(request_id, None)
        self._first_held.pop(request_id, None)
        self._shared_prefix.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def _find_shared_prefix(self, hit: int) -> int:
        """Where the shared prefix of a request ends that found `hit` tokens; 0 where the last search was another's."""
        last = _lookups.get(self.block_pool)
        return last.shared if last is not None and last.hit == hit < last.shared else 0

    def _choose_kept(self, num_tokens: int, shared: int, held: int, free: int) -> KeptRanges:
        """New blocks to materialise when `num_tokens` exist after the step.

        The next step needs the window before its first query. A later request with the same prefix needs the window
        before the last boundary at which hits end, or before the end of the prefix, the `shared` tokens that an
        earlier request had, too. Both are kept for the step where they take less than half of the `free` blocks: they
        may exceed the bound of a request, and cost only a recomputation if missing.
        """
        align, end = self.scheduler_block_size, cdiv(num_tokens, self.block_size)
        if self.kept_window <= 1:
            # Only sinks are read again.
            return KeptRanges(end)
        needed = KeptRanges(self.get_num_skipped_tokens(num_tokens) // self.block_size)
        if not self.enable_caching:
            return needed
        useful = KeptRanges(self.get_num_skipped_tokens((num_tokens - 1) // align * align) // self.block_size)
        junction = range(self.get_num_skipped_tokens(shared) // self.block_size, shared // self.block_size)
        for kept in (useful._replace(junction=junction), useful):
            if 2 * len(self._list_kept(kept, held, end)) <= free:
                return kept
        return needed

    def _list_kept(self, kept: KeptRanges, held: int, end: int) -> list[int]:
        """Of the blocks held .. end - 1 those that are materialised, in order."""
        sinks = range(held, min(end, self.sink_blocks))
        junction = range(max(held, self.sink_blocks, kept.junction.start), min(end, kept.junction.stop, kept.first))
        return [*sinks, *junction, *range(max(held, kept.first, self.sink_blocks), end)]


def register_spec() -> None:
    """Make vLLM know the spec and its manager; idempotent."""
    # A first registration of ours would look like a finished one of vLLM's own and suppress it.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RecentSpec, RecentManager, uniform_type_base_spec=RecentSpec)


register_spec()
