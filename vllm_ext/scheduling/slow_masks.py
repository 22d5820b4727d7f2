# SPDX-License-Identifier: Apache-2.0
"""Masks of slow grammars are filled beside the steps: their requests wait, and nobody waits for them.

    step       1      2      3      4      5
    fast       token  token  token  token  token
    slow       token  .      .      token  .        . not scheduled: its mask is being filled
    thread            [mask........]       [mask...

vLLM fills the masks of a step between its forward pass and its sampling, so that one slow grammar is everybody's. Only
requests whose last mask was slow are held back, and never all that run: who is alone keeps nobody waiting. What they
put out is the same: a mask depends on its own request's tokens only.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_ext import observability
from vllm_ext.structured.budgets import Budgeted
from vllm_ext.structured.threads import LAST, start_thread


class SlowMasks:
    """Holds requests back whose masks are slow, and has a thread fill these meanwhile.

    Copies of one llguidance grammar lock each other out, so requests that share one are held and released together.
    """

    def __init__(self, manager: Any, rank: int = 0) -> None:
        """manager: vLLM's StructuredOutputManager. rank: data-parallel, for the metrics."""
        self._manager = manager
        self._rank = rank
        vllm_config = manager.vllm_config
        # A request that leaves the V1 runner's batch comes back as one that has had a single draft accepted, by which
        # recurrent layers find their state. An external launcher has a scheduler for each rank: all must decide the
        # same, and times differ.
        is_counted = vllm_config.speculative_config is not None and vllm_config.model_config.is_hybrid
        is_repeated = vllm_config.parallel_config.distributed_executor_backend == "external_launcher"
        self._is_on = not is_counted and not is_repeated
        self._thread = start_thread("mask", LAST)

    def begin_step(self) -> None:
        """Another step begins, whether anything of it is structured or not."""
        steps = getattr(self._manager.backend, "steps", None)
        if steps is not None:
            steps.begin()

    def find(self, running: Sequence[Any]) -> dict[str, Any]:
        """Of these requests, those whose next mask will be slow, and those that share a grammar with them, by id."""
        steps = getattr(self._manager.backend, "steps", None)
        if steps is None or not steps.has_slow or not self._is_on:
            return {}
        timed = [(request, grammar) for request in running if (grammar := self._find_timed(request)) is not None]
        families = {id(grammar.family) for _, grammar in timed if grammar.is_slow or grammar.ahead is not None}
        steps.has_slow = bool(families)
        return {request.request_id: request for request, grammar in timed if id(grammar.family) in families}

    def _find_timed(self, request: Any) -> Budgeted | None:
        """The grammar that the next token of a request is masked by, if it is a timed one."""
        structured = request.structured_output_request
        # Only rows that wait for their next token, or have it in flight: neither prompts nor who was preempted.
        if structured is None or request.num_tokens > request.num_computed_tokens + 1:
            return None
        grammar = structured.grammar
        if not isinstance(grammar, Budgeted) or structured.grammar.is_terminated():
            return None
        return None if self._manager._get_constraint_bounds(request, ()).constraint_start else grammar

    def hold(self, slow: Mapping[str, Any], num_running: int) -> set[str]:
        """Ids of those of the slow requests that have to wait, none if they are all that run; has their masks filled.

        All of them are left without drafts: one mask is made of each.
        """
        if len(slow) == num_running:
            return set()
        families: defaultdict[int, list[Any]] = defaultdict(list)
        for request in slow.values():
            request.spec_token_ids = []
            families[id(request.structured_output_request.grammar.family)].append(request)
        held: set[str] = set()
        for requests in families.values():
            if self._is_waiting(requests):
                held.update(request.request_id for request in requests)
        return held

    def _is_waiting(self, requests: Sequence[Any]) -> bool:
        """Whether requests of one family cannot be scheduled yet."""
        # Asynchronous scheduling: where a token is in flight, it is not known yet where its grammar will be.
        if any(request.num_output_placeholders for request in requests):
            return True
        grammars = [request.structured_output_request.grammar for request in requests]
        missing = [grammar for grammar in grammars if grammar.is_slow and grammar.ahead is None]
        for grammar in missing:
            grammar.fill_ahead(self._thread, self._manager.backend.allocate_token_bitmask(1))
        if missing:
            observability.add("vllm_ext:structured_masks_aside_total", len(missing), self._rank)
        return any(grammar.ahead is not None and not grammar.ahead.done() for grammar in grammars)

    def close(self) -> None:
        """End the thread; what it does now ends first."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def leave_out(scheduler: Any, held: set[str]) -> Iterator[None]:
    """Have a vLLM scheduler's schedule() not see these of its running requests, which keep their places and blocks."""
    running, most = scheduler.running, scheduler.max_num_active_reqs
    scheduler.running = [request for request in running if request.request_id not in held]
    # Their rows are taken.
    scheduler.max_num_active_reqs = most - len(held)
    try:
        yield
    finally:
        scheduler.max_num_active_reqs = most
        left = {request.request_id: request for request in scheduler.running}
        before = [
            request
            for request in running
            if request.request_id in held or left.pop(request.request_id, None) is not None
        ]
        scheduler.running = [*before, *left.values()]


def has_room(scheduler: Any) -> bool:
    """Whether a vLLM scheduler's next step preempts nobody: held requests keep blocks that an older one may need."""
    running, ahead = scheduler.running, scheduler.num_lookahead_tokens + scheduler.num_spec_tokens
    missing = sum(max(request.num_tokens - request.num_computed_tokens, 0) for request in running)
    # Each begins a block, and a step has so many tokens and no more.
    tokens = min(missing, scheduler.max_num_scheduled_tokens) + ahead * len(running)
    blocks = len(running) + tokens // scheduler.block_size
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    free: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return blocks * groups <= free
