# SPDX-License-Identifier: Apache-2.0
"""Markdown of benchmark records. Wins, losses and differences too small to tell are written in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.comparison import compare_arms, find_arm_values, find_stock, judge_arms, list_arms, list_metrics
from bench.records import Record

COLUMNS = ("metric", "arm", "median", "p10 to p90", "ratio to stock", "verdict")


def render_case_table(records: Sequence[Record], metrics: Sequence[str] = ()) -> str:
    """The comparison of one case: a row per metric and arm.

    `metrics` chooses and orders them; nothing means all that have a better direction, or all where none has one.
    A ratio above 1 means better than the stock arm, whatever the metric's direction; in brackets its bootstrap
    interval. Raises ValueError for a metric that no arm has.
    """
    stock, arms = find_stock(records), list_arms(records)
    rows = []
    known = list_metrics(records)
    for metric in metrics or list_metrics(records, with_direction=True) or known:
        if metric not in known:
            raise ValueError(f"no metric {metric!r} in case {records[0].case}; there are: {', '.join(known) or 'none'}")
        rows += [[metric, *_describe_value(records, metric, stock, arm)] for arm in arms]
    return "\n".join(_format_row(row) for row in (COLUMNS, ["---"] * len(COLUMNS), *rows))


@dataclass(frozen=True)
class Series:
    """Cases that differ in one setting, a number: `by` is its name, `cases` the records by its value, ascending.

    Cases join a series by two settings: {"series": its name, "series_by": the name of the setting that differs}.
    """

    name: str
    by: str
    cases: Mapping[float, Sequence[Record]]

    @property
    def metric(self) -> str:
        """The first metric that has a better direction. Raises ValueError where none has."""
        for records in self.cases.values():
            if metrics := list_metrics(records, with_direction=True):
                return metrics[0]
        raise ValueError(f"no case of series {self.name} has a metric that can be compared")

    @property
    def arms(self) -> list[str]:
        """The arms of the first case, the one that the others are compared with first."""
        return list_arms(next(iter(self.cases.values())))


def find_series(cases: Mapping[str, Sequence[Record]]) -> list[Series]:
    """The series of all cases that have values, by name. Raises ValueError for one that is not told apart."""
    found: dict[tuple[str, str], dict[float, Sequence[Record]]] = {}
    for case, records in cases.items():
        settings = records[0].settings
        if "series" not in settings or not any(record.metrics for record in records):
            continue
        name, by = str(settings["series"]), str(settings.get("series_by"))
        value = settings.get(by)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"case {case} is in series {name} by {by!r}, but that setting is {value!r}: no number")
        if value in found.setdefault((name, by), {}):
            raise ValueError(f"two cases of series {name} have {by} {value}; the second is {case}")
        found[name, by][value] = records
    return [Series(name, by, dict(sorted(mine.items()))) for (name, by), mine in sorted(found.items())]


def render_series_table(series: Series) -> str:
    """The ratios to stock of one metric: a row for each case, a column for each arm."""
    stock, *others = series.arms
    rows = []
    for value, records in series.cases.items():
        cells = [f"{value:g}", _describe_value(records, series.metric, stock, stock)[1]]
        for arm in others:
            cells.append(_describe_value(records, series.metric, stock, arm)[3])
        rows.append(cells)
    head = [series.by, f"{stock}, {series.metric}", *others]
    return "\n".join(_format_row(row) for row in (head, ["---"] * len(head), *rows))


def render_failures(records: Sequence[Record]) -> str:
    """A list of what failed: arm, repetitions, first line of the error; empty when nothing did."""
    failed: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.status == "failed":
            failed.setdefault((record.arm, _first_line(record.error)), []).append(record.repetition)
    return "\n".join(
        f"- {arm} failed in repetition {', '.join(map(str, repetitions))}: {_escape(error)}"
        for (arm, error), repetitions in failed.items()
    )


def format_value(value: float) -> str:
    """Four significant digits, thousands separated, no exponent from 0.001 up to 1e15."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e15:
        return f"{value:.3e}"
    decimals = max(0, 3 - _count_digits(value))
    return f"{value:,.{decimals}f}"


def _describe_value(records: Sequence[Record], metric: str, stock: str, arm: str) -> list[str]:
    try:
        values = find_arm_values(records, metric, arm)
    except ValueError:
        # The arm failed, or does not have this metric: the row shows the gap, the list of failures the reason.
        return [arm, "-", "-", "-", "-"]
    low, high = values.spread
    median = f"{format_value(values.median)} {values.unit}".strip()
    cells = [arm, median, f"{format_value(low)} to {format_value(high)}"]
    if arm == stock or values.direction == "none":
        return [*cells, "", ""]
    try:
        result = compare_arms(records, metric, stock, arm)
    except ValueError:
        return [*cells, "-", _judge_without_ratio(records, metric, stock, arm)]
    return [*cells, f"{result.ratio:.3f} [{result.low:.3f}, {result.high:.3f}]", result.verdict]


def _judge_without_ratio(records: Sequence[Record], metric: str, stock: str, arm: str) -> str:
    try:
        return judge_arms(records, metric, stock, arm)
    except ValueError:
        return "-"  # the two share no repetition


def _count_digits(value: float) -> int:
    """Position of the leading digit: 0 for 1 to 9, 1 for 10 to 99, -1 for 0.1."""
    return int(f"{value:.3e}".partition("e")[2])


def _format_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _first_line(error: str | None) -> str:
    return (error or "no message").strip().splitlines()[0][:200]
