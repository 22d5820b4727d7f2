# SPDX-License-Identifier: Apache-2.0
"""Steps of a server that speculates: requests come and go, drafts are accepted or not, and time passes.

    simulate(policy, regime, cost, workload, concurrency=...) -> Trace

Acceptance is drawn per request and position from the regime's true chances; a step's time is that of the true cost
with noise. A policy sees what the controller sees in the engine: request ids, context, and what its own steps drafted,
accepted and took. The oracle alone is told the true chances and costs, not the outcomes.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from vllm_ext.speculation.controller import Batch
from vllm_ext.speculation.step_time import StepFeatures

K_MAX = 8
#: Standard deviation of a step's log time.
NOISE = 0.06


@dataclass(frozen=True)
class TrueCost:
    """Milliseconds of a step by its features; tokens are padded to `graph_sizes` where these are given."""

    coefficients: Mapping[str, float]
    graph_sizes: Sequence[int] = ()

    def measure(self, features: StepFeatures) -> float:
        """Milliseconds, without noise."""
        values = features._asdict()
        if self.graph_sizes:
            index = bisect.bisect_left(self.graph_sizes, features.tokens)
            values["tokens"] = self.graph_sizes[index] if index < len(self.graph_sizes) else features.tokens
        return self.coefficients["step"] + sum(self.coefficients[name] * value for name, value in values.items())

    def scale(self, factor: float) -> TrueCost:
        """The same with per-token and drafting costs times `factor`."""
        scaled = {name: value * (1.0 if name == "step" else factor) for name, value in self.coefficients.items()}
        return TrueCost(scaled, self.graph_sizes)


@dataclass(frozen=True)
class Regime:
    """True chances of acceptance while a workload is worked through.

    phases: (share of the work done at which it begins, chances by kind of request); chances [k_max] of position j
    given j-1. Requests are dealt to the kinds in turn.
    """

    name: str
    phases: Sequence[tuple[float, Sequence[np.ndarray]]]

    def find_hazards(self, progress: float, kinds: np.ndarray) -> np.ndarray:
        """True chances [n, k_max] of requests of these kinds when `progress`, 0 to 1, of the work is done."""
        chances = next(chances for first, chances in reversed(self.phases) if first <= progress)
        return np.stack(chances)[kinds % len(chances)]


class Workload(NamedTuple):
    """Requests in the order of arrival: tokens to generate and prompt tokens, int64 [requests]."""

    lengths: np.ndarray
    prompts: np.ndarray

    @classmethod
    def draw(cls, total_tokens: int, seed: int, mean_length: int = 180) -> Workload:
        """Geometric lengths until `total_tokens` are reached."""
        rng = np.random.default_rng(seed)
        lengths = rng.geometric(1 / mean_length, 2 * total_tokens // mean_length + 16)
        count = int(np.searchsorted(np.cumsum(lengths), total_tokens)) + 1
        return cls(lengths[:count], rng.integers(50, 1500, count))


class Observation(NamedTuple):
    """What a policy learns of a finished step."""

    request_ids: Sequence[int]
    drafted: np.ndarray
    accepted: np.ndarray
    features: StepFeatures
    milliseconds: float


class Truth(NamedTuple):
    """What only the oracle sees: the chances of every request, and the cost."""

    hazards: np.ndarray
    cost: TrueCost


class DraftPolicy(Protocol):
    """Chooses draft lengths, int64 [n]."""

    def choose(self, batch: Batch, truth: Truth) -> np.ndarray:
        """Lengths of the next step's drafts."""

    def observe(self, observation: Observation) -> None:
        """Learn from a finished step."""


@dataclass
class Trace:
    """Tokens, milliseconds, mean draft length and work done (0 to 1, before it) of every step."""

    tokens: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)

    def measure_goodput(self, first: int = 0, last: int | None = None) -> float:
        """Tokens per millisecond over steps first .. last-1."""
        return sum(self.tokens[first:last]) / sum(self.milliseconds[first:last])


def simulate(
    policy: DraftPolicy,
    regime: Regime,
    cost: TrueCost,
    workload: Workload,
    *,
    concurrency: int,
    seed: int = 0,
    passes_per_draft: int = 1,
) -> Trace:
    """Serve a workload, `concurrency` requests at a time.

    Every policy has the same work to do, so times compare. The trace ends when nothing waits any more: what is left
    then is a batch that shrinks, and no server's usual state. Tokens are those expected under the true chances, so
    that the noise of the draws does not enter the comparison; what the policy observes is drawn.
    """
    rng = np.random.default_rng(seed)
    total = float(workload.lengths.sum())
    next_id = min(concurrency, len(workload.lengths))
    ids = np.arange(next_id)
    contexts = workload.prompts[ids].astype(float)
    remaining = workload.lengths[ids].astype(float)
    done, trace = 0.0, Trace()
    while next_id < len(workload.lengths):
        progress = min(done / total, 1.0)
        hazards = regime.find_hazards(progress, ids)
        count = len(ids)
        batch = Batch(ids.tolist(), count, int(contexts.sum()))
        lengths = policy.choose(batch, Truth(hazards, cost))
        passes, drafted = int(lengths.max()) * passes_per_draft, int(lengths.sum())
        features = StepFeatures(count + drafted, batch.context_tokens, count, passes, drafted)
        time = cost.measure(features)
        allowed = np.arange(K_MAX) < lengths[:, None]
        # A request's last step makes no more than it needs.
        made = np.minimum(1 + (np.cumprod(hazards, axis=1) * allowed).sum(axis=1), remaining)
        trace.tokens.append(float(made.sum()))
        trace.milliseconds.append(time)
        trace.drafted.append(drafted / count)
        trace.progress.append(progress)
        passed = np.cumprod(rng.random(hazards.shape) < hazards, axis=1).sum(axis=1)
        accepted = np.minimum(passed, lengths)
        policy.observe(Observation(ids.tolist(), lengths, accepted, features, time * rng.lognormal(0, NOISE)))
        contexts += made
        remaining -= made
        done += float(made.sum())
        kept = remaining > 1e-9
        fresh = np.arange(next_id, min(next_id + count - int(kept.sum()), len(workload.lengths)))
        next_id += len(fresh)
        ids = np.concatenate([ids[kept], fresh])
        contexts = np.concatenate([contexts[kept], workload.prompts[fresh]])
        remaining = np.concatenate([remaining[kept], workload.lengths[fresh]])
    return trace


def read_costs(text: str) -> dict[str, TrueCost]:
    """Costs by name from the YAML of `costs.yaml`. Raises ValueError for a case without all coefficients."""
    import yaml

    cases: Any = yaml.safe_load(text)
    costs = {}
    for name, values in cases.items():
        sizes = values.pop("graph_sizes", ())
        missing = {"step", *StepFeatures._fields} ^ set(values)
        if missing:
            raise ValueError(f"cost {name}: missing or unknown coefficients {', '.join(sorted(missing))}")
        costs[name] = TrueCost(values, tuple(sizes))
    return costs
