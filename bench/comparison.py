# SPDX-License-Identifier: Apache-2.0
"""Questions that tables, plots and pages ask of benchmark records: which arms, which values, how much better."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.records import Record
from bench.statistics import Comparison, Verdict, choose_margin, compare, judge_signs

#: The arm that the others are compared with, unless the records' settings name another under "stock".
STOCK = "stock"


@dataclass(frozen=True)
class ArmValues:
    """One metric of one arm: repetition -> value of the repetitions that succeeded, and what it is measured in."""

    values: dict[int, float]
    unit: str
    direction: str

    @property
    def median(self) -> float:
        """Median over the repetitions."""
        return float(np.median(list(self.values.values())))

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile over the repetitions."""
        low, high = np.percentile(list(self.values.values()), [10, 90])
        return float(low), float(high)


def find_case(records: Iterable[Record], case: str) -> list[Record]:
    """The records of a case, by arm and repetition. Raises ValueError with the nearest name when there are none."""
    every = list(records)
    mine = [record for record in every if record.case == case]
    if not mine:
        raise ValueError(_describe_missing("records of case", case, {record.case for record in every}))
    return sorted(mine, key=lambda record: (record.arm, record.repetition))


def list_arms(records: Sequence[Record]) -> list[str]:
    """The arms of one case, the one that the others are compared with first."""
    stock = find_stock(records)
    return sorted({record.arm for record in records}, key=lambda arm: (arm != stock, arm))


def find_stock(records: Sequence[Record]) -> str:
    """The arm that the others of this case are compared with. Raises ValueError when the records disagree on it."""
    names = {str(record.settings.get("stock_arm", STOCK)) for record in records}
    if len(names) != 1:
        raise ValueError(f"the records of {records[0].case} name several arms as stock: {', '.join(sorted(names))}")
    return names.pop()


def list_metrics(records: Sequence[Record], with_direction: bool = False) -> list[str]:
    """The metrics that any record of a case has, in the records' order; `with_direction`: those that can be won."""
    names: dict[str, None] = {}
    for record in records:
        for name, metric in record.metrics.items():
            if not with_direction or metric.direction != "none":
                names.setdefault(name)
    return list(names)


def find_arm_values(records: Sequence[Record], metric: str, arm: str) -> ArmValues:
    """A metric of an arm of one case. Raises ValueError when no repetition that succeeded has a value for it."""
    case = records[0].case
    mine = [record for record in records if record.arm == arm]
    if not mine:
        raise ValueError(_describe_missing(f"arm in case {case}:", arm, {record.arm for record in records}))
    succeeded = [record for record in mine if record.status == "ok"]
    if not succeeded:
        raise ValueError(f"every repetition of {case}/{arm} failed: {mine[0].error}")
    found = {record.repetition: record.metrics[metric] for record in succeeded if metric in record.metrics}
    if not found:
        known = {name for record in succeeded for name in record.metrics}
        raise ValueError(_describe_missing(f"metric in {case}/{arm}:", metric, known))
    values = {repetition: one.value for repetition, one in found.items() if one.value is not None}
    if not values:
        raise ValueError(f"no repetition of {case}/{arm} has a value for {metric}")
    first = next(iter(found.values()))
    return ArmValues(values, first.unit, first.direction)


def compare_arms(records: Sequence[Record], metric: str, stock: str, arm: str) -> Comparison:
    """`arm` against `stock` on the repetitions in which both have a value; a ratio above 1 means that `arm` is better.
    Times and rates must differ by more than two processes of one program do; see `statistics.choose_margin`.

    Raises ValueError when there is no such repetition, or the metric has no better direction.
    """
    first, second, measured = _find_pairs(records, metric, stock, arm)
    return compare(first, second, measured.direction, choose_margin(measured.unit))


def judge_arms(records: Sequence[Record], metric: str, stock: str, arm: str) -> Verdict:
    """The verdict where values of 0 leave `compare_arms` without a ratio; see `judge_signs`. Raises ValueError."""
    first, second, measured = _find_pairs(records, metric, stock, arm)
    return judge_signs(first, second, measured.direction)


def _find_pairs(
    records: Sequence[Record], metric: str, stock: str, arm: str
) -> tuple[list[float], list[float], ArmValues]:
    """The values of both arms by pair, and stock's values for their unit and direction."""
    first, second = find_arm_values(records, metric, stock), find_arm_values(records, metric, arm)
    if first.direction == "none":
        raise ValueError(f"metric {metric} of {records[0].case} has no better direction; it cannot be compared")
    both = sorted(first.values.keys() & second.values.keys())
    if not both:
        raise ValueError(f"no repetition of {records[0].case} has {metric} for both {stock} and {arm}")
    return [first.values[number] for number in both], [second.values[number] for number in both], first


def _describe_missing(what: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"
    return f"no {what} {name!r}; {hint}"
