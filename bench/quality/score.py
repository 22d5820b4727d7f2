# SPDX-License-Identifier: Apache-2.0
"""What quantization did to a model on held-out text: perplexity, divergence from the unquantized model, experts chosen.

Runs in float32 on the weights that the packed codes stand for, with activations rounded to 8 bits where the plan says
so, one layer at a time. `vllm-ext eval` measures the same perplexity through the engine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vllm_ext.compress.cache import StageCache, hash_array, hash_source
from vllm_ext.compress.evaluation import dequantize_checkpoint
from vllm_ext.compress.families import RoutedTokens
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.progress import track
from vllm_ext.compress.rounded_layer import round_inputs
from vllm_ext.compress.sequential import split_plan
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.checkpoint import open_checkpoint
from vllm_ext.quantization.scheme import Scheme

#: Windows of one forward pass.
BATCH_WINDOWS = 16

#: The divergence is taken on one part in this many, of about two windows each: it scatters far less than the loss.
DIVERGENCE_EVERY = 4


@dataclass(frozen=True)
class Score:
    """On `tokens` predicted tokens: mean negative log likelihood, and mean divergence KL(unquantized || this) on a
    quarter of them, nats; changed: share of (token, layer) whose set of experts is not the unquantized model's."""

    loss: float
    divergence: float
    changed: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


class Reference:
    """The unquantized model on windows of a text: its last hidden states and the experts it chose.

    windows: int64 [windows, context]. work: folder where both are kept for the next run; None: nowhere.
    """

    def __init__(self, model: Path, windows: np.ndarray, work: Path | None = None, *, progress: bool = False) -> None:
        self.source, self.windows = open_source(model), windows
        self.stream = LayerStream(self.source, windows, batch_windows=BATCH_WINDOWS)
        key = {"stage": "reference", "source": hash_source(self.source), "windows": hash_array(windows)}
        cache = None if work is None else StageCache(work, key)
        stored = None if cache is None else cache.load("states")
        if stored is None:
            hidden, experts = _run(self.stream, lambda index: self.stream.build_layer(index), progress)
            stored = {"hidden": torch.cat(hidden), "experts": torch.stack(experts)}
            if cache is not None:
                cache.store("states", stored)
        self.outputs = list(stored["hidden"].split(BATCH_WINDOWS))
        self.experts: torch.Tensor = stored["experts"]

    def score(self) -> Score:
        """The unquantized model itself."""
        loss, divergence, tokens = _compare(self.stream, self.outputs, self)
        return Score(loss, divergence, 0.0, tokens)


def score_checkpoint(
    directory: Path, references: Mapping[str, Reference], *, progress: bool = False
) -> dict[str, Score]:
    """{text: score} of a packed checkpoint. Raises CheckpointError for a directory that is none."""
    plan = open_checkpoint(directory).plan
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model"
        dequantize_checkpoint(directory, plain)
        source = open_source(plain)
        for name, reference in references.items():
            stream = LayerStream(source, reference.windows, batch_windows=BATCH_WINDOWS)

            def build(index: int, stream: LayerStream = stream, source: SourceModel = source) -> torch.nn.Module:
                module = stream.build_layer(index)
                schemes, linears = split_plan(source, plan, index)
                if any(scheme.act_bits != 16 for scheme in linears.values()):
                    raise ValueError(f"layer {index} rounds activations outside of experts: not simulated here")
                experts = source.family.find_experts(module)
                if experts is not None and any(scheme.act_bits != 16 for scheme in schemes.values()):
                    source.family.replace_experts(module, _RoundingExperts(experts, schemes, source))
                return module

            outputs, experts = _run(stream, build, progress, name)
            loss, divergence, tokens = _compare(stream, outputs, reference)
            changed = (torch.stack(experts) != reference.experts).any(-1).double().mean()
            found[name] = Score(loss, divergence, float(changed), tokens)
    return found


class _RoundingExperts(torch.nn.Module):
    """Experts whose inputs are rounded as each block's scheme says."""

    def __init__(
        self, experts: torch.nn.Module, schemes: Mapping[tuple[int, str], Scheme], source: SourceModel
    ) -> None:
        super().__init__()
        self._experts, self._schemes, self._family = experts, schemes, source.family

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            inner = apply_gate(self._apply(expert, "gate_up", hidden[rows]))
            total.index_add_(0, rows, self._apply(expert, "down", inner) * weights[rows, slots, None])
        return total

    def _apply(self, expert: int, block: str, inputs: torch.Tensor) -> torch.Tensor:
        weight = self._family.expert_weight(self._experts, expert, block)
        return functional.linear(round_inputs(inputs, self._schemes[expert, block]), weight)


def _run(
    stream: LayerStream, build: Callable[[int], torch.nn.Module], progress: bool, name: str = "unquantized"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(outputs of the last layer, per layer with experts their sorted numbers int16 [tokens, top k])."""
    hidden, chosen = stream.embed(), []
    for index in track(range(stream.num_layers), f"score {name}", stream.num_layers, progress):
        module = build(index)
        experts = stream.family.find_experts(module)
        seen: list[RoutedTokens] = []

        def record(_module: Any, arguments: tuple[Any, ...], seen: list[RoutedTokens] = seen) -> None:
            seen.append(stream.family.read_expert_inputs(arguments))

        if experts is not None:
            experts.register_forward_pre_hook(record)
        hidden = stream.run(module, hidden)
        if seen:
            chosen.append(torch.cat([part.ids for part in seen]).sort(-1).values.to(torch.int16))
    return hidden, chosen


def _compare(stream: LayerStream, outputs: list[torch.Tensor], reference: Reference) -> tuple[float, float, int]:
    """(mean loss, mean divergence, tokens of the loss)."""
    loss = divergence = 0.0
    tokens = compared = 0
    for logits, targets in stream.iterate_logits(outputs):
        loss += float(functional.cross_entropy(logits, targets, reduction="sum").double())
        tokens += len(targets)
    pairs = zip(
        stream.iterate_logits(outputs, DIVERGENCE_EVERY),
        reference.stream.iterate_logits(reference.outputs, DIVERGENCE_EVERY),
        strict=True,
    )
    for (logits, targets), (wanted, _) in pairs:
        found, full = logits.log_softmax(-1), wanted.log_softmax(-1)
        divergence += float(((full - found) * full.exp()).sum(dtype=torch.float64))
        compared += len(targets)
    return loss / tokens, divergence / compared, tokens
