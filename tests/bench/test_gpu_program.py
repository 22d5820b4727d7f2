# SPDX-License-Identifier: Apache-2.0
"""The program for GPUs, as far as a CPU goes: its dry run, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_all
from bench.kernels import gpu
from bench.records import load_records, parse_record

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

#: Records and arms that need CUDA, which every part's dry run has.
EXPECTED = {
    "reference": ({"w4a16_g128_bfloat16", "w4a8_g128_bfloat16"}, r"128x128_w8_s3_c0_u1 w2a16_g128_bfloat16"),
    "graphs": ({"repeat"}, r"mixed replay"),
    "sanitizer": ({"plain"}, r"racecheck"),
    "decode": ({"64x16_w4_s4_c1_u1", "64x16_w4_s3_c1_u1"}, r"w8a8_16"),
    "stock": ({"mixed"}, r"moe_1 marlin_w4"),
    "roofline": ({"copy", "product", "w4a16", "w16a16"}, r"tokens_8192 w4a16"),
}


def run_program(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the interpreter must be asked for before triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)


def check_content(part: str, content: dict[str, Any]) -> None:
    assert content["part"] == part
    assert content["dry_run"] is True
    assert content["left_out"] == []
    arms, needs_cuda = EXPECTED[part]
    records = [parse_record(record) for record in content["records"]]
    assert {record.arm for record in records} == arms
    assert {record.status for record in records} == {"ok"}
    assert all(record.case.startswith(f"gpu_{part}_") for record in records)
    assert needs_cuda in content["needs_cuda"]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_dry_run_writes_one_json_and_one_png(tmp_path: Path) -> None:
    done = run_program("bench.kernels.gpu", "--part", "decode", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_decode.json", "gpu_decode.png"]
    assert is_png(tmp_path / "gpu_decode.png")
    check_content("decode", json.loads((tmp_path / "gpu_decode.json").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_of_all_parts(tmp_path: Path) -> None:
    assert set(EXPECTED) == set(gpu.PARTS)
    done = run_program("bench.gpu_all", "--dry-run", "--minutes", "60", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    ended = json.loads((tmp_path / "gpu_all.json").read_text())
    assert list(ended) == list(gpu.PARTS)
    for part, content in ended.items():
        assert content["note"] == "ok"
        check_content(part, content)
    # A machine that is lent gives back eight files at most.
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_all.json", *(f"gpu_{part}.png" for part in gpu.PARTS)}


def test_parts_share_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def run(part: str, out: Path, minutes: float, is_dry_run: bool) -> dict[str, Any]:
        given.append(minutes)
        return {"exit_code": 0, "seconds": 1.0, "note": "ok"}

    monkeypatch.setattr(gpu_all, "_run", run)
    ended = gpu_all.run_all(gpu.PARTS, tmp_path, 30)
    assert given[0] == pytest.approx(5, abs=0.1)
    assert max(given) <= gpu.MINUTES
    assert all(one["exit_code"] == 0 for one in ended.values())
    given.clear()
    ended = gpu_all.run_all(gpu.PARTS, tmp_path, 0.5)
    assert given == []
    assert {one["note"] for one in ended.values()} == {"no time left of 0.5 minutes"}
    assert json.loads((tmp_path / "gpu_all.json").read_text()) == ended


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu_all, "FEWEST_MINUTES", 0.0)
    ended = gpu_all.run_all(["decode"], tmp_path, 0.002, is_dry_run=True)
    assert ended["decode"]["exit_code"] is None
    assert re.match(r"ended after 0\.0 minutes", ended["decode"]["note"])


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vllm_ext.kernels.gpu.launch.IS_INTERPRETED", False)
    assert gpu.main(["--part", "decode", "--out", str(tmp_path)]) == 1
    assert "there is no CUDA GPU here; --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for run, argument, message in (
        (gpu.main, "--part=all", "invalid choice: 'all'"),
        (gpu_all.main, "--parts=decode,all", "'all' is none of reference, graphs"),
    ):
        with pytest.raises(SystemExit) as raised:
            run([argument])
        assert raised.value.code == 2
        assert message in capsys.readouterr().err


def test_records_of_a_gpu_can_be_stored_and_others_not(tmp_path: Path) -> None:
    record = {
        "case": "gpu_decode_w4a16_1", "arm": "a", "repetition": 0, "versions": {}, "device": {"name": "x"},
        "metrics": {"latency": {"value": 1.0, "unit": "us", "direction": "lower"}}, "git_hash": "unknown",
        "features": {}, "seed": 0, "status": "ok", "error": None, "settings": {},
        "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    part = {"part": "decode", "dry_run": False, "needs_cuda": [], "left_out": [], "records": [record]}
    single, several, dry = tmp_path / "gpu_decode.json", tmp_path / "gpu_all.json", tmp_path / "dry.json"
    single.write_text(json.dumps(part))
    several.write_text(
        json.dumps({"decode": {"exit_code": 0, **part}, "stock": {"exit_code": None, "note": "no time"}})
    )
    dry.write_text(json.dumps({**part, "dry_run": True}))
    for number, path in enumerate((single, several)):
        assert gpu.store_records([path], tmp_path / str(number)) == 1
        assert [one.arm for one in load_records(tmp_path / str(number))] == ["a"]
    with pytest.raises(ValueError, match="is no file of a run on a GPU"):
        gpu.store_records([dry], tmp_path / "none")
