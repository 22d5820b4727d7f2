# SPDX-License-Identifier: Apache-2.0
"""One side of a case: its engine, started and stopped, and what one run on it costs."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case import Arm, Case, resolve_model
from bench.client import Load, RunFailed, prepare_load, prepare_requests, run_client, run_offline
from bench.measures import RunUsage, collect_metrics
from bench.records import ROOT, Metric
from bench.serve.server import ServerFailed, VllmServer, read_log_tail
from bench.serve.usage import CpuReading, read_cpu, read_resident_bytes

#: The stock arm does not even load the pack; neither loads other plugins that happen to be installed.
PLUGINS = {"stock": "", "pack": "vllm_ext"}
#: A free port is found, then the server binds it many seconds later: another process may have taken it.
PORT_TRIES = 3
#: Of the server's log in a failed record.
LOG_LINES = 20
#: Seeds of warm-up runs lie beyond those of measured ones, so that no prompt is in a prefix cache before its run.
WARMUP_SEED = 1_000_000
END_SECONDS = 1.0
MAKE_LIMIT = 3600.0
PACK_METRIC = "vllm_ext:"


#: What Linux, Python and uvicorn write into the log of a server whose port is taken.
PORT_TAKEN = "address already in use"


class PortTaken(ServerFailed):
    """Someone else's server answers on the port that was free when ours was started."""


@dataclass(frozen=True)
class RunResult:
    """What one run measured, and the state that the pack reported about itself."""

    metrics: dict[str, Metric]
    features: dict[str, Any]


class EngineArm:
    """The engine of one arm of a case: `start`, any number of `run`, `stop`. Logs go into `folder`.

    `extra_args` are appended to the case's options (the chosen stock setting). `command` replaces the command line up
    to the options; `environment` is added last. Every start serves under a new name, so that nobody else's server on
    our port is measured.
    """

    def __init__(
        self,
        case: Case,
        name: str,
        model: str,
        folder: Path,
        *,
        extra_args: Sequence[str] = (),
        on_progress: Callable[[float, str], None] | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.case = case
        self.name = name
        self.model = model
        self.folder = folder
        self.args = [*case.args, *case.arm(name).args, *extra_args]
        self.on_progress = on_progress
        self.command = command
        self.environment = dict(environment or {})
        if command is None and case.mode == "offline":
            self.command = [sys.executable, "-m", "bench.serve.offline", model]
        self._server: VllmServer | None = None
        self._served_name = ""
        self._starts = 0

    @property
    def is_running(self) -> bool:
        """Whether there is a live engine."""
        return self._server is not None and self._server.is_running()

    def start(self) -> None:
        """Start the engine, on another port where the first is taken meanwhile. Raises ServerFailed."""
        self.stop()
        for attempt in range(1, PORT_TRIES + 1):
            try:
                self._start_once()
                return
            except ServerFailed as error:
                if attempt == PORT_TRIES or not _is_port_taken(error):
                    raise

    def start_warm(self, first_seed: int = 0) -> None:
        """Start, and make the case's warm-up runs, whose seeds count from this one. Raises as `start` and `run` do."""
        self.start()
        for number in range(self.case.warmup):
            self.run(WARMUP_SEED + first_seed + number)

    def stop(self) -> None:
        """Stop the engine and all its processes; without one, nothing happens."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def run(self, seed: int) -> RunResult:
        """One run of the case's workload. Raises RunFailed, which ends with the log's last lines."""
        server = self._server
        if server is None or server.process_group is None:
            raise RunFailed("the engine is not running")
        try:
            # Before the measured part: writing requests is nobody's cost.
            load = self._prepare(seed)
            before = server.get("/metrics")
            result, cpu = self._drive(server, server.process_group, load, seed)
            after = server.get("/metrics")
        except (RunFailed, OSError, urllib.error.URLError) as error:
            state = "has ended" if _has_ended(server) else "is running"
            tail = read_log_tail(server.log_path, LOG_LINES)
            raise RunFailed(f"{error}\nthe server {state}; last lines of its log:\n{tail}") from error
        usage = RunUsage(
            cpu_seconds=cpu,
            duration=float(result["duration"]),
            resident_bytes=read_resident_bytes(server.process_group),
            startup_seconds=server.startup_seconds,
            before=before,
            after=after,
        )
        return RunResult(collect_metrics(self.case.metrics, result, usage), _read_features(after))

    def _start_once(self) -> None:
        self._starts += 1
        self._served_name = f"{self.name}-{secrets.token_hex(4)}"
        self._server = VllmServer(
            self.model,
            log_path=self.folder / f"{self.name}-{self._starts}.log",
            args=["--served-model-name", self._served_name, *self.args],
            env={**make_environment(self.case, self.name), **self.environment},
            start_timeout=self.case.start_limit,
            on_progress=self.on_progress,
            command=self.command,
        )
        self._server.start()
        log_path = self._server.log_path
        try:
            found = _list_models(self._server)
        except BaseException:
            self.stop()
            raise
        if self._served_name not in found:
            self.stop()
            raise PortTaken(f"another server answers on our port: {found}", log_path, None)

    def _prepare(self, seed: int) -> Load:
        prepare = prepare_requests if self.case.mode == "offline" else prepare_load
        return prepare(self.case.workload, resolve_model(self.case.model), seed, self.folder)

    def _drive(self, server: VllmServer, group: int, load: Load, seed: int) -> tuple[dict[str, Any], float]:
        """(the run's result, CPU seconds of the engine's processes between its first and its last request)."""
        limit = self.case.run_limit
        if self.case.mode == "offline":
            before = read_cpu(group)
            result = run_offline(server, load, seed, limit)
            return result, read_cpu(group).seconds_since(before)
        # The client starts for seconds, in which an idle engine uses CPU time too: its processes poll.
        readings: list[CpuReading] = []
        result = run_client(
            server,
            load,
            self._served_name,
            resolve_model(self.case.model),
            self.folder,
            limit,
            on_edge=lambda: readings.append(read_cpu(group)),
        )
        return result, readings[-1].seconds_since(readings[0])


def make_environment(case: Case, name: str) -> dict[str, str | None]:
    """Environment variables of an arm's engine, beside those of this process."""
    environment: dict[str, str | None] = {"VLLM_PLUGINS": PLUGINS[name]}
    # GiB; the default takes a share of the machine's memory, and two engines are up at once.
    for variable, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1")):
        environment[variable] = os.environ.get(variable, value)
    return {**environment, **case.env, **case.arm(name).env}


def find_model(case: Case, name: str, folder: Path) -> str:
    """The model directory of an arm; where the case or the arm asks for it, made in `folder` by
    `bench.models.make_model`, once for both arms, and by `vllm-ext quantize`.

    Raises RunFailed with the command's last lines.
    """
    arm: Arm = case.arm(name)
    model = resolve_model(arm.model or case.model)
    if case.make_model:
        command = [sys.executable, "-m", "bench.models.make_model", *case.make_model]
        model = _make_once("bench.models.make_model", command, folder / "made-model")
    if arm.quantize:
        command = [sys.executable, "-m", "vllm_ext.cli", "quantize", model, *arm.quantize]
        model = _make_once("vllm-ext quantize", command, folder / f"{name}-model")
    return model


def _make_once(what: str, command: Sequence[str], output: Path) -> str:
    """The directory that a command makes at `-o`, unless it is there already."""
    if not output.is_dir():
        try:
            done = subprocess.run(
                [*command, "-o", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=MAKE_LIMIT
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{what} took longer than {MAKE_LIMIT:g} s") from None
        if done.returncode != 0:
            raise RunFailed(f"{what} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return str(output)


def describe_error(error: Exception) -> str:
    """What the engine or the client said, or the name and text of an exception that nobody expected."""
    return str(error) if isinstance(error, ServerFailed | RunFailed) else f"{type(error).__name__}: {error}"


def _list_models(server: VllmServer) -> str:
    """What answers to GET /v1/models, in words: the names of its models, or what else a stranger says."""
    try:
        answer = server.get("/v1/models")
        return ", ".join(one["id"] for one in json.loads(answer)["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Whoever it is, it is not ours, which names the model that it serves.
        return f"{type(error).__name__}: {error}"


def _is_port_taken(error: ServerFailed) -> bool:
    return isinstance(error, PortTaken) or PORT_TAKEN in read_log_tail(error.log_path).lower()


def _has_ended(server: VllmServer) -> bool:
    # Its connections close before the process of a dying server is gone.
    deadline = time.monotonic() + END_SECONDS
    while server.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not server.is_running()


def _read_features(exposition: str) -> dict[str, Any]:
    """The pack's own metrics: what is active, counted where it happens, and not what was asked for."""
    features = {}
    for line in exposition.splitlines():
        if line.startswith(PACK_METRIC):
            name, _, value = line.rpartition(" ")
            features[name] = float(value)
    return features
