# SPDX-License-Identifier: Apache-2.0
"""Compare stock vLLM with the pack, in alternating pairs, on one vLLM build.

    python -m bench.run CASE... [--reps 6] [--out DIR] [--json] [--resume] [--keep-logs] [--list]

CASE is a YAML file or the name of one in bench/cases; of a file with several numbers of concurrent requests all are
run, or NAME_c4 alone. Every pair becomes two JSON records DIR/CASE/ARM-REPETITION.json
when it ends, so Ctrl-C loses one pair; --resume goes on. Progress goes to stderr, tables to stdout; with --json the
last line is one object. Exit codes: 0 ok, 1 a run failed, 2 bad usage or case, 130 interrupted. docs/benchmarks.md
says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from bench.case import ARMS, CASES, Case, find_cases, load_cases
from bench.comparison import compare_arms, find_arm_values, judge_arms, list_metrics
from bench.records import RESULTS, Record, load_records
from bench.runner import CaseRunner
from bench.statistics import CONFIDENCE, Comparison, Verdict
from bench.strict import CaseError
from bench.tables import format_value
from bench.tuning import CaseFailed

if TYPE_CHECKING:
    from rich.table import Table


def compare_case(records: Sequence[Record]) -> dict[str, Comparison]:
    """The comparison of every metric that both arms have; a metric without one is left out."""
    comparisons = {}
    for metric in list_metrics(records, with_direction=True):
        try:
            comparisons[metric] = compare_arms(records, metric, *ARMS)
        except ValueError:
            continue  # no pair has it, or a value of 0: the table shows what there is
    return comparisons


def judge_case(records: Sequence[Record]) -> dict[str, Verdict]:
    """The verdict on every metric of which both arms have values but no ratio, as some are 0."""
    verdicts: dict[str, Verdict] = {}
    compared = compare_case(records)
    for metric in list_metrics(records, with_direction=True):
        if metric not in compared:
            try:
                verdicts[metric] = judge_arms(records, metric, *ARMS)
            except ValueError:
                continue  # no pair has it
    return verdicts


def make_table(case: Case, records: Sequence[Record]) -> Table:
    """The table of one case: a row for each metric, wins, losses and neither in the same form and the same style."""
    from rich.table import Table
    from rich.text import Text

    comparisons, verdicts = compare_case(records), judge_case(records)
    pairs = max((one.pairs for one in comparisons.values()), default=0)
    table = Table(title=f"{case.name}: {pairs} pairs", title_style="bold", caption=Text(_describe_tuning(records)))
    for head in ("metric", *ARMS, rf"ratio \[{CONFIDENCE:.0%} interval]", "verdict"):
        table.add_column(head, overflow="fold")
    for metric in list_metrics(records):
        cells = [_describe_arm(records, metric, arm) for arm in ARMS]
        ratio, verdict = "", ""
        if (one := comparisons.get(metric)) is not None:
            ratio, verdict = f"{one.ratio:.3f} [{one.low:.3f}, {one.high:.3f}]", one.verdict
        elif metric in verdicts:
            ratio, verdict = "undefined", verdicts[metric]
        # Text, not markup: brackets are not styles.
        table.add_row(*(Text(cell) for cell in (metric, *cells, ratio, verdict)))
    return table


def list_failures(records: Sequence[Record]) -> list[str]:
    """A paragraph for each failed run: arm, repetition and the error with the log's last lines."""
    return [
        f"{record.case} {record.arm}, repetition {record.repetition + 1}, failed: {record.error}"
        for record in records
        if record.status == "failed"
    ]


def describe_results(results: dict[str, list[Record]]) -> dict[str, Any]:
    """The object that --json prints: per case the comparisons, and the runs that failed."""
    cases = {}
    for name, records in results.items():
        comparisons: dict[str, dict[str, Any]] = {
            # JSON has no infinity, the bound of an interval from one pair.
            metric: {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in dataclasses.asdict(one).items()
            }
            for metric, one in compare_case(records).items()
        }
        for metric, verdict in judge_case(records).items():
            comparisons[metric] = {"ratio": None, "verdict": verdict}
        failed = [{"arm": one.arm, "repetition": one.repetition} for one in records if one.status == "failed"]
        cases[name] = {"records": len(records), "comparisons": comparisons, "failed": failed}
    return {"cases": cases}


def run_cases(cases: Sequence[Case], options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[Record]], bool]:
    """Run all cases, print each table when its case ends; ({case: records}, whether everything succeeded)."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=140)
    results = {}
    succeeded = True
    for case in cases:
        place = folder / case.name
        place.mkdir()
        try:
            runner = CaseRunner(case, options.out, place, options.reps or case.repetitions, options.resume)
            records = runner.run()
        except CaseFailed as error:
            print(error, file=sys.stderr, flush=True)
            succeeded = False
            records = [record for record in load_records(options.out) if record.case == case.name]
        results[case.name] = records
        if records:
            console.print(make_table(case, records))
        for failure in list_failures(records):
            print(failure, file=sys.stderr, flush=True)
            succeeded = False
    return results, succeeded


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Compare stock vLLM with the pack.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a YAML file, or a name in bench/cases")
    parser.add_argument("--reps", type=int, metavar="N", help="pairs of runs (default: what the case says, 6)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    parser.add_argument(
        "--resume", action="store_true", help="keep the pairs that succeeded under the same case and code"
    )
    parser.add_argument("--keep-logs", action="store_true", help="keep the engines' logs and say where they are")
    parser.add_argument("--list", action="store_true", help="print the shipped cases and end")
    options = parser.parse_args(argv)
    if options.list:
        for path in sorted(CASES.glob("*.yaml")):
            for case in load_cases(path):
                print(f"{case.name}: {case.description}")
        return 0
    if not options.cases:
        parser.error("give at least one case; --list names them")
    if options.reps is not None and options.reps < 1:
        parser.error(f"--reps must be at least 1, got {options.reps}")
    try:
        # All of them before the first runs for minutes.
        cases = [case for text in options.cases for case in find_cases(text)]
    except CaseError as error:
        parser.error(str(error))
    if len({case.name for case in cases}) < len(cases):
        parser.error("two cases have one name, and would write the same records")
    leave_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="vllm-ext-bench-"))
    try:
        results, succeeded = run_cases(cases, options, folder)
    except KeyboardInterrupt:
        print(
            f"interrupted; the engines are stopped, {options.out} keeps what ran; go on with --resume", file=sys.stderr
        )
        return 130
    finally:
        if options.keep_logs:
            print(f"logs: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    if options.json:
        print(json.dumps(describe_results(results), allow_nan=False))
    return 0 if succeeded else 1


def _describe_arm(records: Sequence[Record], metric: str, arm: str) -> str:
    try:
        values = find_arm_values(records, metric, arm)
    except ValueError:
        return "-"
    low, high = values.spread
    return f"{format_value(values.median)} {values.unit} [{format_value(low)}, {format_value(high)}]"


def _describe_tuning(records: Sequence[Record]) -> str:
    tuning = records[0].settings.get("tuning") or {}
    if not tuning.get("trials"):
        return "median [p10, p90]; a ratio above 1 means that the pack is better"
    chosen = " ".join(tuning["args"]) or "its default"
    return f"stock is tuned: best of {len(tuning['trials'])} by {tuning['metric']} is {chosen}"


def leave_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process as an exception, so that every engine is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` starts its command with SIGHUP ignored; that stays.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that every `finally` between here and the engines runs.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
