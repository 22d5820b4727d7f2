# SPDX-License-Identifier: Apache-2.0
"""The controller's limit reaches the number that vLLM's API process refuses by."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext import observability
from vllm_ext.scheduling.semipd import door

GAUGE = "vllm_ext:semipd_max_queued_tokens"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "records"
    place.mkdir()
    monkeypatch.setenv(observability.DIRECTORY_ENV, str(place))
    monkeypatch.setattr(observability, "_record", None)
    monkeypatch.setattr(door, "PERIOD", 0.01)
    return place


class SchedulerConfig:
    """What is read and written of vLLM's."""

    def __init__(self, given: int | None) -> None:
        self.max_num_queued_tokens = given


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_limit_is_followed_while_the_configuration_lives(directory: Path) -> None:
    configurations = [SchedulerConfig(None)]
    thread = door.follow_limit(SimpleNamespace(scheduler_config=configurations[0]))
    assert thread is not None
    observability.set_gauge(GAUGE, 700.0)
    wait_until(lambda: configurations[0].max_num_queued_tokens == 700)
    observability.set_gauge(GAUGE, 0.0)
    wait_until(lambda: configurations[0].max_num_queued_tokens is None)
    configurations.clear()
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(("gauge", "given", "expected"), [(700, 500, 500), (300, 500, 300), (0, 500, 500)])
def test_a_limit_of_the_users_stays(directory: Path, gauge: float, given: int, expected: int) -> None:
    observability.set_gauge(GAUGE, gauge)
    assert door.read_limit(str(directory), given) == expected


def test_it_ends_with_the_server(directory: Path) -> None:
    vllm_config = SimpleNamespace(scheduler_config=SchedulerConfig(5))
    thread = door.follow_limit(vllm_config)
    assert thread is not None
    observability._record = None
    for record in directory.glob("*"):
        record.unlink()
    directory.rmdir()
    thread.join(10)
    assert not thread.is_alive()


def test_without_metrics_nobody_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(observability.DIRECTORY_ENV, raising=False)
    assert door.follow_limit(SimpleNamespace(scheduler_config=SchedulerConfig(None))) is None
