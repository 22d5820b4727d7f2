# SPDX-License-Identifier: Apache-2.0
"""Whether an engine drafts what its grammars force, and the speculation that carries these drafts without a drafter.

vLLM verifies drafts only where a speculative configuration exists. Where the user has none, ours names a proposer that
proposes nothing, so that drafts come from the scheduler alone. What vLLM refuses or drops because of that configuration
must not be refused or dropped: patches/structured_carrier.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
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


class Limit(NamedTuple):
    """Why forced tokens are not drafted in some engines, and what would change that."""

    reason: str
    fix: str


_CARRIER = "without --speculative-config the pack would have to switch speculation on, and "
#: Everything that keeps forced tokens from an engine. A metric tells a limit by its place, so new ones go last.
LIMITS: Mapping[str, Limit] = {
    "setting": Limit("vllm_ext.structured.forced_tokens is off", "set it to 'auto'"),
    "v2 runner": Limit(
        "the V2 model runner takes drafts from its device, and what writes them there has not run on a GPU yet",
        "set forced_tokens to 'on', or VLLM_USE_V2_MODEL_RUNNER=0 in the environment",
    ),
    "async": Limit(
        "with asynchronous scheduling the next step is scheduled before the grammar knows the last token",
        "add --no-async-scheduling",
    ),
    "pipeline": Limit(
        "several batches are in flight with --pipeline-parallel-size above 1", "use --tensor-parallel-size"
    ),
    "data": Limit("it is not tested with --data-parallel-size above 1", "use one server per replica"),
    "pooling": Limit("the model generates no text", "drop the block"),
    "diffusion": Limit("what vLLM schedules as drafts of diffusion models is their canvas", "drop the block"),
    "hybrid": Limit("state-space layers of hybrid models align blocks to a fixed number of drafts", "drop the block"),
    "probabilistic": Limit(
        "drafts that the grammar forces are not drawn as those of draft_sample_method 'probabilistic' are",
        "drop draft_sample_method from --speculative-config",
    ),
    "rejection": Limit(
        "only rejection_sample_method 'standard' looks at what is drafted",
        "drop rejection_sample_method from --speculative-config",
    ),
    "adaptive": Limit(
        "with enable_adaptive_verification the device chooses which drafts are verified",
        "drop enable_adaptive_verification from --speculative-config",
    ),
    "v2 record": Limit(
        "the V2 model runner takes drafts from its device, and this vLLM's is another", "read `vllm-ext doctor`"
    ),
    "record": Limit(_CARRIER + "this vLLM is another", "read `vllm-ext doctor`"),
    "platform": Limit(
        _CARRIER + "does so on CPUs only, where it changes neither graphs nor asynchronous scheduling",
        'add --speculative-config, for example \'{"method":"ngram","num_speculative_tokens":8}\'',
    ),
    "v2 carrier": Limit(
        _CARRIER + "the V2 model runner takes no drafter of a plugin",
        'add --speculative-config, for example \'{"method":"ngram","num_speculative_tokens":8}\'',
    ),
    "processors": Limit(
        _CARRIER + "vLLM loads no custom logits processors beside speculation",
        "drop --logits-processors, and packages that bring some",
    ),
    "lora": Limit(_CARRIER + "that is not tested with --enable-lora", "drop --enable-lora"),
    "transfer": Limit(_CARRIER + "that is not tested with --kv-transfer-config", "drop --kv-transfer-config"),
    "replay": Limit(_CARRIER + "vLLM refuses traces beside speculation", "drop --enable-trace-replay"),
}


class ForcedTokensPlan(NamedTuple):
    """Whether forced tokens are drafted; `limit` (a key of LIMITS) and `detail` say why not."""

    limit: str = ""
    detail: str = ""

    @property
    def is_on(self) -> bool:
        """Whether nothing keeps them off."""
        return not self.limit

    @property
    def reason(self) -> str:
        """Why not, in words."""
        if self.is_on:
            return ""
        return LIMITS[self.limit].reason + (f": {self.detail}" if self.detail else "")

    @property
    def fix(self) -> str:
        """What would change that."""
        return "" if self.is_on else LIMITS[self.limit].fix

    @property
    def limit_index(self) -> int:
        """The limit as a number, for a metric: 0 for none, else its place in LIMITS."""
        return 1 + list(LIMITS).index(self.limit) if self.limit else 0

    def describe(self) -> str:
        """One clear line for logs and doctor."""
        return "forced tokens on" if self.is_on else f"forced tokens off: {self.reason}"


def find_plan(limit_index: int) -> ForcedTokensPlan:
    """The plan of a metric's number (`limit_index`). Raises IndexError for a number of another release."""
    return ForcedTokensPlan(["", *LIMITS][limit_index])


def uses_carrier(vllm_config: Any) -> bool:
    """Whether the speculation of a finished configuration is ours."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == CARRIER


def plan_forced_tokens(vllm_config: Any) -> ForcedTokensPlan:
    """Decide for a finished configuration. Raises config.ConfigError where `on` cannot be honoured, naming the fix."""
    settings = config.read_settings(vllm_config).structured
    if settings is None or not settings.enabled or settings.forced_tokens == "off":
        return ForcedTokensPlan("setting")
    is_wanted = settings.forced_tokens == "on"
    limits = (*_list_limits(vllm_config, is_wanted), *_list_limits_of_drafter(vllm_config))
    plan = next((ForcedTokensPlan(limit, detail) for applies, limit, detail in limits if applies), ForcedTokensPlan())
    if is_wanted and not plan.is_on:
        raise config.ConfigError(
            f"vllm_ext.structured.forced_tokens 'on' cannot be honoured: {plan.reason}; {plan.fix}, or set it to 'auto'"
        )
    return plan


def plan_platform() -> ForcedTokensPlan:
    """What `auto` does for a plain `vllm serve MODEL` on this machine, as far as no model is needed to tell."""
    from vllm.platforms import current_platform

    mismatch = _find_carrier_mismatch()
    if mismatch is not None:
        return ForcedTokensPlan("record", mismatch)
    return ForcedTokensPlan() if current_platform.is_cpu() else ForcedTokensPlan("platform")


def _list_limits(vllm_config: Any, is_wanted: bool) -> list[tuple[bool, str, str]]:
    """(applies, key of LIMITS, detail) of what does not depend on the drafter."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return [
        (bool(vllm_config.use_v2_model_runner) and not is_wanted, "v2 runner", ""),
        (bool(vllm_config.scheduler_config.async_scheduling), "async", ""),
        (parallel.pipeline_parallel_size > 1, "pipeline", ""),
        (parallel.data_parallel_size > 1, "data", ""),
        (model.runner_type != "generate", "pooling", ""),
        (bool(model.is_diffusion), "diffusion", ""),
        (bool(model.is_hybrid), "hybrid", ""),
    ]


def _list_limits_of_drafter(vllm_config: Any) -> list[tuple[bool, str, str]]:
    from vllm.platforms import current_platform

    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    is_v2 = bool(vllm_config.use_v2_model_runner)
    if speculative is not None:
        mismatch = _find_mismatch("structured_carrier") if is_v2 else None
        method = speculative.rejection_sample_method
        return [
            (speculative.draft_sample_method == "probabilistic", "probabilistic", ""),
            (method != "standard", "rejection", f"not {method!r}"),
            (is_v2 and bool(speculative.enable_adaptive_verification), "adaptive", ""),
            (mismatch is not None, "v2 record", mismatch or ""),
        ]
    mismatch = _find_carrier_mismatch()
    has_processors = bool(model.logits_processors) or bool(metadata.entry_points(group="vllm.logits_processors"))
    return [
        (mismatch is not None, "record", mismatch or ""),
        (not current_platform.is_cpu(), "platform", ""),
        (is_v2, "v2 carrier", ""),
        (has_processors, "processors", ""),
        (vllm_config.lora_config is not None, "lora", ""),
        (vllm_config.kv_transfer_config is not None, "transfer", ""),
        (bool(model.enable_trace_replay), "replay", ""),
    ]


def _find_carrier_mismatch() -> str | None:
    return next(filter(None, map(_find_mismatch, ("structured_carrier", "cpu_sampling"))), None)


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
