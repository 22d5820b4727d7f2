# SPDX-License-Identifier: Apache-2.0
"""Measured step times: taken by this process's scheduler and by engines like it, and by no other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scheduling.real_scheduler import MODEL, build_scheduler
from vllm_ext.scheduling import step_times
from vllm_ext.speculation.prior import store_prior
from vllm_ext.speculation.step_time import COEFFICIENTS

TIMES = dict.fromkeys(COEFFICIENTS, 1.5)


@pytest.fixture
def vllm_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(step_times, "_measured", {})
    return build_scheduler(4, tmp_path).vllm_config


CHANGES: dict[str, Callable[[Any], None]] = {
    "model": lambda config: setattr(config.model_config, "model", "another/model"),
    "revision": lambda config: setattr(config.model_config, "revision", "v2"),
    "quantization": lambda config: setattr(config.model_config, "quantization", "mxmoe"),
    "bit plan": lambda config: setattr(config.model_config.hf_config, "quantization_config", {"plan_sha256": "0"}),
    "online plan": lambda config: config.additional_config["vllm_ext"].update(kv_cache={"window": 64}),
    "cache": lambda config: setattr(config.cache_config, "cache_dtype", "fp8"),
    "tensor parallelism": lambda config: setattr(config.parallel_config, "tensor_parallel_size", 2),
    "expert parallelism": lambda config: setattr(config.parallel_config, "enable_expert_parallel", True),
    "drafter": lambda config: setattr(config.speculative_config, "method", "suffix"),
    "drafts": lambda config: setattr(config.speculative_config, "num_speculative_tokens", 5),
    "graphs": lambda config: setattr(config.compilation_config, "cudagraph_capture_sizes", [1, 2]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_engine_has_another_file(what: str, vllm_config: Any) -> None:
    before = step_times.find_prior_path(vllm_config)
    assert step_times.find_prior_path(vllm_config) == before
    CHANGES[what](vllm_config)
    assert step_times.find_prior_path(vllm_config) != before


def test_another_machine_has_another_file(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {step_times.find_prior_path(vllm_config)}
    monkeypatch.setattr(step_times, "_name_cpu", lambda: "another")
    step_times._describe_device.cache_clear()
    paths.add(step_times.find_prior_path(vllm_config))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    step_times._describe_device.cache_clear()
    paths.add(step_times.find_prior_path(vllm_config))
    monkeypatch.setattr(step_times, "_count_cores", lambda: 1000)
    step_times._describe_device.cache_clear()
    paths.add(step_times.find_prior_path(vllm_config))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    paths.add(step_times.find_prior_path(vllm_config))
    step_times._describe_device.cache_clear()
    assert len(paths) == 5


def test_how_lengths_are_chosen_takes_no_time(vllm_config: Any, tmp_path: Path) -> None:
    before = step_times.find_prior_path(vllm_config)
    block = vllm_config.additional_config["vllm_ext"]
    block |= {"smartspec": {"policy": "priority"}, "cache_dir": str(tmp_path / "other")}
    after = step_times.find_prior_path(vllm_config)
    assert (after.name, after.parent) == (before.name, tmp_path / "other" / "smartspec")


def test_a_folder_by_its_full_path(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = step_times.find_prior_path(vllm_config)
    monkeypatch.chdir(MODEL.parent)
    vllm_config.model_config.model = MODEL.name
    assert step_times.find_prior_path(vllm_config) == before


def test_the_description_is_text(vllm_config: Any) -> None:
    """The same in every process: no addresses of objects."""
    text = json.dumps(step_times.describe_engine(vllm_config), default=str)
    assert " object at 0x" not in text
    assert "tiny_moe" in text


def test_times_are_handed_over_and_stored(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_times.find_step_times(vllm_config) is None
    step_times.keep_step_times(vllm_config, TIMES)
    assert step_times.find_step_times(vllm_config) == TIMES
    # As a process that measured nothing.
    monkeypatch.setattr(step_times, "_measured", {})
    assert step_times.find_step_times(vllm_config) == TIMES


def test_a_full_disk_keeps_nothing_from_this_engine(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, coefficients: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_times, "store_prior", fail)
    monkeypatch.setattr(step_times.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        step_times.keep_step_times(vllm_config, TIMES)
    assert "cannot keep its step times in" in caplog.text
    assert "No space left on device" in caplog.text
    assert step_times.find_step_times(vllm_config) == TIMES
    assert not step_times.find_prior_path(vllm_config).exists()


def test_a_broken_file_is_measured_again(vllm_config: Any) -> None:
    path = step_times.find_prior_path(vllm_config)
    store_prior(path, TIMES)
    assert step_times.find_step_times(vllm_config) == TIMES
    path.write_text("[" * 100_000)
    assert step_times.find_step_times(vllm_config) is None


def test_the_cpu_has_a_name() -> None:
    assert step_times._name_cpu()
    assert step_times._count_cores() >= 1
