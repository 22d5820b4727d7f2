# SPDX-License-Identifier: Apache-2.0
"""vLLM's real schedulers under the goodput mixin, without an engine: a test gives the outputs of the model runner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_ext.scheduling.factory import make_scheduler

MODEL = Path(__file__).resolve().parents[2] / "bench" / "models" / "tiny_moe"
BLOCK_SIZE = 32


@contextmanager
def same_environment() -> Iterator[None]:
    """vLLM notes things of its own in the environment, which engines of later tests would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@same_environment()
def build_scheduler(
    k: int,
    cache_dir: Path,
    *,
    base: str = "Scheduler",
    num_seqs: int = 8,
    method: str = "ngram",
    compose: Callable[[str], type] = lambda base: make_scheduler(base, ("smartspec",)),
    hold_steps: int = 1,
    **smartspec: Any,
) -> Any:
    """A vLLM scheduler with the goodput mixin, over KV blocks for num_seqs long requests.

    base: "Scheduler" or "AsyncScheduler". cache_dir: where measured step times are looked for. compose: the class for a
    base. hold_steps: by default every step has a plan of its own, whatever the machine takes. smartspec: settings.
    """
    model = ModelConfig(model=str(MODEL), dtype="float32", max_model_len=2048)
    parallel = ParallelConfig()
    vllm_config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False),
        parallel_config=parallel,
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_seqs, max_num_batched_tokens=16384, max_model_len=2048, is_encoder_decoder=False
        ),
        speculative_config=SpeculativeConfig(
            method=method, num_speculative_tokens=k, target_model_config=model, target_parallel_config=parallel
        ),
        device_config=DeviceConfig("cpu"),
        additional_config={
            "vllm_ext": {"smartspec": {"hold_steps": hold_steps, **smartspec}, "cache_dir": str(cache_dir)}
        },
    )
    # The CPU platform switches asynchronous scheduling off; AsyncScheduler itself runs anywhere.
    vllm_config.scheduler_config.async_scheduling = base == "AsyncScheduler"
    blocks = num_seqs * 2048 // BLOCK_SIZE + 1
    vllm_config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return compose(base)(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
    )


def add_request(scheduler: Any, rid: str, prompt: int = 8, *, max_tokens: int = 1000, **arguments: Any) -> Request:
    """A request of `prompt` tokens that stops only by its length."""
    extra_args = arguments.pop("extra_args", None)
    parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)
    request = Request(rid, list(range(10, 10 + prompt)), parameters, None, **arguments)
    scheduler.add_request(request)
    return request


def run_model(output: SchedulerOutput, sample: Callable[[str, list[int]], list[int]]) -> ModelRunnerOutput:
    """What a model runner would return: sample(request id, its drafts) gives the tokens put out."""
    ids = list(output.num_scheduled_tokens)
    tokens = [sample(rid, output.scheduled_spec_decode_tokens.get(rid, [])) for rid in ids]
    return ModelRunnerOutput(ids, {rid: row for row, rid in enumerate(ids)}, tokens)


def hand_drafts(scheduler: Any, drafts: Mapping[str, list[int]]) -> None:
    """Give a synchronous scheduler what the drafter made, as EngineCore does after a step."""
    scheduler.update_draft_token_ids(DraftTokenIds(list(drafts), list(drafts.values())))
