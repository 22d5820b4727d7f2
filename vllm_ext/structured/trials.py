# SPDX-License-Identifier: Apache-2.0
"""Trials of costly grammars in a process of their own (compile_worker.py), from the API process's side."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from vllm_ext.structured.compile_worker import read_message, write_message
from vllm_ext.structured.errors import shorten
from vllm_ext.structured.routing import Plan

logger = logging.getLogger("vllm.vllm_ext")

#: Trials that wait; a flood of costly grammars is answered instead of collected.
MOST_WAITING = 32
#: A trial that has not begun after so long is answered as busy.
WAIT_MS = 800.0
#: What closing waits for the writing thread, which may be starting a process.
CLOSE_SECONDS = 10.0


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
        #: What a thread writes to the supervisor, in order: its pipe may be full, and its start takes a while.
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        #: The process that a trial was given to.
        self._takers: dict[int, subprocess.Popen[bytes]] = {}
        self._is_closed = False

    def start(self) -> None:
        """Start the supervisor now, so that the first trial does not wait for its imports."""
        self._post({"start": True})

    def submit(self, plan: Plan) -> Future[dict[str, Any]]:
        """Try a plan: {"outcome", "message", "ms"} as compile_worker.py says. Cancelling the result ends the trial."""
        result: Future[dict[str, Any]] = Future()
        with self._lock:
            if len(self._pending) >= MOST_WAITING:
                result.set_result({"outcome": "busy", "message": "", "ms": 0.0})
                return result
            name = next(self._names)
            self._pending[name] = result
        result.add_done_callback(lambda future: self._forget(name, future))
        self._post(
            {
                "id": name,
                "plan": {**asdict(plan), "fallback": None},
                "limit_ms": self._limit_ms,
                "limit_mib": self._limit_mib,
                "wait_ms": WAIT_MS,
            }
        )
        return result

    def explain(self, plan: Plan, outcome: str, message: str) -> str:
        """What a request is told about an engine's answer to its plan. outcome: as compile_worker.py says."""
        engine = "llguidance" if plan.engine == "guidance" else "xgrammar"
        if outcome == "slow":
            limit = f"{self._limit_ms:g} ms (structured.max_compile_ms)"
            return f"the {plan.kind} specification takes longer to compile than {limit}: make it smaller"
        if outcome == "defect":
            return shorten(f"{engine} fails on the {plan.kind} specification: {message}")
        if outcome == "memory":
            limit = f"{self._limit_mib:g} MiB (structured.max_compile_mib)"
            return f"the {plan.kind} specification needs more memory to compile than {limit}: make it smaller"
        if outcome == "busy":
            return f"other costly specifications are being checked and this {plan.kind} is one too: try again"
        because = f" (chosen because {plan.reason})" if plan.reason else ""
        return shorten(f"{engine} does not take the {plan.kind} specification{because}: {message}")

    def _forget(self, name: int, future: Future[dict[str, Any]]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            is_pending = self._pending.pop(name, None) is not None
            self._takers.pop(name, None)
        if is_pending:
            self._post({"cancel": name})

    def _post(self, message: dict[str, Any]) -> None:
        """Have a message written; never waits."""
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="vllm-ext-trials-writer", daemon=True)
                self._writer.start()
        self._outbox.put(message)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            name = message.get("id")
            with self._lock:
                is_wanted = name is None or name in self._pending
                if not is_wanted or ("cancel" in message and self._process is None):
                    continue
            try:
                if self._is_closed:
                    raise OSError("the engine ends")
                try:
                    self._send(message)
                except BrokenPipeError:
                    # The process ended since it was looked at: another one takes the message.
                    process = self._process
                    if process is not None:
                        process.wait()
                    self._send(message)
            except Exception as error:  # whatever it is, the trials after this one need the thread
                logger.exception("vllm-ext: a grammar cannot be tried, its process does not start")
                with self._lock:
                    future = self._pending.pop(name, None) if name is not None else None
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result({"outcome": "busy", "message": str(error), "ms": 0.0})

    def _send(self, message: dict[str, Any]) -> None:
        process = self._ensure_started()
        if "start" in message:
            return
        if (name := message.get("id")) is not None:
            with self._lock:
                if name not in self._pending:
                    return
                self._takers[name] = process
        assert process.stdin is not None
        write_message(process.stdin.fileno(), message)

    def _ensure_started(self) -> subprocess.Popen[bytes]:
        """The supervisor; called by the writing thread alone."""
        if self._process is not None and self._process.poll() is None:
            return self._process
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
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            self._process = process
        threading.Thread(target=self._read, args=(process,), name="vllm-ext-trials", daemon=True).start()
        write_message(process.stdin.fileno(), self._setup)
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while (message := read_message(process.stdout.fileno())) is not None:
            if "ready" in message:
                logger.debug("vllm-ext: grammars are tried in process %d", process.pid)
                continue
            with self._lock:
                future = self._pending.pop(message["id"], None)
                self._takers.pop(message["id"], None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(message)
        process.wait()
        with self._lock:
            # What another process was given is not lost with this one.
            names = [name for name in self._pending if self._is_closed or self._takers.get(name) is process]
            lost = [self._pending.pop(name) for name in names]
            for name in names:
                self._takers.pop(name, None)
        for future in lost:
            if future.set_running_or_notify_cancel():
                future.set_result({"outcome": "busy", "message": "the process ended", "ms": 0.0})

    def close(self) -> None:
        """End the supervisor and every trial; waits for it."""
        with self._lock:
            self._is_closed = True
            process, writer = self._process, self._writer
        if process is not None:
            # A write that waits for it ends too.
            process.kill()
        if writer is not None:
            self._outbox.put(None)
            writer.join(CLOSE_SECONDS)
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
