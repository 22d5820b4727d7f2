# SPDX-License-Identifier: Apache-2.0
"""Run a case: tune stock, then alternating pairs of runs, whose two records are written when the pair has ended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.arms import EngineArm, RunResult, describe_error, find_model
from bench.case import ARMS, Case
from bench.client import RunFailed
from bench.records import (
    ROOT,
    Record,
    describe_environment,
    hide_all_paths,
    hide_paths,
    load_records,
    record_path,
    write_record,
)
from bench.tuning import CaseFailed, median_of, tune_stock

#: A longer request body is recorded by its digest.
LONG_BODY = 2000
#: An arm that could not be started so often ends the case: another five minutes would say the same.
START_FAILURES = 2
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")

MakeArm = Callable[..., EngineArm]


@dataclass
class CaseRunner:
    """Runs one case into the folder of results `out`. `folder` holds logs, request files and made models.

    `make_arm` builds an arm (EngineArm's arguments); tests give one with another command.
    """

    case: Case
    out: Path
    folder: Path
    repetitions: int
    resume: bool = False
    make_arm: MakeArm = EngineArm
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    _arms: dict[str, EngineArm] = field(default_factory=dict)
    _start_failures: dict[str, list[str]] = field(default_factory=dict)
    _stale: list[Path] = field(default_factory=list)
    _held: list[Record] = field(default_factory=list)

    def run(self) -> list[Record]:
        """All records of the case, those of an earlier run with `resume` included.

        Raises CaseFailed when an arm cannot be started twice in a row, no stock setting works, or no run succeeded that
        could replace older records. Whatever ends it, KeyboardInterrupt included, no engine is left running and every
        finished pair has its records.
        """
        self._environment = describe_environment()
        self._workload = describe_workload(self.case)
        kept = self._find_finished() if self.resume else {}
        self._stale = self._list_stale(kept)
        missing = [number for number in range(self.repetitions) if number not in kept]
        if kept:
            self.say(f"{self.case.name}: {len(kept)} finished pairs are there already")
        if missing:
            self._tuning = next(iter(kept.values())).settings["tuning"] if kept else self._tune()
            with ExitStack() as stack:
                stack.callback(self._stop_all)
                for name in ARMS:
                    self._arms[name] = self._make(name, self._tuning["args"] if name == "stock" else ())
                for done, repetition in enumerate(missing):
                    if self.case.restart_every and done and done % self.case.restart_every == 0:
                        self._stop_all()
                    self._run_pair(repetition)
            if self._held:
                raise CaseFailed(f"{self.case.name}: no run succeeded, older records stay:\n{self._held[-1].error}")
        return [record for record in load_records(self.out) if record.case == self.case.name]

    def _run_pair(self, repetition: int) -> None:
        # Who is first has a cooler machine and an emptier page cache: each arm is first every other time.
        order = ARMS if repetition % 2 == 0 else ARMS[::-1]
        errors: dict[str, str | None] = {}
        if self.case.servers == "together":
            # Before either is measured: the pair then lies close in time, with no start between its halves.
            errors = {name: self._make_ready(name, repetition) for name in order}
        started = datetime.now(UTC).isoformat(timespec="seconds")
        results: dict[str, list[RunResult]] = {name: [] for name in order}
        for number in range(self.case.passes):
            for name in order if number % 2 == 0 else order[::-1]:
                if name not in errors:
                    errors[name] = self._make_ready(name, repetition)
                if errors[name] is None:
                    self._run_pass(name, repetition, number, results[name], errors)
        for position, name in enumerate(order):
            result = None if errors[name] is not None else take_medians(results[name])
            self._write(name, repetition, position, result, errors[name], started, results[name])
        for name, failures in self._start_failures.items():
            if len(failures) >= START_FAILURES:
                older = "; older records stay" if self._held else ""
                raise CaseFailed(
                    f"{self.case.name}: {name} did not start {len(failures)} times in a row{older}:\n{failures[-1]}"
                )

    def _run_pass(
        self, name: str, repetition: int, number: int, results: list[RunResult], errors: dict[str, str | None]
    ) -> None:
        arm, began = self._arms[name], time.monotonic()
        try:
            # The same prompts for both arms, others for every pass: no arm finds them in its prefix cache.
            results.append(arm.run(self.case.seed + repetition * self.case.passes + number))
        except Exception as failure:  # noqa: BLE001 - a broken answer, no number: it costs one run, not the benchmark
            errors[name] = describe_error(failure)
        self._report(name, repetition, errors[name] or results[-1], time.monotonic() - began)
        if errors[name] is not None or self.case.servers == "in_turn":
            # After a failure the next repetition gets a fresh engine.
            arm.stop()

    def _make_ready(self, name: str, repetition: int) -> str | None:
        """Start and warm up an arm that is not running; the reason where it failed."""
        arm = self._arms[name]
        if arm.is_running:
            return None
        began = time.monotonic()
        try:
            arm.start_warm(repetition * self.case.warmup)
        except Exception as error:  # noqa: BLE001 - as in a run; a missing `vllm` command too
            arm.stop()
            reason = describe_error(error)
            self._start_failures.setdefault(name, []).append(reason)
            self.say(f"{self.case.name} {name}: not ready: {reason.splitlines()[0]}")
            return reason
        self._start_failures.pop(name, None)
        self.say(f"{self.case.name} {name}: started and warm in {time.monotonic() - began:.0f} s")
        return None

    def _tune(self) -> dict[str, Any]:
        return tune_stock(self.case, lambda extra, place: self._make("stock", extra, place), self.folder, self.say)

    def _make(self, name: str, extra_args: Iterable[str], place: Path | None = None) -> EngineArm:
        try:
            model = find_model(self.case, name, self.folder)
        except RunFailed as error:
            raise CaseFailed(f"{self.case.name} {name}: {error}") from error
        return self.make_arm(self.case, name, model, place or self.folder, extra_args=tuple(extra_args))

    def _write(
        self,
        name: str,
        repetition: int,
        position: int,
        result: RunResult | None,
        error: str | None,
        started: str,
        passes: Sequence[RunResult],
    ) -> None:
        case, arm = self.case, self.case.arm(name)
        settings: dict[str, Any] = {
            "kind": case.mode,
            "stock_arm": ARMS[0],
            "case_digest": case.digest,
            "position": position,
            "model": hide_paths(arm.model or case.model),
            "make_model": list(case.make_model),
            "quantize": list(arm.quantize),
            "args": [hide_paths(one) for one in self._arms[name].args],
            "env": {**case.env, **arm.env},
            "ambient": list_ambient(),
            "workload": self._workload,
            "warmup": case.warmup,
            "goodput": dict(case.workload.goodput),
            "servers": case.servers,
            "passes": case.passes,
            "by_pass": list_passes(passes) if case.passes > 1 else {},
            "restart_every": case.restart_every,
            "tuning": self._tuning,
        }
        record = Record(
            case=case.name,
            arm=name,
            repetition=repetition,
            metrics={} if result is None else result.metrics,
            features={} if result is None else result.features,
            seed=case.seed + repetition * case.passes,
            status="failed" if result is None else "ok",
            error=None if error is None else hide_paths(error),
            started=started,
            settings={key: value for key, value in settings.items() if value not in ({}, [], "")},
            **self._environment,
        )
        if self._stale and result is None:
            # It may be the machine or a mistake in the case: older records are worth more than this.
            self._held.append(record)
            return
        self._drop_stale()
        for one in (*self._held, record):
            write_record(self.out, one)
        self._held = []

    def _report(self, name: str, repetition: int, result: RunResult | str | None, seconds: float) -> None:
        if not isinstance(result, RunResult):
            said = f"failed: {str(result).splitlines()[0]}"
        else:
            shown = [(key, metric) for key, metric in result.metrics.items() if metric.value is not None][:3]
            said = ", ".join(f"{key} {metric.value:.4g} {metric.unit}" for key, metric in shown)
        self.say(f"{self.case.name} {name} {repetition + 1}/{self.repetitions} ({seconds:.0f} s): {said}")

    def _stop_all(self) -> None:
        with ExitStack() as stack:
            # Each is stopped, also where stopping another was interrupted.
            for arm in self._arms.values():
                stack.callback(arm.stop)

    def _find_finished(self) -> dict[int, Record]:
        """{repetition: stock's record} of the pairs that both succeeded under this very case, code and versions."""
        pairs: dict[int, dict[str, Record]] = {}
        for record in load_records(self.out):
            if record.case == self.case.name and self._is_current(record):
                pairs.setdefault(record.repetition, {})[record.arm] = record
        return {number: pair["stock"] for number, pair in sorted(pairs.items()) if all(name in pair for name in ARMS)}

    def _is_current(self, record: Record) -> bool:
        return (
            record.status == "ok"
            and record.settings.get("case_digest") == self.case.digest
            and record.git_hash == self._environment["git_hash"]
            and record.versions == self._environment["versions"]
            and record.device == self._environment["device"]
            and record.settings.get("workload") == self._workload
            and record.settings.get("ambient", {}) == list_ambient()
        )

    def _list_stale(self, kept: Mapping[int, Record]) -> list[Path]:
        """Records of other runs of this case: mixed with ours they would be compared as pairs."""
        return [
            record_path(self.out, record.case, record.arm, record.repetition)
            for record in load_records(self.out)
            if record.case == self.case.name and not (record.repetition in kept and record.arm in ARMS)
        ]

    def _drop_stale(self) -> None:
        """Called when the first run has succeeded: until then what goes wrong has cost nothing."""
        if self._stale:
            why = "of another state of code, machine or case, or unfinished" if self.resume else "of an earlier run"
            self.say(f"{self.case.name}: {len(self._stale)} records {why} are removed")
        for path in self._stale:
            path.unlink()
        self._stale = []


def describe_workload(case: Case) -> dict[str, Any]:
    """The workload as a record has it: a file by its name and content, for folders are this machine's."""
    workload = case.workload
    described: dict[str, Any] = {"name": workload.name, "num_requests": workload.num_requests, **workload.options}
    if "path" in described:
        for path in (Path(described["path"]), ROOT / described["path"]):
            if path.is_file():
                described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        described["path"] = Path(described["path"]).name
    body: dict[str, Any] = dict(workload.extra_body)
    if len(text := json.dumps(body, sort_keys=True)) > LONG_BODY:
        body = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    extra = {"extra_body": body, "client_args": list(workload.client_args)}
    # As `write_record` does, so that --resume finds in a record what it compares with.
    hidden: dict[str, Any] = hide_all_paths(described | {key: value for key, value in extra.items() if value})
    return hidden


def list_ambient() -> dict[str, str]:
    """Variables of the environment that engines inherit and that change what they do; no secrets."""
    return {
        name: hide_paths(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("OMP_", "VLLM_", "GOMP_", "KMP_")) and not SECRET.search(name)
    }


def take_medians(results: Sequence[RunResult]) -> RunResult:
    """One result of several passes: the median of every metric, the last state of the features."""
    metrics = {}
    for name, first in results[0].metrics.items():
        metrics[name] = replace(first, value=median_of(result.metrics[name].value for result in results))
    return RunResult(metrics, results[-1].features)


def list_passes(results: Iterable[RunResult]) -> dict[str, list[float | None]]:
    """{metric: its value in every pass}."""
    values: dict[str, list[float | None]] = {}
    for result in results:
        for name, metric in result.metrics.items():
            values.setdefault(name, []).append(metric.value)
    return values
