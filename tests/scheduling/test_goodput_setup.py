# SPDX-License-Identifier: Apache-2.0
"""What smartspec refuses once the model is known, and which of its decisions it makes for which engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from vllm_ext import config
from vllm_ext.scheduling.goodput_setup import ControlPlan, check_engine, plan_control

K = 6


def describe_engine(method: str = "ngram", uses_v2: bool = False, **smartspec: Any) -> Any:
    """What is read of a finished VllmConfig."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method,
            num_speculative_tokens=K,
            num_speculative_tokens_per_batch_size=None,
            enable_adaptive_verification=False,
            prompt_lookup_max=4,
        ),
        model_config=SimpleNamespace(model="some/model", is_hybrid=False, is_diffusion=False),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        use_v2_model_runner=uses_v2,
        additional_config={"vllm_ext": {"smartspec": smartspec}},
    )


@pytest.mark.parametrize("policy", ["equal", "priority", "deadline", "priority+deadline"])
def test_what_is_accepted(policy: str) -> None:
    check_engine(describe_engine(policy=policy, k_max=K, probe_every=1))
    check_engine(describe_engine("eagle", uses_v2=True))
    check_engine(describe_engine(drafter="trie"))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (describe_engine(k_max=7), "k_max must be 1 to num_speculative_tokens=6, got 7: raise"),
        (describe_engine(k_max=0), "k_max must be 1 to num_speculative_tokens=6, got 0"),
        (describe_engine(probe_every=0), "probe_every must be at least 1 step, got 0"),
        (describe_engine(drafter="trie", uses_v2=True), "needs the V1 model runner, and this engine uses V2"),
    ],
)
def test_bad_settings_are_named(engine: Any, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        check_engine(engine)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("is_hybrid", r"hybrid models \(some/model\): .* switch smartspec off"),
        ("is_diffusion", r"diffusion models \(some/model\): .* the canvas .* switch smartspec off"),
    ],
)
def test_models_whose_drafts_are_something_else(kind: str, message: str) -> None:
    engine = describe_engine()
    setattr(engine.model_config, kind, True)
    with pytest.raises(config.ConfigError, match=message):
        check_engine(engine)


def test_a_missing_drafter_is_named() -> None:
    engine = describe_engine()
    engine.speculative_config = None
    with pytest.raises(config.ConfigError, match="add --speculative-config, or drop the block"):
        check_engine(engine)


def test_what_is_controlled_without_graphs() -> None:
    assert plan_control(describe_engine()) == ControlPlan(K, True, True, None, 0)
    assert plan_control(describe_engine("draft_model", k_max=3)) == ControlPlan(3, True, True, None, 1)
    # Not told a length, or insisting on one.
    assert plan_control(describe_engine("suffix")) == ControlPlan(K, False, True, None, 0)
    adaptive = describe_engine("eagle", uses_v2=True)
    adaptive.speculative_config.enable_adaptive_verification = True
    assert plan_control(adaptive) == ControlPlan(K, True, False, None, 1)


def test_what_is_controlled_with_graphs_of_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, which is not at hand: only what is captured may be used."""
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    engine = describe_engine("eagle")
    engine.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    assert plan_control(engine) == ControlPlan(K, True, False, (0, K), 1)
    engine.speculative_config.num_speculative_tokens_per_batch_size = [(1, 4, 5), (5, 64, 2)]
    assert plan_control(engine).uniform_lengths == (0, 2, 5, K)
    engine.additional_config["vllm_ext"]["smartspec"]["k_max"] = 4
    assert plan_control(engine).uniform_lengths == (0, 2)
    engine.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert plan_control(engine) == ControlPlan(4, True, True, None, 1)
