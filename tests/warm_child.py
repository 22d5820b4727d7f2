# SPDX-License-Identifier: Apache-2.0
"""Interpreters that have imported vLLM, without its plugins, and nothing else: forks of one that is started once.

Importing vLLM takes eight seconds, and what most tests ask of a fresh interpreter comes after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.child import ChildResult, read_result

#: Reads one request a line: the code, the whole environment, a folder that leads sys.path, a file for stdout and one
#: for stderr. Answers with the exit code of the fork that ran it. Our own stdout carries answers only.
PARENT = """
import json, os, sys, threading, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import vllm.engine.arg_utils, vllm.model_executor.layers.linear, vllm.plugins, vllm.v1.engine.core
import vllm.model_executor.layers.fused_moe, vllm.model_executor.layers.quantization, vllm.v1.worker.worker_base
# A fork has only the thread that forked: another one could hold a lock for ever.
assert threading.active_count() == 1, threading.enumerate()
assert not any(name.split(".")[0] == "vllm_ext" for name in sys.modules)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            os.chdir(request["directory"])
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.path[:0] = request["path"]
            exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class WarmChildren:
    """Runs code in forks of one warm interpreter; made by `start_warm_children`."""

    def __init__(self, parent: subprocess.Popen[str], folder: Path) -> None:
        self._parent = parent
        self._folder = folder

    def run(self, code: str, path: str | None = None, **environment: str | None) -> ChildResult:
        """Run `code` outside the source tree; path: a folder that leads sys.path; environment as in `run_child`."""
        wanted: Mapping[str, str | None] = {**os.environ, **environment}
        request = {
            "code": code,
            "environment": {name: value for name, value in wanted.items() if value is not None},
            "path": [] if path is None else [path],
            "directory": str(self._folder),
            **{name: str(self._folder / name) for name in ("stdout", "stderr")},
        }
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the warm interpreter ended; its stderr is the test's"
        stdout, stderr = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        return read_result(stdout, stderr, int(answer))


@contextlib.contextmanager
def start_warm_children(folder: Path) -> Iterator[WarmChildren]:
    """Import vLLM once, in a process that ends with the block; folder: its working directory."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as parent:
        try:
            yield WarmChildren(parent, folder)
        finally:
            parent.kill()
