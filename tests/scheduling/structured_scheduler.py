# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler under the forced-tokens mixin, without an engine, and a model that draws what masks allow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.scheduling.real_scheduler import BLOCK_SIZE, MODEL, same_environment
from vllm_ext.scheduling.factory import make_scheduler
from vllm_ext.structured import carrier

END = 2
SIZE = 4096


def make_record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMA = make_record(
    customer_identifier={"type": "integer", "minimum": 0, "maximum": 99},
    delivery_country={"enum": ["FR", "DE"]},
    is_priority=({"type": "boolean"}),
)


@same_environment()
def build_scheduler(
    *,
    features: tuple[str, ...] = ("structured",),
    forced: str = "auto",
    tokens: int = 16384,
    base: str = "Scheduler",
    **config: Any,
) -> Any:
    """A scheduler over the shipped model's tokenizer; with no feature, vLLM's own without speculation."""
    model = ModelConfig(model=str(MODEL), dtype="float32", max_model_len=2048)
    block: dict[str, dict[str, Any]] = {name: {} for name in features}
    if "structured" in block:
        block["structured"] = {"forced_tokens": forced}
    vllm_config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False),
        parallel_config=ParallelConfig(),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=tokens, max_model_len=2048, is_encoder_decoder=False
        ),
        device_config=DeviceConfig("cpu"),
        additional_config={"vllm_ext": block},
        **config,
    )
    vllm_config.structured_outputs_config.backend = "xgrammar"
    vllm_config.structured_outputs_config.disable_any_whitespace = True
    # The CPU platform switches asynchronous scheduling off; AsyncScheduler itself runs anywhere.
    vllm_config.scheduler_config.async_scheduling = base == "AsyncScheduler"
    if features:
        carrier.attach_carrier(vllm_config)
    blocks = 8 * 2048 // BLOCK_SIZE + 1
    vllm_config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return make_scheduler(base, features)(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_SIZE,
    )


def add_request(scheduler: Any, rid: str, schema: Any = SCHEMA, max_tokens: int = 200, **sampling: Any) -> Request:
    parameters = SamplingParams(max_tokens=max_tokens, **sampling)
    if schema is not None:
        parameters.structured_outputs = StructuredOutputsParams(json=json.dumps(schema))
        parameters.structured_outputs._backend = "xgrammar"
    parameters.update_from_generation_config({}, END)
    request = Request(rid, [10, 11, 12, 13], parameters, None)
    scheduler.structured_output_manager.grammar_init(request)
    if schema is not None:
        # Compiled by now, so that the number of steps says something.
        request.structured_output_request._grammar.result()
    scheduler.add_request(request)
    return request


class Model:
    """Prefers tokens by what was put out before, and draws among those that the mask allows."""

    def __init__(self, scheduler: Any, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.seed = seed
        self.outputs: dict[str, list[int]] = {}
        self.steps = 0
        self.scheduled: list[dict[str, list[int]]] = []

    def prefer(self, rid: str, output: list[int]) -> np.ndarray:
        """Values of all tokens: long ones before short ones, as models do, and noise."""
        generator = np.random.default_rng([self.seed, len(output), *output[-3:], ord(rid[0])])
        return generator.random(SIZE) + 0.5 * (np.arange(SIZE) > 300)

    def choose(self, rid: str, output: list[int], mask: np.ndarray | None) -> int:
        values = self.prefer(rid, output)
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:SIZE]
            values = np.where(bits > 0, values, -1)
        return int(values.argmax())

    def step(self, drafts: Callable[[str], list[int]] | None = None) -> None:
        """Schedule, mask, sample greedily, accept what agrees: as EngineCore.step does."""
        scheduler = self.scheduler
        output = scheduler.schedule()
        grammar = scheduler.get_grammar_bitmask(output)
        rows = {}
        start = 0
        for rid in grammar.structured_output_request_ids if grammar is not None else ():
            rows[rid] = start
            start += 1 + len(output.scheduled_spec_decode_tokens.get(rid, ()))
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for rid in ids:
            given = output.scheduled_spec_decode_tokens.get(rid, [])
            text = self.outputs.setdefault(rid, [])
            tokens: list[int] = []
            for place in range(len(given) + 1):
                mask = grammar.grammar_bitmask[rows[rid] + place] if rid in rows else None
                tokens.append(self.choose(rid, text + tokens, mask))
                if place == len(given) or tokens[-1] != given[place]:
                    break
            sampled.append(tokens)
        self.steps += output.total_num_scheduled_tokens > 0
        self.scheduled.append(dict(output.scheduled_spec_decode_tokens))
        result = ModelRunnerOutput(ids, {rid: row for row, rid in enumerate(ids)}, sampled)
        # Asynchronously scheduled, a request may have ended in the step before.
        requests = {rid: scheduler.requests[rid] for rid in ids if rid in scheduler.requests}
        scheduler.update_from_output(output, result)
        for rid, request in requests.items():
            self.outputs[rid] = list(request.output_token_ids)
        if drafts is not None:
            going = [rid for rid in ids if rid in scheduler.requests]
            scheduler.update_draft_token_ids(DraftTokenIds(going, [drafts(rid) for rid in going]))

    def run(self, most: int = 400, drafts: Callable[[str], list[int]] | None = None) -> dict[str, list[int]]:
        for _ in range(most):
            if not self.scheduler.has_requests():
                return self.outputs
            self.step(drafts)
        raise AssertionError(f"not done after {most} steps")


def run_all(scheduler: Any, rids: str = "abc", **arguments: Any) -> tuple[dict[str, list[int]], Model]:
    for rid in rids:
        add_request(scheduler, rid, **arguments)
    model = Model(scheduler)
    return model.run(), model
