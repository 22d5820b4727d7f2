# SPDX-License-Identifier: Apache-2.0
"""Where forced tokens are drafted, and what the carrier's speculation leaves as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.sample import logits_processor
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ext import config
from vllm_ext.patches import registry, structured_carrier
from vllm_ext.structured import carrier
from vllm_ext.structured.carrier import (
    CARRIER,
    LIMITS,
    MOST_DRAFTS,
    ForcedTokensPlan,
    NullProposer,
    find_plan,
    plan_forced_tokens,
    plan_platform,
    uses_carrier,
)


def describe_engine(forced: str | None = "auto", speculative: Any = None, **changes: Any) -> Any:
    """What is read of a finished VllmConfig; `changes` by dotted path, dots written as two underscores."""
    engine = SimpleNamespace(
        additional_config={"vllm_ext": {} if forced is None else {"structured": {"forced_tokens": forced}}},
        use_v2_model_runner=False,
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=8),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(
            runner_type="generate",
            is_diffusion=False,
            is_hybrid=False,
            logits_processors=None,
            enable_trace_replay=False,
            max_model_len=100,
        ),
        speculative_config=speculative,
        lora_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *owners, name = path.split("__")
        target = engine
        for owner in owners:
            target = getattr(target, owner)
        setattr(target, name, value)
    return engine


def describe_drafter(**changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "method": "ngram",
            "model": "ngram",
            "draft_sample_method": "greedy",
            "rejection_sample_method": "standard",
            "enable_adaptive_verification": False,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler_config__async_scheduling": True}, "asynchronous scheduling"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size"),
        ({"model_config__runner_type": "pooling"}, "generates no text"),
        ({"model_config__is_diffusion": True}, "canvas"),
        ({"model_config__is_hybrid": True}, "hybrid"),
        ({"model_config__logits_processors": ["a.B"]}, "custom logits processors"),
        ({"model_config__enable_trace_replay": True}, "traces"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"speculative_config": describe_drafter(draft_sample_method="probabilistic")}, "'probabilistic'"),
        ({"speculative_config": describe_drafter(rejection_sample_method="synthetic")}, "'synthetic'"),
    ],
)
def test_auto_is_off_and_on_is_refused_where_it_cannot_run(changes: dict[str, Any], reason: str) -> None:
    plan = plan_forced_tokens(describe_engine(**changes))
    assert not plan.is_on
    assert reason in plan.describe()
    with pytest.raises(config.ConfigError, match="forced_tokens 'on' cannot be honoured") as refused:
        plan_forced_tokens(describe_engine("on", **changes))
    assert plan.reason in str(refused.value)
    assert plan.fix in str(refused.value)


def test_on_where_stock_is_synchronous_anyway() -> None:
    assert plan_forced_tokens(describe_engine()).is_on
    assert plan_forced_tokens(describe_engine("on")).is_on
    assert plan_forced_tokens(describe_engine(speculative=describe_drafter())).is_on
    assert not plan_forced_tokens(describe_engine("off")).is_on
    assert not plan_forced_tokens(describe_engine(None)).is_on
    # A drafter of the user's needs nothing that is not loaded beside it anyway.
    assert plan_forced_tokens(describe_engine(speculative=describe_drafter(), lora_config=object())).is_on


def test_on_the_v2_runner_only_where_it_is_asked_for() -> None:
    plan = plan_forced_tokens(describe_engine(use_v2_model_runner=True, speculative=describe_drafter()))
    assert "has not run on a GPU yet" in plan.reason
    assert "'on'" in plan.fix
    assert plan_forced_tokens(describe_engine("on", use_v2_model_runner=True, speculative=describe_drafter())).is_on
    adaptive = describe_drafter(enable_adaptive_verification=True)
    with pytest.raises(config.ConfigError, match="drop enable_adaptive_verification"):
        plan_forced_tokens(describe_engine("on", use_v2_model_runner=True, speculative=adaptive))
    # vLLM's V2 runner has no drafters of the class custom_class, which carries ours.
    with pytest.raises(config.ConfigError, match="takes no drafter of a plugin"):
        plan_forced_tokens(describe_engine("on", use_v2_model_runner=True))


def test_another_v2_runner_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_mismatch", lambda record: "f is now g")
    given: dict[str, Any] = {"use_v2_model_runner": True, "speculative": describe_drafter()}
    with pytest.raises(config.ConfigError, match="this vLLM's is another: f is now g"):
        plan_forced_tokens(describe_engine("on", **given))


def test_a_metric_tells_every_limit() -> None:
    plans = [ForcedTokensPlan(), *(ForcedTokensPlan(limit) for limit in LIMITS)]
    assert [plan.limit_index for plan in plans] == list(range(len(LIMITS) + 1))
    assert [find_plan(number) for number in range(len(plans))] == plans
    assert all(plan.reason and plan.fix for plan in plans[1:])
    with pytest.raises(IndexError):
        find_plan(len(plans))


def test_what_the_platform_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_platform().is_on
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert "on CPUs only" in plan_platform().reason
    monkeypatch.setattr(registry, "find_mismatch", lambda record: "f is now g")
    assert "f is now g" in plan_platform().reason


def test_on_gpus_only_beside_a_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert "on CPUs only" in plan_forced_tokens(describe_engine()).reason
    assert plan_forced_tokens(describe_engine(speculative=describe_drafter())).is_on


def test_a_vllm_that_does_not_fit_is_left_without_a_carrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_mismatch", lambda record: "f is now g" if "carrier" in record.name else None)
    assert "f is now g" in plan_forced_tokens(describe_engine()).reason
    assert plan_forced_tokens(describe_engine(speculative=describe_drafter())).is_on


def test_the_carrier_is_attached_only_where_no_drafter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def make(**arguments: Any) -> Any:
        made.append(arguments)
        return SimpleNamespace(**arguments)

    monkeypatch.setattr("vllm.config.SpeculativeConfig", make)
    for engine in (describe_engine("off"), describe_engine(lora_config=object()), describe_engine(None)):
        carrier.attach_carrier(engine)
        assert engine.speculative_config is None
    drafter = describe_drafter()
    engine = describe_engine(speculative=drafter)
    assert carrier.attach_carrier(engine).is_on
    assert engine.speculative_config is drafter
    assert not uses_carrier(engine)
    assert made == []
    engine = describe_engine()
    assert carrier.attach_carrier(engine).is_on
    assert uses_carrier(engine)
    assert made[0]["num_speculative_tokens"] == MOST_DRAFTS
    # vLLM's CPU runner fails where drafts do not fit into the drafter's context.
    assert engine.speculative_config.draft_model_config.max_model_len == 100 + MOST_DRAFTS
    assert engine.model_config.max_model_len == 100


def test_the_proposer_proposes_nothing() -> None:
    module, _, name = CARRIER.rpartition(".")
    assert (module, name) == (NullProposer.__module__, "NullProposer")
    proposer = NullProposer(None)
    proposer.load_model(None)
    assert proposer.propose([[1], [], [2, 3]], None, None, slot_mappings=None) == [[], [], []]


# --- what the carrier's speculation leaves as it was ---------------------------------------------------------


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch, undone afterwards."""
    for owner, name in (
        (SamplingParams, "_validate_spec_decode"),
        (gpu_model_runner, "build_logitsprocs"),
        (GPUModelRunner, "_sample"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(original, "__wrapped__", original))
    structured_carrier.wrap_carrier()
    structured_carrier.wrap_carrier()


OURS, USERS = SimpleNamespace(model=CARRIER, method="custom_class"), SimpleNamespace(model="ngram", method="ngram")


@pytest.mark.parametrize("arguments", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}])
def test_requests_are_refused_beside_drafters_only(wrapped: None, arguments: dict[str, Any]) -> None:
    parameters: Any = SamplingParams(**arguments)
    parameters._validate_spec_decode(OURS)
    parameters._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        parameters._validate_spec_decode(USERS)


def test_logits_processors_are_all_there(wrapped: None) -> None:
    def build(speculative: Any, **arguments: Any) -> set[str]:
        vllm_config = SimpleNamespace(
            speculative_config=speculative, scheduler_config=SimpleNamespace(max_num_seqs=4), parallel_config=None
        )
        made = gpu_model_runner.build_logitsprocs(vllm_config, torch.device("cpu"), False, False, **arguments)
        return {type(one).__name__ for one in made.all}

    names = {kind.__name__ for kind in logits_processor.BUILTIN_LOGITS_PROCESSORS}
    assert {"MinPLogitsProcessor", "LogitBiasLogitsProcessor"} <= names
    assert build(OURS) == names
    assert build(USERS) == {"MinTokensLogitsProcessor"}


def test_steps_without_drafts_go_to_the_sampler(wrapped: None) -> None:
    asked: list[Any] = []

    sample: Any = GPUModelRunner._sample
    with_drafts, without = (SimpleNamespace(num_draft_tokens=counts) for counts in ([0, 2], [0, 0]))

    class Model:
        input_batch = SimpleNamespace(sampling_metadata="metadata", update_async_output_token_ids=lambda: None)
        use_async_scheduling = False

        def __init__(self, speculative: Any) -> None:
            self.speculative_config = speculative

        def sampler(self, **arguments: Any) -> str:
            return "sampler"

        def rejection_sampler(self, *arguments: Any) -> str:
            return "rejection sampler"

        def _get_spec_decode_draft_probs(self, metadata: Any) -> None:
            asked.append(metadata)

    found = [
        sample(Model(speculative), None, metadata)
        for speculative in (OURS, USERS)
        for metadata in (with_drafts, without, None)
    ]
    assert found == ["rejection sampler", "sampler", "sampler", "rejection sampler", "rejection sampler", "sampler"]
    assert asked == [with_drafts, with_drafts, without]
