# SPDX-License-Identifier: Apache-2.0
"""Router repair: gates of a quantized model that send its tokens where the unquantized model sends them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.families import Kind, RoutedTokens
from vllm_ext.compress.progress import track
from vllm_ext.compress.rounded_layer import build_rounded_layer, find_linear
from vllm_ext.compress.rounding import QuantizedWeight
from vllm_ext.compress.sequential import split_plan
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import LayerStream, StreamedLayer
from vllm_ext.quantization.plan import Plan

#: Added to the diagonal of the inputs' second moment, as a share of its mean.
DAMPING = 0.01

#: Steps of L-BFGS on the divergence of routing probabilities.
STEPS = 20

#: Codes of a layer that was rounded before, by checkpoint path.
ReadCodes = Callable[[StreamedLayer], Mapping[str, QuantizedWeight]]


class LayerRouting(NamedTuple):
    """Routing of one layer on held-out tokens against that of the unquantized model.

    changed_before, changed: share of tokens whose set of experts is another one. method: how the gate was fitted,
    "none" where it was left alone.
    """

    layer: int
    changed_before: float
    changed: float
    method: str


def list_repair_constants() -> dict[str, float]:
    """Numbers of this module that decide new gates: part of what stored ones depend on."""
    return {"damping": DAMPING, "steps": STEPS}


@dataclass(frozen=True)
class RouterRepair:
    """New gates, and what they do on held-out calibration tokens.

    gates: {checkpoint name of a weight [experts, hidden]: its new value}; empty where repair did not lower the loss.
    kept: whether it did. loss_full, loss_before, loss_after: mean token loss (nats) of the unquantized model, of the
    quantized one, and of that with every new gate.
    """

    gates: Mapping[str, torch.Tensor]
    layers: tuple[LayerRouting, ...]
    tokens: int
    loss_full: float
    loss_before: float
    loss_after: float

    @property
    def kept(self) -> bool:
        """Whether the repaired model is better on the held-out tokens."""
        return bool(self.gates)

    @property
    def changed_before(self) -> float:
        """Share of (token, layer) pairs that reach another set of experts, before repair."""
        return sum(layer.changed_before for layer in self.layers) / len(self.layers)

    @property
    def changed_after(self) -> float:
        """The same with the new gates."""
        return sum(layer.changed for layer in self.layers) / len(self.layers)

    def describe(self) -> str:
        """One line for people."""
        text = (
            f"router repair on {self.tokens} held-out tokens: other experts for {self.changed_before:.2%} of (token, "
            f"layer) before and {self.changed_after:.2%} after, loss {self.loss_before:.4f} and {self.loss_after:.4f} "
            f"(unquantized {self.loss_full:.4f})"
        )
        return text if self.kept else f"{text}; not better, so the gates are left as they are"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, without the gates."""
        values = asdict(self)
        del values["gates"]
        return {
            **values,
            "layers": [layer._asdict() for layer in self.layers],
            "changed_before": self.changed_before,
            "changed_after": self.changed_after,
            "kept": self.kept,
        }


def repair_routers(
    source: SourceModel,
    plan: Plan,
    read_codes: ReadCodes,
    windows: np.ndarray,
    held_out: np.ndarray,
    *,
    cache: StageCache | None = None,
    progress: bool = False,
) -> RouterRepair:
    """Fit every gate anew on the quantized path, layer by layer, so that it routes as the unquantized model's does.

    source, plan: as for rounding. read_codes: gives a layer's codes. windows, held_out: int64 [windows, context], to
    fit with, and to judge with: text that the codes were not chosen with either. cache: where a finished repair is
    kept and looked for.

    Two fits per layer, on the inputs that the repaired layers before it give: least squares to the unquantized
    logits, damped towards the old gate (closed form), and from there the divergence of the routing probabilities
    (L-BFGS, convex). Of these and the old gate the one whose routing weights are nearest to the unquantized ones on
    held-out tokens is taken, in the gate's own type. At the end all of them are dropped where the loss on held-out
    tokens has not fallen. Routers are softmax of one linear map without bias.
    Raises ValueError for windows without a held-out one.

    Source: the aims are those of router alignment in EAQuant (arXiv:2506.13329: mean squared error and divergence of
    logits) and GEMQ (arXiv:2605.23078: routers alone are tuned, by gradient descent on the model's loss); the closed
    form is GPTAQ's correction (arXiv:2504.02692) applied to a gate, and needs no backward pass through the model.
    """
    if not len(windows) or not len(held_out):
        raise ValueError("router repair needs windows to fit with and windows held out: give more calibration text")
    stored = None if cache is None else cache.load("router-repair")
    if stored is not None:
        gates = cache.load("router-gates") if cache is not None and stored["kept"] else {}
        if gates is not None:
            return _from_json(stored, gates)
    fit, judge = LayerStream(source, windows), LayerStream(source, held_out)
    full, plain, repaired = judge.embed(), judge.embed(), judge.embed()
    fitted = fit.embed()
    gates, layers = {}, []
    for layer in track(fit.layers(), "router repair", fit.num_layers, progress):
        schemes, linears = split_plan(source, plan, layer.index)
        module = build_rounded_layer(layer, schemes, linears, read_codes(layer))
        path = _find_gate(source, layer.index) if layer.routed is not None else None
        if path is not None:
            assert layer.routed is not None
            gate = find_linear(module, layer, path)
            wanted = _trace(layer, judge, layer.module, full)
            before = _trace(layer, judge, module, plain)
            # The plain path goes through the layer with the old gate.
            plain = judge.run(module, plain)
            old = gate.weight
            start, rows = _trace(layer, fit, module, fitted).hidden, layer.routed.hidden
            candidates = {"none": old, **_fit_gates(old, start, rows)}
            dtype = source.reader.infos[f"{path}.weight"].dtype
            distances: dict[str, tuple[float, float]] = {}
            for name, weight in candidates.items():
                candidates[name] = weight.to(dtype).to(old.dtype)
                gate.weight = torch.nn.Parameter(candidates[name], requires_grad=False)
                distances[name] = _compare(_trace(layer, judge, module, repaired), wanted, layer.num_experts)
            best = min(distances, key=lambda name: distances[name][0])
            gate.weight = torch.nn.Parameter(candidates[best], requires_grad=False)
            if best != "none":
                gates[f"{path}.weight"] = candidates[best].to(dtype)
            changed = _compare(before, wanted, layer.num_experts)[1]
            layers.append(LayerRouting(layer.index, changed, distances[best][1], best))
        else:
            plain = judge.run(module, plain)
        fitted, repaired = fit.run(module, fitted), judge.run(module, repaired)
        full = judge.run(layer.module, full)
    losses = [judge.loss(path) for path in (full, plain, repaired)]
    if not losses[2] < losses[1]:
        gates = {}
    found = RouterRepair(gates, tuple(layers), int(held_out.size), *losses)
    if cache is not None:
        if gates:
            cache.store("router-gates", gates)
        cache.store("router-repair", found.to_json())
    return found


def _from_json(stored: Mapping[str, Any], gates: Mapping[str, torch.Tensor]) -> RouterRepair:
    layers = tuple(LayerRouting(**layer) for layer in stored["layers"])
    losses = (stored[name] for name in ("loss_full", "loss_before", "loss_after"))
    return RouterRepair(gates, layers, stored["tokens"], *losses)


def _find_gate(source: SourceModel, layer: int) -> str | None:
    """Checkpoint path of a layer's router."""
    paths = (m.path for m in source.modules.values() if m.kind is Kind.ROUTER and m.layer == layer)
    return next(paths, None)


class _Silent(torch.nn.Module):
    """Stands in for experts, keeps what they are given and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[RoutedTokens] = []

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.seen.append(RoutedTokens(hidden, ids, weights))
        return torch.zeros_like(hidden)


def _trace(
    layer: StreamedLayer, stream: LayerStream, module: torch.nn.Module, inputs: list[torch.Tensor]
) -> RoutedTokens:
    """What the experts of a version of the layer would be given."""
    experts, silent = layer.stream.family.find_experts(module), _Silent()
    assert experts is not None
    layer.stream.family.replace_experts(module, silent)
    try:
        stream.run(module, inputs)
    finally:
        layer.stream.family.replace_experts(module, experts)
    return RoutedTokens.join(silent.seen)


def _fit_gates(old: torch.Tensor, inputs: torch.Tensor, reference: torch.Tensor) -> dict[str, torch.Tensor]:
    """{method: gate [experts, hidden]} for inputs [tokens, hidden] of the quantized path and the reference's."""
    logits = functional.linear(reference, old)
    moment = inputs.T @ inputs / len(inputs)
    damping = DAMPING * float(moment.diagonal().mean())
    damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    missing = (logits - functional.linear(inputs, old)).T @ inputs / len(inputs)
    ridge = old + torch.linalg.solve(damped, missing.T).T
    gate = ridge.clone().requires_grad_()
    wanted = logits.softmax(-1)
    optimizer = torch.optim.LBFGS([gate], max_iter=STEPS, line_search_fn="strong_wolfe")

    def measure() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            divergence = -(wanted * functional.linear(inputs, gate).log_softmax(-1)).sum(-1).mean()
            loss = divergence + 0.5 * DAMPING * (gate - ridge).square().sum() * damping
            loss.backward()
        return loss

    optimizer.step(measure)
    found = {"least squares": ridge}
    if bool(torch.isfinite(gate).all()):
        found["divergence"] = gate.detach()
    return found


def _compare(found: RoutedTokens, wanted: RoutedTokens, num_experts: int) -> tuple[float, float]:
    """(mean squared difference of routing weights, share of tokens with another set of experts)."""
    spread = [
        torch.zeros(len(one.ids), num_experts, dtype=torch.float64, device=one.ids.device).scatter_(
            1, one.ids, one.weights.double()
        )
        for one in (found, wanted)
    ]
    other = (found.ids.sort(-1).values != wanted.ids.sort(-1).values).any(-1)
    return float((spread[0] - spread[1]).square().sum(-1).mean()), float(other.double().mean())
