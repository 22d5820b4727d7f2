# SPDX-License-Identifier: Apache-2.0
"""A small whole sweep, about a quarter of an hour on two CPU cores: engines, operators, baselines, report.

    python -m bench.sweep [--repetitions 6] [--out DIR]

`make bench` runs it. Each part is a process of its own, and one that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.records import RESULTS, ROOT
from bench.run import leave_on_signals

#: Between the request to end and the end by force: engines stop in ten seconds, and there may be two.
END_SECONDS = 60.0
#: Stock against the pack as engines: what an idle pack costs, and mixed precision online and packed.
ENGINE_CASES = ("idle", "mxmoe_online", "mxmoe_packed")
#: Operators: one matrix at the rate of memory, and a decode step and a small batch of a real layer against vLLM's own.
OP_CASES = ("cpu_gemv_w2_1", "cpu_gemv_w4_1", "cpu_moe_e60_1", "cpu_moe_e60_16")
PYTEST_SUITES = ("--benchmark-only", "bench/kernels", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*")


@dataclass(frozen=True)
class Part:
    """One command of the sweep: its name, the words after `python -m`, and what is added to the environment."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def list_parts(repetitions: int, out: Path) -> list[Part]:
    """The sweep's commands, in order; the report comes last."""
    engines = ["bench.run", *ENGINE_CASES, "--reps", str(repetitions), "--out", str(out)]
    operators = ["bench.op", "--bind-threads", *OP_CASES, "--repetitions", str(repetitions), "--out", str(out)]
    return [
        Part("engines", engines),
        Part("operators", operators),
        Part("operator baselines", ["pytest", "-q", *PYTEST_SUITES]),
        Part("report", ["bench.report", "--results", str(out)]),
    ]


def run_parts(parts: Sequence[Part]) -> list[str]:
    """Run the commands one after the other; the names of those that failed. Ctrl-C ends the whole sweep."""
    failed = []
    for part in parts:
        began = time.monotonic()
        print(f"== {part.name}", file=sys.stderr, flush=True)
        code = run_part(part)
        state = "done" if code == 0 else f"failed with exit code {code}"
        print(f"== {part.name}: {state} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if code != 0:
            failed.append(part.name)
    return failed


def run_part(part: Part) -> int:
    """Exit code of a part. Where this process is asked to end, the part is asked too, and has time to stop its engines.

    Raises what ended it: KeyboardInterrupt or SystemExit.
    """
    # A session of its own: Ctrl-C reaches the part once, from here.
    command = [sys.executable, "-m", *part.words]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **part.environment}, start_new_session=True) as process:
        try:
            return process.wait()
        except BaseException:
            # Again where it is ignored: a second Ctrl-C while waiting ends the waiting, and then all of it is killed.
            try:
                process.send_signal(signal.SIGINT)
                process.wait(END_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exit codes: 0 ok, 1 a part failed, 2 bad usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description="Run a small sweep of benchmarks.")
    parser.add_argument("--repetitions", type=int, default=6, metavar="N", help="pairs of runs (default 6)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    began = time.monotonic()
    leave_on_signals()
    try:
        failed = run_parts(list_parts(options.repetitions, options.out.resolve()))
    except KeyboardInterrupt:
        print("interrupted; the records of finished pairs stay", file=sys.stderr)
        return 130
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; results in {options.out / 'README.md'}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
