# SPDX-License-Identifier: Apache-2.0
"""The process in which costly grammars are tried: a supervisor with both engines loaded, and a fork for every trial.

    python -m vllm_ext.structured.compile_worker        (started by trials.py, spoken to over its pipes)

A trial that takes too long or too much memory is a process that is killed, nothing else: native code of an engine
cannot be interrupted, and a thread that runs it cannot be ended. The supervisor has one thread and never compiles, so
it always answers; it ends with the pipe, and its forks with it. All of them run at a low priority.

Messages are JSON behind a length of four bytes. To the supervisor: first the tokenizer, then {"id", "plan",
"limit_ms", "limit_mib", "wait_ms"} or {"cancel": id}. From it: {"ready": threads}, then {"id", "outcome", "message",
"ms"}; outcome is ok, refused (by the engine), slow, memory, defect (the exception by name), or busy (never started).
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from typing import Any

from vllm_ext.structured.routing import Plan

#: Added to the priority of the server (nice): trials give way to requests that are being served.
NICENESS = 10
_PR_SET_PDEATHSIG = 1
_MIB = 1 << 20


def write_message(descriptor: int, message: dict[str, Any]) -> None:
    """Write one message whole. Raises BrokenPipeError where nobody reads."""
    text = json.dumps(message).encode()
    data = struct.pack("!I", len(text)) + text
    while data:
        data = data[os.write(descriptor, data) :]


def read_message(descriptor: int) -> dict[str, Any] | None:
    """Read one message; None at the end of the pipe."""
    head = _read_exactly(descriptor, 4)
    text = _read_exactly(descriptor, struct.unpack("!I", head)[0]) if head else None
    return json.loads(text) if text else None


def _read_exactly(descriptor: int, size: int) -> bytes | None:
    parts = []
    while size:
        data = os.read(descriptor, min(size, _MIB))
        if not data:
            return None
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def plan_from(values: dict[str, Any]) -> Plan:
    """A plan from its message; its fallback stays with the sender."""
    names = {field.name for field in fields(Plan)} - {"fallback"}
    return Plan(**{name: value for name, value in values.items() if name in names})


@dataclass
class _Trial:
    """A fork at work."""

    name: int
    pid: int
    pipe: int
    started: float
    limit_ms: float


class Supervisor:
    """Starts forks, ends those that exceed a limit, and reports."""

    def __init__(self, engines: Any, inbox: int, outbox: int, most_forks: int) -> None:
        """engines: what a fork calls with a Plan. inbox, outbox: descriptors. most_forks: trials at a time."""
        self._engines, self._inbox, self._outbox, self._most = engines, inbox, outbox, most_forks
        self._waiting: deque[tuple[float, dict[str, Any]]] = deque()
        self._running: dict[int, _Trial] = {}

    def run(self) -> None:
        """Serve until the pipe ends; leaves no fork behind."""
        try:
            while True:
                self._start_waiting()
                ready, _, _ = select.select([self._inbox, *self._running], [], [], self._next_deadline())
                if self._inbox in ready:
                    message = read_message(self._inbox)
                    if message is None:
                        return
                    self._take(message)
                for pipe in [pipe for pipe in ready if pipe in self._running]:
                    self._finish(self._running[pipe])
                self._end_late()
        finally:
            for trial in list(self._running.values()):
                self._kill(trial)

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" not in message:
            self._waiting.append((time.monotonic(), message))
            return
        self._waiting = deque(each for each in self._waiting if each[1]["id"] != message["cancel"])
        for trial in [trial for trial in self._running.values() if trial.name == message["cancel"]]:
            self._kill(trial)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._most:
            _, message = self._waiting.popleft()
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                self._try_out(message, reader, writer)
            os.close(writer)
            limit = message["limit_ms"]
            self._running[reader] = _Trial(message["id"], pid, reader, time.monotonic(), limit)

    def _try_out(self, message: dict[str, Any], reader: int, writer: int) -> None:
        """Body of a fork; never returns."""
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            limit = _read_data_bytes() + int(message["limit_mib"] * _MIB)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                self._engines(plan_from(message["plan"]))
                outcome, text = "ok", ""
            except MemoryError:
                outcome, text = "memory", ""
            except ValueError as error:
                # The engine's own word where the limit on memory met one of its allocations.
                outcome, text = ("memory", "") if "bad_alloc" in str(error) else ("refused", str(error))
            except BaseException as error:  # noqa: BLE001 - reported by name; a panic of an engine is no Exception
                outcome, text = "defect", f"{type(error).__name__}: {error}"
            write_message(writer, {"outcome": outcome, "message": text})
        finally:
            # Whatever happened, a fork must not go on as a second supervisor.
            os._exit(0)

    def _finish(self, trial: _Trial) -> None:
        """The pipe of a fork has its result, or its end: an allocation failed, and the engine took the process down."""
        message = read_message(trial.pipe) or {"outcome": "memory", "message": ""}
        milliseconds = (time.monotonic() - trial.started) * 1e3
        self._kill(trial)
        write_message(self._outbox, {"id": trial.name, "ms": milliseconds, **message})

    def _end_late(self) -> None:
        now = time.monotonic()
        for trial in list(self._running.values()):
            if (now - trial.started) * 1e3 > trial.limit_ms:
                self._kill(trial)
                report = {"id": trial.name, "outcome": "slow", "message": "", "ms": (now - trial.started) * 1e3}
                write_message(self._outbox, report)
        late = [each for each in self._waiting if (now - each[0]) * 1e3 > each[1]["wait_ms"]]
        for each in late:
            self._waiting.remove(each)
            write_message(self._outbox, {"id": each[1]["id"], "outcome": "busy", "message": "", "ms": 0.0})

    def _next_deadline(self) -> float | None:
        ends = [trial.started + trial.limit_ms / 1e3 for trial in self._running.values()]
        ends += [since + message["wait_ms"] / 1e3 for since, message in self._waiting]
        return max(0.0, min(ends) - time.monotonic()) + 0.001 if ends else None

    def _kill(self, trial: _Trial) -> None:
        os.kill(trial.pid, signal.SIGKILL)
        os.waitpid(trial.pid, 0)
        os.close(trial.pipe)
        del self._running[trial.pipe]


def _read_data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


#: llguidance compiles as it goes, so its limits are met some tokens later.
_WALK = 24


def _walk(matcher: Any) -> None:
    """Write a few tokens under the masks, the same ones every time. Raises ValueError where llguidance gives up."""
    generator = random.Random(0)
    for _ in range(_WALK):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if matcher.is_stopped():
            return
        # Bytes at random, so that no list of all tokens is made.
        places = [place for place, byte in enumerate(mask) if byte]
        if not places:
            return
        place = generator.choice(places)
        bits = [bit for bit in range(8) if mask[place] >> bit & 1]
        if not matcher.consume_token(8 * place + generator.choice(bits)):
            raise ValueError(matcher.get_error() or "a token of its own mask was not taken")


class Engines:
    """Both engines with the server's vocabulary; calling it with a plan compiles, and fills masks."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """setup: {"xgrammar": TokenizerInfo as JSON, "guidance": arguments of LLTokenizer or None, "whitespace"}."""
        import xgrammar as xgr

        self._whitespace = setup["whitespace"]
        self._info = xgr.TokenizerInfo.deserialize_json(setup["xgrammar"])
        self._mask = xgr.allocate_token_bitmask(1, self._info.vocab_size)
        self._tokenizer = None
        if setup["guidance"] is not None:
            import llguidance

            self._tokenizer = llguidance.LLTokenizer(
                setup["guidance"]["tokenizer"],
                n_vocab=setup["guidance"]["n_vocab"],
                eos_token=setup["guidance"]["eos_token"],
            )

    def __call__(self, plan: Plan) -> None:
        from vllm_ext.structured import engines

        if plan.engine == "guidance":
            if self._tokenizer is None:
                raise ValueError("llguidance has no tokenizer of this kind here")
            _walk(engines.compile_guidance(self._tokenizer, plan, self._whitespace))
            return
        import xgrammar as xgr

        compiler = xgr.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        matcher = xgr.GrammarMatcher(engines.compile_xgrammar(compiler, plan, self._whitespace))
        matcher.fill_next_token_bitmask(self._mask, 0)


def main() -> int:
    """Body of the supervisor's process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    # Libraries print on stdout; the pipe is for messages only.
    outbox = os.dup(1)
    os.dup2(2, 1)
    setup = read_message(0)
    if setup is None:
        return 0
    engines = Engines(setup)
    write_message(outbox, {"ready": len(os.listdir("/proc/self/task"))})
    Supervisor(engines, 0, outbox, setup["most_forks"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
