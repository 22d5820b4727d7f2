# SPDX-License-Identifier: Apache-2.0
"""Trials of costly grammars in a process of their own (compile_worker.py), from the API process's side."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from vllm_ext.structured.compile_worker import read_message, write_message
from vllm_ext.structured.routing import Plan

logger = logging.getLogger("vllm.vllm_ext")

#: Trials that wait; a flood of costly grammars is answered instead of collected.
MOST_WAITING = 32
#: A trial that has not begun after so long is answered as busy.
WAIT_MS = 800.0


class TrialPool:
    """One supervisor process, started by the first trial and again where it was lost; thread-safe."""

    def __init__(self, make_setup: Callable[[], dict[str, Any]], limit_ms: float, limit_mib: float) -> None:
        """make_setup: the first message, made once. limit_ms, limit_mib: wall time and memory of a trial."""
        self._make_setup, self._limit_ms, self._limit_mib = make_setup, limit_ms, limit_mib
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._setup: dict[str, Any] | None = None
        self._names = itertools.count()
        self._pending: dict[int, Future[dict[str, Any]]] = {}

    def start(self) -> None:
        """Start the supervisor now, so that the first trial does not wait for its imports."""
        with self._lock:
            self._ensure_started()

    def submit(self, plan: Plan) -> Future[dict[str, Any]]:
        """Try a plan: {"outcome", "message", "ms"} as compile_worker.py says. Cancelling the result ends the trial."""
        result: Future[dict[str, Any]] = Future()
        with self._lock:
            if len(self._pending) >= MOST_WAITING:
                result.set_result({"outcome": "busy", "message": "", "ms": 0.0})
                return result
            name = next(self._names)
            self._pending[name] = result
            try:
                self._send(
                    {
                        "id": name,
                        "plan": {**asdict(plan), "fallback": None},
                        "limit_ms": self._limit_ms,
                        "limit_mib": self._limit_mib,
                        "wait_ms": WAIT_MS,
                    }
                )
            except OSError as error:
                del self._pending[name]
                logger.warning("vllm-ext: grammars cannot be tried, their process does not start: %s", error)
                result.set_result({"outcome": "busy", "message": str(error), "ms": 0.0})
                return result
        result.add_done_callback(lambda future: self._forget(name, future))
        return result

    def _forget(self, name: int, future: Future[dict[str, Any]]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            if self._pending.pop(name, None) is not None and self._process is not None:
                try:
                    self._send({"cancel": name})
                except OSError:
                    logger.warning("vllm-ext: the process that tries grammars is gone")

    def _send(self, message: dict[str, Any]) -> None:
        self._ensure_started()
        assert self._process is not None
        assert self._process.stdin is not None
        write_message(self._process.stdin.fileno(), message)

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if self._setup is None:
            self._setup = {**self._make_setup(), "most_forks": max(1, (os.cpu_count() or 1) // 4)}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # -P: a folder in the working directory must not pass for a package.
        command = [sys.executable, "-P", "-m", "vllm_ext.structured.compile_worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(process,), name="vllm-ext-trials", daemon=True).start()
        write_message(process.stdin.fileno(), self._setup)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while (message := read_message(process.stdout.fileno())) is not None:
            if "ready" in message:
                logger.debug("vllm-ext: grammars are tried in process %d", process.pid)
                continue
            with self._lock:
                future = self._pending.pop(message["id"], None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(message)
        process.wait()
        with self._lock:
            lost = list(self._pending.values()) if self._process is process else []
            if lost:
                self._pending.clear()
        for future in lost:
            if future.set_running_or_notify_cancel():
                future.set_result({"outcome": "busy", "message": "the process ended", "ms": 0.0})

    def close(self) -> None:
        """End the supervisor and every trial; waits for it."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.kill()
            process.wait()
