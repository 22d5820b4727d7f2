# SPDX-License-Identifier: Apache-2.0
"""The page of the quality table and its plot, from the records beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.quality.cells import BF16, BUDGETS, METHODS, TEXTS
from bench.quality.targets import REAL_SHAPE, Losses, judge_memory, list_targets, measure_closed, read_losses
from bench.records import Record, read_record

PLOT = "quality.png"
ONE_SEED = "(1)"
VERDICTS = {True: "met", False: "missed", None: "not known: one seed"}

INTRODUCTION = """\
<!-- Written by `python -m bench.quality`; edit the records or the script, not this page. -->
# Quality by bits

The shipped model `bench/models/tiny_moe` (5 layers of 16 experts), its experts quantized, on the whole held-out texts
(context 512). Each cell is the mean over {seeds} of calibration windows, rotation and allocation; in brackets half the
distance between the largest and the smallest, or {ONE_SEED} where there is one seed alone (rounding to nearest has
none). Perplexity is that of the packed codes, computed in float32; the table at the end compares it with `vllm-ext
eval`, the engine. *Changed* is the share of (token, layer) that reach another set of experts than in the unquantized
model; *divergence* is the mean KL from its predictions on a quarter of the tokens, in thousandths of a nat.
Bits are true bits: scales and zero points count. A uniform row has, of the schemes that fit the budget, the one that
its rounding did best with, which is not always the largest; `ours_equal` has the bytes of `gptaq`. How each row works:
[docs/compress.md](../../../docs/compress.md).
"""


def write_page(out: Path) -> None:
    """Write README.md and the plot into the folder of the records, if there are any."""
    records = [read_record(path) for path in sorted(out.glob("*.json"))]
    if not records:
        return
    _draw(records, out / PLOT)
    (out / "README.md").write_text(render_page(records), encoding="utf-8")


def render_page(records: Sequence[Record]) -> str:
    """The page as Markdown; the same records give the same text."""
    seeds = sorted({record.seed for record in records if record.arm not in (BF16, REAL_SHAPE)})
    parts = [INTRODUCTION.format(ONE_SEED=ONE_SEED, seeds=f"{len(seeds)} seeds" if len(seeds) != 1 else "one seed")]
    parts.append(f"![loss above the unquantized model by bits]({PLOT})\n")
    parts += _render_table(records, "bits of each row", "bits", 4)
    parts.append("\n" + "\n".join(f"- `{method.name}`: {method.title}" for method in METHODS) + "\n")
    for text in TEXTS:
        for metric, title, factor, digits in (
            (f"perplexity_{text}", f"Perplexity, {text}", 1.0, 3),
            (f"divergence_{text}", f"Divergence from the unquantized model (mnats), {text}", 1e3, 2),
            (f"changed_{text}", f"Changed experts (%), {text}", 1.0, 2),
        ):
            parts += [f"## {title}\n", *_render_table(records, "", metric, digits, factor), ""]
    parts += [*_render_targets(records), *_render_domains(records), *_render_repair(records)]
    parts += [*_render_engine(records), *_render_shapes(records)]
    return "\n".join(parts)


def _render_table(records: Sequence[Record], corner: str, metric: str, digits: int, factor: float = 1.0) -> list[str]:
    """A row for each method, a column for each budget."""
    lines = [[corner, *(budget.name for budget in BUDGETS)], ["---"] * (len(BUDGETS) + 1)]
    if metric.startswith("perplexity"):
        lines.append([BF16, *[_cell(records, BF16, metric, digits, factor)] * len(BUDGETS)])
    for method in METHODS:
        cells = [_cell(records, f"{method.name}_{budget.name}", metric, digits, factor) for budget in BUDGETS]
        lines.append([method.name, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _find_values(records: Sequence[Record], arm: str, metric: str) -> list[float]:
    found = [record.metrics[metric].value for record in records if record.arm == arm and metric in record.metrics]
    return [value for value in found if value is not None]


def _cell(records: Sequence[Record], arm: str, metric: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * value for value in _find_values(records, arm, metric)]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return text if arm == BF16 or arm.startswith("rtn_") else f"{text} {ONE_SEED}"
    return text if max(values) == min(values) else f"{text} ({(max(values) - min(values)) / 2:.{digits}f})"


def _render_targets(records: Sequence[Record]) -> list[str]:
    targets = list_targets(read_losses(records), records)
    if not targets:
        return []
    parts = ["## Targets\n", "| target | " + " | ".join(TEXTS) + " | wanted | |", "|---" * (len(TEXTS) + 3) + "|"]
    for target in targets:
        # One value of no text stands in the first column.
        shown = [target.values.get(text) for text in TEXTS] if "" not in target.values else [target.values[""]]
        cells = ["" if value is None else f"{value:.2f} {target.unit}" for value in shown]
        values = " | ".join(cells + [""] * (len(TEXTS) - len(cells)))
        parts.append(f"| {target.title} | {values} | {target.wanted} | {VERDICTS[target.met]} |")
    return [*parts, ""]


def _render_domains(records: Sequence[Record]) -> list[str]:
    """Calibrated on one domain, tested on both: what remains of what calibration on both gains."""
    losses, parts = read_losses(records), []
    for calibrated in TEXTS:
        for method in ("gptq", "gptaq", "ours"):
            arm = f"{method}_2.5_from_{calibrated}"
            cells = [_cell(records, arm, f"perplexity_{text}", 3) for text in TEXTS]
            if not all(cells):
                continue
            remains = ""
            if method == "ours":
                shares = (
                    f"{row}: " + ", ".join(f"{text} {_measure_rest(losses, row, calibrated, text)}" for text in TEXTS)
                    for row in ("gptq", "gptaq")
                )
                remains = "; ".join(shares)
            parts.append(f"| {method} | {calibrated} | " + " | ".join(cells) + f" | {remains} |")
    if not parts:
        return []
    note = (
        "The last column: the gap that ours closes of each uniform row where both are calibrated on this domain alone, "
        "and in brackets where both are calibrated on the two, of the same seed.\n"
    )
    head = "| row at 2.5 bits | calibrated on | " + " | ".join(f"perplexity, {text}" for text in TEXTS)
    return [
        "## Calibrated on one domain\n",
        note,
        head + " | closed by ours |",
        "|---" * (len(TEXTS) + 3) + "|",
        *parts,
        "",
    ]


def _measure_rest(losses: Losses, row: str, calibrated: str, text: str) -> str:
    """Share of a uniform row's gap that ours closes, calibrated on one domain (and on both)."""
    alone = measure_closed(losses, f"{row}_2.5_from_{calibrated}", f"ours_2.5_from_{calibrated}", text)
    both = measure_closed(losses, f"{row}_2.5", "ours_2.5", text)
    seeds = sorted(alone.keys() & both.keys())
    if not seeds:
        return "?"
    one, two = (100 * statistics.fmean(found[seed] for seed in seeds) for found in (alone, both))
    return f"{one:.0f} % ({two:.0f} %)"


def _render_repair(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        repair = record.settings.get("router_repair")
        if repair is not None:
            rows.append(
                f"| {record.arm} | {record.seed} | {100 * repair['changed_before']:.2f} | "
                f"{100 * repair['changed_after']:.2f} | {repair['loss_before']:.4f} | {repair['loss_after']:.4f} | "
                f"{'yes' if repair['kept'] else 'no'} |"
            )
    if not rows:
        return []
    head = "| cell | seed | changed before (%) | after (%) | loss before | after | kept |"
    return ["## Router repair, on held-out calibration text\n", head, "|---" * 7 + "|", *rows, ""]


def _render_engine(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        for text in TEXTS:
            found, difference = (record.metrics.get(f"engine_{what}_{text}") for what in ("perplexity", "difference"))
            if found is not None and difference is not None:
                rows.append(f"| {record.arm} | {record.seed} | {text} | {found.value:.4f} | {difference.value:+.3f} |")
    if not rows:
        return []
    head = "| cell | seed | text | perplexity in the engine | difference (%) |"
    note = "Perplexity by `vllm-ext eval` on the first 24 windows, and how far it is from this page's on the same.\n"
    return ["## Through the engine\n", note, head, "|---" * 5 + "|", *rows, ""]


def _render_shapes(records: Sequence[Record]) -> list[str]:
    """Time and memory at a real model's shapes."""
    found = [record for record in records if record.arm == REAL_SHAPE]
    if not found:
        return []
    record = found[0]
    value = {name: metric.value for name, metric in record.metrics.items()}
    shapes = ", ".join(f"{name} {size}" for name, size in record.settings["shapes"].items())
    run = (
        f"`python -m bench.quality.real_shape`: {shapes}; random weights, {record.settings['scheme']}, "
        f"{record.settings['rounding']} with rotation, {record.settings['sweeps']} sweeps, "
        f"{record.settings['windows']} windows, "
        f"{record.settings['threads']} threads.\n"
    )
    found_out = (
        f"Wall time {value['wall']:.0f} s (processor {value['cpu']:.0f} s). Peak memory {value['peak_memory']:.0f} MiB "
        f"above what the program itself takes; one layer in float32 is {value['layer_float32']:.0f} MiB, the "
        f"activations of one path {value['activations']:.0f} MiB: {judge_memory(record).values['']:.2f} layers beside "
        f"those. The scheme is given: profile, sensitivities with their gradients, the comparison of plans and router "
        f"repair are not run here.\n"
    )
    return ["## At real shapes\n", run, found_out]


def _draw(records: Sequence[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    losses = read_losses(records)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(TEXTS), squeeze=False)[0], TEXTS, strict=True):
        full = losses.get((BF16, text), {}).get(0)
        if full is None:
            continue
        for method in METHODS:
            points = []
            for budget in BUDGETS:
                bits = _find_values(records, f"{method.name}_{budget.name}", "bits")
                values = list(losses.get((f"{method.name}_{budget.name}", text), {}).values())
                if values and bits and "a8" not in budget.name:
                    points.append((statistics.fmean(bits), 1e3 * (statistics.fmean(values) - full)))
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=method.name)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("true bits per expert weight")
        axes.set_ylabel("loss above unquantized (mnats)")
        axes.set_title(text)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
