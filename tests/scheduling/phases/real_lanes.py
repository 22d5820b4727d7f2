# SPDX-License-Identifier: Apache-2.0
"""The shipped lane mixin around vLLM's real schedulers, without an engine, on the device of the fake one."""

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
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.scheduling.phases.fake_scheduler import Step
from tests.scheduling.real_scheduler import same_environment
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.scheduler import LaneMixin
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneResult

MODEL = Path(__file__).resolve().parents[3] / "bench" / "models" / "tiny_moe"
BLOCK_SIZE = 16
MAX_ACTIVE = 4


class RealLanes(LaneMixin):
    """The shipped mixin, driven lane by lane, with what the fake device needs of a launch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_preemptions = 0

    def is_over(self: Any) -> bool:
        return not (self.requests or self.has_requests())

    def launch_lane(self, lane: Lane) -> tuple[LaneLaunch, Step] | None:
        launch = self.schedule_lane(lane)
        return None if launch is None else (launch, self._make_step(launch.output))

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

    def complete_lane(self, launch: LaneLaunch, sampled: Mapping[str, int | None]) -> dict[str, list[int]]:
        """Returns the tokens that go to clients, by request."""
        ids = list(launch.batch.tokens)
        tokens = [[token] if (token := sampled[rid]) is not None else [] for rid in ids]
        made = ModelRunnerOutput(ids, {rid: row for row, rid in enumerate(ids)}, tokens)
        outputs = self.update_lane(LaneResult(launch, made, 0.0, 0.0, 1.0))
        return {one.request_id: one.new_token_ids for client in outputs.values() for one in client.outputs}

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.num_preemptions += 1
        super()._preempt_request(request, *args, **kwargs)


class RealLaneScheduler(RealLanes, Scheduler):
    """Synchronous."""


class RealAsyncLaneScheduler(RealLanes, AsyncScheduler):
    """Asynchronous: the decode lane has two batches in flight."""

    depths = (1, 2)


@cache
def make_config(
    budget: int, asynchronous: bool, block: tuple[tuple[str, Any], ...] = ()
) -> tuple[VllmConfig, StructuredOutputManager]:
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
            additional_config={"vllm_ext": {"semipd": dict(block)}},
        )
        config.scheduler_config.async_scheduling = asynchronous
        return config, StructuredOutputManager(config)


def build_lanes(num_blocks: int, budget: int, *, asynchronous: bool, **block: Any) -> Any:
    """One of the two schedulers over so many blocks, one of which vLLM keeps for itself; block: semipd's settings."""
    config, structured = make_config(budget, asynchronous, tuple(block.items()))
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    kind = RealAsyncLaneScheduler if asynchronous else RealLaneScheduler
    return kind(config, kv_cache, structured, BLOCK_SIZE)


def make_request(rid: str, prompt: Sequence[int], max_tokens: int, client: str | None = None, **kwargs: Any) -> Request:
    extra = None if client is None else {"client": client}
    parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    return Request(rid, list(prompt), parameters, None, block_hasher=hasher, **kwargs)
