# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of whole engines on layers of a real model's shape: stock bf16 and mxmoe at several widths.

    python -m bench.engine_speed [SHAPE...] [--layers 4] [--repetitions 5] [--work DIR] [--out DIR]

A model of random weights has a few layers of the shape and a small vocabulary, so that what is measured is layers and
not the output head. It is packed by `vllm-ext quantize` to every width of --bits, and written as a 4-bit checkpoint in
GPTQ's format for stock vLLM; where that has no kernel for it, as on x86 without AMX, a failed record says so. All
engines stay up and take turns: decoding after a short prompt, and prefill, each at several batch sizes. One record per
engine and repetition, in the case `engine_SHAPE`. --work keeps models between runs.
Exit codes: 0 ok, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.arms import EngineArm, find_model
from bench.case import Case, Workload, parse_case
from bench.client import RunFailed
from bench.models.gptq import quantize_directory
from bench.models.make_model import make_model
from bench.records import RESULTS, Metric, Record, describe_environment, hide_paths, write_record
from bench.run import leave_on_signals
from bench.serve.server import ServerFailed, read_log_tail

STOCK, STOCK_4BIT = "bf16", "gptq-4"
#: Of the log of an engine that does not start, to find the reason in.
LOG_LINES = 60
BITS = (4.25, 3.25, 2.25)
BATCHES = (1, 8, 32)
CONTEXT = 512
#: Of the stock 4-bit checkpoint.
GROUP_SIZE = 128
#: Enough of a vocabulary for the shipped tokenizer; the head of the real models would be a large part of few layers.
VOCABULARY = 4096
SHAPES: dict[str, dict[str, int]] = {
    "e60": {"experts": 60, "experts_per_token": 4, "moe_intermediate": 1408},
    "e128": {"experts": 128, "experts_per_token": 8, "moe_intermediate": 768},
}
#: Both are Qwen3-MoE with a hidden size of 2048; the first has the experts of Qwen1.5-MoE-A2.7B.
PRESET = "qwen3-30b-a3b"


@dataclass(frozen=True)
class Phase:
    """A load and the throughput that is its result."""

    name: str
    input_len: int
    output_len: int
    throughput: str


#: In decode one step of nine carries prompts; in prefill one token of 129 is generated.
PHASES = (Phase("decode", 8, 64, "output_throughput"), Phase("prefill", 128, 1, "total_throughput"))


def make_models(shape: str, layers: int, bits: Sequence[float], work: Path) -> dict[str, Case]:
    """{arm: its case}, in the order of the report; models are made in `work` where they are not there yet."""
    model = work / f"{shape}-{layers}"
    if not model.is_dir():
        sizes: dict[str, Any] = {"layers": layers, "vocab": VOCABULARY, "context": 2 * CONTEXT, **SHAPES[shape]}
        make_model(PRESET, model, **sizes)
    content = {
        "model": str(model),
        "mode": "offline",
        "args": f"--max-model-len {CONTEXT} --max-num-seqs {max(BATCHES)} --enforce-eager "
        "--no-enable-prefix-caching --distributed-executor-backend uni",
        "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": 0},
        "workload": {"name": "random", "num_requests": 1, "options": {"input_len": 8, "output_len": 8}},
        "metrics": ["output_throughput", "total_throughput", "resident_memory"],
    }
    rounded = work / f"{shape}-{layers}-gptq"
    if not rounded.is_dir():
        partial = work / f".{rounded.name}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model, partial)
        quantize_directory(partial, GROUP_SIZE)
        os.replace(partial, rounded)
    cases = {STOCK: parse_case(content, f"engine_{shape}")}
    cases[STOCK_4BIT] = parse_case({**content, "stock": {"model": str(rounded)}}, f"engine_{shape}")
    for width in bits:
        pack = {"quantize": ["--bits", width]}
        cases[f"mxmoe-{width:g}"] = parse_case({**content, "pack": pack}, f"engine_{shape}")
    return cases


@contextlib.contextmanager
def start_engines(cases: Mapping[str, Case], work: Path) -> Iterator[tuple[dict[str, EngineArm], dict[str, str]]]:
    """(engines, {arm: why it did not start}); one is started after the other, as each holds its weights twice while it
    loads them. Only the stock 4-bit arm may fail; raises ServerFailed for another."""
    with contextlib.ExitStack() as stack:
        engines, failures = {}, {}
        for name, case in cases.items():
            folder = work / f"{Path(case.model).name}-{name}"
            folder.mkdir(exist_ok=True)
            side = "stock" if name in (STOCK, STOCK_4BIT) else "pack"
            engine = EngineArm(case, side, find_model(case, side, folder), folder)
            stack.callback(engine.stop)
            print(f"{case.name}: start {name}", file=sys.stderr, flush=True)
            try:
                engine.start()
            except ServerFailed as error:
                if name != STOCK_4BIT:
                    raise
                failures[name] = find_reason(read_log_tail(error.log_path, LOG_LINES))
                print(f"{case.name}: {name} did not start: {failures[name]}", file=sys.stderr, flush=True)
            else:
                engines[name] = engine
        yield engines, failures


def find_reason(log: str) -> str:
    """The last line of a log that names an exception, or all of it."""
    named = [line.strip() for line in log.splitlines() if "Error:" in line]
    return hide_paths(named[-1] if named else log)


def measure_repetition(engines: Mapping[str, EngineArm], repetition: int) -> dict[str, dict[str, Metric]]:
    """{arm: {metric: value}}; the arms take turns within every load, in the opposite order every other time."""
    measured: dict[str, dict[str, Metric]] = {name: {} for name in engines}
    order = list(engines) if repetition % 2 == 0 else list(engines)[::-1]
    for phase in PHASES:
        for batch in BATCHES:
            options = {"input_len": phase.input_len, "output_len": phase.output_len}
            for name in order:
                engine = engines[name]
                engine.case = replace(engine.case, workload=Workload("random", batch, options))
                metrics = engine.run(seed=repetition).metrics
                measured[name][f"{phase.name}_batch_{batch}"] = metrics[phase.throughput]
                measured[name]["resident_memory"] = metrics["resident_memory"]
    return measured


def run_shape(shape: str, layers: int, bits: Sequence[float], repetitions: int, work: Path, out: Path) -> None:
    """Measure one shape and write its records. Raises ServerFailed or RunFailed with the end of an engine's log."""
    cases = make_models(shape, layers, bits, work)
    environment = describe_environment()
    settings = {"kind": "engine", "stock_arm": STOCK, "layers": layers, "vocabulary": VOCABULARY, "hidden": 2048}
    settings |= {**SHAPES[shape], "args": list(cases[STOCK].args)}
    settings |= {phase.name: f"{phase.output_len} tokens after {phase.input_len}" for phase in PHASES}
    with start_engines(cases, work) as (engines, failures):
        for name, reason in failures.items():
            write_record(out, Record(f"engine_{shape}", name, 0, {}, status="failed", error=reason,
                                     settings=settings, **environment))  # fmt: skip
        measure_repetition(engines, repetitions)
        for repetition in range(repetitions):
            for name, metrics in measure_repetition(engines, repetition).items():
                quantize = list(cases[name].pack.quantize)
                described = {**settings, "quantize": quantize} if quantize else settings
                record = Record(
                    f"engine_{shape}", name, repetition, metrics, seed=repetition, settings=described, **environment
                )
                write_record(out, record)
            print(f"engine_{shape}: repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine_speed", description="Whole engines on real shapes.")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"default all: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, metavar="BITS", help="true bits per weight")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models and logs here")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    options = parser.parse_args(argv)
    unknown = [shape for shape in options.shapes if shape not in SHAPES]
    if unknown:
        parser.error(f"no shape {unknown[0]!r}; known: {', '.join(SHAPES)}")
    if options.layers < 1 or options.repetitions < 1:
        parser.error("--layers and --repetitions must be at least 1")
    leave_on_signals()
    with tempfile.TemporaryDirectory(prefix="vllm-ext-engine-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for shape in options.shapes or SHAPES:
            try:
                run_shape(shape, options.layers, options.bits, options.repetitions, work, options.out.resolve())
            except (ServerFailed, RunFailed, ValueError) as error:
                print(f"engine_{shape}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
