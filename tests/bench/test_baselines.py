# SPDX-License-Identifier: Apache-2.0
"""Committed baselines of operators, and the pytest fixture that compares with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.kernels import baselines
from bench.kernels.baselines import describe_machine_class, find_loss, read_baselines, update_baselines

CPUINFO = """processor : 0
vendor_id : GenuineIntel
cpu family : 6
model : 143
model name : Intel(R) Xeon(R)
flags : fpu avx2 avx512f avx512_vnni amx_int8
processor : 1
vendor_id : Other
"""

SUITE = """
import time

def wait(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

def bench_wait(gated):
    gated(lambda inputs: wait({seconds}), lambda inputs: wait(3e-4), lambda index: index)
"""


def test_machine_class_is_family_and_best_instruction_set() -> None:
    assert describe_machine_class(4, CPUINFO) == "GenuineIntel family 6 model 143, amx_int8, 4 threads"
    assert describe_machine_class(1, "") == "? family ? model ?, no known vector instructions, 1 threads"
    assert describe_machine_class(2, CPUINFO.replace(" amx_int8", "")).endswith("avx512_vnni, 2 threads")


def test_this_machine_has_a_class() -> None:
    assert describe_machine_class(2) == describe_machine_class(2)
    assert "2 threads" in describe_machine_class(2)


def test_updates_keep_other_suites_and_machines(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    assert read_baselines(path) == {}
    update_baselines("b", {"two": 2.00004, "one": 1.0}, path)
    update_baselines("a", {"one": 3.0}, path)
    update_baselines("b", {"one": 1.5}, path)
    assert read_baselines(path) == {"a": {"one": 3.0}, "b": {"one": 1.5, "two": 2.0}}
    assert list(json.loads(path.read_text())) == ["a", "b"]


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": {"one": 0}}', '{"a": {"one": "fast"}}'])
def test_bad_files_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"baselines\.json"):
        read_baselines(path)


def test_only_a_certain_loss_counts() -> None:
    assert find_loss(ratio_high=1.2, baseline=1.0) is None
    assert find_loss(ratio_high=1 - baselines.ALLOWED_LOSS + 0.001, baseline=1.0) is None
    assert find_loss(ratio_high=0.5, baseline=2.0) == pytest.approx(0.75)


def test_shipped_baselines_can_be_read() -> None:
    suites = read_baselines()
    assert suites, "run the suites with --update-baselines and commit bench/kernels/baselines.json"


def test_an_interrupted_call_changes_no_block() -> None:
    quiet = [float(number % 5 + 2) for number in range(40)]
    noisy = [1000.0 if number % 5 else value for number, value in enumerate(quiet)]
    assert baselines.take_block_minima(noisy) == baselines.take_block_minima(quiet) == [2.0] * 8
    assert baselines.take_block_minima([1.0, 5.0, 3.0], blocks=2) == [1.0, 3.0]
    with pytest.raises(ValueError, match="7 rounds are fewer than 8 blocks"):
        baselines.take_block_minima([1.0] * 7)


def test_what_others_use_is_measured() -> None:
    meter = baselines.BusyMeter()
    # This process alone is busy, and that does not count.
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    assert 0 <= meter.read() <= 1
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        meter = baselines.BusyMeter()
        time.sleep(0.5)
        assert meter.read() > 0.3 / (os.cpu_count() or 1)
    finally:
        busy.kill()
        busy.wait()


@pytest.fixture
def suite(tmp_path: Path, repository: Path) -> Path:
    """A suite with the shipped fixture, whose baselines lie in a file of its own."""
    conftest = (repository / "bench" / "kernels" / "conftest.py").read_text()
    patch = f"import bench.kernels.baselines as own\nown.BASELINES = own.Path({str(tmp_path / 'own.json')!r})\n"
    marker = "from bench.kernels.baselines import ("
    assert marker in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace(marker, patch + marker, 1))
    return tmp_path


def run_suite(folder: Path, repository: Path, seconds: float, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "bench_wait.py").write_text(SUITE.replace("{seconds}", str(seconds)))
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "-p", "no:cacheprovider", str(folder)]
    command += [
        "--busy-limit",
        "2",
        "-o",
        "python_files=bench_*.py",
        "-o",
        "python_functions=bench_*",
        "--rootdir",
        str(folder),
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.slow
def test_a_suite_fails_when_it_lost_speed_on_a_quiet_machine(suite: Path, repository: Path) -> None:
    # Nothing is below a limit under 0, as if the machine were never quiet.
    refused = run_suite(suite, repository, 3e-4, "--update-baselines", "--busy-limit=-1")
    assert refused.returncode == 1
    assert "baselines need a quiet one" in refused.stdout
    assert not (suite / "own.json").exists()

    written = run_suite(suite, repository, 3e-4, "--update-baselines")
    assert written.returncode == 0, written.stdout
    ((_, ratios),) = read_baselines(suite / "own.json").items()
    assert ratios == {"bench_wait": pytest.approx(1.0, rel=0.5)}

    slower = run_suite(suite, repository, 3e-3)
    assert slower.returncode == 1
    assert "bench_wait lost" in slower.stdout
    assert "--update-baselines and commit baselines.json" in slower.stdout

    busy = run_suite(suite, repository, 3e-3, "--busy-limit=-1")
    assert busy.returncode == 0, busy.stdout
    assert "bench_wait is not judged: other processes use" in busy.stdout
