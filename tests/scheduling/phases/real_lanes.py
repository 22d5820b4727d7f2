# SPDX-License-Identifier: Apache-2.0
"""The lanes around vLLM's real schedulers, without an engine: the seams of fake_scheduler, and the same device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.scheduling.phases.fake_scheduler import Step
from tests.scheduling.real_scheduler import same_environment
from vllm_ext.scheduling.phases.lanes import LaneBatch, Lanes
from vllm_ext.scheduling.phases.view import Lane

MODEL = Path(__file__).resolve().parents[3] / "bench" / "models" / "tiny_moe"
BLOCK_SIZE = 16
MAX_ACTIVE = 4


class RealLanes:
    """Around vLLM's Scheduler or AsyncScheduler."""

    lanes: Lanes[Any]

    def start_lanes(self, depths: tuple[int, int]) -> None:
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        self.lanes = Lanes[Any](manager.block_pool.free_blocks, depths)
        self._lane: Lane | None = None
        self._held: list[Request] = []
        self.num_preemptions = 0
        allocate = manager.allocate_slots

        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            assert self._lane is not None
            if self.lanes.delays_hashes(self._lane):
                kwargs["delay_cache_blocks"] = True
            return allocate(*args, **kwargs)

        manager.allocate_slots = allocate_slots

    def add_request(self, request: Request) -> None:
        finished: set[str] = self.finished_req_ids  # type: ignore[attr-defined]
        if self.lanes.is_settled(request.request_id) and request.request_id not in finished:
            super().add_request(request)  # type: ignore[misc]
        else:
            self._held.append(request)

    def lane_has_work(self: Any, lane: Lane) -> bool:
        if not self.lanes.has_room(lane):
            return False
        if self.finished_req_ids or self.lanes.has_finished(lane) or (lane is Lane.PREFILL and self.waiting):
            return True
        return any(self.lanes.may_schedule(lane, request) for request in self.running)

    def is_over(self: Any) -> bool:
        return not (self.requests or self._held or self.finished_req_ids) and self.lanes.is_idle()

    def schedule_lane(self: Any, lane: Lane) -> tuple[LaneBatch[Any], Step, SchedulerOutput] | None:
        view = self.lanes.open_batch(lane, self.running)
        max_active, waiting = self.max_num_active_reqs, self.waiting
        self.running, self._lane = view.mine, lane
        if lane is Lane.DECODE:
            self.waiting = create_request_queue(self.policy)
        else:
            self.max_num_active_reqs = view.limit_active(max_active)
        output = self.schedule()
        self._lane, self.max_num_active_reqs = None, max_active
        if lane is Lane.DECODE:
            preempted, self.waiting = self.waiting, waiting
            self.waiting.prepend_requests(preempted)
        self.running = view.merge(self.running)
        assert len(self.running) <= max_active
        output.finished_req_ids = self.lanes.take_finished(output.finished_req_ids)
        if not (output.num_scheduled_tokens or output.finished_req_ids or output.kv_cache_block_copies):
            self.lanes.drop_batch()
            return None
        return self.lanes.launch(output.num_scheduled_tokens), self._make_step(output), output

    def _make_step(self: Any, output: SchedulerOutput) -> Step:
        new = {data.req_id for data in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        scheduled = output.num_scheduled_tokens
        return Step(
            {rid: (self.requests[rid].num_computed_tokens - count, count) for rid, count in scheduled.items()},
            {rid: list(self.requests[rid].all_token_ids) for rid in new},
            {rid: self.kv_cache_manager.get_block_ids(rid)[0] for rid in scheduled},
            [(copy.src_block_id, copy.dst_block_id) for copy in output.kv_cache_block_copies or ()],
            output.finished_req_ids,
        )

    def update_lane(
        self: Any, batch: LaneBatch[Any], output: SchedulerOutput, sampled: Mapping[str, int | None]
    ) -> dict[str, list[int]]:
        """Returns the tokens that go to clients, by request."""
        self.lanes.complete(batch)
        if self.lanes.delays_hashes(batch.lane):
            for rid in batch.tokens:
                request = self.requests.get(rid)
                if request is not None and request.status == RequestStatus.RUNNING:
                    self.kv_cache_manager.cache_blocks(request, self.lanes.count_written(request))
        ids = list(batch.tokens)
        tokens = [[token] if (token := sampled[rid]) is not None else [] for rid in ids]
        made = self.update_from_output(
            output, ModelRunnerOutput(ids, {rid: row for row, rid in enumerate(ids)}, tokens)
        )
        held, self._held = self._held, []
        for request in held:
            self.add_request(request)
        return {one.request_id: one.new_token_ids for client in made.values() for one in client.outputs}

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        return self.lanes.may_preempt(request.request_id) and not self.lanes.expects_blocks()

    def _free_request_blocks(self, request: Request) -> None:
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        if self.lanes.holds_blocks(request.request_id):
            self.lanes.defer_free(request.request_id, manager.pop_blocks_for_free(request)[::-1])
        else:
            manager.free(request)

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        self.num_preemptions += 1
        super()._preempt_request(*args, **kwargs)  # type: ignore[misc]

    def _free_cow_retained_blocks(self, blocks: Sequence[Any], fence_seq: int) -> None:
        self.lanes.retain_copies(blocks)


class RealLaneScheduler(RealLanes, Scheduler):
    """Synchronous."""


class RealAsyncLaneScheduler(RealLanes, AsyncScheduler):
    """Asynchronous: the decode lane has two batches in flight."""


@cache
def make_config(budget: int, asynchronous: bool) -> tuple[VllmConfig, StructuredOutputManager]:
    with same_environment():
        init_none_hash(sha256)
        config = VllmConfig(
            model_config=ModelConfig(model=str(MODEL), dtype="float32", max_model_len=512),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            parallel_config=ParallelConfig(),
            scheduler_config=SchedulerConfig(
                max_num_seqs=MAX_ACTIVE, max_num_batched_tokens=budget, max_model_len=512, is_encoder_decoder=False
            ),
            device_config=DeviceConfig("cpu"),
        )
        config.scheduler_config.async_scheduling = asynchronous
        return config, StructuredOutputManager(config)


def build_lanes(num_blocks: int, budget: int, *, asynchronous: bool) -> Any:
    """One of the two schedulers over so many blocks, one of which vLLM keeps for itself."""
    config, structured = make_config(budget, asynchronous)
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    kind = RealAsyncLaneScheduler if asynchronous else RealLaneScheduler
    scheduler: Any = kind(config, kv_cache, structured, BLOCK_SIZE)
    scheduler.start_lanes((1, 2) if asynchronous else (1, 1))
    return scheduler


def make_request(rid: str, prompt: Sequence[int], max_tokens: int) -> Request:
    parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(rid, list(prompt), parameters, None, block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256))
