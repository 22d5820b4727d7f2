# SPDX-License-Identifier: Apache-2.0
"""Decoded tokens per second of whole engines after long contexts: stock's pages against presets of the KV cache.

    python -m bench.kv_cache_speed [--contexts 2048 8192 32768] [--batch 1 8] [--presets skvq_k2v2 ...] [--layers 2]
                                   [--tokens 48] [--repetitions 5] [--work DIR] [--out DIR]

A model of random weights has the attention of Qwen3-0.6B (16 heads, 8 kv heads of 128) and few layers with a small
vocabulary: attention over a long context is most of its step, as it is in a large model with many requests. Stock runs
twice, with bf16 and with fp8 pages. Every engine computes the prompts once, which is its prefill; after that they are
prefix hits but for their last token, and what is measured is decoding. All engines stay up and take turns. One record
per engine, batch, context and repetition, in the case `engine_kv_bBATCH_CONTEXT`.
Exit codes: 0 ok, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.arms import EngineArm
from bench.case import Case, Workload, parse_case
from bench.client import RunFailed
from bench.models.make_model import make_model
from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from bench.run import leave_on_signals
from bench.serve.server import ServerFailed
from vllm_ext.kv_cache.presets import PLAN_NAME, get_preset

STOCK = "bf16"
#: {arm of stock: (its options, bits of an element)}.
STOCK_ARMS: dict[str, tuple[str, float]] = {STOCK: ("", 16), "fp8": ("--kv-cache-dtype fp8", 8)}
PRESETS = ("skvq_k2v2", "kivi_k2v2", "kivi_k4v4", "kv4")
CONTEXTS = (2048, 8192, 32768)
BATCHES = (1, 8)
#: vLLM's on CPUs; prefix hits end at its multiples.
BLOCK_SIZE = 128
SHAPE: dict[str, Any] = {
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate": 3072,
    "vocab": 4096,
}
#: Computed tokens of a measured run beyond the decoded ones, of each request: one of the prompt, and one to spare.
SPARE_TOKENS = 2
RUN_LIMIT = 1800
#: Quantized tokens that take as much room as the full-precision pages of a request: some twenty, each with the size of
#: a page of BLOCK_SIZE tokens.
WINDOW_TOKENS = 2560


def make_cases(presets: Sequence[str], contexts: Sequence[int], options: argparse.Namespace, work: Path) -> list[Case]:
    """The engines in the order of the report, stock first; the model is made in `work` where it is not there yet."""
    model = work / f"kv-{options.layers}"
    longest = max(contexts) + options.tokens
    if not model.is_dir():
        partial = work / f".{model.name}"
        shutil.rmtree(partial, ignore_errors=True)
        make_model("tiny-qwen3", partial, layers=options.layers, context=1 << 17, **SHAPE)
        os.replace(partial, model)
    content = {
        "model": str(model),
        "mode": "offline",
        "args": f"--max-model-len {longest} --max-num-seqs {max(options.batch)} --enforce-eager "
        f"--block-size {BLOCK_SIZE} --distributed-executor-backend uni",
        "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": 0},
        "workload": {"name": "random", "num_requests": 1, "options": {"input_len": 8, "output_len": 8}},
        "metrics": ["output_throughput", "duration", "computed_tokens", "resident_memory"],
        "run_limit": RUN_LIMIT,
    }

    def describe(arguments: str, bits: float) -> dict[str, Any]:
        # An engine writes to all of its cache when it starts, and all engines are up at once.
        space = count_cache_gib(bits, contexts, max(options.batch), options.layers)
        return {"args": arguments, "env": {"VLLM_CPU_KVCACHE_SPACE": space}}

    cases = [
        parse_case({**content, "stock": describe(arguments, bits)}, name)
        for name, (arguments, bits) in STOCK_ARMS.items()
    ]
    for name in presets:
        pack = describe(f"--kv-cache-dtype {name}", estimate_bits(name))
        cases.append(parse_case({**content, "pack": pack}, name))
    return cases


def estimate_bits(name: str) -> float:
    """Bits per element of a preset's pages; of a plan, those of four-bit ones, which it stays below."""
    return get_preset("kv4" if name == PLAN_NAME else name).bits(SHAPE["head_dim"])


def count_cache_gib(bits: float, contexts: Sequence[int], batch: int, layers: int) -> int:
    """What all prompts take at these bits, with their windows in full precision and a block for every request's answer.

    Prompts of smaller batches are among those of the largest.
    """
    elements = 2 * SHAPE["kv_heads"] * SHAPE["head_dim"] * layers
    tokens = sum(context + WINDOW_TOKENS for context in contexts)
    return max(1, math.ceil(batch * tokens * elements * bits / 8 / 2**30))


@contextlib.contextmanager
def start_engines(cases: Sequence[Case], work: Path) -> Iterator[dict[str, EngineArm]]:
    """{arm: its engine}. Raises ServerFailed."""
    with contextlib.ExitStack() as stack:
        engines = {}
        for case in cases:
            folder = work / f"logs-{case.name}"
            folder.mkdir(exist_ok=True)
            side = "stock" if case.name in STOCK_ARMS else "pack"
            engine = EngineArm(case, side, case.model, folder)
            stack.callback(engine.stop)
            print(f"start {case.name}", file=sys.stderr, flush=True)
            engine.start()
            engines[case.name] = engine
        yield engines


def run_once(engine: EngineArm, batch: int, context: int, tokens: int) -> dict[str, Metric]:
    """Decode `tokens` tokens after each of `batch` prompts, the same ones in every run of one context."""
    # One token after a whole number of blocks: the least that a prefix hit leaves to compute.
    options = {"input_len": context - BLOCK_SIZE + 1, "output_len": tokens}
    engine.case = replace(engine.case, workload=Workload("random", batch, options))
    return engine.run(seed=context).metrics


def measure_repetition(
    engines: Mapping[str, EngineArm], batch: int, context: int, tokens: int, repetition: int
) -> dict[str, dict[str, Metric]]:
    """{arm: {metric: value}}; the other way round every other time. Raises RunFailed where prompts were computed."""
    order = list(engines) if repetition % 2 == 0 else list(engines)[::-1]
    measured = {}
    for name in order:
        metrics = run_once(engines[name], batch, context, tokens)
        computed = metrics["computed_tokens"].value
        if computed is None or computed > batch * (tokens + SPARE_TOKENS):
            raise RunFailed(
                f"{name} computed {computed} tokens for {batch * tokens} decoded ones after {context}: its prompts "
                "were no prefix hits, so this is no measurement of decoding; give fewer contexts, or a smaller --batch"
            )
        measured[name] = {"decode": metrics["output_throughput"], "resident_memory": metrics["resident_memory"]}
    return measured


def measure_prefill(engine: EngineArm, batch: int, context: int) -> Metric | None:
    """Tokens computed per second while the prompts are put into the cache; None where they are there already."""
    metrics = run_once(engine, batch, context, 1)
    computed, duration = metrics["computed_tokens"].value, metrics["duration"].value
    if computed is None or not duration or computed <= batch * (1 + SPARE_TOKENS):
        return None
    return Metric(computed / duration, "tokens/s", "higher")


def run_context(
    engines: Mapping[str, EngineArm],
    batch: int,
    context: int,
    options: argparse.Namespace,
    environment: Mapping[str, Any],
) -> None:
    """Fill the caches, measure, and write the records of one batch and context."""
    case = f"engine_kv_b{batch}_{context}"
    settings = {
        "kind": "engine", "stock_arm": STOCK, "batch": batch, "context": context, "layers": options.layers,
        "tokens": options.tokens, **SHAPE, "args": list(next(iter(engines.values())).args),
        "series": f"engine_kv_b{batch}", "series_by": "context",
    }  # fmt: skip
    prefill: dict[str, Metric | None] = {}
    for name, engine in engines.items():
        began = time.monotonic()
        prefill[name] = measure_prefill(engine, batch, context)
        print(f"{case}: prefill of {name}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    measure_repetition(engines, batch, context, 8, 0)
    for repetition in range(options.repetitions):
        for name, metrics in measure_repetition(engines, batch, context, options.tokens, repetition).items():
            computed = prefill[name]
            if repetition == 0 and computed is not None:
                # A prompt is computed once, so there is one value.
                metrics["prefill"] = computed
            record = Record(case, name, repetition, metrics, seed=context, settings=settings, **environment)
            write_record(options.out.resolve(), record)
        print(f"{case}: repetition {repetition + 1} of {options.repetitions}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv_cache_speed", description="Decoding after long contexts.")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="N", help="requests at a time")
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="NAME", help="values of --kv-cache-dtype")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="decoded by every run")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep model and logs here")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    options = parser.parse_args(argv)
    if min(*options.batch, options.layers, options.repetitions) < 1 or options.tokens < 8:
        parser.error("--batch, --layers and --repetitions must be at least 1, --tokens at least 8")
    if min(options.contexts) < 2 * BLOCK_SIZE:
        parser.error(f"--contexts must be at least {2 * BLOCK_SIZE}, got {min(options.contexts)}")
    leave_on_signals()
    with tempfile.TemporaryDirectory(prefix="vllm-ext-kv-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        try:
            cases = make_cases(options.presets, options.contexts, options, work)
            environment = describe_environment()
            with start_engines(cases, work) as engines:
                for context in sorted(options.contexts):
                    for batch in sorted(options.batch):
                        run_context(engines, batch, context, options, environment)
        except (ServerFailed, RunFailed, ValueError) as error:
            print(f"kv_cache_speed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
