# SPDX-License-Identifier: Apache-2.0
"""The runner on real engines: the client's fields, the plugin on one side only, and steps and CPU time of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.records import Record, load_records

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

METRIC = {
    "name": "layers",
    "prometheus": "vllm_ext:mxmoe_layer_count",
    "kind": "gauge",
    "unit": "layers",
    "direction": "none",
}


def run_case(folder: Path, repository: Path, **content: Any) -> list[Record]:
    path = folder / "trial.yaml"
    case = {"model": "bench/models/tiny_moe", "pack": {"args": "--quantization mxmoe"}, **content}
    case["args"] = "--max-model-len 512 --max-num-seqs 8 --enforce-eager"
    path.write_text(json.dumps(case))  # JSON is YAML
    command = [sys.executable, "-m", "bench.run", str(path), "--reps", "1", "--out", str(folder / "results")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = load_records(folder / "results")
    assert [(record.arm, record.status) for record in records] == [("pack", "ok"), ("stock", "ok")]
    return records


def value(record: Record, name: str) -> float:
    found = record.metrics[name].value
    assert found is not None, name
    return found


def test_two_servers_under_the_stock_client(tmp_path: Path, repository: Path) -> None:
    names = ["ttft", "tpot_p99", "itl", "e2el", "goodput", "output_throughput", "cpu_per_step", "cpu_time", "steps"]
    workload = {
        "name": "prefix_repetition",
        "num_requests": 8,
        "options": {"prefix_len": 32, "suffix_len": 16, "num_prefixes": 2, "output_len": 24, "max_concurrency": 4},
        "goodput": {"ttft": 60000, "tpot": 60000},
    }
    pack, stock = run_case(tmp_path, repository, workload=workload, metrics=[*names, "computed_tokens", METRIC])
    for record in (pack, stock):
        for name in names:
            assert value(record, name) > 0, name
        # 8 answers of 24 tokens, the first of each with its prompt, in turns of 4.
        assert 2 * 24 <= value(record, "steps") <= 8 * 24
        assert value(record, "computed_tokens") >= 8 * 24
        assert value(record, "cpu_per_step") == pytest.approx(
            1e3 * value(record, "cpu_time") / value(record, "steps"), rel=1e-6
        )
    # The pack is active on its side, and not even loaded on the other.
    assert value(pack, "layers") > 0
    assert stock.metrics["layers"].value is None
    assert any(name.startswith("vllm_ext:mxmoe_layer_count") for name in pack.features)
    assert stock.features == {}


def test_two_offline_engines(tmp_path: Path, repository: Path) -> None:
    # Two at a time, the next one when one is answered.
    options = {"max_model_len": 128, "output_tokens": 16, "max_concurrency": 2}
    workload = {"name": "chat", "num_requests": 4, "options": options}
    names = ["output_throughput", "wall_per_step", "cpu_per_step", "steps", "duration"]
    pack, stock = run_case(tmp_path, repository, mode="offline", passes=2, workload=workload, metrics=[*names, METRIC])
    for record in (pack, stock):
        assert 2 * 16 <= value(record, "steps") <= 4 * 16
        assert value(record, "output_throughput") > 0
        assert value(record, "wall_per_step") > 0
        assert value(record, "cpu_per_step") > 0
    assert value(pack, "layers") > 0
    assert stock.features == {}
