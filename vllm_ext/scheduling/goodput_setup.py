# SPDX-License-Identifier: Apache-2.0
"""What smartspec does for a given engine: checks at start-up, and the controller with its measured prior."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ext import __version__, config
from vllm_ext.scheduling import trie_proposer
from vllm_ext.scheduling.policy import make_policy
from vllm_ext.speculation.controller import PROBE_EVERY, GoodputController
from vllm_ext.speculation.step_time import StepTimeModel, load_prior

logger = logging.getLogger("vllm.vllm_ext")

#: Drafters that give lists of tokens at a cost that hardly depends on their number: no pass of a model per draft.
LIST_METHODS = ("ngram", "ngram_gpu", "suffix", "custom_class")
#: Drafters that insist on, or are not told, the number of drafts: only their verification is trimmed.
FIXED_METHODS = ("suffix", "custom_class")


class ControlPlan(NamedTuple):
    """Which of the two decisions are ours, and how lengths are limited."""

    k_max: int
    drafts: bool
    trims: bool
    uniform_lengths: tuple[int, ...] | None
    passes_per_draft: int


def read_settings(vllm_config: Any) -> config.Settings:
    """The pack's settings of a finished configuration."""
    return config.parse(config.find_block(vllm_config.additional_config))


def check_engine(vllm_config: Any) -> None:
    """Refuse what only the finished configuration shows. Raises config.ConfigError naming the value and the fix."""
    speculative = vllm_config.speculative_config
    settings = read_settings(vllm_config).smartspec
    assert settings is not None
    if speculative is None:
        raise config.ConfigError("vllm_ext.smartspec needs speculation: add --speculative-config, or drop the block")
    most = speculative.num_speculative_tokens
    if settings.k_max is not None and not 1 <= settings.k_max <= most:
        raise config.ConfigError(
            f"vllm_ext.smartspec.k_max must be 1 to num_speculative_tokens={most}, got {settings.k_max}: "
            f"raise num_speculative_tokens in --speculative-config, or lower k_max"
        )
    if settings.probe_every is not None and settings.probe_every < 1:
        raise config.ConfigError(f"vllm_ext.smartspec.probe_every must be at least 1 step, got {settings.probe_every}")
    trie_proposer.check_drafter(vllm_config, settings)
    if vllm_config.model_config.is_diffusion:
        raise config.ConfigError(
            f"smartspec does not run with diffusion models ({vllm_config.model_config.model}): what vLLM schedules as "
            "their drafts is the canvas they write on, which must not be trimmed; switch smartspec off"
        )
    if vllm_config.model_config.is_hybrid:
        raise config.ConfigError(
            f"smartspec does not run with hybrid models ({vllm_config.model_config.model}): their state-space layers "
            "align blocks to a fixed number of drafts; switch smartspec off"
        )


def plan_control(vllm_config: Any) -> ControlPlan:
    """Decide what is controlled: see docs/smartspec.md, "What is controlled where"."""
    from vllm.platforms import current_platform

    speculative = vllm_config.speculative_config
    settings = read_settings(vllm_config).smartspec
    assert settings is not None
    k_max = settings.k_max or speculative.num_speculative_tokens
    drafts = speculative.method not in FIXED_METHODS
    graphs = vllm_config.compilation_config.cudagraph_mode
    has_decode_graphs = current_platform.is_cuda_alike() and graphs is not None and graphs.has_full_cudagraphs()
    uniform = None
    if has_decode_graphs:
        # Whole decode steps are captured for one length of all requests: the full one and those of stock's table.
        table = speculative.num_speculative_tokens_per_batch_size or ()
        captured = {length for *_, length in table} | {speculative.num_speculative_tokens}
        uniform = tuple(sorted({0} | {length for length in captured if length <= k_max}))
        drafts = drafts and len(uniform) > 1
    # Stock's own verification trimming sees the draft model's logits, which say more than past acceptance.
    trims = not has_decode_graphs and not getattr(speculative, "enable_adaptive_verification", False)
    return ControlPlan(k_max, drafts, trims, uniform, 0 if speculative.method in LIST_METHODS else 1)


def make_controller(vllm_config: Any, plan: ControlPlan, requests: Mapping[str, Any]) -> GoodputController:
    """The controller, with the step times that the start-up sweep stored for this model and device.

    requests: the scheduler's, by id, which a policy weighs.
    """
    settings = read_settings(vllm_config).smartspec
    assert settings is not None
    prior = load_prior(find_prior_path(vllm_config))
    if prior is None:
        logger.info("smartspec: no measured step times; starting from a guess that the first steps replace")
    return GoodputController(
        plan.k_max,
        step_time=StepTimeModel(prior),
        uniform_lengths=plan.uniform_lengths,
        passes_per_draft=plan.passes_per_draft,
        probe_every=settings.probe_every or PROBE_EVERY,
        policy=make_policy(settings.policy, requests),
    )


def find_prior_path(vllm_config: Any) -> Path:
    """File of the step times of this model on this device: <cache_dir>/smartspec/<hash>.json."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    key = {
        "model": [str(model.model), str(model.revision), str(model.dtype), str(model.quantization)],
        "device": [current_platform.device_name, current_platform.get_device_name(), parallel.tensor_parallel_size],
        "drafter": [str(speculative.method), str(speculative.model)],
        "graphs": str(vllm_config.compilation_config.cudagraph_mode),
        "version": __version__,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return read_settings(vllm_config).cache_path / "smartspec" / f"{name}.json"
