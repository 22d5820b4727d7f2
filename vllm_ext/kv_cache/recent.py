# SPDX-License-Identifier: Apache-2.0
"""Full-precision pages of recent tokens and sinks: a KV-cache group of their own, found by content like any other.

The group is a sliding window whose first blocks stay (sinks) and whose interior is never materialised: in a prefill
step the backend reads the step's own keys from the model, so a chunk needs blocks only for what later steps read.

    blocks   [ sinks ][ null ... null ][ window before this step ][ null ... ][ window before the next ]

Importing this module registers the spec with vLLM; unpickling one in EngineCore does that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


class RecentManager(SlidingWindowManager):
    """Blocks of the window and the sinks of every request.

    Differs from `SlidingWindowManager`: sinks are kept, touched and required for a prefix hit; a long step gets blocks
    for its last window alone; and blocks beside holes are freed, too.
    """

    def __init__(self, kv_cache_spec: RecentSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks
        self.kept_window = kv_cache_spec.kept_window
        # First block to materialise, decided when vLLM asks how many are needed, followed when it asks for them.
        self._first_kept: dict[str, int] = {}
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
                return tuple([] for _ in kv_cache_group_ids), 0
            for found, block in zip(blocks, cached, strict=True):
                found[i] = block
        return blocks, hit

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
            evictable = self._get_num_evictable_blocks(
                [block for i, block in enumerate(new_computed_blocks) if i < self.sink_blocks or i >= skipped]
            )
        end = cdiv(num_tokens, self.block_size)
        if apply_admission_cap:
            needed = max(end - held, 0) + evictable
            cap = self.max_admission_blocks_per_request
            return needed if cap is None else min(needed, cap)
        # What the quantized pages of the step may take from the free ones; those of a prefix hit may all be among them.
        first = self._choose_first(num_tokens, held, self.block_pool.get_num_free_blocks() - evictable - main_blocks)
        self._first_kept[request_id] = first
        return self._count_kept(first, held, end) + evictable

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Blocks for the sinks and the last window of `num_tokens`; the null block in between."""
        blocks = self.req_to_blocks[request_id]
        held, end = len(blocks), cdiv(num_tokens, self.block_size)
        first = self._first_kept.pop(request_id, 0)
        count = self._count_kept(first, held, end)
        fresh = iter(self.block_pool.get_new_blocks(count) if count else [])
        added = [next(fresh) if i < self.sink_blocks or i >= first else self._null_block for i in range(held, end)]
        blocks.extend(added)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in added if block is not self._null_block)
        return added

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; forgets the request."""
        self._first_kept.pop(request_id, None)
        self._first_held.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def _choose_first(self, num_tokens: int, held: int, free: int) -> int:
        """First new block to materialise when `num_tokens` exist after the step.

        The next step needs the window before its first query. A later request with the same prefix needs the window
        before the last boundary at which hits end; that one is kept for the step, too, where it takes less than half of
        the `free` blocks: it may exceed the bound of a request, and costs only a recomputation if missing.
        """
        align, end = self.scheduler_block_size, cdiv(num_tokens, self.block_size)
        if self.kept_window <= 1:
            # Only sinks are read again.
            return end
        needed = self.get_num_skipped_tokens(num_tokens) // self.block_size
        if not self.enable_caching:
            return needed
        useful = self.get_num_skipped_tokens((num_tokens - 1) // align * align) // self.block_size
        return useful if 2 * self._count_kept(useful, held, end) <= free else needed

    def _count_kept(self, first: int, held: int, end: int) -> int:
        """Blocks held .. end - 1 that are sinks or from `first` on."""
        sinks = max(0, min(end, self.sink_blocks) - held)
        return sinks + max(0, end - max(held, first, self.sink_blocks))


def register_spec() -> None:
    """Make vLLM know the spec and its manager; idempotent."""
    # A first registration of ours would look like a finished one of vLLM's own and suppress it.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RecentSpec, RecentManager, uniform_type_base_spec=RecentSpec)


register_spec()
