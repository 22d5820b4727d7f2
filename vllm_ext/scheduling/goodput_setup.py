# SPDX-License-Identifier: Apache-2.0
"""What smartspec does for a given engine: checks at start-up, and the controller with its measured prior."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType

from vllm_ext import config
from vllm_ext.scheduling import graphs, step_times, trie_proposer
from vllm_ext.scheduling.drafters import REFUSED_METHOD, describe_drafter
from vllm_ext.scheduling.policy import make_policy
from vllm_ext.speculation.acceptance import AcceptanceModel
from vllm_ext.speculation.controller import PROBE_EVERY, GoodputController
from vllm_ext.speculation.pace import HOLD_STEPS
from vllm_ext.speculation.step_time import StepTimeModel

logger = logging.getLogger("vllm.vllm_ext")

#: Numbers of rows that a linear layer of vLLM's CPU backend keeps its oneDNN primitives for (`create_onednn_mm` in
#: vllm/model_executor/layers/utils.py:587, 0.32). Another number makes a primitive anew in every layer.
KEPT_SHAPES = 32


class ControlPlan(NamedTuple):
    """Which of the two decisions are ours, and how lengths are limited."""

    k_max: int
    #: Whether the number of drafts is ours, and whether the number of those that are verified is.
    plans_drafts: bool
    trims: bool
    #: Lengths that all requests of a step have in common; None for a length each.
    uniform_lengths: tuple[int, ...] | None
    #: Tokens that forward passes are padded to.
    graph_sizes: tuple[int, ...]
    #: Forward passes of the drafter by the longest draft that is asked for, 0 to num_speculative_tokens.
    passes: tuple[int, ...]
    #: Steps that one plan of drafts stands for at most.
    hold_steps: int


def check_engine(vllm_config: Any) -> None:
    """Refuse what only the finished configuration shows, and have the draft lengths captured that will be used.

    Raises config.ConfigError naming the value and the fix.
    """
    speculative = vllm_config.speculative_config
    settings = config.read_settings(vllm_config).smartspec
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
    if settings.hold_steps is not None and settings.hold_steps < 1:
        raise config.ConfigError(f"vllm_ext.smartspec.hold_steps must be at least 1 step, got {settings.hold_steps}")
    trie_proposer.check_drafter(vllm_config, settings)
    if speculative.method == REFUSED_METHOD:
        raise config.ConfigError(
            f"smartspec does not run with the speculative method {REFUSED_METHOD!r}, which makes no drafts: "
            "switch smartspec off"
        )
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
    graphs.declare_lengths(vllm_config, describe_drafter(vllm_config), settings.k_max or most)
    _check_control(vllm_config)


def _check_control(vllm_config: Any) -> None:
    """Refuse an engine in which nothing would be left to choose."""
    plan, speculative = plan_control(vllm_config), vllm_config.speculative_config
    if plan.plans_drafts or plan.trims:
        return
    mode = vllm_config.compilation_config.cudagraph_mode.name
    if plan.uniform_lengths == (0,):
        table = speculative.num_speculative_tokens_per_batch_size
        raise config.ConfigError(
            f"vllm_ext.smartspec.k_max={plan.k_max} is below every draft length that cudagraph_mode {mode} captures "
            f"with num_speculative_tokens_per_batch_size={table}: raise k_max, add a length up to it to the table, or "
            "drop the table"
        )
    raise config.ConfigError(
        f"smartspec has nothing to choose here: the speculative method {speculative.method!r} always makes "
        f"num_speculative_tokens={speculative.num_speculative_tokens} drafts, and cudagraph_mode {mode} verifies as "
        "many for every request: set cudagraph_mode in --compilation-config to PIECEWISE, or switch smartspec off"
    )


def plan_control(vllm_config: Any) -> ControlPlan:
    """Decide what is controlled: see docs/smartspec.md, "What is controlled where"."""
    speculative = vllm_config.speculative_config
    settings = config.read_settings(vllm_config).smartspec
    assert settings is not None
    k_max = settings.k_max or speculative.num_speculative_tokens
    drafter = describe_drafter(vllm_config)
    limits = graphs.find_limits(vllm_config, drafter, k_max)
    uniform = limits.uniform_lengths
    plans_drafts = drafter.takes_number and uniform != (0,)
    return ControlPlan(
        k_max,
        plans_drafts=plans_drafts,
        # Stock's own trimming, on the V2 runner, sees the draft model's logits, which say more than past acceptance.
        trims=uniform is None and not speculative.enable_adaptive_verification,
        uniform_lengths=uniform,
        graph_sizes=limits.sizes,
        passes=drafter.passes,
        # Without a plan all there is to choose are drafts at hand, which are others at every step.
        hold_steps=(settings.hold_steps or HOLD_STEPS) if plans_drafts else 1,
    )


def describe_plan(vllm_config: Any, plan: ControlPlan) -> str:
    """One line of what will be chosen, and of what will not."""
    if not plan.plans_drafts:
        drafts = "the drafter's own number of drafts"
    elif plan.uniform_lengths is not None:
        drafts = f"{', '.join(map(str, plan.uniform_lengths))} drafts for all requests of a step"
    else:
        drafts = f"0 to {plan.k_max} drafts by request"
    if plan.trims:
        trims = "verification trimmed by request"
    elif vllm_config.speculative_config.enable_adaptive_verification:
        trims = "verification left to enable_adaptive_verification"
    else:
        trims = "nothing trimmed"
    method, mode = vllm_config.speculative_config.method, vllm_config.compilation_config.cudagraph_mode
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    return f"method {method}, {runner} model runner, cudagraph_mode {mode}: {drafts}, {trims}"


def find_group(requests: Mapping[str, Any], request_id: Hashable) -> int:
    """0 for a greedy request, 1 for one that is sampled: their chances are learned apart (`AcceptanceModel`).

    requests: the scheduler's, by id. One that is gone, whose last outcome is read later, is as good as greedy.
    """
    parameters = getattr(requests.get(str(request_id)), "sampling_params", None)
    return int(parameters is not None and parameters.sampling_type != SamplingType.GREEDY)


def make_controller(vllm_config: Any, plan: ControlPlan, requests: Mapping[str, Any]) -> GoodputController:
    """The controller, with the step times that a start-up sweep measured for this model and device.

    requests: the scheduler's, by id, which a policy weighs and whose sampling tells them apart.
    """
    settings = config.read_settings(vllm_config).smartspec
    assert settings is not None
    logger.info("smartspec: %s", describe_plan(vllm_config, plan))
    prior = step_times.find_step_times(vllm_config)
    if prior is None:
        logger.info("smartspec: no measured step times; starting from a guess that serving replaces")
    controller = GoodputController(
        plan.k_max,
        acceptance=AcceptanceModel(plan.k_max, find_group=functools.partial(find_group, requests)),
        step_time=StepTimeModel(prior),
        uniform_lengths=plan.uniform_lengths,
        graph_sizes=plan.graph_sizes,
        passes=plan.passes[: plan.k_max + 1],
        plans_drafts=plan.plans_drafts,
        trims=plan.trims,
        kept_shapes=KEPT_SHAPES if current_platform.is_cpu() else 0,
        is_ragged=describe_drafter(vllm_config).is_ragged,
        probe_every=settings.probe_every or PROBE_EVERY,
        policy=make_policy(settings.policy, requests),
    )
    controller.warm_up()
    return controller
