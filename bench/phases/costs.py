# SPDX-License-Identifier: Apache-2.0
"""What a batch costs: published coefficients, carried over to a model and a device, alone and beside another batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

COSTS = Path(__file__).parent / "costs.yaml"


class Work(NamedTuple):
    """Milliseconds of a batch that has the whole device to itself, by what limits them."""

    compute: float  # scales with the share of the cores
    memory: float  # does not, above the share that saturates the memory
    fixed: float  # does not scale: launches, and the host


@dataclass(frozen=True)
class Cost:
    """Coefficients in milliseconds; see costs.yaml for their sources."""

    fixed: float
    token: float
    pair: float
    step: float
    context: float
    request: float
    host: float
    saturation: float
    beside_prefill: float
    beside_decode: float
    overlap: float

    def measure_prefill(self, tokens: float, pairs: float) -> Work:
        """A batch of prompt tokens; pairs: tokens^2 of whole prompts, or chunk * (chunk + 2 * what is before it)."""
        return Work(self.token * tokens + self.pair * pairs, 0.0, self.fixed + self.host)

    def measure_decode(self, requests: int, context: float) -> Work:
        """A step of requests with so many tokens in the KV cache together."""
        return Work(0.0, self.step + self.context * context, self.request * requests + self.host)

    def measure_mixed(self, tokens: float, pairs: float, requests: int, context: float) -> float:
        """Milliseconds of one batch of prompt tokens and requests that decode: weights are read once."""
        if not tokens:
            work = self.measure_decode(requests, context)
            return work.memory + work.fixed
        # What has no prompt tokens costs a step at least, however few tokens there are.
        linear = max(self.fixed + self.token * (tokens + requests), self.step if requests else 0.0)
        return linear + self.pair * pairs + self.context * context + self.request * requests + self.host

    def divide(self, shares: Sequence[float]) -> tuple[float, float]:
        """What prefill and decode really get of the cores, where both run with such shares.

        Below 1 together: their shares. Above: what one alone may use is its own, and of what both may use prefill,
        whose kernels are large, gets `overlap`.
        """
        prefill, decode = shares
        both = max(0.0, prefill + decode - 1)
        return prefill - both * (1 - self.overlap), decode - both * self.overlap

    def slow_down(self, work: Work, share: float, *, is_prefill: bool, is_beside: bool) -> float:
        """Milliseconds of a batch that really gets a share of the cores; is_beside: the other lane runs."""
        compute, memory, fixed = work
        total = compute / share + memory * max(1.0, self.saturation / share)
        if is_beside:
            total *= self.beside_decode if is_prefill else self.beside_prefill
        return total + fixed

    def scale(self, group: str, factor: float) -> Cost:
        """The same with the coefficients of a group of GROUPS times a factor; what is a factor changes by
        its distance from 1."""
        changed = {}
        for name in GROUPS[group]:
            value = getattr(self, name)
            if name.startswith("beside"):
                changed[name] = 1 + (value - 1) * factor
            elif name == "overlap":
                changed[name] = 1 - (1 - value) * factor
            else:
                changed[name] = value * factor
        return replace(self, **changed)


#: What is made 30 % lower and higher together.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "compute": ("token", "pair"),
    "memory": ("step", "context"),
    "fixed": ("fixed", "host"),
    "saturation": ("saturation",),
    "contention": ("beside_prefill", "beside_decode", "overlap"),
}


def read_costs(path: Path = COSTS) -> dict[str, Any]:
    """The whole file."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_cost(
    content: Mapping[str, Any],
    *,
    engine: str,
    host: str,
    model: str = "llama3-8b",
    device: str = "a100",
    prefill_factor: float = 1.0,
) -> Cost:
    """The published fit of an engine, carried over from OPT-13B on an A100 to a model and a device.

    prefill_factor: times that prefill takes longer than in the fit. Terms of compute scale with parameters and
    operations per second, terms of memory with the bytes they read and with bandwidth. Raises KeyError for a name that
    the file does not have.
    """
    fit, base, target = content["engines"][engine], content["models"]["opt-13b"], content["models"][model]
    old, new = content["devices"]["a100"], content["devices"][device]
    weights = target["parameters"] / base["parameters"]
    attention = target["layers"] * target["hidden"] / (base["layers"] * base["hidden"])
    compute, memory = old["flops"] / new["flops"], old["bandwidth"] / new["bandwidth"]
    return Cost(
        fixed=fit["fixed"] * weights * memory * prefill_factor,
        token=fit["token"] * weights * compute * prefill_factor,
        pair=fit["pair"] * attention * compute * prefill_factor,
        step=fit["step"] * weights * memory,
        context=fit["context"] * target["kv_bytes"] / base["kv_bytes"] * memory,
        request=fit["request"] * weights * compute,
        host=content["hosts"][host],
        **content["sharing"],
    )
