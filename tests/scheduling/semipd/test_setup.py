# SPDX-License-Identifier: Apache-2.0
"""What semi-PD refuses by name, and what it puts into an engine's configuration."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.scheduling.real_scheduler import same_environment
from vllm_ext import config
from vllm_ext.scheduling.phases.controller import SplitController
from vllm_ext.scheduling.phases.published import NearestPublishedController
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
        ({"kv_cache_dtype": "skvq_k2v2"}, "a --kv-cache-dtype that quantizes"),
        ({"kv_cache_dtype": "fp8"}, "a --kv-cache-dtype that quantizes"),
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
        ({"fairness": -1.0}, "fairness .* must be above 0"),
        ({"admission": "refuse"}, "add vllm_ext.semipd.slo_ttft_ms"),
        ({"splits": []}, "splits must be shares"),
        ({"splits": [0.5, 1]}, r"splits must be shares .* got \[0.5, 1\]"),
        ({"splits": ["half"]}, "splits must be shares"),
    ],
)
def test_bad_settings_are_named(tiny_moe: str, block: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        make_config(tiny_moe, block)


def test_a_controller_where_there_is_an_objective(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"slo_ttft_ms": 300, "slo_tpot_ms": 50, "splits": [0.5, 0.25]}
    finished = make_config(tiny_moe, settings, max_num_batched_tokens=512)
    monkeypatch.setattr(setup, "find_cores", lambda: list(range(8)))
    controller: Any = setup.make_pacer(finished)._controller
    assert isinstance(controller, SplitController)
    assert controller._objectives == (0.3, 0.05, 0.9)
    assert (controller._mixed._budget, controller._refuses) == (512, True)
    assert [len(split.prefill) for split in setup.plan_device(finished)] == [2, 4]
    # Two cores have one split, but batches of both phases are another way.
    monkeypatch.setattr(setup, "find_cores", lambda: [0, 1])
    assert setup.make_pacer(finished)._controller is not None
    # Without an objective there is nothing to decide by.
    assert setup.make_pacer(make_config(tiny_moe))._controller is None
    always = make_config(tiny_moe, {"mode": "always", "slo_tpot_ms": 50})
    published = make_config(tiny_moe, {"controller": "published", "slo_tpot_ms": 50})
    assert isinstance(setup.make_pacer(published)._controller, NearestPublishedController)
    controller = setup.make_pacer(always)._controller
    assert (controller._mixed, controller._refuses) == (None, False)


def test_refusing_is_done_where_requests_come_in(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[Any] = []
    monkeypatch.setattr(setup.door, "follow_limit", followed.append)
    make_config(tiny_moe, {"slo_ttft_ms": 300})
    assert followed == []
    finished = make_config(tiny_moe, {"slo_ttft_ms": 300, "admission": "refuse"})
    assert followed == [finished]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OMP_PLACES", "{0},{1}", r"OMP_PLACES='\{0\},\{1\}' ties OpenMP's threads to cores"),
        ("GOMP_CPU_AFFINITY", "0 1", "GOMP_CPU_AFFINITY='0 1' ties"),
        ("OMP_PROC_BIND", "TRUE", "OMP_PROC_BIND='TRUE' ties"),
        ("KMP_AFFINITY", "granularity=fine,compact", "KMP_AFFINITY='granularity=fine,compact' ties"),
        ("VLLM_CPU_OMP_THREADS_BIND", "0|1", r"semipd: VLLM_CPU_OMP_THREADS_BIND='0\|1' must be cores of one rank"),
        ("VLLM_CPU_NUM_OF_RESERVED_CPU", "9999", "semipd: VLLM_CPU_NUM_OF_RESERVED_CPU='9999' must be a number below"),
    ],
)
def test_who_else_places_threads_is_named(
    tiny_moe: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(config.ConfigError, match=message):
        make_config(tiny_moe)


def test_threads_may_be_left_alone(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    monkeypatch.setenv("KMP_AFFINITY", "disabled")
    assert make_config(tiny_moe).parallel_config.worker_cls == setup.WORKER


def test_models_whose_blocks_are_not_fenced(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = make_config(tiny_moe)
    monkeypatch.setattr(finished.model_config, "attention_chunk_size", 8192)
    with pytest.raises(config.ConfigError, match="models with chunked local attention"):
        setup.check_engine(finished)
    monkeypatch.setattr(type(finished.model_config), "use_mla", True)
    with pytest.raises(config.ConfigError, match="models with multi-head latent attention"):
        setup.check_engine(finished)
