# SPDX-License-Identifier: Apache-2.0
"""What semi-PD must reach against stock on real servers, and whether records of the cases `semipd_*` do.

    python -m bench.serve.semipd_goals [--results DIR] [--json]

A goal is met where the whole interval of the ratio is on its side, missed where none of it is, and else left open.
Stock is the setting that was best at the tuned metric; below it stand the others as they were while stock was tuned:
against these the repetitions of the pack are not paired, so there is no interval.

Exit codes: 0 every goal of every case is met, 1 one is not, 2 bad usage or no records.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.case import ARMS
from bench.comparison import compare_arms, find_arm_values
from bench.records import RESULTS, Record, load_records

PREFIX = "semipd_"
#: Ratio to stock, above 1 where the pack is better, that each metric must have: half the 99th percentile of the times
#: between tokens, at a tenth more time to the first token and a tenth less throughput at most.
GOALS = {"itl_p99": 2.0, "ttft_p90": 1 / 1.1, "output_throughput": 0.9}


@dataclass(frozen=True)
class Judgement:
    """A goal of a case: its ratio with its interval, and met, missed or open."""

    case: str
    metric: str
    goal: float
    ratio: float
    low: float
    high: float
    state: str


def judge_case(records: Sequence[Record]) -> list[Judgement]:
    """The goals of one case's records. Raises ValueError where a metric has no pair."""
    found = []
    for metric, goal in GOALS.items():
        one = compare_arms(records, metric, *ARMS)
        state = "met" if one.low >= goal else "missed" if one.high < goal else "open"
        found.append(Judgement(records[0].case, metric, goal, one.ratio, one.low, one.high, state))
    return found


def compare_settings(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{stock's options: {metric: ratio of the pack's median to theirs, above 1 where the pack is better}} of every
    setting that was tried."""
    stock = next(record for record in records if record.arm == ARMS[0])
    found: dict[str, dict[str, float]] = {}
    for trial in (stock.settings.get("tuning") or {}).get("trials", ()):
        ratios = {}
        for metric in GOALS:
            values = [value for value in trial.get("metrics", {}).get(metric, ()) if value]
            if values:
                pack = find_arm_values(records, metric, ARMS[1])
                ratio = statistics.median(values) / pack.median
                ratios[metric] = ratio if pack.direction == "lower" else 1 / ratio
        found[" ".join(trial["args"]) or "no further option"] = ratios
    return found


def describe(records: Sequence[Record], judgements: Sequence[Judgement]) -> list[str]:
    """Lines about one case."""
    lines = [f"{records[0].case}, ratio to stock, above 1 is better:"]
    for one in judgements:
        bounds = f"[{one.low:.3f}, {one.high:.3f}]"
        lines.append(f"  {one.metric:18} {one.ratio:.3f} {bounds}, goal {one.goal:.3f}: {one.state}")
    for setting, ratios in compare_settings(records).items():
        shown = ", ".join(f"{metric} {ratio:.2f}" for metric, ratio in ratios.items()) or "it failed"
        lines.append(f"  while tuned, {setting}: {shown}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve.semipd_goals", description="Goals of semi-PD.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    options = parser.parse_args(argv)
    cases: dict[str, list[Record]] = {}
    for record in load_records(options.results):
        if record.case.startswith(PREFIX) and record.settings.get("kind") == "server":
            cases.setdefault(record.case, []).append(record)
    if not cases:
        parser.error(f"no records of a case {PREFIX}* in {options.results}; run python -m bench.run first")
    every: dict[str, Any] = {}
    for name, records in cases.items():
        try:
            judgements = judge_case(records)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(describe(records, judgements)), file=sys.stderr if options.json else sys.stdout)
        every[name] = {"goals": [asdict(one) for one in judgements], "settings": compare_settings(records)}
    if options.json:
        print(json.dumps(every))
    return 0 if all(goal["state"] == "met" for one in every.values() for goal in one["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
