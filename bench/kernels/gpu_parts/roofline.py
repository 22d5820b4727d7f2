# SPDX-License-Identifier: Apache-2.0
"""`mixed_moe` against what this GPU can do: bytes at the speed of a copy, operations at that of a large bf16 product.

A call can take no less than the longer of the two. Few tokens are bound by bytes, many by operations; which bound holds
is in the settings. Widths of 2 and 3 bits are bound by instructions instead, see docs/gpu-kernels.md.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.kernels.gpu_parts.common import Context, Result, count_traffic, make_trial, time_arms, uniform
from bench.records import Metric
from vllm_ext.kernels.gpu.trials import Timer

TOKENS = (1, 2, 4, 8, 16, 512, 2048, 8192)
WIDTHS = ((2, 16), (3, 16), (4, 16), (6, 16), (8, 16), (16, 16), (4, 8), (8, 8))

#: Bytes of the copy (read and written), and the size of the product.
COPY_BYTES, PRODUCT_SIZE = 4 << 30, 8192


def run(context: Context) -> Result:
    """The ceilings, then every width and number of tokens."""
    result = Result("roofline", "share", limit=0.8)
    bandwidth, rate = _measure_ceilings(context, result)
    for num_tokens in TOKENS:
        for bits, act_bits in WIDTHS:
            case, arm = f"tokens_{num_tokens}", f"w{bits}a{act_bits}"
            if context.is_dry_run and (num_tokens, bits, act_bits) not in ((1, 4, 16), (1, 16, 16)):
                result.needs_cuda.append(f"{case} {arm}")
            elif not context.has_time():
                result.left_out.append(f"{case} {arm}")
            else:
                trial = make_trial(context, uniform(bits, act_bits), num_tokens)
                num_bytes, operations = count_traffic(trial)
                # int8 products have twice the rate of bf16 ones.
                bounds = (num_bytes / bandwidth, operations / (rate * (2 if act_bits == 8 else 1)))
                settings = {
                    "tokens": num_tokens,
                    "bytes": round(num_bytes),
                    "operations": round(operations),
                    "bound": "bytes" if bounds[0] >= bounds[1] else "operations",
                    "shape": list(context.shape),
                }
                describe = {arm: partial(_describe, max(bounds))}
                time_arms(context, result, case, {arm: (trial.run, trial.copies)}, describe, settings)
                del trial
    return result


def _describe(bound: float, seconds: float) -> dict[str, Metric]:
    return {"share": Metric(bound / seconds, "of the roofline", "higher"), "bound": Metric(bound * 1e6, "us")}


def _measure_ceilings(context: Context, result: Result) -> tuple[float, float]:
    """(bytes per second, operations per second). Random data: zeros draw less power and run faster."""
    num_bytes, size = (1 << 20, 64) if context.is_dry_run else (COPY_BYTES, PRODUCT_SIZE)
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    best = []
    for name, call in (
        ("copy", lambda index: target.copy_(source)),
        ("product", lambda index: torch.matmul(a, b, out=out)),
    ):
        timer = Timer(call, 1, context.device, calls=4)
        seconds = sorted(timer.measure() for _ in range(9))[4]
        best.append((num_bytes if name == "copy" else 2 * size**3) / seconds)
        unit, scale = ("GB/s", 1e9) if name == "copy" else ("TFLOP/s", 1e12)
        result.add("ceilings", name, {"rate": Metric(best[-1] / scale, unit, "higher")})
    return best[0], best[1]
