# SPDX-License-Identifier: Apache-2.0
"""The shared-memory record: written by several processes, summed by the API process."""

from __future__ import annotations

import multiprocessing
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child import run_child
from vllm_ext import observability

BYTES, COUNT = "vllm_ext:mxmoe_weight_bytes", "vllm_ext:mxmoe_weight_count"


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A record directory of this process, and no state left over from or for other tests."""
    monkeypatch.delenv(observability.DIRECTORY_ENV, raising=False)
    monkeypatch.setattr(observability, "_record", None)
    monkeypatch.setattr(observability, "_owned", None)
    monkeypatch.setattr(observability, "_collector", None)
    created = observability.create_directory()
    monkeypatch.setenv(observability.DIRECTORY_ENV, created)
    yield created
    observability._remove_owned()


def add_in_child(amounts: list[float], engine_index: int) -> None:
    for amount in amounts:
        observability.add(BYTES, amount, engine_index)


def test_processes_are_summed_per_engine(directory: str) -> None:
    observability.add(BYTES, 5)
    context = multiprocessing.get_context("fork")
    for amounts, engine in (([1.0, 2.0], 0), ([10.0], 1)):
        child = context.Process(target=add_in_child, args=(amounts, engine))
        child.start()
        child.join()
        assert child.exitcode == 0
    totals = observability.read_records(directory)
    assert totals[0, BYTES] == 8.0
    assert totals[1, BYTES] == 10.0
    assert totals[0, COUNT] == 0.0


def test_directory_is_private_and_reused(directory: str) -> None:
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert observability.create_directory() == directory
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
    assert observability.read_records(directory)[0, BYTES] == 3.0


def test_abandoned_directories_are_removed_and_live_ones_kept(directory: str) -> None:
    killed = (
        "import json, os; from vllm_ext import observability as o;"
        "print(json.dumps(o.create_directory()), flush=True); {}"
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
    observability.add("vllm_ext:mxmoe_routed_tokens_total", 7)
    observability.install_collector()
    registry = observability.extend_registry(CollectorRegistry())
    text = generate_latest(registry).decode()
    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 4096.0' in text
    assert 'vllm_ext:mxmoe_routed_tokens_total{engine="0"} 7.0' in text
    from prometheus_client import REGISTRY

    assert 'vllm_ext:mxmoe_weight_bytes{engine="0"} 4096.0' in generate_latest(REGISTRY).decode()
    REGISTRY.unregister(observability._collector)


def test_names_follow_the_rule_and_the_docs_list_them(repository: Path) -> None:
    documented = re.findall(r"^\| `(vllm_ext:\w+)` \| (\w+) \|", (repository / "docs" / "metrics.md").read_text(), re.M)
    assert documented == [(metric.name, metric.kind) for metric in observability.METRICS]
    for metric in observability.METRICS:
        assert re.fullmatch(r"vllm_ext:[a-z]+(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
