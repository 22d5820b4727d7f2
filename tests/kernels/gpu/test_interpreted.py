# SPDX-License-Identifier: Apache-2.0
"""Runs interpreted/ in a process that asks for Triton's interpreter before anything imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(repository: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    # Two threads at most: more would wait for each other, on matrices this small.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_in_the_interpreter(repository: Path) -> None:
    run_interpreted(repository, str(FOLDER))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_more_of_the_kernels_in_the_interpreter(repository: Path, name: str) -> None:
    run_interpreted(repository, str(FOLDER / name), "-m", "slow", "--timeout=3000")
