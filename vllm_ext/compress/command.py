# SPDX-License-Identifier: Apache-2.0
"""The commands `vllm-ext quantize` and `vllm-ext plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext.compress.calibration import NUM_WINDOWS
from vllm_ext.compress.figures import check_figures, plot_profile
from vllm_ext.compress.linear_error import has_experts
from vllm_ext.compress.pareto import plot_front, write_csv
from vllm_ext.compress.plan_file import read_plan
from vllm_ext.compress.plan_options import PlanOptions
from vllm_ext.compress.plan_report import PlanReport
from vllm_ext.compress.planning import make_plan
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.refine import SWEEPS
from vllm_ext.compress.rotation import rotate_source
from vllm_ext.compress.source import open_source
from vllm_ext.compress.time_model import DEFAULT_BATCHES, parse_batches
from vllm_ext.quantization.atomic_directory import check_output, check_parent, write_file
from vllm_ext.quantization.plan import ExpertSchemes
from vllm_ext.quantization.scheme import Scheme

#: What a predicted cost is, by `PlanOptions.measure`.
LOSS_NAMES = {
    "weight": "squared weight error",
    "layer": "squared change of layer outputs",
    "loss": "rise of the loss in nats",
}


def run_quantize(options: argparse.Namespace) -> int:
    """Quantize and print where the result is; returns the exit code."""
    return _report_errors("quantize", lambda: _quantize(options))


def run_plan(options: argparse.Namespace) -> int:
    """Make a plan, print it as a table of layers by schemes, and save it if asked; returns the exit code."""
    return _report_errors("plan", lambda: _plan(options))


def _quantize(options: argparse.Namespace) -> None:
    report = quantize_model(
        options.model,
        options.output,
        rounding=options.rounding,
        rotate=options.rotate,
        balanced=options.balanced,
        sweeps=_count_sweeps(options),
        repair_router=options.repair_router,
        work=options.work,
        progress=True,
        **_plan_arguments(options),
    )
    planned = report.planned
    _print_notes(planned)
    print(f"{report.output}: {planned.describe_size()}; {report.total_bytes} bytes in all, {report.seconds:.1f} s")
    _print_comparison(planned)
    if report.repair is not None:
        print(report.repair.describe())
    if options.json:
        print(json.dumps(report.to_json()))


def _plan(options: argparse.Namespace) -> None:
    if options.output is not None:
        check_output(options.output)
        check_parent(options.output)
    # Before the work whose result could then not be shown.
    if options.pareto is not None and options.bits is None:
        raise ValueError("--pareto needs --bits: a given plan has no budgets to compare")
    if options.profile is not None and (options.bits is None or not options.calibration):
        raise ValueError("--profile needs --bits and --calibration: without text nothing is routed")
    for prefix in (options.pareto, options.profile):
        if prefix is not None:
            check_figures()
            check_parent(prefix)
            for suffix in (".csv", ".json", ".png"):
                check_output(prefix.with_name(prefix.name + suffix))
    arguments = _plan_arguments(options)
    source = open_source(options.model)
    if options.profile is not None and not has_experts(source):
        raise ValueError(f"--profile is about routed experts, of which {options.model} has none: leave it out")
    planned = make_plan(
        rotate_source(source, options.seed) if options.rotate else source,
        fixed=arguments.pop("plan"),
        rounding=options.rounding,
        sweeps=_count_sweeps(options),
        progress=True,
        **arguments,
    )
    _print_notes(planned)
    _print_table(planned)
    _write_pareto(options.pareto, planned)
    _write_profile(options.profile, planned)
    if options.output is not None:
        write_file(options.output, json.dumps(planned.plan.to_config(), indent=2) + "\n")
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
        "num_windows": NUM_WINDOWS if options.windows is None else options.windows,
        "plan": read_plan(options.plan) if options.plan is not None else None,
        "options": PlanOptions(
            measure=options.sensitivity,
            per_layer=options.per_layer,
            exponent=options.exponent,
            time_weight=options.time_weight,
            max_time_us=options.max_time_us,
            exact=options.exact,
            device=options.device,
            tables=options.tuning,
            batches=DEFAULT_BATCHES if options.batches is None else parse_batches(options.batches),
            compare=not options.no_compare,
            force_mixed=options.force_mixed,
            work=options.work,
        ),
    }


def _write_pareto(prefix: Path | None, planned: PlanReport) -> None:
    if prefix is None:
        return
    csv, png = (prefix.with_name(prefix.name + suffix) for suffix in (".csv", ".png"))
    write_csv(csv, planned.front)
    plot_front(png, planned.front, LOSS_NAMES[planned.measure or "weight"])
    print(f"loss, time and bytes of {len(planned.front)} plans written to {csv} and {png}")


def _write_profile(prefix: Path | None, planned: PlanReport) -> None:
    if prefix is None or planned.profile is None:
        return
    record, png = (prefix.with_name(prefix.name + suffix) for suffix in (".json", ".png"))
    write_file(record, json.dumps(planned.profile.to_json()) + "\n")
    plot_profile(png, planned.profile)
    print(f"routing of {planned.profile.tokens} tokens written to {record} and {png}")


def _print_table(planned: PlanReport) -> None:
    """Blocks by layer and scheme, gate_up + down; other linears in a row of their own."""
    from rich.console import Console
    from rich.table import Column, Table

    rows: dict[str, Counter[tuple[str, str]]] = {}
    for module, schemes in planned.plan.modules.items():
        row = rows.setdefault(module.rpartition(".")[0], Counter())
        if isinstance(schemes, ExpertSchemes):
            row.update((block, str(scheme)) for block, scheme in schemes._asdict().items())
        else:
            row["", str(schemes)] += 1
    names = sorted({scheme for row in rows.values() for _, scheme in row}, key=_rank_scheme)
    layers = Column("layer", min_width=max(map(len, rows)), no_wrap=True)
    table = Table(layers, *names, title="blocks per scheme (gate_up + down for experts)")
    for layer, row in rows.items():
        cells = []
        for name in names:
            experts = f"{row['gate_up', name]} + {row['down', name]}"
            cells.append(str(row["", name]) if row["", name] else "" if experts == "0 + 0" else experts)
        table.add_row(layer, *cells)
    Console().print(table)
    print(planned.describe_size())
    if planned.measure is not None:
        least = " with these bits in every layer" if planned.per_layer else " of these bytes"
        time = "unknown" if planned.predicted_time_us is None else f"{planned.predicted_time_us:.1f} us"
        print(
            f"predicted {LOSS_NAMES[planned.measure]} {planned.predicted_cost:.4g} (no plan{least} is more than "
            f"{planned.gap:.2%} below), time in experts of a mean batch {time}"
        )
    _print_comparison(planned)


def _count_sweeps(options: argparse.Namespace) -> int:
    return SWEEPS if options.sweeps is None else int(options.sweeps)


def _print_notes(planned: PlanReport) -> None:
    for note in planned.notes:
        print(f"note: {note}")


def _rank_scheme(name: str) -> tuple[float, int, str]:
    """By weight bits, then from large groups to small ones; a whole row is the largest."""
    scheme = Scheme.parse(name)
    return scheme.weight_bits, -scheme.group_size if scheme.group_size > 0 else -(10**9), name


def _print_comparison(planned: PlanReport) -> None:
    found = planned.comparison
    if found is None:
        return
    print(
        f"held-out loss of {found.tokens} tokens: unquantized {found.full:.4f}, uniform {found.uniform_scheme} "
        f"{found.uniform:.4f} ({found.uniform_bits:.4f} bits), mixed {found.equal:.4f} ({found.equal_bits:.4f} bits) "
        f"and {found.mixed:.4f} ({found.mixed_bits:.4f} bits)"
    )
    if found.mixed_wins:
        print(
            f"mixing removes {found.closed:.0%} of what the uniform plan loses, {found.closed_at_equal_bytes:.0%} at "
            f"exactly its bytes"
        )
    elif planned.chosen == "uniform":
        print("mixing does not win here: the plan is uniform (--force-mixed keeps the mixed one)")
    else:
        print("mixing does not win here, and was kept as asked")


def _report_errors(command: str, run: Callable[[], None]) -> int:
    try:
        run()
    except (ValueError, OSError) as error:
        # Every error of this package that a user can cause is one of these, with a message that names the fix.
        print(f"vllm-ext {command}: error: {error}", file=sys.stderr)
        return 1
    return 0
