# SPDX-License-Identifier: Apache-2.0
"""Engine steps and wall time with forced tokens, and the cost of masks without: stock vLLM and the pack, shipped MoE.

    python -m bench.structured.forced_tokens [--case CASE] [--repetitions 5] [--out DIR] [--schemas N]

Every arm is an engine of its own process, float32, greedy, compact separators; all stay up and take turns. A repetition
asks for every schema of schemas.py one request at a time, and eight (of eight schemas) at a time, each in two passes.
Before the first the pack forgets how the model spelled texts (cold: metrics `..._batch_N`); in the second it knows what
the first showed (`..._known_batch_N`). Every pass of a run has another prompt for each schema.

The case `structured_cpu` compares CPU time per token at 32 requests, constrained and, as many tokens, unconstrained.
Exit codes: 0 ok, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, write_record
from bench.structured.schemas import PROMPTS, SCHEMAS, Schema, array, record

MODEL = ROOT / "bench" / "models" / "tiny_moe"
MAX_TOKENS = 160
BATCHES = (1, 8)
#: Of the CPU case: requests, and tokens of each.
CPU_BATCH, CPU_TOKENS = 32, 64
#: Passes of each batch size in a repetition, and what the metrics of each are called.
PASSES = ("", "known_")
#: An answer that is not over after CPU_TOKENS.
ENDLESS = array(record(**SCHEMAS["product"]["properties"]), 60, 60)
LIMIT_SECONDS = 300.0
STOCK = "stock"
#: What `additional_config.vllm_ext.structured` says; None without the pack. forced_tokens off shows masks alone.
ARMS: Mapping[str, Mapping[str, Any] | None] = {
    STOCK: None,
    "pack": {"enabled": True, "whitespace": "compact"},
    "pack-masks": {"enabled": True, "whitespace": "compact", "forced_tokens": "off"},
}
CASES: Mapping[str, tuple[str, ...]] = {
    "structured_forced": (STOCK, "pack"),
    "structured_cpu": (STOCK, "pack", "pack-masks"),
}


class Engine:
    """An engine in a process of its own, which answers one call at a time."""

    def __init__(self, arm: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(arm, there), daemon=True)
        self._process.start()
        there.close()
        self.features = self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError with the engine's own trace."""
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        if not self._pipe.poll(LIMIT_SECONDS):
            raise RuntimeError(f"the engine gave no answer in {LIMIT_SECONDS:.0f} s")
        try:
            is_good, answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("the engine's process has ended") from error
        if not is_good:
            raise RuntimeError(answer)
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(20)
            self._process.kill()


def _serve(arm: str, pipe: Any) -> None:
    """Body of an engine's process."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_PLUGINS="" if ARMS[arm] is None else "vllm_ext",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        # One thread: the model is small, and threads that spin while they wait would count as CPU time.
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        server = _Server(arm)
        pipe.send((True, server.describe()))
        while (asked := pipe.recv()) is not None:
            method, arguments = asked
            pipe.send((True, getattr(server, method)(*arguments)))
    except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
        pipe.send((False, traceback.format_exc()))


class _Server:
    def __init__(self, arm: str) -> None:
        from vllm import LLM

        settings = ARMS[arm]
        self.llm = LLM(
            model=str(MODEL),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=CPU_BATCH,
            enable_prefix_caching=False,
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            additional_config={} if settings is None else {"vllm_ext": {"structured": dict(settings)}},
        )
        # In this process: the engine's core is at hand, and its CPU time is this process's.
        self.core: Any = self.llm.llm_engine.engine_core
        scheduler = self.core.engine_core.scheduler
        self.scheduler = scheduler
        self.steps = 0
        schedule = scheduler.schedule

        def count(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.steps += output.total_num_scheduled_tokens > 0
            return output

        scheduler.schedule = count

    def forget(self) -> None:
        """Drop what was learned of the model's spellings, as if the engine had just started."""
        forget = getattr(self.scheduler, "forget_spellings", None)
        if forget is not None:
            forget()

    def describe(self) -> dict[str, Any]:
        speculative = self.llm.llm_engine.vllm_config.speculative_config
        return {
            "scheduler": type(self.scheduler).__name__,
            "speculative_method": None if speculative is None else f"{speculative.method} {speculative.model}",
            "forced_tokens": bool(getattr(self.scheduler, "_drafts_forced", False)),
        }

    def generate(self, prompts: Sequence[str], schemas: Sequence[Schema | None], tokens: int) -> dict[str, Any]:
        """Generate for all prompts at once; without a schema exactly so many tokens, else at most."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        parameters = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            if schema is None
            else SamplingParams(
                temperature=0, max_tokens=tokens, structured_outputs=StructuredOutputsParams(json=schema)
            )
            for schema in schemas
        ]
        before, began, cpu = self.steps, time.perf_counter(), time.process_time()
        outputs = self.llm.generate(list(prompts), parameters, use_tqdm=False)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "finished": [output.outputs[0].finish_reason == "stop" for output in outputs],
            "steps": self.steps - before,
            "seconds": seconds,
            "cpu_seconds": cpu,
        }


def measure_schemas(engine: Engine, names: Sequence[str], number: int, batch: int) -> dict[str, Any]:
    """One pass over all schemas, `batch` at a time, each with a prompt that only this number gives it."""
    total: dict[str, Any] = {"tokens": [], "finished": [], "steps": [], "seconds": 0.0}
    for start in range(0, len(names), batch):
        chosen = names[start : start + batch]
        prompts = [PROMPTS[(number + start + place) % len(PROMPTS)] for place in range(len(chosen))]
        result = engine.call("generate", prompts, [SCHEMAS[name] for name in chosen], MAX_TOKENS)
        for key in ("tokens", "finished"):
            total[key] += result[key]
        total["steps"].append(result["steps"])
        total["seconds"] += result["seconds"]
    return total


def summarize(what: str, mine: Mapping[str, Any], stock: Mapping[str, Any]) -> dict[str, Metric]:
    """Metrics of a pass (`batch_8`, `known_batch_8`), next to the stock engine's pass over the same requests."""
    ratios = [a / b for a, b in zip(mine["steps"], stock["steps"], strict=True)]
    same = sum(a == b for a, b in zip(mine["tokens"], stock["tokens"], strict=True))
    return {
        f"steps_{what}": Metric(sum(mine["steps"]), "steps", "lower"),
        f"steps_ratio_median_{what}": Metric(statistics.median(ratios), "of stock", "lower"),
        f"steps_ratio_max_{what}": Metric(max(ratios), "of stock", "lower"),
        f"wall_{what}": Metric(mine["seconds"], "s", "lower"),
        f"identical_{what}": Metric(same, "requests", "higher"),
        f"requests_{what}": Metric(len(mine["tokens"]), "requests"),
        f"output_tokens_{what}": Metric(sum(map(len, mine["tokens"])), "tokens"),
        f"finished_{what}": Metric(sum(mine["finished"]), "requests"),
    }


def measure_cpu(engine: Engine, repetition: int) -> dict[str, Metric]:
    """CPU time per token of 32 constrained requests, and of as many without a schema, in turns."""
    prompts = [PROMPTS[(repetition + place) % len(PROMPTS)] for place in range(CPU_BATCH)]
    times: dict[str, float] = {}
    order = ["constrained", "unconstrained"]
    for kind in order if repetition % 2 == 0 else order[::-1]:
        schema = ENDLESS if kind == "constrained" else None
        result = engine.call("generate", prompts, [schema] * CPU_BATCH, CPU_TOKENS)
        count = sum(map(len, result["tokens"]))
        if count != CPU_BATCH * CPU_TOKENS:
            raise RuntimeError(f"{kind} requests gave {count} tokens, not {CPU_BATCH * CPU_TOKENS}")
        times[kind] = result["cpu_seconds"] / count * 1e6
    return {
        **{f"cpu_{kind}": Metric(value, "us/token", "lower") for kind, value in times.items()},
        "cpu_ratio": Metric(times["constrained"] / times["unconstrained"], "of unconstrained", "lower"),
    }


def run(cases: Sequence[str], repetitions: int, names: Sequence[str], out: Path) -> None:
    """Measure and write records. Raises RuntimeError with the trace of an engine that fails."""
    environment = describe_environment()
    settings = {
        "model": MODEL.name, "dtype": "float32", "max_tokens": MAX_TOKENS, "schemas": len(names),
        "separators": "compact", "threads": 1, "cpu_batch": CPU_BATCH, "cpu_tokens": CPU_TOKENS,
    }  # fmt: skip
    engines: dict[str, Engine] = {}
    try:
        for arm in dict.fromkeys(arm for case in cases for arm in CASES[case]):
            print(f"start {arm}", file=sys.stderr, flush=True)
            engines[arm] = Engine(arm)
        for arm, engine in engines.items():
            # Kernels, and the memory of the first steps; a schema of its own, so that no text is learned.
            engine.call("generate", [PROMPTS[0]] * CPU_BATCH, [None] * CPU_BATCH, 16)
            engine.call("generate", [PROMPTS[0]], [{"type": "string", "pattern": "^[a-z]{4}$"}], 16)
            # Every grammar is compiled by now; the first token is not drafted, so nothing is learned of texts.
            warm = [*(SCHEMAS[name] for name in names), ENDLESS]
            engine.call("generate", [PROMPTS[0]] * len(warm), warm, 1)
            print(f"{arm}: {engine.features}", file=sys.stderr, flush=True)
        for case in cases:
            for repetition in range(repetitions):
                metrics = MEASURES[case](engines, names, repetition)
                for arm in CASES[case]:
                    features = engines[arm].features
                    write_record(out, Record(case, arm, repetition, metrics[arm], seed=repetition,
                                             features=features, settings=settings, **environment))  # fmt: skip
                _print_repetition(repetition, metrics)
    finally:
        for engine in engines.values():
            engine.stop()


def order_arms(case: str, repetition: int) -> list[str]:
    """The arms of a case, in the opposite order every other time."""
    return list(CASES[case]) if repetition % 2 == 0 else list(CASES[case])[::-1]


def measure_forced(
    engines: Mapping[str, Engine], names: Sequence[str], repetition: int
) -> dict[str, dict[str, Metric]]:
    """{arm: metrics} of one repetition of the case `structured_forced`."""
    order = order_arms("structured_forced", repetition)
    metrics: dict[str, dict[str, Metric]] = {arm: {} for arm in order}
    number = len(BATCHES) * len(PASSES) * repetition
    for batch in BATCHES:
        for arm in order:
            engines[arm].call("forget")
        for kind in PASSES:
            passes = {arm: measure_schemas(engines[arm], names, number, batch) for arm in order}
            for arm in order:
                metrics[arm] |= summarize(f"{kind}batch_{batch}", passes[arm], passes[STOCK])
            number += 1
    return metrics


def measure_masks(engines: Mapping[str, Engine], names: Sequence[str], repetition: int) -> dict[str, dict[str, Metric]]:
    """{arm: metrics} of one repetition of the case `structured_cpu`."""
    return {arm: measure_cpu(engines[arm], repetition) for arm in order_arms("structured_cpu", repetition)}


MEASURES = {"structured_forced": measure_forced, "structured_cpu": measure_masks}


def _print_repetition(repetition: int, metrics: Mapping[str, Mapping[str, Metric]]) -> None:
    for arm, values in metrics.items():
        line = ", ".join(f"{name} {value.value:.4g}" for name, value in values.items())
        print(f"{repetition} {arm}: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.structured.forced_tokens", description="Forced tokens and masks."
    )
    parser.add_argument("--case", choices=list(MEASURES), help="default: all")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS), metavar="N", help="the first N only")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    options = parser.parse_args(argv)
    most = len(PROMPTS) // (len(BATCHES) * len(PASSES))
    if not 1 <= options.repetitions <= most or options.schemas < 1:
        parser.error(f"--repetitions must be 1 to {most}, as prompts come once, and --schemas at least 1")
    try:
        cases = [options.case] if options.case else list(MEASURES)
        run(cases, options.repetitions, list(SCHEMAS)[: options.schemas], options.out.resolve())
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
