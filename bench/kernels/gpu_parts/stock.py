# SPDX-License-Identifier: Apache-2.0
"""`mixed_moe` beside vLLM's own MoE kernels on the same routing, weights cold, arms in turn.

    bf16       vLLM's Triton kernel `fused_experts`, with the configuration that it finds for this GPU
    int8_w8a8, fp8_w8a8   the same kernel on 8-bit weights and activations, scales by output channel and by token
    marlin_w4  `fused_marlin_moe` on 4-bit codes in groups of 128, symmetric (needs a vLLM with its Marlin kernels)
    marlin_w8  the same on 8-bit codes
    humming_w3, _w4, _w8   vLLM's Humming kernels (`HummingIndexedExperts`), symmetric codes in groups of 128
    w4a16 ...  ours, one width in all experts
    mixed      ours: 2, 3 and 4 bits by turns, 3 code bits on average: humming_w3 has as many in all experts

Times are those of CUDA graphs. Weights are random: this is speed only; at equal bits the arms compute layers of equal
size, not the same numbers. Humming compiles its kernels where it runs, with NVRTC or nvcc; its arms say what of it is
missing: the package, one that it imports, or its compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.kernels.gpu_parts.common import Context, Result, Shape, count_traffic, make_trial, time_arms, uniform
from bench.records import Metric
from vllm_ext.kernels.gpu.samples import make_format, make_routing
from vllm_ext.kernels.gpu.trials import COLD_BYTES

TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
OURS = {
    "w4a16": uniform(4, 16),
    "w8a16": uniform(8, 16),
    "w4a8": uniform(4, 8),
    "w8a8": uniform(8, 8),
    "mixed": [(make_format(bits), make_format(bits)) for bits in (2, 3, 4)],
}
GROUP_SIZE = 128

#: The first GPUs whose tensor core multiplies e4m3.
FP8_CAPABILITY = (8, 9)

#: Widths of Humming's arms; the first has as many bits as `mixed` has on average.
HUMMING_WIDTHS = (3, 4, 8)

Arm = tuple[Callable[[int], object], int]


def run(context: Context) -> Result:
    """All numbers of tokens; in a dry run ours alone, at one."""
    result = Result("stock", "latency")
    for num_tokens in TOKENS:
        case = f"moe_{num_tokens}"
        if context.is_dry_run and num_tokens > 1:
            result.needs_cuda.append(case)
        elif not context.has_time():
            result.left_out.append(case)
        else:
            _compare(context, result, case, num_tokens)
    return result


def _compare(context: Context, result: Result, case: str, num_tokens: int) -> None:
    arms: dict[str, Arm] = {}
    makers: dict[str, Callable[[], Arm]] = {
        "bf16": partial(_make_bf16, context, num_tokens),
        "int8_w8a8": partial(make_w8a8, context, num_tokens, torch.int8),
        "fp8_w8a8": partial(make_w8a8, context, num_tokens, torch.float8_e4m3fn),
        "marlin_w4": partial(_make_marlin, context, num_tokens, 4),
        "marlin_w8": partial(_make_marlin, context, num_tokens, 8),
        **{f"humming_w{bits}": partial(_make_humming, context, num_tokens, bits) for bits in HUMMING_WIDTHS},
    }
    if not context.is_dry_run and torch.cuda.get_device_capability(context.device) < FP8_CAPABILITY:
        del makers["fp8_w8a8"]
    for name, make in makers.items():
        if context.is_dry_run:
            result.needs_cuda.append(f"{case} {name}")
            continue
        # Its compiler may take long.
        if name.startswith("humming") and not context.has_time():
            result.left_out.append(f"{case} {name}")
            continue
        try:
            arms[name] = make()
        except Exception as error:  # noqa: BLE001 - other people's kernels are missing for many reasons
            result.add(case, name, {}, error=f"{type(error).__name__}: {error}")
    describe: dict[str, Callable[[float], dict[str, Metric]]] = {}
    for name, pairs in OURS.items():
        if context.is_dry_run and name != "mixed":
            result.needs_cuda.append(f"{case} {name}")
            continue
        trial = make_trial(context, pairs, num_tokens)
        arms[name] = (trial.run, trial.copies)
        describe[name] = partial(_describe, *count_traffic(trial))
    settings = {"tokens": num_tokens, "shape": list(context.shape), "group_size": GROUP_SIZE}
    time_arms(context, result, case, arms, describe, settings)
    if context.device.type == "cuda":
        torch.cuda.empty_cache()


def _describe(num_bytes: float, operations: float, seconds: float) -> dict[str, Metric]:
    return {
        "bandwidth": Metric(num_bytes / seconds / 1e9, "GB/s", "higher"),
        "rate": Metric(operations / seconds / 1e12, "TFLOP/s", "higher"),
    }


def _count_copies(num_bytes: int, shape: Shape, num_tokens: int) -> int:
    """As for ours (trials.py): experts that no token reaches are as good as copies."""
    touched = min(1.0, num_tokens * shape.top_k / shape.experts)
    return min(64, math.ceil(COLD_BYTES / (num_bytes * touched)))


def _route(context: Context, num_tokens: int, copies: int) -> list[Any]:
    experts, top_k, hidden, _ = context.shape
    return [
        make_routing(num_tokens, hidden, top_k, experts, torch.bfloat16, context.device, seed) for seed in range(copies)
    ]


def _make_bf16(context: Context, num_tokens: int) -> Arm:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    experts, _, hidden, intermediate = context.shape
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": context.device}
    first = torch.randn(experts, 2 * intermediate, hidden, **options) / hidden**0.5
    second = torch.randn(experts, hidden, intermediate, **options) / intermediate**0.5
    copies = _count_copies(first.nbytes + second.nbytes, context.shape, num_tokens)
    weights = [(first.clone(), second.clone()) for _ in range(copies)]
    routings = _route(context, num_tokens, copies)

    def run(index: int) -> torch.Tensor:
        x, ids, routing = routings[index % copies]
        out: torch.Tensor = fused_experts(x, *weights[index % copies], routing, ids)
        return out

    return run, copies


def make_w8a8(context: Context, num_tokens: int, dtype: torch.dtype) -> Arm:
    """vLLM's uniform W8A8, int8 or e4m3, as it runs a compressed-tensors checkpoint (`make_int8_moe_quant_config`,
    `fp8_w8a8_moe_quant_config`): scales by output channel, activations rounded by token inside the call.

    Returns the call by number of its copy of the weights, and how many copies there are.
    """
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config, int8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    experts, _, hidden, intermediate = context.shape
    packed, scales = [], []
    for N, K in ((2 * intermediate, hidden), (hidden, intermediate)):
        codes = torch.randint(-127, 128, (experts, N, K), dtype=torch.int8, device=context.device)
        packed.append(codes if dtype == torch.int8 else codes.to(dtype))
        scales.append(torch.rand(experts, N, 1, device=context.device) / 127 / K**0.5)
    if dtype == torch.int8:
        quant_config = int8_w8a8_moe_quant_config(*scales, None, None, per_act_token_quant=True)
    else:
        quant_config = fp8_w8a8_moe_quant_config(*scales, per_act_token_quant=True, per_out_ch_quant=True)
    copies = _count_copies(sum(one.nbytes for one in packed), context.shape, num_tokens)
    weights = [[one.clone() for one in packed] for _ in range(copies)]
    routings = _route(context, num_tokens, copies)

    def run(index: int) -> torch.Tensor:
        x, ids, routing = routings[index % copies]
        out: torch.Tensor = fused_experts(x, *weights[index % copies], routing, ids, quant_config=quant_config)
        return out

    return run, copies


def _make_marlin(context: Context, num_tokens: int, bits: int) -> Arm:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales
    from vllm.scalar_type import scalar_types

    experts, _, hidden, intermediate = context.shape
    packed: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    for K, N in ((hidden, 2 * intermediate), (intermediate, hidden)):
        # GPTQ's order: 32 bits of codes along K.
        shape = (experts, K * bits // 32, N)
        codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=context.device)
        packed.append(ops.gptq_marlin_moe_repack(codes, K, N, bits))
        step = torch.rand(experts, K // GROUP_SIZE, N, device=context.device).mul_(0.02).bfloat16()
        scales.append(marlin_moe_permute_scales(step, K, N, GROUP_SIZE))
    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    copies = _count_copies(sum(one.nbytes for one in (*packed, *scales)), context.shape, num_tokens)
    weights = [[one.clone() for one in packed] for _ in range(copies)]
    routings = _route(context, num_tokens, copies)

    def run(index: int) -> torch.Tensor:
        x, ids, routing = routings[index % copies]
        first, second = weights[index % copies]
        out: torch.Tensor = fused_marlin_moe(x, first, second, None, None, *scales, routing, ids, kind.id)
        return out

    return run, copies


def _make_humming(context: Context, num_tokens: int, bits: int) -> Arm:
    """As vLLM builds it for a GPTQ checkpoint
    (`model_executor.layers.quantization.utils.humming.moe`), without a model around it."""
    check_humming()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.fused_humming_moe import HummingIndexedExperts
    from vllm.model_executor.layers.quantization.utils import humming
    from vllm.v1.worker import workspace

    experts, top_k, hidden, intermediate = context.shape
    layer: Any = torch.nn.Module()
    layer.params_dtype, layer.layer_name = torch.bfloat16, "experts"
    layer.moe_config = FusedMoEConfig(
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_logical_experts=experts,
        activation=MoEActivation.SILU,
        device=context.device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    for prefix, K, N in (("w13", hidden, 2 * intermediate), ("w2", intermediate, hidden)):
        # GPTQ's order: 32 bits of codes along K.
        shape = (experts, K * bits // 32, N)
        codes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=context.device)
        scales = torch.rand(experts, K // GROUP_SIZE, N, device=context.device).mul_(0.02).bfloat16()
        for name, tensor in (("qweight", codes), ("scales", scales)):
            layer.register_parameter(f"{prefix}_{name}", torch.nn.Parameter(tensor, requires_grad=False))
    checkpoint = {"quant_method": "gptq", "bits": bits, "group_size": GROUP_SIZE, "desc_act": False, "sym": True}
    config = VllmConfig()
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(context.device)
    with set_current_vllm_config(config):
        humming.convert_to_humming_moe_kernel_format(layer, quant_config=checkpoint)
        quant_config = humming.get_humming_moe_quant_config(layer)
        kernel = humming.make_humming_moe_kernel(quant_config, layer.moe_config, HummingIndexedExperts)
    packed = (layer.w13_weight.data, layer.w2_weight.data)
    copies = _count_copies(sum(one.nbytes for one in packed), context.shape, num_tokens)
    weights = [tuple(one.clone() for one in packed) for _ in range(copies)]
    routings = _route(context, num_tokens, copies)

    def run(index: int) -> torch.Tensor:
        x, ids, routing = routings[index % copies]
        rest = (MoEActivation.SILU, experts, None, False)
        with set_forward_context(None, config, num_tokens=num_tokens):
            out: torch.Tensor = kernel.apply(x, *weights[index % copies], routing, ids, *rest)
        return out

    try:
        run(0)
    except Exception as error:
        raise RuntimeError(
            f"humming imports, and compiling or running fails: {type(error).__name__}: {error}"
        ) from error
    return run, copies


def check_humming() -> None:
    """Raise ImportError that says what of Humming is missing: its package, or something that it imports."""
    if importlib.util.find_spec("humming") is None:
        raise ModuleNotFoundError("the package humming is not installed: its distribution is humming-kernels")
    try:
        for name in ("humming", "humming.forward", "humming.transform", "humming.tune", "humming.schema"):
            importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(f"humming is installed and does not import: {type(error).__name__}: {error}") from error
