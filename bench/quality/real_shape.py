# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `vllm-ext quantize` at a real model's shapes: two layers of Qwen1.5-MoE-A2.7B, random weights.

    python -m bench.quality.real_shape [--out DIR] [--windows 16] [--threads 2]

60 experts of 2048 x 1408, 4 per token, in the layout of Qwen3-MoE, the family that `quantize` knows: there is no shared
expert, and attention has no biases. Quantizes in a process of its own, whose largest resident set is recorded
beside the size of one layer in float32. The scheme is given and uniform: profile, sensitivities with their gradients,
the comparison of plans and router repair are not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality.__main__ import CASE, MODEL
from bench.records import RESULTS, Metric, Record, describe_environment, write_record

PRESET = "qwen3-30b-a3b"
SHAPES: dict[str, Any] = {
    "layers": 2, "experts": 60, "experts_per_token": 4, "hidden": 2048, "moe_intermediate": 1408, "heads": 16,
    "kv_heads": 16,
}  # fmt: skip
SCHEME = "w3a16_g128"
MIB = 2**20

_CHILD = r"""
import json, re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[4]))
from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.quantization.scheme import Scheme
def read_peak():
    # Not getrusage: its maximum also counts what the parent had before this program was loaded.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

before = read_peak()
started, used = time.monotonic(), time.process_time()
report = quantize_model(
    sys.argv[1], sys.argv[2], bits=3.25, uniform=True, schemes=[Scheme.parse(sys.argv[6])], rounding=sys.argv[8],
    rotate=True, sweeps=int(sys.argv[7]), calibration=json.loads(sys.argv[5]), num_windows=int(sys.argv[3]),
    options=PlanOptions(measure="weight"), progress=True,
)
print(json.dumps({
    "wall": time.monotonic() - started, "cpu": time.process_time() - used, "before": before,
    "peak": read_peak(), "bits": report.planned.bits_per_weight,
}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model, quantize it, write the record; returns the exit code."""
    from bench.models.make_model import make_model

    parser = argparse.ArgumentParser(prog="python -m bench.quality.real_shape")
    parser.add_argument("--out", type=Path, default=RESULTS / CASE, help="folder of the record")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounding", choices=("gptq", "gptaq"), default="gptaq")
    parser.add_argument("--model", type=Path, help="the model, made before by make_model; default: make it")
    parser.add_argument("--sweeps", type=int, default=3, help="passes over finished codes")
    parser.add_argument("--work", type=Path, help="folder for model and result; default: a temporary one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        model = options.model or make_model(PRESET, Path(folder) / "model", **SHAPES)
        texts = json.dumps([str(MODEL / f"{name}_train.txt") for name in ("kjv", "py")])
        arguments = [
            str(model),
            str(Path(folder) / "packed"),
            str(options.windows),
            str(options.threads),
            texts,
            SCHEME,
        ]
        arguments += [str(options.sweeps), options.rounding]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"real_shape: quantize ended with {done.returncode}", file=sys.stderr)
            return 1
    found = json.loads(done.stdout.splitlines()[-1])
    hidden, intermediate = SHAPES["hidden"], SHAPES["moe_intermediate"]
    layer = 4 * (SHAPES["experts"] * 3 * hidden * intermediate + 4 * hidden * hidden) / MIB
    activations = 4 * options.windows * 512 * hidden / MIB
    peak = (found["peak"] - found["before"]) / 1024
    metrics = {
        "wall": Metric(found["wall"], "s"),
        "cpu": Metric(found["cpu"], "s"),
        "bits": Metric(found["bits"], "bits"),
        "peak_memory": Metric(peak, "MiB"),
        "layer_float32": Metric(layer, "MiB"),
        "activations": Metric(activations, "MiB"),
    }
    settings = {"stock_arm": "bf16", "shapes": SHAPES, "windows": options.windows, "threads": options.threads}
    settings |= {"sweeps": options.sweeps, "rounding": options.rounding}
    write_record(
        options.out.parent,
        Record(CASE, "real_shape", 0, metrics, settings={**settings, "scheme": SCHEME}, **describe_environment()),
    )
    print(json.dumps({name: metric.value for name, metric in metrics.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
