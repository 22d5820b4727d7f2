# SPDX-License-Identifier: Apache-2.0
"""The fixed plan of a bare `--quantization mxmoe`: no calibration data, only the weights themselves.

In every MoE layer, and separately for its gate_up and its down blocks, the half of the experts that 3-bit rounding
hurts most (largest squared error) gets w4a16, the others w3a16, asymmetric, in groups of 128. Where 128 does not
divide K, groups are 64, then 32, then the whole row; where K is not a multiple of 8, the block stays in 16 bits.

With groups of 128 that is 3.5 bits of codes and 0.1875 of scales and zero points, 3.69 bits a weight. Every rank
ranks the experts and shards it holds. A plan made from activations and routing is better: `vllm-ext quantize`.
"""

from __future__ import annotations

import torch

from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.quantization.scheme import Scheme

HIGH_BITS = 4
LOW_BITS = 3

#: Tried in this order.
GROUP_SIZES = (128, 64, 32, -1)


def choose_group_size(K: int) -> int:
    """The first of `GROUP_SIZES` that divides K; -1 is the whole row."""
    return next(size for size in GROUP_SIZES if size == -1 or K % size == 0)


def choose_schemes(weights: torch.Tensor, name: str = "weight") -> list[Scheme]:
    """Schemes of one block of every expert of a layer.

    weights: float [experts, N, K]. Returns one scheme per expert. Of an odd number of experts the larger half
    gets the higher width; of equal errors the expert with the lower index does.
    name: what errors call the layer. Raises ValueError for NaN or infinite weights.
    """
    num_experts, _, K = weights.shape
    if K % 8:
        return [Scheme(16)] * num_experts
    group_size = choose_group_size(K)
    high, low = Scheme(HIGH_BITS, 16, group_size), Scheme(LOW_BITS, 16, group_size)
    errors = [measure_error(weight, low, f"{name}, expert {e}") for e, weight in enumerate(weights)]
    ranked = sorted(range(num_experts), key=lambda expert: (-errors[expert], expert))
    hurt_most = set(ranked[: (num_experts + 1) // 2])
    return [high if expert in hurt_most else low for expert in range(num_experts)]


def measure_error(weight: torch.Tensor, scheme: Scheme, name: str = "weight") -> float:
    """Sum of squared differences between `weight` [N, K] and its round-to-nearest version."""
    difference = dequantize(round_to_nearest(weight, scheme, name), scheme).sub_(weight)
    return float(difference.square_().sum(dtype=torch.float64))
