# SPDX-License-Identifier: Apache-2.0
"""The `vllm-ext` command. Exit codes: 0 ok, 1 failed, 2 bad usage. `--json` prints one object on the last line."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_ext import __version__


def make_parser() -> argparse.ArgumentParser:
    """The command line; each command's module adds its own arguments and is imported only when it runs."""
    parser = argparse.ArgumentParser(prog="vllm-ext", description="Tools of the vllm-ext extension pack.")
    parser.add_argument("--version", action="version", version=f"vllm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is active, what fits this vLLM, what does not and why")
    doctor.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    doctor.add_argument("--server", metavar="URL", help="also read the pack's metrics of a running vLLM server")
    doctor.add_argument(
        "--fix", action="store_true", help="install what is missing for the `vllm` command on the CPU wheel"
    )

    quantize = commands.add_parser("quantize", help="quantize a model into a packed checkpoint that vllm serve reads")
    _add_plan_arguments(quantize)
    quantize.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="directory to make")
    quantize.add_argument(
        "--rounding", choices=("rtn", "gptq", "gptaq"), default="rtn",
        help="how codes are chosen: to nearest, or by the error on calibration text (needs --calibration)",
    )  # fmt: skip
    quantize.add_argument(
        "--rotate", action="store_true", help="rotate the residual stream by a randomized Hadamard matrix"
    )
    quantize.add_argument(
        "--balanced", action="store_true", help="choose calibration windows so that rare experts see tokens too"
    )
    quantize.add_argument(
        "--repair-router", action="store_true",
        help="fit the routers to the quantized model, so that tokens reach the experts they reached before; kept where "
        "the loss on held-out calibration text falls",
    )  # fmt: skip
    quantize.add_argument(
        "--work", type=Path, metavar="DIR",
        help="where finished layers are kept until the end, so that the same command goes on after a kill; "
        "default: a hidden folder beside OUT",
    )  # fmt: skip

    plan = commands.add_parser("plan", help="choose the bits of every block, without quantizing")
    _add_plan_arguments(plan)
    plan.add_argument("-o", "--output", type=Path, metavar="FILE", help="plan file to make")
    plan.add_argument(
        "--rounding", choices=("rtn", "gptq", "gptaq"), default="rtn", help="how codes will be chosen (see quantize)"
    )
    plan.add_argument("--rotate", action="store_true", help="plan for a rotated residual stream (see quantize)")
    plan.add_argument("--work", type=Path, metavar="DIR", help="where measurements are kept for the next run")
    plan.add_argument(
        "--pareto", type=Path, metavar="PREFIX",
        help="write PREFIX.csv and PREFIX.png: loss, time and bytes of all budgets",
    )  # fmt: skip
    plan.add_argument(
        "--profile", type=Path, metavar="PREFIX",
        help="write PREFIX.json and PREFIX.png: how often experts are used (needs --calibration)",
    )  # fmt: skip

    calibrate = commands.add_parser("calibrate-kv", help="calibrate a KV-cache preset, or choose its bits by layer")
    _add_calibrate_arguments(calibrate)

    evaluate = commands.add_parser("eval", help="held-out perplexity of a model directory, through vLLM")
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="model directory, packed or not")
    evaluate.add_argument("--text", required=True, type=Path, metavar="FILE", help="held-out text, or JSONL with text")
    evaluate.add_argument("--context", type=int, default=512, help="tokens of a window")
    evaluate.add_argument("--windows", type=int, metavar="N", help="use only the first N windows")
    evaluate.add_argument("--enforce-eager", action="store_true", help="run the engine without torch.compile")
    evaluate.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `quantize` and `plan` share."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of an unquantized Hugging Face model")
    parser.add_argument("--method", choices=("mxmoe",), default="mxmoe")
    parser.add_argument(
        "--bits",
        type=_parse_bits,
        metavar="B",
        help="true bits, scales and zero points included, per expert weight; in a dense model per weight of its layers",
    )
    parser.add_argument("--uniform", action="store_true", help="one scheme for all, the best within --bits")
    parser.add_argument(
        "--schemes", metavar="A,B,...",
        help="schemes to choose from; default: 2, 3, 4, 5, 6 and 8 bits in groups of 128; with --calibration those of "
        "2 to 4 bits also in other groups and without zero points",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="FILE",
        help="text or JSONL like that the model will see, or 'random'; may be repeated. Sensitivities, gptq, gptaq and "
        "router repair are measured with it, and a quarter is held out to compare plans with",
    )  # fmt: skip
    parser.add_argument(
        "--sweeps", type=int, metavar="N", help="with gptq and gptaq: passes over the finished codes (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument(
        "--windows", type=int, metavar="N", help="calibration windows of 512 tokens, from all files (default 128)"
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="schemes that are given; with --bits, for what --bits does not choose"
    )
    parser.add_argument(
        "--sensitivity", choices=("weight", "layer", "loss"),
        help="what schemes are judged by: weight errors, the layer's output, or the loss; default: loss with "
        "--calibration, else weight",
    )  # fmt: skip
    parser.add_argument("--per-layer", action="store_true", help="the same bits in every layer, as MxMoE allocates")
    parser.add_argument(
        "--exponent", type=float, default=1.0, metavar="R", help="with --per-layer: minimize loss**R * time**(1-R)"
    )
    parser.add_argument(
        "--time-weight", type=float, default=0.0, metavar="W", help="loss that a microsecond of a batch is worth"
    )
    parser.add_argument("--max-time-us", type=float, metavar="T", help="longest time of a batch in the experts")
    parser.add_argument("--exact", action="store_true", help="solve the allocation exactly (small models)")
    parser.add_argument("--device", default="cpu", help="whose time: cpu, a100, h100, h200, b200, or one in --tuning")
    parser.add_argument("--tuning", type=Path, metavar="DIR", help="measured times, *.json; default: the roofline")
    parser.add_argument("--batches", metavar="M:SHARE,...", help="tokens of the batches served, e.g. 1:0.2,32:0.8")
    parser.add_argument(
        "--no-compare", action="store_true", help="do not compare with a uniform plan on held-out calibration text"
    )
    parser.add_argument(
        "--force-mixed", action="store_true", help="keep the mixed plan even where the uniform one is better"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")


def _add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face model")
    parser.add_argument(
        "--preset", required=True, metavar="P",
        help="a name of --kv-cache-dtype, such as skvq_k2v2; with kvplan, only bits by layer are chosen",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", action="append", required=True, metavar="FILE",
        help="text or JSONL like that the model will see, or 'random'; may be repeated. A quarter is held out",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="*.safetensors for kv_cache.calibration")
    parser.add_argument(
        "--bits", type=_parse_bits, metavar="B", help="choose bits by layer: true bits of an element, mean"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="with --bits: write kv_cache.layer_bits as JSON")
    parser.add_argument(
        "--pareto", type=Path, metavar="PREFIX", help="with --bits: write PREFIX.csv and PREFIX.png for all budgets"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the text that is drawn, and of k-means")
    parser.add_argument("--windows", type=int, metavar="N", help="windows of text, from all files (default 32)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="the model runs in; auto: its own"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")


def _check_quantize(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with 2 for options that need another one."""
    for wanted, name in (
        (options.rounding != "rtn", f"--rounding {options.rounding}"),
        (options.repair_router, "--repair-router"),
    ):
        if wanted and not options.calibration:
            parser.error(f"{name} needs --calibration FILE")


def _check_sweeps(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.sweeps is not None and options.rounding == "rtn":
        parser.error("--sweeps is about codes that gptq and gptaq chose: add --rounding gptq or gptaq")
    if options.sweeps is not None and options.sweeps < 0:
        parser.error(f"--sweeps must not be negative, got {options.sweeps}")


def _parse_bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not (math.isfinite(bits) and bits > 0):
        raise argparse.ArgumentTypeError(f"bits must be a positive number, got {text!r}")
    return bits


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (argparse exits with 2 on bad usage)."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        from vllm_ext import doctor

        return doctor.run(as_json=options.json, server=options.server, fix=options.fix)
    if options.command in ("quantize", "plan"):
        if options.bits is None and options.plan is None:
            parser.error(f"{options.command} needs --bits or --plan")
        if options.bits is None:
            # Read by nobody: the schemes are all given.
            names = (
                "uniform",
                "schemes",
                "sensitivity",
                "exact",
                "per_layer",
                "time_weight",
                "max_time_us",
                "force_mixed",
            )
            idle = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
            if options.calibration and options.rounding == "rtn" and not getattr(options, "repair_router", False):
                idle.append("--calibration")
            if idle:
                parser.error(f"{idle[0]} is about schemes that --bits chooses, and --plan gives them all: add --bits")
        if options.windows is not None and not options.calibration:
            parser.error("--windows is about calibration text: add --calibration FILE")
        if options.windows is not None and options.windows < 1:
            parser.error(f"--windows must be at least 1, got {options.windows}")
        if options.command == "quantize":
            _check_quantize(parser, options)
        _check_sweeps(parser, options)
        if options.seed < 0:
            parser.error(f"--seed must not be negative, got {options.seed}")
        # Read when torch is loaded. Threads that spin at every barrier halt a busy machine: measured 18 times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from vllm_ext.compress import command

        return command.run_quantize(options) if options.command == "quantize" else command.run_plan(options)
    if options.command == "calibrate-kv":
        for name in ("windows", "context"):
            value = getattr(options, name)
            if value is not None and value < 1:
                parser.error(f"--{name} must be at least 1, got {value}")
        if options.seed < 0:
            parser.error(f"--seed must not be negative, got {options.seed}")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from vllm_ext.kv_cache import calibrate_command

        return calibrate_command.run(options)
    if options.command == "eval":
        from vllm_ext import evaluate

        return evaluate.run(options)
    raise AssertionError(f"command {options.command} is parsed but not handled")


if __name__ == "__main__":
    sys.exit(main())
