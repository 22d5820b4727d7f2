# SPDX-License-Identifier: Apache-2.0
"""How far a fast path may be from its reference, in one place, with the reason for each number.

The measure is `relative_error`: the Frobenius norm of the difference over that of the expected tensor. A single
output can cancel to nearly zero, so an element's own relative error says nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gpu.configurations import SCALE_WEIGHTS


class Tolerance(NamedTuple):
    """Largest accepted `relative_error`, and why it is not smaller."""

    relative: float
    reason: str


#: Keys: (dtype of x, activation bits). They hold for the tests' layers, K from 8 to 192: a single flipped int8 code
#: weighs most where K is small.
MIXED_MOE: dict[tuple[torch.dtype, int], Tolerance] = {
    (torch.float32, 16): Tolerance(
        1e-5, "the same float32 products summed in another order: 2**-24 times the root of K, with room"
    ),
    (torch.float16, 16): Tolerance(1e-3, "only the output is rounded to 11 bits: half a unit is 2**-12"),
    (torch.bfloat16, 16): Tolerance(
        2e-2, "weights, gate and up, the intermediate and the output are rounded to 8 bits, 2**-9 each; median 5e-3"
    ),
    (torch.float32, 8): Tolerance(
        1e-2, "a last-bit difference before int8 rounding can flip a code of the intermediate: 1/127 of its largest"
    ),
    (torch.float16, 8): Tolerance(1e-2, "as in float32; rounding the output to 11 bits adds little"),
    (torch.bfloat16, 8): Tolerance(1e-2, "as in float32; rounding the output to 8 bits adds 2**-9"),
}

#: The reference in float32 against the same formula in float64; keys: activation bits.
MIXED_MOE_REFERENCE: dict[int, Tolerance] = {
    16: Tolerance(1e-5, "float32 against float64: 2**-24 times the root of K, with room"),
    8: Tolerance(1e-2, "a last-bit difference before int8 rounding can flip a code: 1/127 of its group's largest"),
}


#: Keys: (dtype of x, activation bits), as above; one GEMM instead of two and no rounding in between.
MIXED_LINEAR: dict[tuple[torch.dtype, int], Tolerance] = {
    (torch.float32, 16): Tolerance(1e-5, "the same float32 products summed in another order"),
    (torch.float16, 16): Tolerance(1e-3, "only the output is rounded to 11 bits: half a unit is 2**-12"),
    (torch.bfloat16, 16): Tolerance(1e-2, "weights and output are rounded to 8 bits, 2**-9 each"),
    (torch.float32, 8): Tolerance(1e-5, "both paths round the same float32 inputs to the same int8 codes"),
    (torch.float16, 8): Tolerance(1e-3, "the same int8 codes; only the output is rounded to 11 bits"),
    # Other row blocks of the same layer may have 16-bit activations, whose GEMM is in bf16.
    (torch.bfloat16, 8): Tolerance(1e-2, "the same int8 codes; the output, and weights beside, are rounded to 8 bits"),
}

#: The reference in float32 against the same formula in float64; keys: activation bits.
MIXED_LINEAR_REFERENCE = MIXED_MOE_REFERENCE


#: The compiled CPU kernels on bf16 and fp16 against the reference in float32; keys: activation bits. For layers with
#: at least FEW_OUTPUTS outputs in all: rounding to bf16 costs 2**-8 at most and half of that on average, so a handful
#: of outputs can be off by twice as much.
NATIVE_MOE: dict[int, Tolerance] = {
    16: Tolerance(2e-3, "the output is rounded to 8 bits; two int8 planes add 2**-15 of a group's largest value"),
    8: Tolerance(1.8e-2, "a last-bit difference before int8 rounding can flip a code of the intermediate, 1/127"),
}

#: One linear layer: no rounding in between.
NATIVE_LINEAR: dict[int, Tolerance] = {
    16: NATIVE_MOE[16],
    8: Tolerance(2e-3, "both round the same inputs to the same int8 codes; only the output is rounded to 8 bits"),
}

#: Random layers down to 8 columns and one token, some blocks in bf16. Layers of codes alone, with 64 columns and more,
#: are held to NATIVE_MOE times FUZZ_ROOM.
NATIVE_FUZZ: dict[int, Tolerance] = {
    16: Tolerance(2e-2, "as MIXED_MOE in bf16: blocks kept in bf16 round their inputs to 8 bits"),
    8: Tolerance(6e-2, "one flipped code of an intermediate of 8 columns, beside bf16 blocks"),
}

#: Among ten thousand small layers, one has roundings that exceed the limit of the others by a twentieth.
FUZZ_ROOM = 1.25

#: The Triton kernels on bf16 and fp16 against the reference in float32, for layers with at least FEW_OUTPUTS outputs;
#: keys: (dtype of x, activation bits). Scales applied to products: configurations.SCALE_PRODUCTS and CORRECT_SUMS.
GPU_LINEAR: dict[tuple[torch.dtype, int], Tolerance] = {
    (torch.bfloat16, 16): Tolerance(2.5e-3, "only the output is rounded to 8 bits: 1.6e-3 on average"),
    (torch.float16, 16): Tolerance(4e-4, "only the output is rounded to 11 bits: 2e-4 on average"),
    (torch.bfloat16, 8): Tolerance(2.5e-3, "the same int8 codes as the reference; the output is rounded to 8 bits"),
    (torch.float16, 8): Tolerance(4e-4, "the same int8 codes as the reference; the output is rounded to 11 bits"),
}

#: As GPU_LINEAR, where 16-bit activations are multiplied by weights in x's type: configurations.SCALE_WEIGHTS.
GPU_LINEAR_ROUNDED: dict[torch.dtype, Tolerance] = {
    torch.bfloat16: Tolerance(4e-3, "a group's scale, then each weight, then the output are rounded to 8 bits"),
    torch.float16: Tolerance(6e-4, "each weight and the output are rounded to 11 bits"),
}

#: As GPU_LINEAR, for a MoE layer.
GPU_MOE: dict[tuple[torch.dtype, int], Tolerance] = {
    (torch.bfloat16, 16): Tolerance(4.5e-3, "as one linear layer, and the intermediate is rounded to 8 bits"),
    (torch.float16, 16): Tolerance(7e-4, "as one linear layer, and the intermediate is rounded to 11 bits"),
    (torch.bfloat16, 8): Tolerance(
        2e-2,
        "the intermediate is rounded to 8 bits before int8 rounding, which flips codes: 1/127 of a group's largest",
    ),
    (torch.float16, 8): Tolerance(1e-2, "as in bf16, with an eighth of the rounding before"),
}

#: As GPU_LINEAR_ROUNDED, for a MoE layer. A layer that has 8-bit activations, too, is held to GPU_MOE's for these.
GPU_MOE_ROUNDED: dict[torch.dtype, Tolerance] = {
    torch.bfloat16: Tolerance(8e-3, "scales, weights, the intermediate and experts' results are rounded to 8 bits"),
    torch.float16: Tolerance(1.2e-3, "weights, the intermediate and experts' results are rounded to 11 bits"),
}


def choose_gpu_moe(dtype: torch.dtype, act_bits: int, scaling: int) -> Tolerance:
    """The tolerance of a MoE layer by the Triton kernels. act_bits: the fewest of its blocks; scaling: of its tiles
    (gpu/configurations.py)."""
    rounds_weights = act_bits == 16 and scaling == SCALE_WEIGHTS
    return GPU_MOE_ROUNDED[dtype] if rounds_weights else GPU_MOE[dtype, act_bits]


def choose_gpu_linear(dtype: torch.dtype, act_bits: int, scaling: int) -> Tolerance:
    """As `choose_gpu_moe`, of a linear layer."""
    rounds_weights = act_bits == 16 and scaling == SCALE_WEIGHTS
    return GPU_LINEAR_ROUNDED[dtype] if rounds_weights else GPU_LINEAR[dtype, act_bits]


#: Outputs below which the tolerances of the compiled kernels are doubled.
FEW_OUTPUTS = 512


def find_limit(tolerance: Tolerance, num_outputs: int) -> float:
    """The largest accepted `relative_error` of a compiled kernel's result with this many elements."""
    return tolerance.relative * (1 if num_outputs >= FEW_OUTPUTS else 2)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of (actual - expected) over that of expected; where that is zero, the norm of actual."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    norm = torch.linalg.vector_norm(expected.double())
    return float(difference / norm if norm > 0 else difference)
