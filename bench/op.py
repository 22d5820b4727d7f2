# SPDX-License-Identifier: Apache-2.0
"""Compare implementations of one operator in one process: alternating, cold, repeated, as ordinary records.

    python -m bench.op [CASE...] [--list] [--repetitions 5] [--bind-threads] [--out DIR]

runs the cases that the modules `bench/kernels/bench_*.py` list in a function `op_cases() -> list[OpCase]`. CASE may be
a pattern (`'cpu_moe_*'`). `--bind-threads` starts again with the OpenMP runtime and the pinned threads of vLLM's CPU
workers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.kernels.binding import count_cores, describe_binding, restart_bound
from bench.records import RESULTS, Metric, Record, describe_environment, hide_paths, write_record
from bench.statistics import measure_spread

SUITES = Path(__file__).parent / "kernels"

#: Bytes between two uses of the same memory, in last-level caches. Caches are not strictly least-recently-used,
#: so one cache size is not enough.
COLD_FACTOR = 4.0
#: So many input sets at most; an operator that touches only a few kilobytes is then measured warm, and says so.
MAX_INPUT_SETS = 1024
#: Where the machine does not tell its cache size: larger than the last-level cache of most servers' sockets.
UNKNOWN_CACHE_BYTES = 64 << 20
DEFAULT_CALLS = 30
DEFAULT_REPETITIONS = 5
#: Warm-up: at least so many calls of each arm and so many seconds in all. Covers compilation, allocation of scratch
#: memory and the start of the thread pool.
WARMUP_CALLS = 3
WARMUP_SECONDS = 0.2


@dataclass(frozen=True)
class OpCase:
    """One comparison. See `compare_ops` for the meaning of the fields; `stock` names the arm that others must beat.

    `features` is called when the case runs: to list cases must not load what they measure.
    """

    case: str
    arms: Mapping[str, Callable[[Any], object]]
    make_inputs: Callable[[int], Any]
    working_set_bytes: int | Mapping[str, int]
    stock: str
    calls: int = DEFAULT_CALLS
    settings: Mapping[str, Any] = field(default_factory=dict)
    features: Callable[[], Mapping[str, Any]] = dict
    synchronize: Callable[[], object] | None = None
    cache_bytes: int | None = None
    cold_bytes: int | None = None
    ceiling: str | None = None


def compare_ops(
    case: str,
    arms: Mapping[str, Callable[[Any], object]],
    make_inputs: Callable[[int], Any],
    working_set_bytes: int | Mapping[str, int],
    repetitions: int = DEFAULT_REPETITIONS,
    *,
    stock: str | None = None,
    calls: int = DEFAULT_CALLS,
    settings: Mapping[str, Any] | None = None,
    features: Mapping[str, Any] | None = None,
    synchronize: Callable[[], object] | None = None,
    cache_bytes: int | None = None,
    cold_bytes: int | None = None,
    ceiling: str | None = None,
) -> list[Record]:
    """Time the arms on the same inputs, call by call in turn, with memory that no cache holds; one record per
    arm and repetition.

    case               name of the comparison, used as the folder of its records
    arms               name -> callable that takes one input set. What it returns is dropped after its time is taken
    make_inputs        input set number i, for i in 0, 1, ...: any object, passed to the arms as it is. Sets must not
                       share the memory whose reading is to be measured (weights); equal shapes, other contents.
                       Where one set of weights is larger than the caches by far, sets may share it and differ in
                       routing
    working_set_bytes  bytes that one call reads and writes, of each arm or of all. The number of input sets follows:
                       the arm that touches least comes back to the same memory after COLD_FACTOR last-level caches,
                       or after `cold_bytes` where those are more
    repetitions        records per arm; arms are paired by repetition
    stock              the arm that the others are compared with in reports; default: the first
    calls              calls of each arm in a repetition, rounded up so that all arms see all input sets equally often
    synchronize        waits for the device (`torch.cuda.synchronize`); called before both readings of the clock
    cache_bytes        last-level cache; default: what this machine's CPU tells. Give the L2 size of a GPU
    cold_bytes         bytes of its own that every arm goes through before it comes back to the same memory
    ceiling            an arm that does no more than read its bytes

    Metrics: `latency` (us, median of the calls), `latency_p10` and `latency_p90` (us), `cpu_time` (us of all threads
    per call, mean), `bandwidth` (GB/s, working set / latency), and with a ceiling `ceiling_share`, the bandwidth as a
    part of that arm's in the same repetition. Raises ValueError for bad arguments. An arm that
    raises gets records with status "failed" and the error; the others go on without it.
    """
    sizes = _check_arguments(case, arms, working_set_bytes, repetitions, calls, stock, ceiling)
    cache = cache_bytes or last_level_cache_bytes()
    cold = max(COLD_FACTOR * cache, cold_bytes or 0)
    num_sets = count_input_sets(min(sizes.values()), cold, len(arms))
    rounds = math.ceil(calls / num_sets) * num_sets
    inputs = [make_inputs(index) for index in range(num_sets)]
    environment = describe_environment()
    device = environment["device"]
    device["cores"] = count_cores(os.environ, device.get("cores", 1))
    described = {
        **(settings or {}),
        "kind": "op",
        "stock_arm": stock or next(iter(arms)),
        "calls": rounds,
        "input_sets": num_sets,
        "cold": num_sets * min(sizes.values()) >= cold,
        "cold_bytes": round(cold),
        "last_level_cache_bytes": cache,
        "threads": _count_threads(),
        "binding": describe_binding(os.environ),
    }
    errors: dict[str, str] = {}
    _warm_up(arms, inputs, errors, synchronize)
    records = []
    for repetition in range(repetitions):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        timings = _time_round_robin(arms, inputs, rounds, errors, synchronize, reverse=repetition % 2 == 1)
        metrics = {arm: {} if arm in errors else _summarize(timings[arm], sizes[arm]) for arm in arms}
        if ceiling is not None:
            _add_ceiling_share(metrics, ceiling)
        for arm in arms:
            records.append(
                Record(
                    case=case,
                    arm=arm,
                    repetition=repetition,
                    metrics=metrics[arm],
                    versions=environment["versions"],
                    device=device,
                    git_hash=environment["git_hash"],
                    features=dict(features or {}),
                    seed=repetition,
                    status="failed" if arm in errors else "ok",
                    error=errors.get(arm),
                    started=started,
                    settings={**described, "working_set_bytes": sizes[arm]},
                )
            )
    return records


def run_case(case: OpCase, repetitions: int = DEFAULT_REPETITIONS) -> list[Record]:
    """`compare_ops` on the fields of a case."""
    return compare_ops(
        case.case,
        case.arms,
        case.make_inputs,
        case.working_set_bytes,
        repetitions,
        stock=case.stock,
        calls=case.calls,
        settings=case.settings,
        features=case.features(),
        synchronize=case.synchronize,
        cache_bytes=case.cache_bytes,
        cold_bytes=case.cold_bytes,
        ceiling=case.ceiling,
    )


def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0 that Linux lists, in bytes; UNKNOWN_CACHE_BYTES where it lists none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes) or UNKNOWN_CACHE_BYTES


def count_input_sets(call_bytes: int, cold_bytes: float, num_arms: int) -> int:
    """Input sets to cycle through, so that `cold_bytes` of other memory pass before one is used again.

    At least one per arm: in every round each arm uses another set, as arms may read the same tensors. At most
    MAX_INPUT_SETS.
    """
    return max(num_arms, min(MAX_INPUT_SETS, math.ceil(cold_bytes / call_bytes)))


def _check_arguments(
    case: str,
    arms: Mapping[str, object],
    working_set_bytes: int | Mapping[str, int],
    repetitions: int,
    calls: int,
    stock: str | None,
    ceiling: str | None,
) -> dict[str, int]:
    if not arms:
        raise ValueError(f"case {case!r} has no arms; give at least one callable")
    for role, name in (("stock", stock), ("ceiling", ceiling)):
        if name is not None and name not in arms:
            raise ValueError(f"{role} {name!r} of case {case!r} is not one of its arms: {', '.join(arms)}")
    if repetitions < 1 or calls < 1:
        raise ValueError(f"repetitions and calls must be at least 1, got {repetitions} and {calls}")
    sizes = dict.fromkeys(arms, working_set_bytes) if isinstance(working_set_bytes, int) else dict(working_set_bytes)
    if set(sizes) != set(arms):
        raise ValueError(f"working_set_bytes names {', '.join(sizes)}; the arms are {', '.join(arms)}")
    for arm, size in sizes.items():
        if size < 1:
            raise ValueError(f"working_set_bytes of {arm!r} must be at least 1, got {size}")
    return sizes


def _count_threads() -> int:
    # Not imported here: an operator may be anything, and torch takes seconds.
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else len(os.sched_getaffinity(0))


def _warm_up(
    arms: Mapping[str, Callable[[Any], object]],
    inputs: Sequence[Any],
    errors: dict[str, str],
    synchronize: Callable[[], object] | None,
) -> None:
    deadline = time.monotonic() + WARMUP_SECONDS
    number = 0
    while (number < WARMUP_CALLS or time.monotonic() < deadline) and len(errors) < len(arms):
        for arm, call in arms.items():
            if arm not in errors:
                _call(arm, call, inputs[number % len(inputs)], errors, synchronize)
        number += 1


def _call(
    arm: str,
    call: Callable[[Any], object],
    inputs: Any,
    errors: dict[str, str],
    synchronize: Callable[[], object] | None,
) -> tuple[int, int]:
    """(wall, CPU) nanoseconds of one call."""
    try:
        if synchronize is not None:
            synchronize()
        cpu = time.process_time_ns()
        wall = time.perf_counter_ns()
        # Kept until the clock is read: freeing the result is not the operator's work.
        result = call(inputs)
        if synchronize is not None:
            synchronize()
        wall = time.perf_counter_ns() - wall
        cpu = time.process_time_ns() - cpu
        del result
    except Exception as error:  # noqa: BLE001 - whatever an arm raises is its result, and the others go on
        errors[arm] = hide_paths(f"{type(error).__name__}: {error}")
        return 0, 0
    return wall, cpu


def _time_round_robin(
    arms: Mapping[str, Callable[[Any], object]],
    inputs: Sequence[Any],
    rounds: int,
    errors: dict[str, str],
    synchronize: Callable[[], object] | None,
    reverse: bool,
) -> dict[str, list[tuple[int, int]]]:
    timings: dict[str, list[tuple[int, int]]] = {arm: [] for arm in arms}
    # Arms that read the same tensors stay as far apart as the sets allow; one directly after the other would be warm.
    offsets = {arm: index * len(inputs) // len(arms) for index, arm in enumerate(arms)}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # The order turns every round, so that neither arm always follows the other.
            order = list(arms) if (number % 2 == 1) == reverse else list(arms)[::-1]
            for arm in order:
                if arm not in errors:
                    index = (number + offsets[arm]) % len(inputs)
                    timings[arm].append(_call(arm, arms[arm], inputs[index], errors, synchronize))
    finally:
        if was_enabled:
            gc.enable()
    return timings


def _summarize(timings: Sequence[tuple[int, int]], working_set_bytes: int) -> dict[str, Metric]:
    wall = [wall / 1e3 for wall, _ in timings]
    latency = statistics.median(wall)
    low, high = measure_spread(wall)
    return {
        "latency": Metric(latency, "us", "lower"),
        "latency_p10": Metric(low, "us", "none"),
        "latency_p90": Metric(high, "us", "none"),
        "cpu_time": Metric(statistics.fmean(cpu / 1e3 for _, cpu in timings), "us", "lower"),
        # Of the arm's own bytes: an arm that needs fewer of them wins with less.
        "bandwidth": Metric(working_set_bytes / latency / 1e3, "GB/s", "none"),
    }


def _add_ceiling_share(metrics: Mapping[str, dict[str, Metric]], ceiling: str) -> None:
    bandwidths = {arm: mine["bandwidth"].value for arm, mine in metrics.items() if mine}
    highest = bandwidths.get(ceiling)
    for arm, value in bandwidths.items():
        share = value / highest if value is not None and highest else None
        metrics[arm]["ceiling_share"] = Metric(share, "", "none")


def choose_cases(wanted: Sequence[str], cases: Mapping[str, OpCase]) -> list[str]:
    """Names of the cases that were asked for by name or pattern, in that order, each once; nothing means all.

    Raises ValueError for what fits none.
    """
    chosen: dict[str, None] = {}
    for pattern in wanted or ["*"]:
        fitting = [name for name in cases if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"no operator case {pattern}; there are: {', '.join(cases) or 'none'}")
        chosen.update(dict.fromkeys(fitting))
    return list(chosen)


def replace_records(folder: Path, records: Sequence[Record]) -> None:
    """Write the records of one case in place of all it had: what is left of an earlier run would be paired wrongly."""
    for path in (folder / records[0].case).glob("*.json"):
        path.unlink()
    for record in records:
        write_record(folder, record)


def list_cases() -> dict[str, OpCase]:
    """All cases of `bench/kernels`, by name. Raises ValueError when two have the same."""
    cases: dict[str, OpCase] = {}
    for path in sorted(SUITES.glob("bench_*.py")):
        module = importlib.import_module(f"bench.kernels.{path.stem}")
        for case in getattr(module, "op_cases", list)():
            if case.case in cases:
                raise ValueError(f"two operator cases are called {case.case!r}; the second is in {path.name}")
            cases[case.case] = case
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exit codes: 0 ok, 1 an arm failed, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.op", description="Time operators against their peers.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="name or pattern; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--repetitions", type=int, default=DEFAULT_REPETITIONS, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument(
        "--bind-threads", action="store_true", help="threads as in vLLM's CPU workers: one pinned per core"
    )
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    if options.bind_threads:
        restart_bound("bench.op", sys.argv[1:] if argv is None else argv)
    cases = list_cases()
    if options.list:
        print("\n".join(cases))
        return 0
    try:
        chosen = choose_cases(options.cases, cases)
    except ValueError as error:
        parser.error(str(error))
    failed = False
    for name in chosen:
        began = time.monotonic()
        records = run_case(cases[name], options.repetitions)
        replace_records(options.out, records)
        failed |= any(record.status == "failed" for record in records)
        print(f"{name} ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
        for arm in cases[name].arms:
            print(f"  {describe_arm(records, arm)}", flush=True)
    return 1 if failed else 0


def describe_arm(records: Sequence[Record], arm: str) -> str:
    """One line: the arm's median latency and the range of its repetitions, or its error."""
    mine = [record for record in records if record.arm == arm]
    error = next((record.error for record in mine if record.status == "failed"), None)
    if error is not None:
        return f"{arm}: failed: {error}"
    values = [value for record in mine if (value := record.metrics["latency"].value) is not None]
    return f"{arm}: {statistics.median(values):.1f} us ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
