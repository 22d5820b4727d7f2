# SPDX-License-Identifier: Apache-2.0
"""The sweep of `make bench`: its cases exist, its parts run apart, a failure is told and stops nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import sweep
from bench.case import find_cases
from bench.op import list_cases
from bench.sweep import Part, list_parts, run_parts


def test_its_cases_exist() -> None:
    for name in sweep.ENGINE_CASES:
        assert [case.name for case in find_cases(name)] == [name]
    assert set(sweep.OP_CASES) <= set(list_cases())


def test_the_report_comes_last_and_reads_what_the_others_write(tmp_path: Path) -> None:
    parts = list_parts(3, tmp_path)
    assert parts[-1].words == ["bench.report", "--results", str(tmp_path)]
    for part in parts[:2]:
        assert part.words[-2:] == ["--out", str(tmp_path)]
        assert "3" in part.words


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "works.py").write_text("import os\nprint('found', os.environ['MARK'])\n")
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    parts = [Part("first", ["fails"]), Part("second", ["works"], {"MARK": "this"})]
    assert run_parts(parts) == ["first"]
    printed = capfd.readouterr()
    assert "found this" in printed.out
    assert "first: failed with exit code 3" in printed.err
    assert "second: done" in printed.err


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Part] = []

    def run(parts: list[Part]) -> list[str]:
        seen.extend(parts)
        return ["operators"]

    monkeypatch.setattr(sweep, "run_parts", run)
    assert sweep.main(["--repetitions", "2", "--out", str(tmp_path)]) == 1
    assert "failed: operators" in capsys.readouterr().err
    assert str(tmp_path) in seen[0].words
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--repetitions", "0"])
    assert stopped.value.code == 2


#: A part that needs a second to stop, and then says so.
SLOW_TO_STOP = """
import sys, time, pathlib
here = pathlib.Path(sys.argv[1])
try:
    (here / "started").touch()
    time.sleep(60)
finally:
    time.sleep(1)
    (here / "stopped").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_part_has_time_to_stop(tmp_path: Path, number: int) -> None:
    (tmp_path / "slow_part.py").write_text(SLOW_TO_STOP)
    code = (
        "import sys; from pathlib import Path; from bench import sweep\n"
        f"part = sweep.Part('slow', ['slow_part', {str(tmp_path)!r}], {{'PYTHONPATH': {str(tmp_path)!r}}})\n"
        "sweep.list_parts = lambda *_: [part, part]\n"
        "sys.exit(sweep.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=sweep.ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (tmp_path / "stopped").exists()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 128 + signal.SIGTERM}[number], said


def test_modules_of_the_parts_exist() -> None:
    import importlib.util

    for part in list_parts(1, Path("out")):
        assert importlib.util.find_spec(part.words[0]) is not None
