# SPDX-License-Identifier: Apache-2.0
"""Every patch record of the pack, and how one is applied. At most 12 records and 25 symbols: see README.md."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable

from . import signature
from .record import PatchRecord, Symbol

logger = logging.getLogger("vllm.vllm_ext")

RECORDS: tuple[PatchRecord, ...] = (
    PatchRecord(
        name="engine_config",
        feature="core",
        process="every",
        symbols=(Symbol("vllm.engine.arg_utils:EngineArgs.create_engine_config", "6ed5996fbeca"),),
        reason="vLLM has no plugin hook that sees an engine's arguments before its configuration is built",
        change="parses --additional-config.vllm_ext, checks what combines, exports the active features; "
        "calls the original at once where nothing of ours is used",
        without="only bare --quantization names work: settings, checks and metrics of the pack are off",
        removal="vLLM offers general plugins a configuration callback",
        apply="vllm_ext.patches.engine_config:wrap_create_engine_config",
    ),
    PatchRecord(
        name="metrics_route",
        feature="core",
        process="api",
        symbols=(
            Symbol("vllm.entrypoints.serve.instrumentator.metrics:attach_router", "a287ccbefbbe"),
            Symbol("vllm.v1.metrics.prometheus:get_prometheus_registry", "5d704f29a71d"),
        ),
        reason="with --api-server-count above 1 the registry behind /metrics is built anew at every request, "
        "and custom collectors cannot join it",
        change="answers /metrics of such a server from the same registry with the pack's collector added; "
        "a single API server is left alone",
        without="the pack's metrics are missing where several API servers share /metrics",
        removal="vLLM lets plugins add collectors to the registry behind /metrics",
        apply="vllm_ext.patches.metrics:wrap_attach_router",
    ),
    PatchRecord(
        name="drafting",
        feature="smartspec",
        process="engine",
        symbols=(
            Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__", "dab981f437af"),
            Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids", "9e3287256f36"),
        ),
        reason="vLLM tells a list drafter one number of drafts for the whole batch, and neither request ids nor who "
        "has left; its n-gram drafter takes several times as long as its search",
        change="gives list drafters of the V1 model runner a length per request, by which drafts are cut; n-grams "
        "with such lengths are searched by the pack, which finds the same drafts, and where smartspec.drafter is trie, "
        "drafts come from tries; other drafters and engines without smartspec pass through",
        without="drafters make as many drafts for every request as the longest needs, verification cuts them, and the "
        "trie drafter is the n-gram drafter that carries it",
        removal="SchedulerOutput carries a number of drafts by request, and custom_class drafters are given request "
        "ids",
        apply="vllm_ext.patches.speculation:wrap_drafting",
    ),
    PatchRecord(
        name="step_sweep",
        feature="smartspec",
        process="engine",
        symbols=(Symbol("vllm.v1.executor.abstract:Executor.compile_or_warm_up_model", "3be8fd00be68"),),
        reason="the scheduler cannot reach the workers, and nothing runs between their warm-up and its construction",
        change="times forward passes of a few sizes once per model and device; engines without smartspec pass through",
        without="smartspec starts from guessed step times",
        removal="vLLM gives schedulers measured step times, or plugins a callback after warm-up",
        apply="vllm_ext.patches.speculation:wrap_compile_or_warm_up_model",
    ),
    PatchRecord(
        name="cpu_sampling",
        feature="smartspec",
        process="engine",
        symbols=(Symbol("vllm.v1.sample.rejection_sampler:expand_batch_to_tokens", "be07f15b2a59"),),
        reason="on the CPU vLLM 0.32 divides the logits of drafted tokens by a temperature that nobody wrote, so that "
        "speculation changes what is sampled",
        change="expands values of requests to their tokens in plain torch on the CPU; other devices pass through",
        without="requests that are not greedy get tokens of another distribution where they speculate on a CPU",
        removal="vLLM's CPU kernel writes its result",
        apply="vllm_ext.patches.cpu_sampling:wrap_expand_batch_to_tokens",
        also=("structured",),
    ),
    PatchRecord(
        name="structured_name",
        feature="structured",
        process="every",
        symbols=(Symbol("vllm.config.structured_outputs:StructuredOutputsConfig.compute_hash", "3be8fd00be68"),),
        reason="the names of --structured-outputs-config.backend are a closed list in vLLM, and the command line is "
        "parsed before any configuration is known",
        change="adds the name vllm_ext to that list; vLLM's own names keep their meaning",
        without="structured generation is switched on by --additional-config.vllm_ext.structured only",
        removal="vLLM lets plugins register structured-output backends",
        apply="vllm_ext.patches.structured_backend:add_backend_name",
    ),
    PatchRecord(
        name="structured_backend",
        feature="structured",
        process="engine",
        symbols=(
            Symbol("vllm.sampling_params:SamplingParams._validate_structured_outputs", "bd3e5d654898"),
            Symbol("vllm.v1.engine.async_llm:AsyncLLM.add_request", "c2098751f35d"),
            Symbol("vllm.v1.structured_output:StructuredOutputManager.__init__", "6d452b83ca24"),
            Symbol("vllm.v1.structured_output:StructuredOutputManager.grammar_init", "0920572169cf"),
        ),
        reason="vLLM's first structured request chooses the one backend of an engine; requests are validated on the "
        "event loop and compiled without limits",
        change="where the configuration names our backend, requests are checked off the event loop and every one is "
        "compiled by the engine that honours it; other engines pass through",
        without="engines with structured generation of the pack are refused",
        removal="vLLM takes structured-output backends from plugins, one per request",
        apply="vllm_ext.patches.structured_backend:wrap_requests",
    ),
    PatchRecord(
        name="structured_carrier",
        feature="structured",
        process="engine",
        symbols=(
            Symbol("vllm.sampling_params:SamplingParams._validate_spec_decode", "6f5a0a6139b8"),
            Symbol("vllm.v1.sample.logits_processor:build_logitsprocs", "522caa04be96"),
            Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", "2887086d95a9"),
            Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs", "43b60cc79f3b"),
        ),
        reason="vLLM verifies drafts of its own drafters only: beside a speculative configuration, which makes it "
        "refuse min_p and logit_bias and sample all requests by rejection, and on the V2 model runner from its "
        "device's table",
        change="where that configuration is the pack's own, such requests are served, without drafts, and steps "
        "without drafts are sampled as without speculation; on the V2 model runner, tokens that a grammar forces are "
        "written into that table; other engines pass through",
        without="tokens that a grammar forces are drafted only beside a drafter of the user's, on the V1 model runner",
        removal="vLLM verifies drafts of the scheduler, on both model runners and without a speculative configuration",
        apply="vllm_ext.patches.structured_carrier:wrap_speculation",
    ),
    PatchRecord(
        name="structured_masks",
        feature="structured",
        process="engine",
        symbols=(Symbol("vllm.v1.structured_output.utils:apply_grammar_bitmask", "54dfbad4640c"),),
        reason="on CPUs vLLM takes logits to float32 and back to mask them, row by row",
        change="masks logits on the CPU in the dtype that they have; other devices pass through",
        without="masks cost more on CPUs",
        removal="vLLM masks bfloat16 logits directly",
        apply="vllm_ext.patches.structured_masks:wrap_apply_grammar_bitmask",
    ),
    PatchRecord(
        name="kv_cache_dtypes",
        feature="kv_cache",
        process="every",
        symbols=(Symbol("vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype", "0b7ab713717d"),),
        reason="the names of --kv-cache-dtype are a closed list in vLLM, and the command line is parsed before any "
        "configuration is known",
        change="adds the pack's names to that list, as bytes; vLLM's own names keep their meaning",
        without="--kv-cache-dtype knows vLLM's own names only",
        removal="vLLM lets plugins register KV-cache dtypes",
        apply="vllm_ext.patches.kv_cache:add_cache_dtypes",
    ),
    PatchRecord(
        name="kv_cache_attention",
        feature="kv_cache",
        process="engine",
        symbols=(Symbol("vllm.model_executor.layers.attention.attention:Attention.__init__", "e4d681373112"),),
        reason="vLLM chooses backends by platform, not by a layer's dtype, tells an implementation neither its layer "
        "nor its neighbours, and CPUs ignore chosen backends",
        change="layers whose KV-cache dtype is ours get our backend and a layer beside that owns the pages of their "
        "window; other layers pass through",
        without="engines with a KV-cache dtype of the pack are refused",
        removal="vLLM passes layer names to backends and asks plugins for a layer's backend",
        apply="vllm_ext.patches.kv_cache:wrap_attention",
    ),
    PatchRecord(
        name="lane_threads",
        feature="semipd",
        process="engine",
        symbols=(
            Symbol("vllm.forward_context:get_forward_context", "5d704f29a71d"),
            Symbol("vllm.forward_context:is_forward_context_available", "5d704f29a71d"),
            Symbol("vllm.forward_context:override_forward_context", "96934404554a"),
        ),
        reason="vLLM has one forward context per process, and two lanes run a model at once",
        change="keeps the forward context by thread; with one thread nothing changes",
        without="semipd does not start",
        removal="vLLM's forward context is a ContextVar",
        apply="vllm_ext.patches.lane_threads:separate_threads",
    ),
)


def find_record(name: str) -> PatchRecord:
    """The record of this name; KeyError names the known ones."""
    for record in RECORDS:
        if record.name == name:
            return record
    raise KeyError(f"no patch record {name!r}; known: {', '.join(record.name for record in RECORDS)}")


def select_records(features: Iterable[str], process: str) -> list[PatchRecord]:
    """Records to apply in `process` for `features`; "core" records count wherever any feature is on."""
    wanted = set(features)
    if wanted:
        wanted.add("core")
    return [record for record in RECORDS if record.process == process and wanted & {record.feature, *record.also}]


def find_mismatch(record: PatchRecord) -> str | None:
    """Why the record does not fit the imported vLLM, in one line; None when every symbol matches."""
    for symbol in record.symbols:
        try:
            live = signature.read_live_signature(symbol.target)
        except signature.SymbolAbsentError as error:
            return f"{error} (absent)"
        if signature.compute_digest(live) != symbol.digest:
            return f"{symbol.target} is now {live}"
    return None


def apply_record(name: str) -> bool:
    """Apply one record if vLLM still is what it was written against; otherwise warn in one line and return False."""
    record = find_record(name)
    mismatch = find_mismatch(record)
    if mismatch is not None:
        logger.warning(
            "vllm-ext: patch %s is left out (%s), so %s. `vllm-ext doctor` lists all patches.",
            record.name,
            mismatch,
            record.without,
        )
        return False
    module, _, function = record.apply.partition(":")
    getattr(importlib.import_module(module), function)()
    return True
