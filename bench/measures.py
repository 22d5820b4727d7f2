# SPDX-License-Identifier: Apache-2.0
"""What a run of a case can report: name, where the number comes from, unit, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.records import Direction, Metric
from bench.serve.server import parse_metric

Source = Literal["client", "run", "gauge", "counter"]

#: vLLM's histogram of tokens per engine step: its count is the number of steps, its sum the tokens computed.
STEPS = "vllm:iteration_tokens_total_count"
TOKENS = "vllm:iteration_tokens_total_sum"


@dataclass(frozen=True)
class Measure:
    """One reportable number.

    source "client": field `key` of the result of `vllm bench serve`, or of the offline engine; "run": computed by
    `RunUsage`; "gauge": a metric of `/metrics` after the run; "counter": its increase during the run.
    """

    source: Source
    key: str
    unit: str
    direction: Direction
    needs_server: bool = False


def _list_latencies() -> dict[str, Measure]:
    measures = {}
    for name in ("ttft", "tpot", "itl", "e2el"):
        for suffix, key in (
            ("", "median_{}_ms"),
            ("_mean", "mean_{}_ms"),
            ("_p90", "p90_{}_ms"),
            ("_p99", "p99_{}_ms"),
        ):
            measures[name + suffix] = Measure("client", key.format(name), "ms", "lower", needs_server=True)
    return measures


#: Names that a case may list under `metrics`.
MEASURES: dict[str, Measure] = {
    **_list_latencies(),
    "goodput": Measure("client", "request_goodput", "requests/s", "higher", needs_server=True),
    "request_throughput": Measure("client", "request_throughput", "requests/s", "higher"),
    "output_throughput": Measure("client", "output_throughput", "tokens/s", "higher"),
    "total_throughput": Measure("client", "total_token_throughput", "tokens/s", "higher"),
    "duration": Measure("client", "duration", "s", "lower"),
    "wall_per_step": Measure("run", "wall_per_step", "ms", "lower"),
    "cpu_per_step": Measure("run", "cpu_per_step", "ms", "lower"),
    "cpu_per_token": Measure("run", "cpu_per_token", "ms", "lower"),
    "cpu_time": Measure("run", "cpu_time", "s", "lower"),
    "steps": Measure("run", "steps", "steps", "none"),
    "computed_tokens": Measure("run", "computed_tokens", "tokens", "none"),
    "resident_memory": Measure("run", "resident_memory", "MiB", "lower"),
    "startup": Measure("run", "startup", "s", "none"),
}


@dataclass(frozen=True)
class RunUsage:
    """What the server's side of one run cost: CPU seconds of its process group, seconds of wall time between first and
    last request as the client saw them, resident bytes afterwards, seconds that its start took, and `/metrics` before
    and after."""

    cpu_seconds: float
    duration: float
    resident_bytes: int
    startup_seconds: float
    before: str
    after: str

    def count(self, name: str) -> float | None:
        """Increase of a counter of `/metrics` during the run; None when it is not exported."""
        after = parse_metric(self.after, name)
        return None if after is None else after - (parse_metric(self.before, name) or 0.0)

    def compute(self, key: str) -> float | None:
        """A number by its `Measure.key`; None where its divisor is absent or 0."""
        steps, tokens = self.count(STEPS), self.count(TOKENS)
        values = {
            "cpu_time": self.cpu_seconds,
            "steps": steps,
            "computed_tokens": tokens,
            "cpu_per_step": 1e3 * self.cpu_seconds / steps if steps else None,
            "cpu_per_token": 1e3 * self.cpu_seconds / tokens if tokens else None,
            "wall_per_step": 1e3 * self.duration / steps if steps else None,
            "resident_memory": self.resident_bytes / 2**20,
            "startup": self.startup_seconds,
        }
        return values[key]


def collect_metrics(measures: Mapping[str, Measure], result: Mapping[str, Any], usage: RunUsage) -> dict[str, Metric]:
    """The values of the chosen measures, from the client's result and the server's usage."""
    metrics = {}
    for name, measure in measures.items():
        value: float | None
        if measure.source == "client":
            value = result.get(measure.key)
        elif measure.source == "run":
            value = usage.compute(measure.key)
        elif measure.source == "gauge":
            value = parse_metric(usage.after, measure.key)
        else:
            value = usage.count(measure.key)
        metrics[name] = Metric(None if value is None else float(value), measure.unit, measure.direction)
    return metrics
