# SPDX-License-Identifier: Apache-2.0
"""Draft lengths from goodput against every setting of stock, within one engine.

    python -m bench.speculation.switched [CASE ...] [--repetitions 15] [--finals 0] [--model DIR] [--out DIR] [--resume]

CASE as in `bench.speculation.engines`, which has an engine for every setting. Here one engine, the pack's, answers the
same requests once with smartspec and once with each of stock's settings: for these vLLM's own scheduler runs, and the
number of drafts that it asks for is the setting's. That leaves out what two processes of one program differ by, which
on a small machine is more than what is to be found out, and also what differs between their settings before any draft
is made: no speculation at all is here an engine with a drafter that is asked for nothing. Runs are short and many,
because a small machine's speed drifts; a table by batch size that asks for one number at a case's concurrency is left
out, being one of the other settings. With --finals, so many more repetitions follow of smartspec and those of stock's
settings that are within a tenth of the best: the others have lost, and take the longest.
Written is one record for each case, setting and repetition, in the case `switched_CASE`; printed is how smartspec
compares with the best setting. With --resume, cases whose records are there are not measured again.
Exit codes: 0 ok, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.arms import WARMUP_SEED, find_model, make_environment
from bench.case import Case
from bench.client import Load, RunFailed, prepare_requests
from bench.records import RESULTS, Metric, Record, describe_environment, record_path, write_record
from bench.run import leave_on_signals
from bench.speculation.engines import (
    FILES,
    OFF,
    OURS,
    compare_draws,
    describe_case,
    find_records,
    is_measured,
    name_setting,
    print_comparison,
    read_cases,
)
from bench.strict import CaseError

if TYPE_CHECKING:
    from vllm import LLM

PREFIX = "switched"
#: Of the goodput mixin, the methods that are also vLLM's.
BYPASSED = ("schedule", "_update_after_schedule", "update_from_output", "finish_requests")
#: Requests of a run for each that runs at once, and at least.
REQUESTS_PER_SLOT, FEWEST_REQUESTS = 3, 4
#: Of stock's settings, those that are less than this factor slower than the best may be it.
CLOSE = 1.1


def read_lengths(arguments: Sequence[str], most: int, max_num_seqs: int) -> list[int]:
    """Drafts that a setting of stock asks for by the number of running requests, 0 to max_num_seqs.

    most: what the engine's drafter makes at most. Raises ValueError for a setting that asks for more, and for one that
    is none of speculation.
    """
    if name_setting(arguments) == OFF:
        return [0] * (max_num_seqs + 1)
    speculative = json.loads(arguments[1])
    table = speculative.get("num_speculative_tokens_per_batch_size")
    rows = table or [[1, max_num_seqs, speculative["num_speculative_tokens"]]]
    lengths = [0] * (max_num_seqs + 1)
    for first, last, length in rows:
        if length > most:
            raise ValueError(f"a setting of stock asks for {length} drafts, and the engine's drafter makes {most}")
        lengths[first : last + 1] = [length] * len(lengths[first : last + 1])
    return lengths


class Switch:
    """Whether the goodput mixin of a live scheduler is in charge, or vLLM's own code with a table of lengths."""

    def __init__(self, scheduler: Any) -> None:
        """scheduler: one made of the goodput mixin and vLLM's; nothing is running."""
        self._scheduler = scheduler
        self._table = scheduler.dynamic_sd_lookup
        self._stock = next(cls for cls in type(scheduler).__mro__ if cls.__module__.startswith("vllm."))

    def use_stock(self, lengths: Sequence[int]) -> None:
        """Until `use_pack`: lengths by the number of running requests."""
        self._scheduler.dynamic_sd_lookup = list(lengths)
        for name in BYPASSED:
            setattr(self._scheduler, name, types.MethodType(getattr(self._stock, name), self._scheduler))

    def use_pack(self) -> None:
        """As the engine was made."""
        self._scheduler.dynamic_sd_lookup = self._table
        for name in BYPASSED:
            vars(self._scheduler).pop(name, None)


class SwitchedEngine:
    """The pack's engine of a case in this process, with its switch and a count of its steps."""

    def __init__(self, case: Case, model: str) -> None:
        """Starts it on this model directory; raises what vLLM raises where it cannot."""
        from bench.serve.offline import make_engine, make_parser

        for variable, value in make_environment(case, "pack").items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        options = make_parser().parse_args([model, *case.args, *case.pack.args])
        self.llm: LLM = make_engine(options)
        # One process, so that its scheduler is at hand.
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.switch = Switch(scheduler)
        self.most = scheduler.num_spec_tokens
        self.max_num_seqs = scheduler.max_num_running_reqs
        self._steps = 0
        step = self.llm.llm_engine.step

        def count_step() -> Any:
            self._steps += 1
            return step()

        self.llm.llm_engine.step = count_step

    def run(self, load: Load, lengths: Sequence[int] | None, seed: int) -> dict[str, Metric]:
        """One run of these requests; lengths None for smartspec. Raises RunFailed."""
        from bench.serve.offline import run_requests

        if lengths is None:
            self.switch.use_pack()
        else:
            self.switch.use_stock(lengths)
        # Other settings have sent the same prompts before.
        if not self.llm.reset_prefix_cache():
            raise RunFailed("the prefix cache cannot be emptied: requests of an earlier run are still there")
        self._steps = 0
        result = run_requests(self.llm, [dict(request) for request in load.requests or ()], seed, load.max_concurrency)
        if result["failed"]:
            raise RunFailed(f"{result['failed']} of {load.num_requests} requests failed")
        return {
            "output_throughput": Metric(result["output_throughput"], "tokens/s", "higher"),
            "wall_per_step": Metric(1e3 * result["duration"] / self._steps, "ms", "lower"),
            "steps": Metric(float(self._steps), "steps", "lower"),
        }


def list_arms(case: Case, most: int, max_num_seqs: int) -> dict[str, list[int] | None]:
    """{arm: its drafts by running requests}, None for smartspec's. Raises ValueError as `read_lengths`."""
    arms: dict[str, list[int] | None] = {OURS: None}
    seen: set[int] = set()
    for setting in ((), *case.tune):
        lengths = read_lengths(setting, most, max_num_seqs)
        used = set(lengths[1 : case.workload.options["max_concurrency"] + 1])
        if len(used) == 1 and used <= seen:
            continue
        seen |= used if len(used) == 1 else set()
        arms[name_setting(setting)] = lengths
    return arms


def find_finalists(case: Case, repetitions: int, out: Path, code: str) -> list[str]:
    """Of stock's settings, those that may be the best by a case's first repetitions."""
    records = [one for one in find_records(out, case, code, PREFIX) if one.repetition < repetitions]
    stock = sorted({record.arm for record in records} - {OURS})
    ratios = {arm: compare_draws(records, arm).ratio for arm in stock}
    return [arm for arm, ratio in ratios.items() if ratio < CLOSE * min(ratios.values())]


def is_whole(case: Case, repetitions: int, finals: int, out: Path, code: str) -> bool:
    """Whether a case's records are all there, found out without its engine."""
    speculative = json.loads(case.pack.args[case.pack.args.index("--speculative-config") + 1])
    arms = list_arms(case, speculative["num_speculative_tokens"], case.workload.options["max_concurrency"])
    if not is_measured(case, arms, range(repetitions), out, code, PREFIX):
        return False
    last = [OURS, *find_finalists(case, repetitions, out, code)]
    return is_measured(case, last, range(repetitions, repetitions + finals), out, code, PREFIX)


def shorten(case: Case) -> Case:
    """The same case with as many requests as one run has here."""
    count = max(FEWEST_REQUESTS, REQUESTS_PER_SLOT * case.workload.options["max_concurrency"])
    return replace(case, workload=replace(case.workload, num_requests=count))


def measure_case(
    engine: SwitchedEngine,
    case: Case,
    model: str,
    repetitions: int,
    finals: int,
    environment: Mapping[str, Any],
    out: Path,
) -> None:
    """All settings of a case in turn, in another order each time; writes their records. Raises RunFailed.

    Records of this case and code that are there go: two runs that are not one after the other are no pair.
    """

    def prepare(seed: int) -> Load:
        with tempfile.TemporaryDirectory(prefix="vllm-ext-switched-") as folder:
            return prepare_requests(case.workload, model, seed, Path(folder))

    arms = list_arms(case, engine.most, engine.max_num_seqs)
    for old in find_records(out, case, environment["git_hash"], PREFIX):
        record_path(out, old.case, old.arm, old.repetition).unlink()
    settings = {**describe_case(case), "args": [*case.args, *case.pack.args]}
    load = prepare(WARMUP_SEED)
    for lengths in arms.values():
        engine.run(load, lengths, WARMUP_SEED)
    names = list(arms)
    for repetition in range(repetitions + finals):
        if repetition == repetitions:
            names = [OURS, *find_finalists(case, repetitions, out, environment["git_hash"])]
        seed = case.seed + repetition
        load = prepare(seed)
        # Of new prompts the first run is slower, by a tenth at one request: kernels are prepared for their lengths.
        # Who is first or last in turn would pay for all.
        engine.run(load, arms[OFF], seed)
        # Shuffled: of an order and its reverse the same settings have the ends, and those were a few percent slower.
        for name in random.Random(seed).sample(names, len(names)):
            metrics = engine.run(load, arms[name], seed)
            # Repetitions of one process: each is a draw of its own, of all but the process.
            described = {**settings, "drafts": arms[name], "started_for_repetition": repetition}
            write_record(
                out,
                Record(
                    f"{PREFIX}_{case.name}", name, repetition, metrics, seed=seed, settings=described, **environment
                ),
            )
    more = f", {finals} more of {', '.join(names)}" if finals else ""
    print(f"{PREFIX}_{case.name}: {repetitions} repetitions of {len(arms)} settings{more}", file=sys.stderr, flush=True)


def measure_cases(
    cases: Sequence[Case], repetitions: int, finals: int, environment: Mapping[str, Any], out: Path
) -> None:
    """One engine for cases that share theirs. Raises RunFailed, and what vLLM raises where it cannot start."""
    with tempfile.TemporaryDirectory(prefix="vllm-ext-switched-model-") as folder:
        model = find_model(cases[0], "pack", Path(folder))
        engine = SwitchedEngine(cases[0], model)
        for case in cases:
            measure_case(engine, case, model, repetitions, finals, environment, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation.switched", description="Draft lengths within one engine."
    )
    parser.add_argument("cases", nargs="*", default=FILES, metavar="CASE")
    parser.add_argument("--repetitions", type=int, default=15, metavar="N", help="of each setting")
    parser.add_argument("--finals", type=int, default=0, metavar="N", help="more, of those that may be the best")
    parser.add_argument("--model", metavar="DIR", help="instead of the cases' own")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--resume", action="store_true", help="do not measure again what is there")
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if options.finals < 0:
        parser.error("--finals must be at least 0")
    try:
        cases = [shorten(case) for case in read_cases(options.cases, options.model)]
        # Before an engine is started for minutes.
        for setting in ((), *cases[0].tune):
            name_setting(setting)
    except (CaseError, ValueError) as error:
        parser.error(str(error))
    leave_on_signals()
    environment, out = describe_environment(), options.out.resolve()
    code = environment["git_hash"]
    asked = options.repetitions, options.finals
    left = [case for case in cases if not (options.resume and is_whole(case, *asked, out, code))]
    try:
        if left:
            measure_cases(left, *asked, environment, out)
    except (RunFailed, RuntimeError, ValueError) as error:
        print(f"speculation.switched: {error}", file=sys.stderr)
        return 1
    print_comparison(cases, out, code, PREFIX)
    return 0


if __name__ == "__main__":
    sys.exit(main())
