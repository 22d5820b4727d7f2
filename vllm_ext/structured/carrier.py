# SPDX-License-Identifier: Apache-2.0
"""Whether an engine drafts what its grammars force, and the speculation that carries these drafts without a drafter.

vLLM verifies drafts only where a speculative configuration exists. Where the user has none, ours names a proposer that
proposes nothing, so that drafts come from the scheduler alone. What vLLM refuses or drops because of that configuration
must not be refused or dropped: patches/structured_carrier.py.
"""

from __future__ import annotations

import copy
import logging
from importlib import metadata
from typing import Any, NamedTuple

from vllm_ext import config
from vllm_ext.patches import registry

logger = logging.getLogger("vllm.vllm_ext")

#: Drafts of a request in a step, where there is no drafter that says how many.
MOST_DRAFTS = 12


class NullProposer:
    """A drafter without drafts, for vLLM's method `custom_class` (V1 model runner)."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's CPU runner calls it; there is nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """No draft for any request."""
        return [[] for _ in sampled_token_ids]


#: How a speculative configuration names the proposer.
CARRIER = f"{__name__}.{NullProposer.__name__}"


class ForcedTokensPlan(NamedTuple):
    """Whether forced tokens are drafted; `reason` says why not, and `fix` what would change that."""

    is_on: bool
    reason: str = ""
    fix: str = ""

    def describe(self) -> str:
        """One clear line for logs and doctor."""
        return "forced tokens on" if self.is_on else f"forced tokens off: {self.reason}"


def uses_carrier(vllm_config: Any) -> bool:
    """Whether the speculation of a finished configuration is ours."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == CARRIER


def plan_forced_tokens(vllm_config: Any) -> ForcedTokensPlan:
    """Decide for a finished configuration. Raises config.ConfigError where `on` cannot be honoured, naming the fix."""
    settings = config.read_settings(vllm_config).structured
    if settings is None or not settings.enabled or settings.forced_tokens == "off":
        return ForcedTokensPlan(False, "vllm_ext.structured.forced_tokens is off")
    obstacle = _find_obstacle(vllm_config)
    if obstacle is None:
        return ForcedTokensPlan(True)
    if settings.forced_tokens == "on":
        raise config.ConfigError(
            f"vllm_ext.structured.forced_tokens 'on' cannot be honoured: {obstacle.reason}; {obstacle.fix}, or set it "
            "to 'auto'"
        )
    return obstacle


def _find_obstacle(vllm_config: Any) -> ForcedTokensPlan | None:
    """What keeps forced tokens from this engine, or None."""
    for applies, reason, fix in (*_list_limits(vllm_config), *_list_limits_of_drafter(vllm_config)):
        if applies:
            return ForcedTokensPlan(False, reason, fix)
    return None


def _list_limits(vllm_config: Any) -> list[tuple[bool, str, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return [
        (
            bool(vllm_config.use_v2_model_runner),
            "the V2 model runner takes drafts from the GPU, where the scheduler cannot put them",
            "set VLLM_USE_V2_MODEL_RUNNER=0 in the environment",
        ),
        (
            bool(vllm_config.scheduler_config.async_scheduling),
            "with asynchronous scheduling the next step is scheduled before the grammar knows the last token",
            "add --no-async-scheduling",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "several batches are in flight with --pipeline-parallel-size above 1",
            "use --tensor-parallel-size",
        ),
        (
            parallel.data_parallel_size > 1,
            "it is not tested with --data-parallel-size above 1",
            "use one server per replica",
        ),
        (model.runner_type != "generate", "the model generates no text", "drop the block"),
        (
            bool(model.is_diffusion),
            "what vLLM schedules as drafts of diffusion models is their canvas",
            "drop the block",
        ),
        (
            bool(model.is_hybrid),
            "state-space layers of hybrid models align blocks to a fixed number of drafts",
            "drop the block",
        ),
    ]


def _list_limits_of_drafter(vllm_config: Any) -> list[tuple[bool, str, str]]:
    from vllm.platforms import current_platform

    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is not None:
        return [
            (
                speculative.draft_sample_method == "probabilistic",
                "drafts that the grammar forces are not drawn as those of draft_sample_method 'probabilistic' are",
                "drop draft_sample_method from --speculative-config",
            ),
            (
                speculative.rejection_sample_method != "standard",
                f"rejection_sample_method {speculative.rejection_sample_method!r} does not look at what is drafted",
                "drop rejection_sample_method from --speculative-config",
            ),
        ]
    carrier = "without --speculative-config the pack would have to switch speculation on, and "
    mismatch = next(filter(None, map(_find_mismatch, ("structured_carrier", "cpu_sampling"))), None)
    return [
        (mismatch is not None, carrier + f"this vLLM is another: {mismatch}", "read `vllm-ext doctor`"),
        (
            not current_platform.is_cpu(),
            carrier + "does so on CPUs only, where it changes neither graphs nor asynchronous scheduling",
            'add --speculative-config, for example \'{"method":"ngram","num_speculative_tokens":8}\'',
        ),
        (
            bool(model.logits_processors) or bool(metadata.entry_points(group="vllm.logits_processors")),
            carrier + "vLLM loads no custom logits processors beside speculation",
            "drop --logits-processors, and packages that bring some",
        ),
        (
            vllm_config.lora_config is not None,
            carrier + "that is not tested with --enable-lora",
            "drop --enable-lora",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            carrier + "that is not tested with --kv-transfer-config",
            "drop --kv-transfer-config",
        ),
        (
            bool(model.enable_trace_replay),
            carrier + "vLLM refuses traces beside speculation",
            "drop --enable-trace-replay",
        ),
    ]


def _find_mismatch(record: str) -> str | None:
    return registry.find_mismatch(registry.find_record(record))


def attach_carrier(vllm_config: Any) -> ForcedTokensPlan:
    """Plan forced tokens and, where no drafter carries them, give the configuration ours. Call it before the engine
    starts, on the finished configuration: only there it is settled what the engine is. Raises config.ConfigError."""
    plan = plan_forced_tokens(vllm_config)
    if plan.is_on and vllm_config.speculative_config is None:
        from vllm.config import SpeculativeConfig

        speculative = SpeculativeConfig(
            method="custom_class",
            model=CARRIER,
            num_speculative_tokens=MOST_DRAFTS,
            target_model_config=vllm_config.model_config,
            target_parallel_config=vllm_config.parallel_config,
        )
        # vLLM 0.32's CPU runner asks for a CUDA stream, and fails, where drafts do not fit into the drafter's context.
        drafter = copy.copy(vllm_config.model_config)
        drafter.max_model_len += MOST_DRAFTS
        speculative.draft_model_config = drafter
        vllm_config.speculative_config = speculative
    logger.info("vllm-ext structured: %s", plan.describe())
    return plan
