# SPDX-License-Identifier: Apache-2.0
"""Conformance of JSON schemas, keyword by keyword: vLLM alone, and with the pack.

    python -m bench.structured.conformance [--results DIR]

writes a record of the case `structured_conformance` for each arm: `stock` (an engine that has served an ordinary schema
before), `stock_first` (each schema the first of its engine) and `pack`. A schema is *honoured* (three valid texts
accepted, three invalid ones not), *narrow* (nothing invalid accepted, something valid neither), *refused* (an error
before anything is generated) or *wrong* (something invalid accepted, without a word).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from bench.structured.acceptance import judge_pack, judge_stock
from bench.structured.cases import CASES, Case

Judge = Callable[[str, str, Sequence[str]], "tuple[str, list[bool]] | None"]
ARMS: dict[str, Judge] = {
    "stock": lambda kind, spec, texts: judge_stock(kind, spec, texts, is_first=False),
    "stock_first": lambda kind, spec, texts: judge_stock(kind, spec, texts, is_first=True),
    "pack": judge_pack,
}
CASE = "structured_conformance"


def judge(case: Case, judges: Judge) -> tuple[str, str]:
    """(verdict, engine) of one case."""
    found = judges(*case.spec, case.texts)
    if found is None:
        return "refused", ""
    engine, accepted = found
    if any(accepted[len(case.valid) :]):
        return "wrong", engine
    return ("honoured" if all(accepted[: len(case.valid)]) else "narrow"), engine


def run(arm: str) -> Record:
    """Judge every case of one arm."""
    verdicts = {case.name: judge(case, ARMS[arm]) for case in CASES}
    counts = Counter(verdict for verdict, _ in verdicts.values())
    directions = {"honoured": "higher", "wrong": "lower"}
    metrics = {
        name: Metric(float(counts[name]), "schemas", directions.get(name, "none"))  # type: ignore[arg-type]
        for name in ("honoured", "narrow", "refused", "wrong")
    }
    metrics["schemas"] = Metric(float(len(CASES)), "schemas")
    settings = {"verdicts": {name: list(verdict) for name, verdict in verdicts.items()}}
    return Record(CASE, arm, 0, metrics, **describe_environment(), settings=settings)


def render(records: Sequence[Record], with_equal: bool = True) -> str:
    """The verdicts as a Markdown table, one row for each schema. with_equal: also those on which all arms agree."""
    arms = {record.arm: record.settings["verdicts"] for record in records}
    rows = ["| schema | " + " | ".join(ARMS) + " |", "|---" * (1 + len(ARMS)) + "|"]
    for case in CASES:
        verdicts = [arms[arm][case.name] for arm in ARMS]
        if not with_equal and len({verdict for verdict, _ in verdicts}) == 1:
            continue
        cells = [" by ".join(filter(None, verdict)) for verdict in verdicts]
        rows.append(f"| {case.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 where the pack is silently wrong somewhere."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    records = [run(arm) for arm in ARMS]
    for record in records:
        write_record(options.results, record)
    print(render(records))
    for record in records:
        print(record.arm, {name: metric.value for name, metric in record.metrics.items()}, file=sys.stderr)
    return 1 if records[-1].metrics["wrong"].value else 0


if __name__ == "__main__":
    sys.exit(main())
