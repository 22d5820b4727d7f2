# SPDX-License-Identifier: Apache-2.0
"""Check the benchmark against known truths: equal arms must show no difference, a slower one must be found.

    python -m bench.selfcheck [--trials 20] [--pairs 10] [--passes 8] [--slowdown 0.1] [--values FILE]

Three real engines take turns on one workload: stock, stock again, and stock with every step made slower by --slowdown
(bench/slowdown.py). A trial is --pairs pairs of --passes runs, judged as in any case. Passed: "no difference" in at
least 19 of 20 trials of equal arms, "loss" in at least 18 of 20 of the slower one, on the metrics of --require.
Engines are started anew every --restart-every trials, since two processes of one program differ by themselves.
Exit codes: 0 passed, 1 not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.arms import EngineArm
from bench.case import Case, parse_case, resolve_model
from bench.records import Metric, Record, describe_environment, write_record
from bench.run import leave_on_signals
from bench.slowdown import make_environment, write_plugin
from bench.statistics import CONFIDENCE, Comparison, choose_margin, compare

ARMS = ("stock", "equal", "slower")
#: Offline, because a run then costs no client start, so that turns can be quick: a third of a second each. What else
#: happens on a machine lasts longer and meets both arms; runs of a second scattered three times as much.
CASE = {
    "model": "bench/models/tiny_moe",
    "mode": "offline",
    "args": "--max-model-len 1024 --max-num-seqs 16 --enforce-eager --distributed-executor-backend uni",
    # One process and one thread: vLLM's processes spin while they wait for each other, and so do threads at a barrier.
    # That counts as CPU time, and on a busy machine it hides what an engine step costs.
    "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": 0, "OMP_NUM_THREADS": 1, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "workload": {"name": "random", "num_requests": 16, "options": {"input_len": 64, "output_len": 20}},
    "metrics": ["output_throughput", "wall_per_step", "cpu_per_step"],
}
REQUIRED_EQUAL = 0.95
REQUIRED_FOUND = 0.90

Values = dict[str, dict[str, list[float]]]


@contextlib.contextmanager
def start_engines(case: Case, folder: Path, slowdown: float) -> Iterator[dict[str, EngineArm]]:
    """The three engines, warm; stopped at the end."""
    plugin = folder / "plugin"
    if not plugin.is_dir():
        write_plugin(plugin)
    environments: dict[str, Mapping[str, str]] = {"slower": make_environment(plugin, slowdown)}
    with contextlib.ExitStack() as stack:
        engines = {}
        for name in ARMS:
            place = folder / name
            place.mkdir(exist_ok=True)
            model = resolve_model(case.model)
            engines[name] = EngineArm(case, "stock", model, place, environment=environments.get(name))
            stack.callback(engines[name].stop)
        with ThreadPoolExecutor(len(engines)) as pool:
            # Most of a start waits for one core; list() raises what a start raised.
            list(pool.map(lambda engine: engine.start(), engines.values()))
        for engine in engines.values():
            engine.run(seed=1_000_000)
        yield engines


def run_trial(engines: Mapping[str, EngineArm], case: Case, trial: int, pairs: int) -> Values:
    """{metric: {arm: value per pass}}. Every engine is first, second and last equally often."""
    values: Values = {metric: {name: [] for name in ARMS} for metric in case.metrics}
    for number in range(trial * pairs * case.passes, (trial + 1) * pairs * case.passes):
        shift = number % len(ARMS)
        order = ARMS[shift:] + ARMS[:shift]
        # Both directions: a rotation alone would always have the same two neighbours in the same order.
        for name in order if number % 2 == 0 else order[::-1]:
            for metric, measured in engines[name].run(seed=number).metrics.items():
                if measured.value is None:
                    raise ValueError(f"the engine reported no {metric}")
                values[metric][name].append(measured.value)
    return values


def judge(values: Values, case: Case) -> dict[str, dict[str, Comparison]]:
    """{metric: {"equal" and "slower": comparison with stock}} of one trial; a pair's value is the median of its passes,
    as in the records of `CaseRunner`."""
    comparisons: dict[str, dict[str, Comparison]] = {}
    for metric, arms in values.items():
        medians = {
            name: np.median(np.reshape(measured, (-1, case.passes)), axis=1).tolist() for name, measured in arms.items()
        }
        measure = case.metrics[metric]
        margin = choose_margin(measure.unit)
        comparisons[metric] = {
            name: compare(medians["stock"], medians[name], measure.direction, margin) for name in ARMS[1:]
        }
    return comparisons


def describe_check(case: Case, pairs: int, slowdown: float) -> dict[str, Any]:
    """What every trial of one check must have in common."""
    return {"case_digest": case.digest, "pairs": pairs, "slowdown": slowdown, **describe_environment()}


def read_values(path: Path, check: Mapping[str, Any]) -> list[Values]:
    """The trials that an earlier, interrupted check wrote.

    Raises ValueError, which names the first difference, for trials of another check (see `describe_check`).
    """
    if not path.exists():
        return []
    trials = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, trial in enumerate(trials, start=1):
        for name, value in check.items():
            if trial.get(name) != value:
                raise ValueError(
                    f"{path}, trial {number}, was measured with {name} {trial.get(name)!r}, this check has {value!r}; "
                    "remove the file"
                )
    return [trial["values"] for trial in trials]


def append_values(path: Path, check: Mapping[str, Any], values: Values) -> None:
    """Add a trial to the file that `read_values` reads."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**check, "values": values}) + "\n")


def count_verdicts(trials: Sequence[Mapping[str, Mapping[str, Comparison]]], metric: str) -> dict[str, int]:
    """Of one metric over all trials: "equal" arms judged "no difference", "found": the slower arm judged a "loss"."""
    return {
        "equal": sum(trial[metric]["equal"].verdict == "no difference" for trial in trials),
        "found": sum(trial[metric]["slower"].verdict == "loss" for trial in trials),
    }


def list_ratios(
    trials: Sequence[Mapping[str, Mapping[str, Comparison]]], metric: str
) -> dict[str, list[dict[str, float]]]:
    """Of one metric: for the equal and the slower arm the ratio to stock of every trial, and its interval."""
    return {
        name: [
            {key: round(getattr(trial[metric][name], key), 5) for key in ("ratio", "low", "high")} for trial in trials
        ]
        for name in ARMS[1:]
    }


def make_record(
    case: Case, trials: Sequence[Mapping[str, Mapping[str, Comparison]]], check: Mapping[str, Any]
) -> Record:
    """The counts as a record, from which docs take their figures: metrics METRIC_equal and METRIC_found.

    `settings.ratios` has what the verdicts were counted from. `check` is that of `describe_check`.
    """
    metrics = {"trials": Metric(float(len(trials)), "trials", "none")}
    metrics |= {
        f"{metric}_{name}": Metric(float(number), "trials", "none")
        for metric in case.metrics
        for name, number in count_verdicts(trials, metric).items()
    }
    settings: dict[str, Any] = {"kind": "selfcheck", "stock_arm": "stock", "trials": len(trials), "passes": case.passes}
    settings |= {"pairs": check["pairs"], "slowdown": check["slowdown"], "confidence": CONFIDENCE}
    settings |= {"model": case.model, "args": list(case.args), "env": dict(case.env)}
    settings |= {"workload": {"num_requests": case.workload.num_requests, **case.workload.options}}
    settings |= {"ratios": {metric: list_ratios(trials, metric) for metric in case.metrics}}
    environment = {name: check[name] for name in ("versions", "device", "git_hash")}
    return Record("selfcheck", "stock", 0, metrics, settings=settings, **environment)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.selfcheck", description="Check the benchmark itself.")
    parser.add_argument("--trials", type=int, default=20, metavar="N")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="pairs of runs in a trial")
    parser.add_argument("--passes", type=int, default=8, metavar="N", help="turns within a pair")
    parser.add_argument("--slowdown", type=float, default=0.1, metavar="F", help="fraction of a step's time")
    parser.add_argument("--restart-every", type=int, default=4, metavar="N", help="trials between fresh engines")
    parser.add_argument("--require", nargs="*", default=["cpu_per_step"], choices=CASE["metrics"], metavar="METRIC")
    parser.add_argument("--values", type=Path, metavar="FILE", help="keep every trial here, and go on from there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the counts as a record into this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    options = parser.parse_args(argv)
    if min(options.trials, options.pairs, options.passes, options.restart_every) < 1 or not options.slowdown > 0:
        parser.error("--trials, --pairs, --passes and --restart-every must be at least 1, --slowdown above 0")
    case = parse_case({**CASE, "passes": options.passes}, "selfcheck")
    try:
        check = describe_check(case, options.pairs, options.slowdown)
        measured = read_values(options.values, check) if options.values else []
    except ValueError as error:
        parser.error(str(error))
    leave_on_signals()
    with tempfile.TemporaryDirectory(prefix="vllm-ext-selfcheck-") as folder:
        while len(measured) < options.trials:
            with start_engines(case, Path(folder), options.slowdown) as engines:
                for _ in range(min(options.restart_every, options.trials - len(measured))):
                    measured.append(run_trial(engines, case, len(measured), options.pairs))
                    if options.values:
                        append_values(options.values, check, measured[-1])
                    print(f"trial {len(measured)} of {options.trials}", file=sys.stderr, flush=True)
    trials = [judge(values, case) for values in measured]
    counts = {metric: count_verdicts(trials, metric) for metric in case.metrics}
    passed = all(
        counts[metric]["equal"] >= REQUIRED_EQUAL * len(trials)
        and counts[metric]["found"] >= REQUIRED_FOUND * len(trials)
        for metric in options.require
    )
    for metric, count in counts.items():
        print(
            f"{metric}: equal arms show no difference in {count['equal']} of {len(trials)} trials, "
            f"{options.slowdown:.0%} slowdown found in {count['found']}"
        )
    if options.out:
        write_record(options.out, make_record(case, trials, check))
    if options.json:
        print(json.dumps({"passed": passed, "trials": len(trials), "counts": counts}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
