# SPDX-License-Identifier: Apache-2.0
"""The program for GPUs, as far as a CPU goes: its dry run, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench import gpu_all
from bench.kernels import gpu
from bench.kernels.gpu_parts.common import Context, Result
from bench.records import ROOT, Metric, load_records, parse_record
from tests.child import run_child

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and arm64 processors only")

#: Records and arms that need CUDA, which every part's dry run has.
EXPECTED = {
    "reference": ({"w4a16_g128_bfloat16", "w4a8_g128_bfloat16"}, r"128x128_w8_s3_c0_u1 w2a16_g128_bfloat16"),
    "graphs": ({"repeat"}, r"mixed replay"),
    "engine": ({"cpu", "compiled", "eager", "reference"}, r"CUDA graphs"),
    "sanitizer": ({"plain"}, r"racecheck"),
    "decode": ({"64x16_w4_s4_c1_u1", "64x16_w4_s3_c1_u1"}, r"w8a8_16"),
    "stock": ({"mixed"}, r"moe_1 int8_w8a8"),
    "roofline": ({"copy", "product", "w4a16", "w16a16"}, r"tokens_8192 w4a16"),
    "semipd": ({"stock_1024", "semipd", "semipd_auto"}, r"green contexts"),
}


def run_program(module: str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """A process of its own: the interpreter must be asked for before triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def check_content(part: str, content: dict[str, Any]) -> None:
    assert content["part"] == part
    assert content["dry_run"] is True
    assert content["complete"] is True
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
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_dry_run_of_all_parts(tmp_path: Path) -> None:
    assert set(EXPECTED) == set(gpu.PARTS)
    done = run_program("bench.gpu_all", "--dry-run", "--minutes", "60", "--out", str(tmp_path), timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    ended = json.loads((tmp_path / "gpu_all.json").read_text())
    assert list(ended) == list(gpu.PARTS)
    for part, content in ended.items():
        assert content["note"] == "ok"
        check_content(part, content)
    # A machine that is lent gives back eight files at most.
    drawn = {part for part in gpu.PARTS if part not in gpu_all.UNDRAWN}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_all.json", *(f"gpu_{part}.png" for part in drawn)}
    assert len(drawn) < 8


def test_parts_share_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def run(part: str, out: Path, minutes: float, is_dry_run: bool) -> dict[str, Any]:
        given.append(minutes)
        return {"exit_code": 0, "seconds": 1.0, "note": "ok"}

    monkeypatch.setattr(gpu_all, "_run", run)
    ended = gpu_all.run_all(gpu.PARTS, tmp_path, 30)
    assert given[0] == pytest.approx(30 / len(gpu.PARTS), abs=0.1)
    assert max(given) <= gpu.MINUTES
    assert all(one["exit_code"] == 0 for one in ended.values())
    given.clear()
    ended = gpu_all.run_all(gpu.PARTS, tmp_path, 0.5)
    assert given == []
    assert {one["note"] for one in ended.values()} == {"no time left of 0.5 minutes"}
    assert {one["exit_code"] for one in ended.values()} == {gpu.LEFT_OUT}
    assert json.loads((tmp_path / "gpu_all.json").read_text()) == ended


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(gpu_all, "FEWEST_MINUTES", 0.0)
    ended = gpu_all.run_all(["decode"], tmp_path, 0.002, is_dry_run=True)
    assert ended["decode"]["exit_code"] is None
    assert re.fullmatch(r"ended after 0\.0 minutes and 0 s, with 0 records", ended["decode"]["note"])


def make_part(records: int, left_out: Sequence[str] = (), failed: int = 0) -> ModuleType:
    """A part that adds so many records, the first of them failed ones, and then finds no time."""

    def run(context: Context) -> Result:
        result = Result("decode", "latency")
        for number in range(records):
            metrics = {"latency": Metric(1.0, "us", "lower")}
            result.add("layer", f"arm{number}", metrics, error="wrong" if number < failed else None)
        result.left_out += left_out
        return result

    part = ModuleType("part")
    part.run = run  # type: ignore[attr-defined]
    return part


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Puts a module in the place of `decode`, and lets it run here."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("vllm_ext.kernels.gpu.launch.IS_INTERPRETED", True)
    return lambda module: monkeypatch.setitem(sys.modules, "bench.kernels.gpu_parts.decode", module)


def test_every_record_is_in_the_file_at_once(tmp_path: Path, part: Callable[[ModuleType], None]) -> None:
    path = tmp_path / "gpu_decode.json"
    seen: list[Any] = []
    ordinary = make_part(3).run

    def run(context: Context) -> Result:
        with gpu.observe_records(lambda result: seen.append(json.loads(path.read_text()))):
            ordinary(context)
        raise MemoryError("the process dies")

    module = ModuleType("part")
    module.run = run  # type: ignore[attr-defined]
    part(module)
    with pytest.raises(MemoryError):
        gpu.run_part("decode", tmp_path, is_dry_run=True)
    # The inner observer is told after the file is written.
    assert [[record["arm"] for record in content["records"]] for content in seen] == [
        ["arm0"], ["arm0", "arm1"], ["arm0", "arm1", "arm2"]
    ]  # fmt: skip
    assert {(content["complete"], content["part"], content["dry_run"]) for content in seen} == {(False, "decode", True)}
    assert seen[-1] == json.loads(path.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_decode.json"]
    assert Result.add.__name__ == "add"


@pytest.mark.parametrize(
    ("failed", "left_out", "code"), [(0, [], 0), (1, [], 1), (0, ["late"], gpu.LEFT_OUT), (1, ["late"], 1)]
)
def test_the_exit_code_tells_failed_from_left_out(
    failed: int,
    left_out: list[str],
    code: int,
    tmp_path: Path,
    part: Callable[[ModuleType], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    part(make_part(2, left_out, failed))
    assert gpu.main(["--part", "decode", "--dry-run", "--out", str(tmp_path)]) == code
    content = json.loads((tmp_path / "gpu_decode.json").read_text())
    assert (content["complete"], content["left_out"], len(content["records"])) == (True, left_out, 2)
    said = capsys.readouterr().err
    assert ("left out, there was no time: late" in said) == bool(left_out)
    assert ("failed: gpu_decode_layer arm0: wrong" in said) == bool(failed)


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 3), 3), ((1, 3), 1), ((None, 0), 1), ((-9, 3), 1)])
def test_all_parts_have_one_exit_code(
    codes: tuple[int | None, int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {str(place): {"exit_code": code} for place, code in enumerate(codes)}
    monkeypatch.setattr(gpu_all, "run_all", lambda *arguments: ended)
    assert gpu_all.main(["--out", str(tmp_path)]) == expected


def test_what_a_part_left_out_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        content = {"records": [{}], "left_out": [f"arm{number}" for number in range(7)]}
        (tmp_path / "gpu_decode.json").write_text(json.dumps(content))
        return SimpleNamespace(returncode=gpu.LEFT_OUT, stderr="left out, there was no time: arm0")

    monkeypatch.setattr(gpu_all.subprocess, "run", run)
    (tmp_path / "gpu_decode.json").write_text('{"records": ["of an earlier run"]}')
    ended = gpu_all.run_all(["decode"], tmp_path, 8)
    assert ended["decode"]["note"] == "no time for arm0, arm1, arm2, arm3, arm4 and 2 more"
    assert ended["decode"]["records"] == [{}]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_all.json"]


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


HUMMING = """
import json
import sys
from pathlib import Path
sys.path.insert(0, ROOT)
sys.path.insert(0, FOLDER)
from bench.kernels.gpu_parts import stock

def check(source):
    for name in [name for name in sys.modules if name.startswith("humming")]:
        del sys.modules[name]
    if source is not None:
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(source)
    sys.path_importer_cache.clear()
    try:
        stock.check_humming()
    except ImportError as error:
        return str(error)
    return "complete"

# A package of that name stands for it: the real one needs CUDA to be imported.
package = Path(FOLDER, "humming")
found = [check(None), check("import bindings_that_nobody_has")]
for name in ("forward", "transform", "tune", "schema"):
    (package / f"{name}.py").write_text("")
print(json.dumps([*found, check("complete = True")]))
"""


def test_humming_says_which_part_of_it_is_missing(tmp_path: Path) -> None:
    code = HUMMING.replace("FOLDER", repr(str(tmp_path))).replace("ROOT", repr(str(ROOT)))
    child = run_child(code, TRITON_INTERPRET="1", PYTHONDONTWRITEBYTECODE="1")
    assert child.value is not None, child.stderr
    assert child.value == [
        "the package humming is not installed: its distribution is humming-kernels",
        "humming is installed and does not import: ModuleNotFoundError: No module named 'bindings_that_nobody_has'",
        "complete",
    ]
