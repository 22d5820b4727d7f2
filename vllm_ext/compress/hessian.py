# SPDX-License-Identifier: Apache-2.0
"""Second moments of the inputs of experts: what GPTQ measures errors with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Below this many tokens per input, an expert's own statistics are mixed with those of the layer's other tokens.
MIN_TOKENS_PER_INPUT = 2

#: Rows of one product.
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Moments:
    """Weighted means over tokens, [K, K].

    hessian: of x x^T. drift: of (x~ - x) x^T, x~ being the input on the unquantized path; None where there is one path.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None = None

    def mix(self, other: Moments, share: float) -> Moments:
        """share of this and 1 - share of the other."""
        drift = None
        if self.drift is not None and other.drift is not None:
            drift = torch.lerp(other.drift, self.drift, share)
        return Moments(torch.lerp(other.hessian, self.hessian, share), drift)


def minimum_tokens(K: int) -> int:
    """Tokens that an expert's statistics need to stand alone, for K inputs."""
    return MIN_TOKENS_PER_INPUT * K


def measure_moments(
    inputs: torch.Tensor,
    weights: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "a linear",
) -> Moments:
    """Moments of inputs [tokens, K] under weights [tokens] >= 0 (None: all 1); zero where there is no token.

    reference: the same tokens on the unquantized path, [tokens, K]; None: no drift. dtype: of the sums, float32 or
    float64. name: of what takes the inputs, for the error. Raises ValueError for NaN or infinite inputs.
    Source: GPTQ (arXiv:2210.17323, H = 2 X X^T, of which we keep the mean), GPTAQ (arXiv:2504.02692) for the drift.
    """
    tokens, K = inputs.shape
    hessian = torch.zeros(K, K, dtype=dtype, device=inputs.device)
    drift = None if reference is None else torch.zeros_like(hessian)
    total = 0.0
    for start in range(0, tokens, _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        chunk = inputs[rows].to(dtype)
        weighted = chunk if weights is None else chunk * weights[rows, None].to(dtype)
        total += float(len(chunk) if weights is None else weights[rows].double().sum())
        hessian.addmm_(weighted.T, chunk)
        if drift is not None and reference is not None:
            drift.addmm_((reference[rows].to(dtype) - chunk).T, weighted)
    if total > 0:
        hessian /= total
        if drift is not None:
            drift /= total
    if not bool(torch.isfinite(hessian).all()) or (drift is not None and not bool(torch.isfinite(drift).all())):
        raise ValueError(
            f"calibration gives {name} NaN or infinite inputs: a weight before it is damaged; copy the checkpoint again"
        )
    return Moments(hessian, drift)


def weigh_tokens(routing: torch.Tensor, power: float) -> torch.Tensor:
    """How much each routed token counts, [tokens]: its routing weight to a power.

    2 is the share of an expert's error in the squared error of the layer's output; 1 is MoEQuant's affinity-guided
    weight (arXiv:2505.03804); 0 counts tokens.
    """
    return routing.float().clamp_min(0.0) ** power


def spread_rows(total: int, wanted: int, device: torch.device) -> torch.Tensor:
    """At most `wanted` of `total` row indices, evenly spread, int64."""
    count = min(total, wanted)
    return (torch.arange(count, device=device, dtype=torch.int64) * total) // max(count, 1)
