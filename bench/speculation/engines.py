# SPDX-License-Identifier: Apache-2.0
"""Draft lengths from goodput against every setting of stock, on whole engines that take turns.

    python -m bench.speculation.engines [CASE ...] [--draws 3] [--repetitions 2] [--model DIR] [--out DIR] [--work DIR]

CASE is a file of bench/cases, `smartspec_chat`, or one of its numbers of concurrent requests, `smartspec_chat_c4`; all
of speculation without any. An engine for each of the file's stock settings, one for none, and the pack's: all are up at
once, in processes of their own without a server, and answer the same requests one after another, the other way round
every other time. Two processes of one program differ by a tenth on a small machine, so all engines are started anew for
every draw. Written is one record for each case, engine and repetition, in the case `engine_CASE`; printed is how the
pack compares with the best of stock's, where a draw counts once. With --resume, draws whose records are there are not
measured again.
Exit codes: 0 ok, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.arms import WARMUP_SEED, EngineArm, find_model
from bench.case import Case, find_cases
from bench.client import RunFailed
from bench.measures import MEASURES
from bench.records import RESULTS, Record, describe_environment, hide_paths, load_records, write_record
from bench.run import leave_on_signals
from bench.serve.server import ServerFailed
from bench.statistics import bound_mean
from bench.strict import CaseError

FILES = ("smartspec_chat", "smartspec_repetitive", "smartspec_changing")
METRICS = ("output_throughput", "wall_per_step", "cpu_per_token")
OFF, OURS = "off", "smartspec"
#: Engines that start at the same time.
STARTS = 2
#: Of the interval that is printed; few draws say no more.
CONFIDENCE = 0.9


def name_setting(arguments: Sequence[str]) -> str:
    """The arm of a setting of stock: off, k3, table8_3_1. Raises ValueError for one that is none of these."""
    if not arguments:
        return OFF
    if len(arguments) != 2 or arguments[0] != "--speculative-config":
        raise ValueError(f"a stock setting here is one --speculative-config, got {' '.join(arguments)}")
    speculative = json.loads(arguments[1])
    table = speculative.get("num_speculative_tokens_per_batch_size")
    if table is None:
        return f"k{speculative['num_speculative_tokens']}"
    return "table" + "_".join(str(length) for _, _, length in table)


def read_cases(texts: Sequence[str], model: str | None) -> list[Case]:
    """The cases, without their servers. Raises CaseError, and ValueError where they do not share their engines."""
    cases = [case for text in texts for case in find_cases(text)]
    for name in ("args", "env", "tune", "stock", "pack", "model", "make_model"):
        if any(getattr(case, name) != getattr(cases[0], name) for case in cases):
            raise ValueError(f"cases that are measured together share their engines, and {name} differs among theirs")
    metrics = {name: MEASURES[name] for name in METRICS}
    # One process for each engine: with two, how their waiting falls together is part of what is measured.
    changed: dict[str, Any] = {"env": {**cases[0].env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
    if model is not None:
        changed.update(model=model, make_model=())
    return [replace(case, mode="offline", metrics=metrics, tune_metric="", **changed) for case in cases]


def make_engines(case: Case, work: Path) -> dict[str, EngineArm]:
    """{arm: its engine, not started}, no speculation first and the pack last. Raises ValueError and RunFailed."""
    engines = {}
    for setting in ((), *case.tune, None):
        name, side = (OURS, "pack") if setting is None else (name_setting(setting), "stock")
        if name in engines:
            raise ValueError(f"two settings of stock would be the arm {name}: {' '.join(setting or ())}")
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        engines[name] = EngineArm(case, side, find_model(case, side, work), folder, extra_args=setting or ())
    return engines


@contextlib.contextmanager
def start_engines(engines: Mapping[str, EngineArm]) -> Iterator[None]:
    """Within this they run. Raises ServerFailed."""
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.stop)
        with ThreadPoolExecutor(STARTS) as threads:
            list(threads.map(lambda engine: engine.start(), engines.values()))
        yield


def describe_case(case: Case) -> dict[str, Any]:
    """Settings that all records of a case share."""
    return {
        "kind": "engine",
        "stock_arm": OFF,
        "concurrency": case.workload.options["max_concurrency"],
        "requests": case.workload.num_requests,
        "workload": case.workload.name,
        "model": hide_paths(case.model),
        **({"make_model": list(case.make_model)} if case.make_model else {}),
    }


def measure_draw(
    cases: Sequence[Case],
    engines: Mapping[str, EngineArm],
    repetitions: Sequence[int],
    environment: Mapping[str, Any],
    out: Path,
) -> None:
    """All cases on engines that have just started; writes their records. Raises RunFailed."""
    for case in cases:
        settings = {**describe_case(case), "started_for_repetition": repetitions[0]}
        for engine in engines.values():
            engine.case = case
            # What is compiled or cached at the first request of a kind is nobody's speed.
            engine.run(WARMUP_SEED + repetitions[0])
        for repetition in repetitions:
            order = list(engines) if repetition % 2 == 0 else list(engines)[::-1]
            for name in order:
                result = engines[name].run(case.seed + repetition)
                described = {**settings, "args": engines[name].args}
                write_record(
                    out,
                    Record(
                        f"engine_{case.name}",
                        name,
                        repetition,
                        result.metrics,
                        features=result.features,
                        seed=case.seed + repetition,
                        settings=described,
                        **environment,
                    ),
                )
        print(f"engine_{case.name}: repetitions {[one + 1 for one in repetitions]}", file=sys.stderr, flush=True)


def find_records(out: Path, case: Case, code: str, prefix: str = "engine") -> list[Record]:
    """Of a case, of this code and this model. Older ones, of which there may have been more, are no part of a run."""
    model = hide_paths(case.model)
    return [
        record
        for record in load_records(out)
        if record.case == f"{prefix}_{case.name}" and record.git_hash == code and record.settings["model"] == model
    ]


def is_measured(
    case: Case, arms: Iterable[str], repetitions: Sequence[int], out: Path, code: str, prefix: str = "engine"
) -> bool:
    """Whether the records of these arms and repetitions of a case are all there."""
    wanted = {(arm, repetition) for arm in arms for repetition in repetitions}
    return wanted <= {(one.arm, one.repetition) for one in find_records(out, case, code, prefix)}


class Beside(NamedTuple):
    """Ours beside an arm of stock: ratio of the metric, and its interval over the draws."""

    arm: str
    stock: float
    ours: float
    ratio: float
    low: float
    high: float


def compare_draws(records: Sequence[Record], arm: str) -> Beside:
    """Runs of one draw share their processes, so that a draw counts once, with the geometric mean of its pairs."""
    theirs, ours = (_find_values(records, one) for one in (arm, OURS))
    both = sorted(theirs.keys() & ours.keys())
    stock, pack = (float(np.median([values[number] for number in both])) for values in (theirs, ours))
    return Beside(arm, stock, pack, *_describe_logs(list(_find_draws(records, arm).values())))


def compare_held_out(records: Sequence[Record]) -> tuple[float, float, float] | None:
    """Ours beside the best setting of stock, which is chosen for every draw by all the others: ratio, low, high.

    The best of several settings by the same runs that it is compared in is the luckiest of those that are about
    equal: with six equal settings and ratios that scatter by 2 %, ours would seem 2.5 % behind. Chosen by other runs it
    is as lucky as ours (cross-validation, Hastie et al. 2009, section 7.10). None for less than two draws.
    """
    stock = {arm: _find_draws(records, arm) for arm in sorted({record.arm for record in records} - {OURS})}
    found = []
    for draw in sorted(set().union(*stock.values())):
        means = {
            arm: np.mean([log for other, log in draws.items() if other != draw])
            for arm, draws in stock.items()
            if draw in draws and len(draws) > 1
        }
        if means:
            found.append(stock[min(means, key=means.__getitem__)][draw])
    return _describe_logs(found) if len(found) > 1 else None


def _find_values(records: Sequence[Record], arm: str) -> dict[int, float]:
    """An arm's tokens per second by repetition."""
    found = {record.repetition: record.metrics[METRICS[0]].value for record in records if record.arm == arm}
    return {repetition: value for repetition, value in found.items() if value is not None}


def _find_draws(records: Sequence[Record], arm: str) -> dict[int, float]:
    """By draw, the mean log of ours over this arm."""
    theirs, ours = _find_values(records, arm), _find_values(records, OURS)
    draws: dict[int, list[float]] = {}
    for record in records:
        number = record.repetition
        if record.arm == OURS and number in theirs and number in ours:
            draws.setdefault(record.settings["started_for_repetition"], []).append(
                math.log(ours[number] / theirs[number])
            )
    return {draw: float(np.mean(logs)) for draw, logs in draws.items()}


def _describe_logs(logs: Sequence[float]) -> tuple[float, float, float]:
    """The mean ratio, and its interval."""
    low, high = bound_mean(np.array(logs), CONFIDENCE)
    return float(np.exp(np.mean(logs))), float(np.exp(low)), float(np.exp(high))


def print_comparison(cases: Sequence[Case], out: Path, code: str, prefix: str = "engine") -> None:
    """The pack against the best setting of stock: chosen afterwards by the same runs, and by those of other draws."""
    from rich.console import Console
    from rich.table import Table

    interval = f"{CONFIDENCE:.0%} over draws"
    table = Table("case", "best of stock", "tokens/s", "smartspec", "ratio", interval, "best by other draws", interval)
    for case in cases:
        records = find_records(out, case, code, prefix)
        stock = sorted({record.arm for record in records} - {OURS})
        # The one that ours looks worst beside.
        best = min((compare_draws(records, arm) for arm in stock), key=lambda beside: beside.ratio)
        row = [case.name, best.arm, f"{best.stock:.0f}", f"{best.ours:.0f}"]
        row += [f"{best.ratio:.3f}", f"{best.low:.3f} to {best.high:.3f}"]
        if (held_out := compare_held_out(records)) is not None:
            ratio, low, high = held_out
            row += [f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(*row)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation.engines", description="Draft lengths on whole engines."
    )
    parser.add_argument("cases", nargs="*", default=FILES, metavar="CASE")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="times that all engines are started")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="of each case in each draw")
    parser.add_argument("--model", metavar="DIR", help="instead of the cases' own")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep logs here")
    parser.add_argument("--resume", action="store_true", help="do not measure again what is there")
    options = parser.parse_args(argv)
    if min(options.draws, options.repetitions) < 1:
        parser.error("--draws and --repetitions must be at least 1")
    try:
        cases = read_cases(options.cases, options.model)
    except (CaseError, ValueError) as error:
        parser.error(str(error))
    leave_on_signals()
    environment, out = describe_environment(), options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="vllm-ext-speculation-") as folder:
        try:
            engines = make_engines(cases[0], options.work or Path(folder))
            for draw in range(options.draws):
                repetitions = [draw * options.repetitions + number for number in range(options.repetitions)]
                code = environment["git_hash"]
                if options.resume and all(is_measured(case, engines, repetitions, out, code) for case in cases):
                    continue
                print(f"draw {draw + 1} of {options.draws}: start {len(engines)} engines", file=sys.stderr, flush=True)
                with start_engines(engines):
                    measure_draw(cases, engines, repetitions, environment, out)
        except (ServerFailed, RunFailed, ValueError) as error:
            print(f"speculation.engines: {error}", file=sys.stderr)
            return 1
    print_comparison(cases, out, environment["git_hash"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
