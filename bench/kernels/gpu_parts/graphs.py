# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of both ops: captured once, replayed with other tokens and other experts, equal to the bit.

Also without a graph: the same call many times, for a result that changes is a race; and what a table that was never
seen does in a capture, which must be an error and not a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.kernels.gpu_parts.common import Context, Result, uniform
from bench.records import Metric
from vllm_ext.kernels.arena import BlockFormat
from vllm_ext.kernels.gpu.samples import Moe, Routing, make_format, make_moe, make_routing
from vllm_ext.kernels.gpu.trials import LinearTrial
from vllm_ext.kernels.mixed_linear import triton as linear_triton
from vllm_ext.kernels.mixed_moe import triton as moe_triton

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 256
TOKENS = (1, 16, 200, 3000)
REPLAYS, RUNS = 5, 20

LAYERS = {
    "w4a16": uniform(4, 16),
    "w4a8": uniform(4, 8),
    "mixed": [
        (make_format(2), make_format(8, 8)),
        (make_format(4, 8, 64), make_format(16)),
        (make_format(3, 16, 32), make_format(6)),
    ],
}


def run(context: Context) -> Result:
    """All layers and numbers of tokens; a dry run only repeats calls."""
    result = Result("graphs", "mismatches", limit=0.5)
    for name, pairs in LAYERS.items():
        for num_tokens in TOKENS[:1] if context.is_dry_run else TOKENS:
            if not context.has_time():
                result.left_out.append(f"{name} {num_tokens}")
                continue
            _try(result, f"{name}_{num_tokens}", "repeat", partial(_repeat, context, pairs, num_tokens))
            for arm, check in {"replay": _replay, "refusal": _refuse}.items():
                if context.is_dry_run:
                    result.needs_cuda.append(f"{name} {arm}")
                else:
                    _try(result, f"{name}_{num_tokens}", arm, partial(check, context, pairs, num_tokens))
    if context.is_dry_run:
        result.needs_cuda.append("linear replay")
    else:
        _try(result, "linear_16", "replay", lambda: _replay_linear(context))
    return result


def _try(result: Result, case: str, arm: str, check: Callable[[], int]) -> None:
    try:
        wrong = check()
    except Exception as error:  # noqa: BLE001 - a failed capture is a finding
        result.add(case, arm, {}, error=f"{type(error).__name__}: {error}")
        return
    metrics = {"mismatches": Metric(wrong, "results", "lower")}
    result.add(case, arm, metrics, error=f"{wrong} results differ" if wrong else None)


def _make(context: Context, pairs: list[tuple[BlockFormat, BlockFormat]], num_tokens: int) -> tuple[Moe, Routing]:
    formats = [pairs[expert % len(pairs)] for expert in range(EXPERTS)]
    layer = make_moe(formats, HIDDEN, INTERMEDIATE, context.device)
    routing = make_routing(num_tokens, HIDDEN, TOP_K, EXPERTS, torch.bfloat16, context.device)
    return layer, routing


def _repeat(context: Context, pairs: list[tuple[BlockFormat, BlockFormat]], num_tokens: int) -> int:
    layer, (x, ids, weights) = _make(context, pairs, num_tokens)
    rest = (layer.arena, layer.table, None, INTERMEDIATE, "silu", False)
    first = moe_triton.mixed_moe(x, ids, weights, *rest)
    assert first is not None
    runs = 1 if context.is_dry_run else RUNS
    return sum(not torch.equal(first, _result(moe_triton.mixed_moe(x, ids, weights, *rest))) for _ in range(runs))


def _replay(context: Context, pairs: list[tuple[BlockFormat, BlockFormat]], num_tokens: int) -> int:
    layer, (x, ids, weights) = _make(context, pairs, num_tokens)
    rest = (layer.arena, layer.table, None, INTERMEDIATE, "silu", False)
    moe_triton.warm_up(layer.arena, layer.table, HIDDEN, INTERMEDIATE, TOP_K, num_tokens, x.dtype)
    moe_triton.mixed_moe(x, ids, weights, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _result(moe_triton.mixed_moe(x, ids, weights, *rest))
    wrong = 0
    for seed in range(1, REPLAYS + 1):
        routing = make_routing(num_tokens, HIDDEN, TOP_K, EXPERTS, torch.bfloat16, context.device, seed)
        for target, source in zip((x, ids, weights), routing, strict=True):
            target.copy_(source)
        if seed == REPLAYS:
            # No token has an expert: as in the padding of a captured batch.
            ids.fill_(-1)
        graph.replay()
        replayed = out.clone()
        wrong += not torch.equal(replayed, _result(moe_triton.mixed_moe(x, ids, weights, *rest)))
    return wrong


def _refuse(context: Context, pairs: list[tuple[BlockFormat, BlockFormat]], num_tokens: int) -> int:
    """1 where an unknown table in a capture is no RuntimeError."""
    layer, (x, ids, weights) = _make(context, pairs, num_tokens)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            moe_triton.mixed_moe(x, ids, weights, layer.arena, layer.table, None, INTERMEDIATE, "silu", False)
    except RuntimeError as error:
        return int("for the first time" not in str(error))
    return 1


def _replay_linear(context: Context) -> int:
    trial = LinearTrial(make_format(4), 512, 384, 16, torch.bfloat16, context.device, 0)
    linear_triton.warm_up(trial.layer.arena, trial.layer.table, 512, 384, 16, torch.bfloat16)
    trial.run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trial.run(0)
    wrong = 0
    for _ in range(REPLAYS):
        trial.x.normal_()
        graph.replay()
        wrong += not torch.equal(out.clone(), trial.run(0))
    return wrong


def _result(out: torch.Tensor | None) -> torch.Tensor:
    assert out is not None
    return out
