# SPDX-License-Identifier: Apache-2.0
"""The stock setting that a case is measured against: the best of those it lists, and of none."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.arms import EngineArm, describe_error
from bench.case import Case
from bench.records import hide_paths

#: Measured runs of each setting, after the warm-up.
TUNE_RUNS = 3
#: The two best settings run again, in turns, when the second is within this part of the first: one after the other, so
#: small a difference may be the machine's.
TUNE_CLOSE = 0.05
#: Seeds of these runs lie beyond those of measured ones, so that no prompt is in a prefix cache before its run.
TUNE_SEED = 2_000_000


class CaseFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The case cannot go on; records of what ran are kept."""


def tune_stock(
    case: Case,
    make: Callable[[Sequence[str], Path], EngineArm],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Try the case's stock settings, and no setting, in short runs; {"args", "metric", "trials"} of the best.

    make: an arm of stock with these further options, whose logs go into that folder. Raises CaseFailed where no setting
    works.
    """
    if not case.tune:
        return {"args": [], "metric": None, "trials": []}
    metric = case.tune_metric
    direction = case.metrics[metric].direction
    settings = ((), *case.tune)
    trials: list[dict[str, Any]] = [
        {"args": list(extra), "value": None, "values": [], "metrics": {}, "error": None} for extra in settings
    ]
    with ExitStack() as stack:
        arms = []
        for number, extra in enumerate(settings):
            # Each has its own logs.
            place = folder / f"tune-{number}"
            place.mkdir(exist_ok=True)
            arms.append(make(extra, place))
            stack.callback(arms[-1].stop)
        for trial, arm in zip(trials, arms, strict=True):
            try_setting(trial, arm, metric, range(TUNE_RUNS), say)
            arm.stop()
        close = find_close(trials, direction)
        for number in range(TUNE_RUNS if close else 0):
            for place_in_turn in close if number % 2 == 0 else close[::-1]:
                trial, arm = trials[place_in_turn], arms[place_in_turn]
                if trial["error"] is None:
                    try_setting(trial, arm, metric, [TUNE_RUNS + number], say)
                    if case.servers == "in_turn":
                        arm.stop()
    # Those that ran again are judged by the values that they measured in turns.
    again = [
        {**trials[number], "value": median_of(trials[number]["values"][TUNE_RUNS:])}
        for number in close
        if trials[number]["error"] is None
    ]
    return {"args": choose_setting(again or trials, direction), "metric": metric, "trials": trials}


def try_setting(
    trial: dict[str, Any], arm: EngineArm, metric: str, numbers: Iterable[int], say: Callable[[str], None]
) -> None:
    """Runs of one stock setting, added to its trial; what fails is noted there."""
    try:
        if not arm.is_running:
            arm.start_warm()
        for number in numbers:
            measured = arm.run(TUNE_SEED + number).metrics
            trial["values"].append(measured[metric].value)
            # Who doubts the choice sees what the other settings are better at.
            for name, one in measured.items():
                trial["metrics"].setdefault(name, []).append(one.value)
        trial["value"] = median_of(trial["values"])
    except Exception as error:  # noqa: BLE001 - a setting that does not work is one that is not chosen
        trial |= {"value": None, "error": hide_paths(describe_error(error))}
        arm.stop()
    value = "failed" if trial["value"] is None else f"{metric} {trial['value']:.4g}"
    say(f"{arm.case.name} stock with {' '.join(trial['args']) or 'no setting'}: {value}")


def find_close(trials: Sequence[Mapping[str, Any]], direction: str) -> list[int]:
    """Positions of the two best trials where the second is within `TUNE_CLOSE` of the first; else nothing."""
    valued = [number for number, trial in enumerate(trials) if trial["value"] is not None]
    best = sorted(valued, key=lambda number: trials[number]["value"], reverse=direction == "higher")[:2]
    if len(best) < 2:
        return []
    first, second = (trials[number]["value"] for number in best)
    return best if abs(first - second) <= TUNE_CLOSE * abs(first) else []


def choose_setting(trials: Iterable[Mapping[str, Any]], direction: str) -> list[str]:
    """The args of the best trial; the first of equals. Raises CaseFailed with the last error when none has a value."""
    every = list(trials)
    valued = [trial for trial in every if trial["value"] is not None]
    if not valued:
        reason = next((trial["error"] for trial in reversed(every) if trial["error"]), "no value was measured")
        raise CaseFailed(f"no stock setting works: {reason}")
    choose = min if direction == "lower" else max
    return list(choose(valued, key=lambda trial: trial["value"])["args"])


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of the values that are there; None without any."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
