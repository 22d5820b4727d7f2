# SPDX-License-Identifier: Apache-2.0
"""Steps of a server that speculates: requests come and go, drafts are accepted or not, and time passes.

    simulate(policy, regime, cost, workload, concurrency=...) -> Trace

A step goes as in the engine: drafts that the step before asked for are trimmed, the next ones are planned, the forward
pass verifies the one and the drafter makes the other, and then the outcome is known. A request that has just come has
no drafts. Acceptance is drawn per request and position from the regime's true chances; a step's time is that of the
true cost with noise. A policy sees what the controller sees in the engine. The oracle alone is told the true chances
and costs, not the outcomes.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from vllm_ext.speculation.controller import Batch
from vllm_ext.speculation.step_time import StepFeatures

K_MAX = 8
#: Standard deviation of a step's log time.
NOISE = 0.06
#: Forward passes by the longest draft: a model drafts one position a pass, and one pass runs whatever is asked for;
#: a lookup takes none.
PASSES = {"model": tuple(max(1, k) for k in range(K_MAX + 1)), "lookup": (0,) * (K_MAX + 1)}


@dataclass(frozen=True)
class TrueCost:
    """Milliseconds of a step by its features; tokens are padded to `graph_sizes` where these are given."""

    coefficients: Mapping[str, float]
    graph_sizes: Sequence[int] = ()
    drafter: str = "model"

    def measure(self, features: StepFeatures) -> float:
        """Milliseconds, without noise."""
        tokens, *others = features
        if self.graph_sizes and tokens <= self.graph_sizes[-1]:
            tokens = self.graph_sizes[bisect.bisect_left(self.graph_sizes, tokens)]
        step, each_token, *each = self._plain
        return step + each_token * tokens + sum(map(float.__mul__, each, map(float, others)))

    def measure_many(self, features: np.ndarray) -> np.ndarray:
        """Milliseconds of each row, float64 [steps], of features [steps, 6]."""
        values = features.astype(float)
        if self.graph_sizes:
            sizes, tokens = np.array(self.graph_sizes), values[:, 0]
            padded = sizes[np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)]
            values[:, 0] = np.maximum(padded, tokens)
        step, *each = self._plain
        return step + values @ np.array(each)

    @property
    def _plain(self) -> list[float]:
        return [self.coefficients["step"], *(self.coefficients[name] for name in StepFeatures._fields)]

    def scale(self, factor: float) -> TrueCost:
        """The same with per-token and drafting costs times `factor`."""
        scaled = {name: value * (1.0 if name == "step" else factor) for name, value in self.coefficients.items()}
        return TrueCost(scaled, self.graph_sizes, self.drafter)


@dataclass(frozen=True)
class Regime:
    """True chances of acceptance while a workload is worked through.

    phases: (share of the work done at which it begins, chances by kind of request); chances [k_max] of position j
    given j-1. Requests are dealt to the kinds in turn. matches: share of positions of the text at which a lookup finds
    anything to draft; a model always drafts.
    """

    name: str
    phases: Sequence[tuple[float, Sequence[np.ndarray]]]
    matches: float = 1.0

    def find_hazards(self, progress: float, kinds: np.ndarray) -> np.ndarray:
        """True chances [n, k_max] of requests of these kinds when `progress`, 0 to 1, of the work is done."""
        chances = next(chances for first, chances in reversed(self.phases) if first <= progress)
        return np.stack(chances)[kinds % len(chances)]


class Workload(NamedTuple):
    """Requests in the order of arrival: tokens to generate and prompt tokens, int64 [requests]; and a number from 0 to
    1 for every generated token, float64 [tokens], which says whether a lookup finds a match there."""

    lengths: np.ndarray
    prompts: np.ndarray
    luck: np.ndarray

    @classmethod
    def draw(cls, total_tokens: int, seed: int, mean_length: int = 180) -> Workload:
        """Geometric lengths until `total_tokens` are reached."""
        rng = np.random.default_rng(seed)
        lengths = rng.geometric(1 / mean_length, 2 * total_tokens // mean_length + 16)
        count = int(np.searchsorted(np.cumsum(lengths), total_tokens)) + 1
        lengths = lengths[:count]
        return cls(lengths, rng.integers(50, 1500, count), rng.random(int(lengths.sum())))


class Observation(NamedTuple):
    """What a policy learns of a finished step."""

    request_ids: Sequence[Hashable]
    drafted: np.ndarray
    accepted: np.ndarray
    features: StepFeatures
    milliseconds: float
    is_probe: bool


class Truth(NamedTuple):
    """What only the oracle sees: the chances of every request, and the cost."""

    hazards: np.ndarray
    cost: TrueCost


class Plan(NamedTuple):
    """Draft lengths of the next step, int64 [n], and whether they are a probe."""

    lengths: np.ndarray
    is_probe: bool = False


class DraftPolicy(Protocol):
    """Chooses draft lengths."""

    def trim(self, batch: Batch, given: np.ndarray, is_probe: bool, truth: Truth) -> np.ndarray:
        """How many of the given drafts to verify, int64 [n]."""

    def plan(self, batch: Batch, truth: Truth) -> Plan:
        """What to draft for the next step."""

    def observe(self, observation: Observation) -> None:
        """Learn from a finished step."""


@dataclass
class Trace:
    """Every step: expected tokens, features, work done before it (0 to 1), and what probes added to it (drafts
    verified, drafter's passes, drafter's positions, 1 where these are all that is verified)."""

    tokens: list[float] = field(default_factory=list)
    features: list[StepFeatures] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    probes: list[tuple[int, int, int, int]] = field(default_factory=list)

    def without_drafter(self) -> Trace:
        """The same steps in an engine that has none. Raises ValueError where anything was drafted."""
        if any(features.tokens > features.requests for features in self.features):
            raise ValueError("a trace with drafts needs its drafter")
        plain = [features._replace(passes=0, drafted=0) for features in self.features]
        return Trace(self.tokens, plain, self.progress, [(0, 0, 0, 0)] * len(plain))

    def time(self, cost: TrueCost) -> TimedTrace:
        """The same with the milliseconds of each step."""
        features = np.array(self.features, np.int64).reshape(len(self.tokens), -1)
        milliseconds = cost.measure_many(features)
        without = features.copy()
        without[:, [0, 3, 4, 5]] -= np.array(self.probes, np.int64)
        probing = milliseconds - cost.measure_many(without)
        return TimedTrace(np.array(self.tokens), milliseconds, np.array(self.progress), probing)


class TimedTrace(NamedTuple):
    """Every step: expected tokens, milliseconds, work done before it, and milliseconds that probes added."""

    tokens: np.ndarray
    milliseconds: np.ndarray
    progress: np.ndarray
    probing: np.ndarray

    def measure_goodput(self) -> float:
        """Tokens per millisecond."""
        return float(self.tokens.sum() / self.milliseconds.sum())


def simulate(
    policy: DraftPolicy, regime: Regime, cost: TrueCost, workload: Workload, *, concurrency: int, seed: int = 0
) -> Trace:
    """Serve a workload, `concurrency` requests at a time.

    Every policy has the same work to do, so times compare. The trace ends when nothing waits any more: what is left
    then is a batch that shrinks, and no server's usual state. Tokens are those expected under the true chances, so
    that the noise of the draws does not enter the comparison; what the policy observes is drawn.
    """
    rng = np.random.default_rng(seed)
    passes_of = PASSES[cost.drafter]
    has_passes = passes_of[-1] > 0
    total, num_requests = float(workload.lengths.sum()), len(workload.lengths)
    starts = np.cumsum(workload.lengths) - workload.lengths
    next_id = min(concurrency, num_requests)
    ids = np.arange(next_id)
    made = np.zeros(next_id)
    given, is_probe = np.zeros(next_id, np.int64), False
    positions = np.arange(K_MAX)
    done, trace = 0.0, Trace()
    while next_id < num_requests:
        progress = min(done / total, 1.0)
        hazards = regime.find_hazards(progress, ids)
        count = len(ids)
        batch = Batch(ids.tolist(), count, int((workload.prompts[ids] + made).sum()))
        truth = Truth(hazards, cost)
        kept = policy.trim(batch, given, is_probe, truth) if given.any() else given
        lengths, plans_probe = policy.plan(batch, truth)
        passes, verified = passes_of[int(lengths.max())], int(kept.sum())
        drafted = count * passes if has_passes else int(lengths.sum())
        features = StepFeatures(count + verified, batch.context_tokens, count, passes, drafted, int(verified > 0))
        # A request's last step makes no more than it needs.
        expected = 1 + (np.cumprod(hazards, axis=1) * (positions < kept[:, None])).sum(axis=1)
        expected = np.minimum(expected, workload.lengths[ids] - made)
        trace.tokens.append(float(expected.sum()))
        trace.features.append(features)
        trace.progress.append(progress)
        extra = (passes - passes_of[0], drafted - count * passes_of[0]) if plans_probe else (0, 0)
        trace.probes.append((verified if is_probe else 0, *extra, int(is_probe and verified > 0)))
        passed = np.cumprod(rng.random(hazards.shape) < hazards, axis=1).sum(axis=1)
        milliseconds = cost.measure(features) * rng.lognormal(0, NOISE)
        policy.observe(Observation(batch.request_ids, kept, np.minimum(passed, kept), features, milliseconds, is_probe))
        made = made + expected
        done += float(expected.sum())
        given, is_probe = lengths, plans_probe
        if not has_passes and regime.matches < 1:
            places = np.minimum(made, workload.lengths[ids] - 1).astype(np.int64)
            given = np.where(workload.luck[starts[ids] + places] < regime.matches, lengths, 0)
        staying = workload.lengths[ids] - made > 1e-9
        if not staying.all():
            fresh = np.arange(next_id, min(next_id + count - int(staying.sum()), num_requests))
            next_id += len(fresh)
            ids = np.concatenate([ids[staying], fresh])
            made = np.concatenate([made[staying], np.zeros(len(fresh))])
            given = np.concatenate([given[staying], np.zeros(len(fresh), np.int64)])
    return trace


def read_costs(text: str) -> dict[str, TrueCost]:
    """Costs by name from the YAML of `costs.yaml`. Raises ValueError for a case without all coefficients."""
    import yaml

    cases: Any = yaml.safe_load(text)
    costs = {}
    for name, values in cases.items():
        sizes, drafter = values.pop("graph_sizes", ()), values.pop("drafter", "model")
        missing = {"step", *StepFeatures._fields} ^ set(values)
        if missing:
            raise ValueError(f"cost {name}: missing or unknown coefficients {', '.join(sorted(missing))}")
        if drafter not in PASSES:
            raise ValueError(f"cost {name}: drafter {drafter!r} must be one of {', '.join(PASSES)}")
        costs[name] = TrueCost({key: float(value) for key, value in values.items()}, tuple(sizes), drafter)
    return costs
