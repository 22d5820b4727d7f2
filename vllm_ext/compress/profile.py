# SPDX-License-Identifier: Apache-2.0
"""Which experts calibration tokens are routed to: counts and routing weight, per layer and expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ext.compress.families import Family
from vllm_ext.compress.progress import track
from vllm_ext.quantization.safetensors_io import CheckpointError

#: Windows of one forward pass.
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class ActivationProfile:
    """Routing of `tokens` calibration tokens.

    counts: int64 [experts] by layer path (`...mlp.experts`), tokens routed to each expert. mass: float64 [experts],
    sum of the routing weights of those tokens.
    """

    tokens: int
    counts: Mapping[str, np.ndarray]
    mass: Mapping[str, np.ndarray]

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
                layer: {"counts": self.counts[layer].tolist(), "mass": self.mass[layer].tolist()}
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
            return cls(int(value["tokens"]), counts, mass)
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
    counts: dict[str, np.ndarray] = {}
    mass: dict[str, np.ndarray] = {}

    def record(layer: str, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        ids, weights = family.read_routing(output)
        flat, values = ids.reshape(-1).cpu(), weights.reshape(-1).double().cpu()
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"the router of {layer} gave NaN or infinite weights: the checkpoint is damaged")
        counts[layer] += torch.bincount(flat, minlength=len(counts[layer])).numpy()
        mass[layer] += torch.bincount(flat, weights=values, minlength=len(mass[layer])).numpy()

    handles = []
    for layer, router in routers.items():
        num_experts = int(next(router.parameters()).shape[0])
        counts[layer], mass[layer] = np.zeros(num_experts, np.int64), np.zeros(num_experts)
        handles.append(router.register_forward_hook(partial(record, layer)))
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
    return ActivationProfile(int(windows.size), counts, mass)
