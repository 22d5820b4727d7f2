# SPDX-License-Identifier: Apache-2.0
"""Which experts calibration tokens are routed to: counts and routing weight, per layer and expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.families import Family
from vllm_ext.compress.progress import track
from vllm_ext.compress.source import SourceModel
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.safetensors_io import CheckpointError

#: Windows of one forward pass.
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class ActivationProfile:
    """Routing of `tokens` calibration tokens.

    counts: int64 [experts] by layer path (`...mlp.experts`), tokens routed to each expert. mass: float64 [experts],
    sum of the routing weights of those tokens. coactivation: int64 [experts, experts], tokens routed to both; its
    diagonal is counts.
    """

    tokens: int
    counts: Mapping[str, np.ndarray]
    mass: Mapping[str, np.ndarray]
    coactivation: Mapping[str, np.ndarray] = field(default_factory=dict)

    def frequencies(self, layer: str) -> np.ndarray:
        """Share of a layer's routed tokens that each expert gets, float64 [experts], each above zero.

        Every expert counts one token more than was seen: one that calibration missed is rare, not absent.
        """
        counts = self.counts[layer] + 1.0
        return counts / counts.sum()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "tokens": self.tokens,
            "layers": {
                layer: {
                    "counts": self.counts[layer].tolist(),
                    "mass": self.mass[layer].tolist(),
                    **({"coactivation": self.coactivation[layer].tolist()} if layer in self.coactivation else {}),
                }
                for layer in self.counts
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ActivationProfile:
        """The inverse of `to_json`. Raises CheckpointError for anything else."""
        try:
            layers = dict(value["layers"])
            counts = {layer: np.asarray(entry["counts"], np.int64) for layer, entry in layers.items()}
            mass = {layer: np.asarray(entry["mass"], np.float64) for layer, entry in layers.items()}
            pairs = {
                layer: np.asarray(entry["coactivation"], np.int64)
                for layer, entry in layers.items()
                if "coactivation" in entry
            }
            return cls(int(value["tokens"]), counts, mass, pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not an activation profile ({error!r}): make it again") from error


def load_model(directory: Path, dtype: torch.dtype | str = "auto", device: str | None = None) -> torch.nn.Module:
    """The transformers model of a directory, in evaluation mode. dtype "auto": that of the checkpoint.

    device None: CUDA where there is one. Local files only, no remote code.
    """
    from transformers import AutoModelForCausalLM

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def measure_profile(
    model: torch.nn.Module, family: Family, windows: np.ndarray, *, progress: bool = False
) -> ActivationProfile:
    """Run a transformers model over calibration windows, int64 [windows, context], and count its routing.

    Raises CheckpointError for a model without routers, and for a token that is routed to no finite weight.

    Source: MxMoE's activation-frequency profile (arXiv:2505.05799, section 4.1), plus the routing weights.
    """
    routers = family.find_routers(model)
    if not routers:
        raise CheckpointError("the model has no routed experts to profile")
    counted = _Counts()

    def record(layer: str, num_experts: int, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        counted.add(layer, num_experts, *family.read_routing(output))

    handles = []
    for layer, router in routers.items():
        num_experts = int(next(router.parameters()).shape[0])
        handles.append(router.register_forward_hook(partial(record, layer, num_experts)))
    # Without the output layer: logits over the vocabulary would be the largest tensor by far.
    decoder = getattr(model, "base_model", model)
    batches = [windows[start : start + BATCH_WINDOWS] for start in range(0, len(windows), BATCH_WINDOWS)]
    try:
        with torch.inference_mode():
            for batch in track(batches, "profile", len(batches), progress):
                decoder(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counted.finish(int(windows.size))


def stream_profile(source: SourceModel, windows: np.ndarray, *, progress: bool = False) -> ActivationProfile:
    """As `measure_profile` for a checkpoint, in float32, with one layer in memory at a time."""
    stream, counted = LayerStream(source, windows), _Counts()
    for layer in track(stream.layers(), "profile", stream.num_layers, progress):
        if layer.routed is not None:
            name = source.family.experts_path(layer.index)
            counted.add(name, layer.num_experts, layer.routed.ids, layer.routed.weights)
    profile = counted.finish(int(windows.size))
    if not profile.counts:
        raise CheckpointError("the model has no routed experts to profile")
    return profile


class _Counts:
    """Sums over batches."""

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray] = {}
        self._mass: dict[str, np.ndarray] = {}
        self._pairs: dict[str, np.ndarray] = {}

    def add(self, layer: str, num_experts: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """ids int64 [tokens, top k], weights [tokens, top k]."""
        weights = weights.double().cpu()
        if not bool(torch.isfinite(weights).all()):
            raise CheckpointError(f"the router of {layer} gave NaN or infinite weights: the checkpoint is damaged")
        chosen = torch.zeros(len(ids), num_experts, dtype=torch.float64)
        chosen.scatter_(1, ids.cpu(), 1.0)
        flat = ids.reshape(-1).cpu()
        pairs = (chosen.T @ chosen).round().long().numpy()
        mass = torch.bincount(flat, weights=weights.reshape(-1), minlength=num_experts).numpy()
        if layer in self._counts:
            self._counts[layer] += np.diagonal(pairs)
            self._mass[layer] += mass
            self._pairs[layer] += pairs
        else:
            self._counts[layer], self._mass[layer], self._pairs[layer] = np.diagonal(pairs).copy(), mass, pairs

    def finish(self, tokens: int) -> ActivationProfile:
        """The profile of all that was added."""
        return ActivationProfile(tokens, self._counts, self._mass, self._pairs)
