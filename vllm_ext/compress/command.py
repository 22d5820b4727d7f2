# SPDX-License-Identifier: Apache-2.0
"""The commands `vllm-ext quantize` and `vllm-ext plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm_ext.compress.planning import PlanReport, make_plan, read_plan
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.checkpoint import check_output
from vllm_ext.quantization.plan import ExpertSchemes
from vllm_ext.quantization.scheme import Scheme


def run_quantize(options: argparse.Namespace) -> int:
    """Quantize and print where the result is; returns the exit code."""
    return _report_errors("quantize", lambda: _quantize(options))


def run_plan(options: argparse.Namespace) -> int:
    """Make a plan, print it as a table of layers by schemes, and save it if asked; returns the exit code."""
    return _report_errors("plan", lambda: _plan(options))


def _quantize(options: argparse.Namespace) -> None:
    report = quantize_model(
        options.model, options.output, rounding=options.rounding, progress=True, **_plan_arguments(options)
    )
    planned = report.planned
    print(
        f"{report.output}: {planned.bits_per_weight:.4f} bits over {planned.quantized_weights} quantized weights, "
        f"{planned.quantized_bytes} bytes of {report.total_bytes} in all, {report.seconds:.1f} s"
    )
    if options.json:
        print(json.dumps(report.to_json()))


def _plan(options: argparse.Namespace) -> None:
    if options.output is not None:
        check_output(options.output)
    arguments = _plan_arguments(options)
    planned = make_plan(open_source(options.model), fixed=arguments.pop("plan"), progress=True, **arguments)
    _print_table(planned)
    if options.output is not None:
        options.output.write_text(json.dumps(planned.plan.to_config(), indent=2) + "\n", encoding="utf-8")
        print(f"plan written to {options.output}")
    if options.json:
        print(json.dumps({**planned.to_json(), "plan": planned.plan.to_json()}))


def _plan_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "bits": options.bits,
        "schemes": [Scheme.parse(name.strip()) for name in options.schemes.split(",")] if options.schemes else [],
        "uniform": options.uniform,
        "calibration": options.calibration,
        "seed": options.seed,
        "plan": read_plan(options.plan) if options.plan is not None else None,
    }


def _print_table(planned: PlanReport) -> None:
    """Blocks by layer and scheme, gate_up + down; other linears in a row of their own."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, Counter[tuple[str, str]]] = {}
    for module, schemes in planned.plan.modules.items():
        row = rows.setdefault(module.rpartition(".")[0], Counter())
        if isinstance(schemes, ExpertSchemes):
            row.update((block, str(scheme)) for block, scheme in schemes._asdict().items())
        else:
            row["", str(schemes)] += 1
    names = sorted(
        {scheme for row in rows.values() for _, scheme in row}, key=lambda name: Scheme.parse(name).weight_bits
    )
    table = Table("layer", *names, title="blocks per scheme (gate_up + down for experts)")
    for layer, row in rows.items():
        cells = []
        for name in names:
            experts = f"{row['gate_up', name]} + {row['down', name]}"
            cells.append(str(row["", name]) if row["", name] else "" if experts == "0 + 0" else experts)
        table.add_row(layer, *cells)
    Console().print(table)
    print(
        f"{planned.bits_per_weight:.4f} bits over {planned.quantized_weights} weights, {planned.quantized_bytes} bytes"
    )


def _report_errors(command: str, run: Callable[[], None]) -> int:
    try:
        run()
    except (ValueError, OSError) as error:
        # Every error of this package that a user can cause is one of these, with a message that names the fix.
        print(f"vllm-ext {command}: error: {error}", file=sys.stderr)
        return 1
    return 0
