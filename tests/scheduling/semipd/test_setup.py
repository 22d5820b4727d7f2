# SPDX-License-Identifier: Apache-2.0
"""What semi-PD refuses by name, and what it puts into an engine's configuration."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.scheduling.real_scheduler import same_environment
from vllm_ext import config
from vllm_ext.scheduling.phases.controller import SplitController
from vllm_ext.scheduling.semipd import setup


def make_config(model: str, block: dict[str, Any] | None = None, **settings: Any) -> Any:
    arguments = {"enforce_eager": True, "additional_config": {"vllm_ext": {"semipd": block or {}}}, **settings}
    with same_environment():
        return EngineArgs(model=model, max_model_len=256, **arguments).create_engine_config()


def test_seats_are_taken(tiny_moe: str) -> None:
    finished = make_config(tiny_moe)
    assert finished.scheduler_config.scheduler_cls == "vllm_ext.scheduling.factory.Scheduler_with_semipd"
    assert finished.parallel_config.distributed_executor_backend == setup.EXECUTOR
    assert finished.parallel_config.worker_cls == setup.WORKER


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
        ({"tensor_parallel_size": 2}, "tensor, pipeline, data or context parallelism"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"kv_cache_dtype": "skvq_k2v2"}, "--kv-cache-dtype of the pack"),
        ({"enforce_eager": False}, "routed experts in compiled engines"),
        ({"additional_config": {"vllm_ext": {"semipd": {}, "structured": {}}}}, "vllm_ext.structured"),
    ],
)
def test_what_does_not_combine_is_named(tiny_moe: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ConfigError, match=f"semipd does not run with {message}"):
        make_config(tiny_moe, **settings)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"slo_ttft_ms": 0}, "slo_ttft_ms must be above 0, got 0"),
        ({"slo_tpot_ms": -1}, "slo_tpot_ms must be above 0, got -1"),
        ({"percentile": 100}, "percentile must be between 0 and 100, got 100"),
        ({"mode": "off"}, "set vllm_ext.semipd.enabled to false"),
        ({"window": 8}, "window is not part of this release"),
        ({"fairness": 1.0}, "fairness is not part of this release"),
        ({"splits": []}, "splits must be shares"),
        ({"splits": [0.5, 1]}, r"splits must be shares .* got \[0.5, 1\]"),
        ({"splits": ["half"]}, "splits must be shares"),
    ],
)
def test_bad_settings_are_named(tiny_moe: str, block: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        make_config(tiny_moe, block)


def test_a_controller_where_there_is_a_choice(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = make_config(tiny_moe, {"slo_ttft_ms": 300, "slo_tpot_ms": 50, "splits": [0.5, 0.25]})
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda pid: set(range(8)))
    pacer = setup.make_pacer(finished)
    assert isinstance(pacer._controller, SplitController)
    assert pacer._controller._objectives == (0.3, 0.05, 0.9)
    assert [len(split.prefill) for split in setup.plan_device(finished)] == [2, 4]
    # Two cores have one split, and without an objective there is nothing to decide by.
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda pid: {0, 1})
    assert setup.make_pacer(finished)._controller is None
