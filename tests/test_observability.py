# SPDX-License-Identifier: Apache-2.0
"""The shared-memory record: written by several processes, summed by the API process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.child import run_child
from vllm_ext import observability

BYTES, COUNT = "vllm_ext:mxmoe_weight_bytes", "vllm_ext:mxmoe_weight_count"
PAIRS = "vllm_ext:mxmoe_routed_pairs_total"


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A record directory of this process, and no state left over from or for other tests."""
    monkeypatch.delenv(observability.DIRECTORY_ENV, raising=False)
    monkeypatch.setattr(observability, "_record", None)
    monkeypatch.setattr(observability, "_owned", None)
    monkeypatch.setattr(observability, "_collector", None)
    observability.create_directory()
    yield os.environ[observability.DIRECTORY_ENV]
    observability._remove_owned()
    del os.environ[observability.DIRECTORY_ENV]


def add_in_child(amounts: list[float], engine_index: int, written: Any, release: Any) -> None:
    for amount in amounts:
        observability.add(BYTES, amount, engine_index)
        observability.add(PAIRS, amount, engine_index)
    written.set()
    release.wait(20)


def test_processes_are_summed_per_engine(directory: str) -> None:
    observability.add(BYTES, 5)
    observability.add(PAIRS, 5)
    context = multiprocessing.get_context("fork")
    for amounts, engine in (([1.0, 2.0], 0), ([10.0], 1)):
        release = context.Event()
        written = context.Event()
        child = context.Process(target=add_in_child, args=(amounts, engine, written, release))
        child.start()
        assert written.wait(20)
        alive = observability.read_records(directory)
        release.set()
        child.join()
        assert child.exitcode == 0
        assert alive[engine, BYTES] == sum(amounts) + (5 if engine == 0 else 0)
    totals = observability.read_records(directory)
    # What a process held goes with it; what it did stays.
    assert totals[0, BYTES] == 5.0
    assert totals[1, BYTES] == 0.0
    assert totals[0, PAIRS] == 8.0
    assert totals[1, PAIRS] == 10.0
    assert totals[0, COUNT] == 0.0


def test_directory_is_private_and_reused(directory: str) -> None:
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    observability.create_directory()
    assert os.environ[observability.DIRECTORY_ENV] == directory
    observability.add(BYTES, 1)
    (record,) = Path(directory).glob("*.record")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600


def test_without_a_directory_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observability, "_record", None)
    monkeypatch.delenv(observability.DIRECTORY_ENV, raising=False)
    observability.add(BYTES, 1)
    assert observability._record is None


def test_unknown_metric_is_an_error(directory: str) -> None:
    with pytest.raises(KeyError, match="nothing"):
        observability.add("vllm_ext:nothing", 1)


def test_foreign_files_are_skipped(directory: str) -> None:
    observability.add(BYTES, 3)
    (Path(directory) / "1.record").write_bytes(b"\0" * 8)
    (Path(directory) / "2.record").write_bytes(b"\1" * (observability._SLOTS * 8))
    (Path(directory) / "3.record").symlink_to("vanished")
    assert observability.read_records(directory)[0, BYTES] == 3.0


def test_full_or_missing_shared_memory_costs_the_metrics_only(
    directory: str, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(observability, "_record", None)
    monkeypatch.setattr(os, "posix_fallocate", fail_for_lack_of_space)
    observability.add(BYTES, 1)
    observability.add(BYTES, 1)
    (warning,) = messages
    assert "vllm-ext counts nothing in this process" in warning
    assert "No space left" in warning
    assert observability.read_records(directory).get((0, BYTES), 0.0) == 0.0

    monkeypatch.setattr(observability, "_owned", None)
    monkeypatch.delenv(observability.DIRECTORY_ENV)
    monkeypatch.setattr(observability, "_shared_memory_root", lambda: "/nonexistent")
    observability.create_directory()
    assert "vllm-ext shows no metrics" in messages[1]
    assert observability.DIRECTORY_ENV not in os.environ
    os.environ[observability.DIRECTORY_ENV] = directory


def fail_for_lack_of_space(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_abandoned_directories_are_removed_and_live_ones_kept(directory: str) -> None:
    killed = (
        "import json, os; from vllm_ext import observability as o;"
        "o.create_directory(); print(json.dumps(os.environ[o.DIRECTORY_ENV]), flush=True); {}"
    )
    left = run_child(killed.format("os._exit(0)"), **{observability.DIRECTORY_ENV: None}).value
    assert os.path.isdir(left)
    tidy = run_child(killed.format("pass"), **{observability.DIRECTORY_ENV: None}).value
    assert not os.path.exists(tidy)
    assert not os.path.exists(left)
    assert os.path.isdir(directory)


def test_collector_serves_prometheus_text(directory: str) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    observability.add(BYTES, 4096)
    observability.add("vllm_ext:mxmoe_routed_pairs_total", 7)
    observability.install_collector()
    registry = observability.extend_registry(CollectorRegistry())
    text = generate_latest(registry).decode()
    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 4096.0' in text
    assert 'vllm_ext:mxmoe_routed_pairs_total{engine="0"} 7.0' in text
    from prometheus_client import REGISTRY

    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 4096.0' in generate_latest(REGISTRY).decode()
    REGISTRY.unregister(observability._collector)


def test_names_follow_the_rule_and_the_docs_list_them(repository: Path) -> None:
    documented = re.findall(r"^\| `(vllm_ext:\w+)` \| (\w+) \|", (repository / "docs" / "metrics.md").read_text(), re.M)
    assert documented == [(metric.name, metric.kind) for metric in observability.METRICS]
    for metric in observability.METRICS:
        assert re.fullmatch(r"vllm_ext:[a-z]+(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
