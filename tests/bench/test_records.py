# SPDX-License-Identifier: Apache-2.0
"""Records: what is written is read back, half files do not exist, and what is not a record is refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import records
from bench.records import (
    Metric,
    Record,
    describe_environment,
    hide_paths,
    load_records,
    parse_record,
    read_record,
    write_record,
)

RECORD = Record(
    case="decode",
    arm="pack",
    repetition=3,
    metrics={"ttft": Metric(12.5, "ms", "lower"), "goodput": Metric(None, "requests/s", "higher")},
    versions={"vllm": "0.32.0"},
    device={"name": "a CPU", "cores": 2},
    git_hash="abc",
    features={"vllm_ext:mxmoe_layer_count": 4.0},
    seed=3,
    started="2026-01-02T03:04:05+00:00",
    settings={"args": ["--x", "1"]},
)


def test_written_record_is_read_back(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    assert path == tmp_path / "decode" / "pack-3.json"
    assert read_record(path) == RECORD
    assert list(path.parent.iterdir()) == [path], "the partial file must be gone"


@given(
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53),
    unit=st.text(max_size=8),
    direction=st.sampled_from(["lower", "higher", "none"]),
    name=st.text(min_size=1, max_size=12),
    error=st.none() | st.text(max_size=30),
)
def test_any_record_survives_json(value: Any, unit: str, direction: Any, name: str, error: str | None) -> None:
    metrics = {name: Metric(value, unit, direction)}
    record = replace(RECORD, metrics=metrics, error=error, status="ok" if error is None else "failed")
    assert parse_record(json.loads(json.dumps(asdict(record), allow_nan=False))) == record


def test_records_load_in_order_and_ignore_other_files(tmp_path: Path) -> None:
    for arm, repetition in (("stock", 1), ("pack", 10), ("pack", 2), ("stock", 0)):
        write_record(tmp_path, replace(RECORD, arm=arm, repetition=repetition))
    (tmp_path / "README.md").write_text("not a record")
    (tmp_path / "decode" / ".pack-4.json.77").write_text('{"half')
    found = [(record.arm, record.repetition) for record in load_records(tmp_path)]
    assert found == [("pack", 2), ("pack", 10), ("stock", 0), ("stock", 1)]
    assert load_records(tmp_path / "absent") == []


def test_interrupted_write_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(tmp_path, RECORD)

    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, replace(RECORD, seed=9))
    monkeypatch.undo()
    assert read_record(path).seed == 3
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf, True])
def test_metric_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        Metric(value, "ms", "lower")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case": "../x"}, "case name '../x'"),
        ({"arm": "a b"}, "arm name 'a b'"),
        ({"repetition": -1}, "-1 of decode/pack is negative"),
        ({"status": "failed"}, "error if and only if"),
        ({"error": "x"}, "error if and only if"),
        ({"status": "maybe"}, "'maybe' is none of"),
    ],
)
def test_record_refuses_contradictions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"seed": None}, "'seed' is None, expected int"),
        ({"seed": True}, "'seed' is True"),
        ({"metrics": []}, "'metrics' is"),
        ({"metrics": {"ttft": {"value": "1", "unit": "ms", "direction": "lower"}}}, "metric 'ttft': field 'value'"),
        ({"metrics": {"ttft": {"value": 1, "unit": "ms"}}}, "metric 'ttft': missing field 'direction'"),
        ({"metrics": {"ttft": {"value": 1, "unit": "ms", "direction": "up"}}}, "'up' is none of"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_record(tmp_path, RECORD)
    path.write_text(json.dumps({**asdict(RECORD), **change}))
    with pytest.raises(ValueError, match=message) as failure:
        load_records(tmp_path)
    assert str(path) in str(failure.value)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"pack-3\.json is not a benchmark record"):
        load_records(tmp_path)


def test_environment_says_what_was_measured() -> None:
    environment = describe_environment()
    record = replace(RECORD, **environment)
    assert record.versions["vllm-ext"]
    assert record.versions["torch"]
    assert record.device["name"]
    assert record.device["cores"] >= 1


def test_git_hash_tells_changed_code_from_changed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_environment()["git_hash"] == "unknown"
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    code, result = tmp_path / "kernels" / "code.py", tmp_path / "bench" / "results" / "r.json"
    code.write_text("1")
    result.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert describe_environment()["git_hash"] == commit
    result.write_text("2")
    assert describe_environment()["git_hash"] == commit
    code.write_text("2")
    changed = describe_environment()["git_hash"]
    assert changed.startswith(f"{commit}-dirty-")
    code.write_text("3")
    assert describe_environment()["git_hash"] != changed
    code.write_text("1")
    code.with_name("new.py").write_text("1")
    assert describe_environment()["git_hash"].startswith(f"{commit}-dirty-")


def test_published_text_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # The repository itself may lie in the folder for temporary files, which is another of the names.
    monkeypatch.setattr(records, "ROOT", Path("/srv/checkout"))
    places = f"{records.ROOT}/bench/x, {sys.prefix}/lib, {tempfile.gettempdir()}/t, {Path.home()}/y"
    assert hide_paths(places) == "./bench/x, PREFIX/lib, TMP/t, ~/y"
    assert hide_paths(f"{records.ROOT}-old/x") == f"{records.ROOT}-old/x"
    assert hide_paths(f"/mnt{records.ROOT}/x") == f"/mnt{records.ROOT}/x"
    assert hide_paths(f"{records.ROOT}{tempfile.gettempdir()}/x") == f".{tempfile.gettempdir()}/x"
    assert hide_paths(f"-I{records.ROOT}/x --y={records.ROOT}.") == "-I./x --y=.."
