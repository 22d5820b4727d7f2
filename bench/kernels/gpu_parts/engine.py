# SPDX-License-Identifier: Apache-2.0
"""A small MoE in a real vLLM engine: Model Runner V2 and CUDA graphs on, log-probabilities beside those of other paths.

    graphs      --quantization mxmoe with a plan of many widths, as a user starts it; in a dry run "compiled"
    eager       the same with --enforce-eager
    reference   the same weights, the kernels' check made to fail: the float32 reference computes. Started as a user
                starts it, so that the engine has to switch CUDA graphs off by itself
    cpu         stored: what the CPU engine computed with its own kernels (engine_cpu.json says how it was made)

    python -m bench.kernels.gpu_parts.engine --store           on a CPU: writes engine_cpu.json

Each arm is a process of its own: engine_answers.py. The model is bench/models/tiny_moe. All arms round the same bf16
weights while they load. Continuations count up to the first token that differs: behind it they are other texts. A
near-tie of the router or of two tokens may fall either way in bf16, so the mean over all tokens is what is held to a
limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.kernels.gpu_parts.common import Context, Result
from bench.kernels.gpu_parts.engine_answers import Answers, describe_inputs
from bench.records import ROOT, Metric

STORED = Path(__file__).with_name("engine_cpu.json")

#: Mean difference of log-probabilities that arms may have, in nats. CPU engines with our kernels, eager and compiled,
#: and one with the reference differ by 0.015 to 0.021, all of it rounding to bf16 in other places; single tokens, where
#: the router chooses another expert, by up to 2.
LIMIT = 0.05

#: Where Model Runner V2 is.
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"

#: Seconds for one arm, of which compiling takes most on a new machine; with fewer left, none begins.
TIMEOUT, FEWEST_SECONDS = 240.0, 45.0


def run(context: Context) -> Result:
    """Start the arms one after the other and compare each with the reference, with eager, and with the CPU."""
    result = Result("engine", "to_reference", limit=LIMIT)
    first = "compiled" if context.is_dry_run else "graphs"
    if context.is_dry_run:
        result.needs_cuda += ["Model Runner V2", "CUDA graphs", "the Triton kernels"]
    answers = {"cpu": read_stored()}
    for arm in (first, "eager", "reference"):
        left = context.deadline - time.monotonic()
        if left < FEWEST_SECONDS:
            result.left_out.append(arm)
            continue
        try:
            answers[arm] = start_arm(arm, min(TIMEOUT, left))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            result.add("tiny_moe", arm, {}, error=str(error)[-1500:])
    for arm, one in answers.items():
        metrics = {"perplexity": _metric(math.exp(-_mean(one.logprobs)), "")}
        faults = [] if arm == "cpu" else check_facts(arm, one.facts, context.is_dry_run)
        for other in ("reference", "eager", "cpu"):
            if other == arm or other not in answers:
                continue
            found = compare(one, answers[other])
            metrics |= {
                f"to_{other}" if name == "mean" else f"{name}_to_{other}": value for name, value in found.items()
            }
            mean = found["mean"].value
            if mean is None or mean > LIMIT:
                faults.append(f"{'no number of' if mean is None else f'{mean:.3f}'} nats from {other}")
        settings = {"facts": one.facts, "tokens": len(one.logprobs), "limit": LIMIT}
        result.add("tiny_moe", arm, metrics, error="; ".join(faults) or None, settings=settings)
    return result


def check_facts(arm: str, facts: dict[str, Any], is_dry_run: bool) -> list[str]:
    """What did not run as the arm's name says."""
    if is_dry_run:
        return []
    expected = {
        "graphs": facts["graphs"] > 0 and facts["mode"] != "NONE",
        "eager": facts["mode"] == "NONE",
        "reference": facts["mode"] == "NONE" and not facts["enforce_eager"],
    }
    faults = [] if expected[arm] else [f"cudagraph_mode {facts['mode']}, {facts['graphs']} graphs"]
    if facts["runner"] != RUNNER_V2:
        faults.append(f"runner {facts['runner']}")
    if facts["compiled_late"] or (arm != "reference" and not facts["compiled"]):
        faults.append(f"{facts['compiled']} kernels compiled while loading, {facts['compiled_late']} later")
    wrong = "GPU_FRAGMENT" if arm == "reference" else "PLAIN_CODES"
    if wrong in facts["layouts"]:
        faults.append(f"layouts {facts['layouts']}")
    return faults


def compare(one: Answers, other: Answers) -> dict[str, Metric]:
    """Differences of log-probabilities, in nats, and the share of continued tokens that agree.

    Raises ValueError for answers to other prompts.
    """
    if len(one.logprobs) != len(other.logprobs) or len(one.tokens) != len(other.tokens):
        raise ValueError(f"answers to other prompts: {len(one.logprobs)} and {len(other.logprobs)} log-probabilities")
    differences = [abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)]
    agreeing, continued = 0, []
    for place, (tokens, others) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        pairs = zip(tokens, others, strict=True)
        same = next((number for number, (a, b) in enumerate(pairs) if a != b), len(tokens))
        agreeing += same
        logprobs = zip(one.token_logprobs[place][:same], other.token_logprobs[place][:same], strict=True)
        continued += [abs(a - b) for a, b in logprobs]
    found = {
        "mean": _metric(_mean(differences + continued), "nats"),
        "largest": _metric(max(differences + continued), "nats"),
        "agreeing": Metric(agreeing / sum(map(len, one.tokens)), "of the tokens", "higher"),
    }
    if continued:
        found["continued"] = _metric(_mean(continued), "nats")
    return found


def _metric(value: float, unit: str) -> Metric:
    """Where an engine answers with NaN, a metric without a value."""
    return Metric(value if math.isfinite(value) else None, unit, "lower")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def read_stored(path: Path = STORED) -> Answers:
    """What the CPU engine said. Raises ValueError where the file was made for another plan or other prompts."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    expected = describe_inputs()
    if stored["inputs"] != expected:
        raise ValueError(
            f"{path.name} was made for {stored['inputs']}, and this is {expected}: on a CPU, run "
            f"python -m bench.kernels.gpu_parts.engine --store"
        )
    return Answers(**stored["answers"])


def start_arm(arm: str, timeout: float) -> Answers:
    """An arm in a process of its own. Raises RuntimeError with the end of what it said, TimeoutExpired past timeout."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "answers.json"
        command = [sys.executable, "-m", "bench.kernels.gpu_parts.engine_answers", "--arm", arm, "--out", str(path)]
        # The interpreter would run vLLM's own kernels, too.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
        if done.returncode or not path.is_file():
            raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1400:]}")
        return Answers(**json.loads(path.read_text(encoding="utf-8")))


def store(path: Path = STORED) -> None:
    """Write what this machine's CPU engine says."""
    import vllm

    answers = asdict(start_arm("eager", timeout=600))
    rounded = {
        "logprobs": [round(value, 4) for value in answers["logprobs"]],
        "tokens": answers["tokens"],
        "token_logprobs": [[round(value, 4) for value in one] for one in answers["token_logprobs"]],
        "facts": answers["facts"],
    }
    content = {
        "command": "python -m bench.kernels.gpu_parts.engine --store",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        "inputs": describe_inputs(),
        "answers": rounded,
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.gpu_parts.engine")
    parser.add_argument("--store", action="store_true", required=True, help="write what the CPU engine here says")
    parser.parse_args(argv)
    if torch.cuda.is_available():
        parser.error("--store is for a CPU: there is a GPU here")
    store()
    return 0


if __name__ == "__main__":
    sys.exit(main())
