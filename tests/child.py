# SPDX-License-Identifier: Apache-2.0
"""Run a piece of Python in a fresh interpreter and read the JSON it prints last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChildResult:
    """What the child left behind; `value` is its last stdout line as JSON, None when it printed nothing or failed."""

    value: Any
    returncode: int
    stderr: str


def run_child(code: str, python: str = sys.executable, timeout: float = 240, **environment: str | None) -> ChildResult:
    """Run `code` outside the source tree, with `environment` added (None removes a variable)."""
    env = {**os.environ, **{name: value for name, value in environment.items() if value is not None}}
    for name in [name for name, value in environment.items() if value is None]:
        env.pop(name, None)
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=timeout, env=env, cwd=directory
        )
    return read_result(done.stdout, done.stderr, done.returncode)


def read_result(stdout: str, stderr: str, returncode: int) -> ChildResult:
    """The result of a child that ended."""
    lines = stdout.strip().splitlines()
    value = json.loads(lines[-1]) if lines and returncode == 0 else None
    return ChildResult(value, returncode, stdout + stderr)
