# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-ext calibrate-kv`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from vllm_ext.compress.calibration import CONTEXT, CalibrationError
from vllm_ext.compress.figures import check_figures
from vllm_ext.kv_cache.bit_search import BitPlan, plot_front, search_bits, write_front, write_text
from vllm_ext.kv_cache.calibrate import NUM_WINDOWS, CalibrationReport, calibrate_model, find_preset, load_task
from vllm_ext.kv_cache.presets import PLAN_NAME


def run(options: argparse.Namespace) -> int:
    """Calibrate, search bits where asked, print tables; returns the exit code."""
    try:
        _run(options)
    except (ValueError, OSError) as error:
        # Every error that a user can cause is one of these, with a message that names the fix.
        print(f"vllm-ext calibrate-kv: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    searches = options.bits is not None
    calibrates = options.preset != PLAN_NAME
    if not calibrates and not searches:
        find_preset(PLAN_NAME)
    if calibrates and options.output is None:
        raise CalibrationError(f"--preset {options.preset} needs -o OUT.safetensors to write")
    if not calibrates and options.output is not None:
        raise CalibrationError(f"-o is a calibration file, and {PLAN_NAME} has none: drop it, or write --plan FILE")
    preset = find_preset(options.preset) if calibrates else None
    for wanted, name in ((options.plan, "--plan"), (options.pareto, "--pareto")):
        if wanted is not None and not searches:
            raise CalibrationError(f"{name} is about bits by layer: add --bits B")
    outputs = _list_outputs(options)
    for path in outputs:
        _check_output(path)
    if options.pareto is not None:
        check_figures()
    task = load_task(
        options.model,
        options.calibration,
        seed=options.seed,
        context=options.context or CONTEXT,
        num_windows=options.windows or NUM_WINDOWS,
        dtype=options.dtype,
    )
    report = plan = None
    if preset is not None:
        report = calibrate_model(task, preset, options.output, seed=options.seed, progress=True)
        _print_report(report)
    if searches:
        plan = search_bits(task, options.bits, progress=True)
        _print_plan(plan)
        if options.plan is not None:
            write_text(options.plan, json.dumps({"layer_bits": plan.to_layer_bits()}, indent=2) + "\n")
            print(f"bits by layer written to {options.plan}")
        if options.pareto is not None:
            csv, png = _pareto_paths(options.pareto)
            write_front(csv, plan)
            plot_front(png, plan)
            print(f"what each budget buys written to {csv} and {png}")
    if options.json:
        print(
            json.dumps(
                {
                    "model": str(options.model),
                    "calibration": None if report is None else report.to_json(),
                    "plan": None if plan is None else plan.to_json(),
                }
            )
        )


def _list_outputs(options: argparse.Namespace) -> list[Path]:
    outputs = [path for path in (options.output, options.plan) if path is not None]
    return outputs + (list(_pareto_paths(options.pareto)) if options.pareto is not None else [])


def _pareto_paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".csv"), prefix.with_name(prefix.name + ".png")


def _check_output(path: Path) -> None:
    """Before the work whose result could then not be kept."""
    if os.path.lexists(path):
        raise CalibrationError(f"{path} exists already: remove it or give another name")
    if not path.parent.is_dir():
        raise CalibrationError(f"{path.parent} is not a directory: create it, or write {path.name} somewhere else")


def _print_report(report: CalibrationReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "error", "calibrated", "K", "V", title=f"{report.preset}: attention output, held-out text")
    table.columns[0].overflow = "fold"
    for layer in report.layers:
        fields = [" ".join(layer.kept[side]) or "-" for side in ("key", "value")]
        table.add_row(layer.name, f"{layer.plain:.2%}", f"{layer.calibrated:.2%}", *fields)
    table.add_section()
    table.add_row("mean", f"{report.mean('plain'):.2%}", f"{report.mean('calibrated'):.2%}", "", "")
    Console(highlight=False).print(table)
    print(
        f"{report.output}: {report.bits:g} true bits of an element, calibrated on {report.tokens} tokens, judged on "
        f"{report.held_out_tokens}, {report.seconds:.1f} s"
    )


def _print_plan(plan: BitPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "bits", title="bits by layer")
    for layers, pair in plan.to_layer_bits().items():
        table.add_row(layers, pair)
    judged = Table("plan", "true bits", "KL, nats per token", title="judged on held-out text")
    for point in plan.front:
        if point.divergence is not None:
            judged.add_row(point.kind, f"{point.bits:g}", f"{point.divergence:.3g}")
    Console(highlight=False).print(table, judged)
    if plan.chosen != "mixed":
        print(f"note: one pair for all layers, {plan.chosen}, is better on held-out text than any mix that was found")
