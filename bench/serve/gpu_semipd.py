# SPDX-License-Identifier: Apache-2.0
"""semi-PD on a GPU, the part `semipd` of bench/kernels/gpu.py: are the answers stock's, do the lanes overlap, and what
do streams and objectives notice of it?

    answers     the small MoE, requests that come while others run; log-probabilities of stock and of the lanes
    disturbed   a dense model of real shape: streams, and long prompts among them. Times between the streams' tokens,
                and whether the lanes ran beside each other on the device and not in turns: the prompt's time beside
                streams over what it and their steps take one after the other
    rate_R      Poisson arrivals of chat and long prompts, R a second: the part within both objectives

Arm `semipd` sends every prompt through the prefill lane, `semipd_auto` may mix batches. Stock runs with several numbers
of tokens to a batch, lanes with the largest. Each arm is a process of its own: gpu_semipd_engine.py. A dry run has tiny
sizes in vLLM's CPU engine, where answers must be equal token for token.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.kernels.gpu_parts.common import Context, Result
from bench.kernels.gpu_parts.engine import LIMIT, compare
from bench.kernels.gpu_parts.engine_answers import Answers
from bench.records import ROOT, Metric
from bench.serve.gpu_semipd_engine import AUTO, LANES, TINY, TPOT_MS, TTFT_MS

#: Tokens to a batch of stock's arms; the first is the one that others are compared with.
STOCK_BATCHES, TINY_BATCHES = (2048, 8192, 512), (TINY.batch,)
#: Seconds for one engine, and without which none begins.
TIMEOUT, FEWEST_SECONDS = 240.0, 45.0
#: Tokens that every stream must get while a long prompt is computed; the time of one alone is that of dozens of steps.
FEWEST_PASSED = 3.0


def run(context: Context) -> Result:
    """All arms one after the other: what must be known first comes first."""
    result = Result("semipd", "attainment")
    batches = TINY_BATCHES if context.is_dry_run else STOCK_BATCHES
    if context.is_dry_run:
        result.needs_cuda += ["Model Runner V2", "green contexts", "CUDA graphs", "overlap on a device"]
    found: dict[str, dict[str, Any]] = {}
    first = f"stock_{batches[0]}"
    for arm in (first, LANES):
        if (said := _start(context, result, "answers", arm)) is not None:
            found[arm] = said
    for arm, one in found.items():
        reference = found.get(first) if arm != first else None
        metrics, faults = judge_answers(one, reference, is_exact=context.is_dry_run)
        if arm == LANES:
            faults += judge_lanes(one["counters"])
        settings = {"stock_arm": first, "limit": LIMIT, "counters": one["counters"]}
        result.add("answers", arm, metrics, error="; ".join(faults) or None, settings=settings)
    for arm in (LANES, first, AUTO, *(f"stock_{batch}" for batch in batches[1:])):
        said = _start(context, result, "load", arm)
        if said is not None:
            add_load(result, arm, first, said, context.is_dry_run)
    return result


def _start(context: Context, result: Result, scenario: str, arm: str) -> dict[str, Any] | None:
    """What an arm found; None where it failed, which is noted, or there was no time, too."""
    left = context.deadline - time.monotonic()
    if left < FEWEST_SECONDS:
        result.left_out.append(f"{scenario} {arm}")
        return None
    try:
        return start_arm(scenario, arm, context.is_dry_run, min(TIMEOUT, left))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        result.add(scenario if scenario == "answers" else "disturbed", arm, {}, error=str(error)[-1500:])
        return None


def start_arm(scenario: str, arm: str, is_dry_run: bool, timeout: float) -> dict[str, Any]:
    """An arm in a process of its own. Raises RuntimeError with the end of what it said, TimeoutExpired past timeout."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "found.json"
        command = [sys.executable, "-m", "bench.serve.gpu_semipd_engine", "--scenario", scenario, "--arm", arm]
        command += ["--out", str(path), *(["--tiny"] if is_dry_run else [])]
        # The interpreter would run vLLM's own kernels, too.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
        if done.returncode or not path.is_file():
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1400:]}")
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return said


def judge_answers(
    one: Mapping[str, Any], reference: Mapping[str, Any] | None, *, is_exact: bool
) -> tuple[dict[str, Metric], list[str]]:
    """(differences from stock's answers, what is wrong with them). is_exact: every token must be the same."""
    metrics = {"tokens": Metric(sum(map(len, one["tokens"])), "tokens")}
    if reference is None:
        return metrics, []
    mine, theirs = (Answers([], said["tokens"], said["token_logprobs"], {}) for said in (one, reference))
    differences = compare(mine, theirs)
    mean, agreeing = differences["mean"].value, differences["agreeing"].value
    faults = []
    if mean is None or mean > LIMIT:
        faults.append(f"{'no number of' if mean is None else f'{mean:.3f}'} nats from stock")
    if is_exact and agreeing != 1.0:
        faults.append(f"{agreeing:.1%} of the tokens are stock's")
    return metrics | differences, faults


def judge_lanes(counters: Mapping[str, float]) -> list[str]:
    """Whether both lanes ran, and beside each other as far as the host sees."""
    names = ("prefill_batches_total", "decode_batches_total", "overlap_seconds_total")
    return [f"{name} is 0: this was not semi-PD" for name in names if not counters.get(name, 0.0) > 0]


def add_load(result: Result, arm: str, stock: str, said: Mapping[str, Any], is_dry_run: bool) -> None:
    """Records of a load: one for the disturbance, one for every rate."""
    disturbed = said["disturbed"]
    metrics = summarise_disturbance(disturbed)
    settings = {"stock_arm": stock, "batch": said["batch"], "sizes": said["sizes"], "counters": said["counters"]}
    faults = []
    if disturbed["still_running"] == 0:
        faults.append("the streams were over before the long prompts: nothing was disturbed")
    if arm == LANES:
        faults += judge_lanes(said["counters"])
        serial = metrics["serial"].value
        # Two cores of a CPU, and vLLM's operators that let one lane in at a time, promise nothing of time.
        if not is_dry_run and (disturbed["tokens_during"] < FEWEST_PASSED or serial is None or serial >= 1):
            faults.append(
                f"{disturbed['tokens_during']:.1f} tokens passed a long prompt, which with them took {serial} of the "
                "time of one after the other: the lanes do not run beside each other"
            )
    result.add("disturbed", arm, metrics, error="; ".join(faults) or None, settings=settings)
    for one in said["rates"]:
        result.add(f"rate_{one['rate']:g}", arm, summarise_rate(one), settings=settings)


def summarise_disturbance(disturbed: Mapping[str, Any]) -> dict[str, Metric]:
    """Times between tokens without and with a long prompt under way, and of the prompt without and with streams.

    serial: the prompt's time beside streams over its time alone plus that of the steps that ran meanwhile; below 1
    where a device ran some of both at once.
    """
    alone, beside = median(disturbed["alone"]), median(disturbed["beside"])
    step = median(disturbed["calm_gaps"])
    passed = disturbed["tokens_during"]
    metrics = {
        "itl_calm": Metric(1e3 * step, "ms", "lower"),
        "itl_calm_p99": _percentile(disturbed["calm_gaps"], 99),
        "ttft_alone": Metric(1e3 * alone, "ms", "lower"),
        "ttft_beside": Metric(1e3 * beside, "ms", "lower"),
        "passed": Metric(passed, "tokens", "higher"),
        "serial": Metric(beside / (alone + passed * step), "of one after the other", "lower"),
    }
    for name, share in (("itl_p50", 50), ("itl_p99", 99), ("itl_max", 100)):
        metrics[name] = _percentile(disturbed["during_gaps"], share)
    return metrics


def summarise_rate(
    one: Mapping[str, Any], ttft: float = TTFT_MS / 1e3, tpot: float = TPOT_MS / 1e3
) -> dict[str, Metric]:
    """Attainment of both objectives (seconds) by the same request, latencies, tokens a second."""
    met = [first <= ttft and later <= tpot for first, later in zip(one["ttft"], one["tpot"], strict=True)]
    return {
        "attainment": Metric(100 * sum(met) / len(met), "%", "higher"),
        "ttft_p90": _percentile(one["ttft"], 90),
        "tpot_p90": _percentile(one["tpot"], 90),
        "itl_p99": _percentile(one["gaps"], 99),
        "output_throughput": Metric(one["tokens"] / one["seconds"], "tokens/s", "higher"),
    }


def _percentile(seconds: Sequence[float], share: float) -> Metric:
    """In milliseconds; without a value where there is nothing."""
    value = 1e3 * float(np.percentile(seconds, share)) if len(seconds) else math.nan
    return Metric(value if math.isfinite(value) else None, "ms", "lower")
