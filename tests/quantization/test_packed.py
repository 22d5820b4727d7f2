# SPDX-License-Identifier: Apache-2.0
"""Packed experts through vLLM's `RoutedExperts.load_weights`; ranks are played one by one."""

import gc
import itertools
import re
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import MoEActivation, RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.reload import layerwise

from tests.quantization.packed_models import pack_weight
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.kernels import tolerances
from vllm_ext.quantization.config import MxMoEConfig
from vllm_ext.quantization.online import MxMoEOnlineMethod
from vllm_ext.quantization.packed import MxMoEPackedMethod
from vllm_ext.quantization.plan import ExpertSchemes, Plan
from vllm_ext.quantization.scheme import Scheme

LAYER = "model.layers.0.mlp.experts"
EXPERTS, HIDDEN, INTERMEDIATE = 4, 128, 256
PAIRS = [
    ("w3a16_g32", "w4a16_g128"),
    ("w16a16", "w6a16_g64_sym"),
    ("w2a16_g64", "w16a16"),
    ("w5a16_g-1", "w8a16_g-1_sym"),
]
TERNARY_PAIRS = [("w1.6a16_g32_sym", "w1.6a16_g64_sym"), ("w1.6a8_g-1_sym", "w2a16_g64")]

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    with set_current_vllm_config(config):
        yield config


def make_plan(pairs: list[tuple[str, str]] = PAIRS) -> Plan:
    return Plan.parse({f"{LAYER}.{e}": {"gate_up": a, "down": b} for e, (a, b) in enumerate(pairs)})


def make_layer(
    plan: Plan,
    is_packed: bool = True,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    placement: str = "linear",
    intermediate: int = INTERMEDIATE,
    dtype: torch.dtype = torch.float32,
) -> RoutedExperts:
    """vLLM's layer on one rank; tp and ep are (rank, size)."""
    parallel = FusedMoEParallelConfig(
        tp_size=tp[1], pcp_size=1, dp_size=1, ep_size=ep[1], tp_rank=tp[0], pcp_rank=0, dp_rank=0, ep_rank=ep[0],
        sp_size=1, use_ep=ep[1] > 1, all2all_backend="allgather_reducescatter", enable_eplb=False,
    )  # fmt: skip
    experts = len([module for module in plan.modules if module.startswith(LAYER)])
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=2, global_num_experts=experts, num_redundant_experts=0,
        num_expert_group=2 if placement == "round_robin" else None, moe_parallel_config=parallel,
        placement_strategy=placement, enable_eplb=False,
    )  # fmt: skip
    moe = FusedMoEConfig(
        num_experts=experts, experts_per_token=2, hidden_dim=HIDDEN, intermediate_size=intermediate,
        num_local_experts=manager.local_num_experts, num_logical_experts=experts, activation=MoEActivation.SILU,
        device="cpu", routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, in_dtype=dtype,
    )  # fmt: skip
    return RoutedExperts(LAYER, dtype, moe, MxMoEConfig(plan, is_packed), manager)


def random_weights(intermediate: int = INTERMEDIATE, experts: int = EXPERTS) -> Weights:
    """Full weights by checkpoint name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (intermediate, HIDDEN), "up": (intermediate, HIDDEN), "down": (HIDDEN, intermediate)}
    return {
        f"{LAYER}.{expert}.{part}_proj": torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for expert in range(experts)
        for part, shape in shapes.items()
    }


def find_scheme(plan: Plan, name: str) -> Scheme:
    schemes = plan.modules[name.rpartition(".")[0]]
    assert isinstance(schemes, ExpertSchemes)
    return schemes.down if name.endswith("down_proj") else schemes.gate_up


def pack(plan: Plan, weights: Weights) -> Weights:
    """Checkpoint tensors, under the names that reach the layer (vLLM has taken its path off)."""
    packed = {}
    for name, weight in weights.items():
        scheme = find_scheme(plan, name)
        tensors = pack_weight(weight, scheme) if scheme.is_quantized else {"weight": weight}
        packed |= {f"{name}.{suffix}".removeprefix(f"{LAYER}."): tensor for suffix, tensor in tensors.items()}
    return packed


def load(layer: RoutedExperts, tensors: Weights) -> set[str]:
    return set(layer.load_weights(tensors.items()))


def finish(layer: RoutedExperts) -> RoutedExperts:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: RoutedExperts, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, routing, ids, None, None)


def run_plain(plan: Plan, weights: Weights, x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time, on rounded weights."""
    rounded = {}
    for name, weight in weights.items():
        scheme = find_scheme(plan, name)
        rounded[name] = dequantize(round_to_nearest(weight, scheme), scheme) if scheme.is_quantized else weight
    out = torch.zeros_like(x)
    for token, slot in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        gate, up, down = (rounded[f"{LAYER}.{int(ids[token, slot])}.{part}_proj"] for part in ("gate", "up", "down"))
        hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
        out[token] += routing[token, slot] * (down @ hidden)
    return out


def make_tokens(tokens: int = 7, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.rand(tokens, experts).topk(2).indices.to(torch.int32)
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, 2) + 0.1


def test_experts_of_different_widths_are_loaded_and_computed() -> None:
    plan, weights = make_plan(), random_weights()
    layer = make_layer(plan)
    method = layer.quant_method
    assert isinstance(method, MxMoEPackedMethod)
    loaded = load(layer, pack(plan, weights))
    assert loaded == {f"{prefix}_{s}" for prefix in ("w13", "w2") for s in ("qweight", "scales", "zeros", "weight")}
    finish(layer)
    tokens = make_tokens()
    assert tolerances.relative_error(run(layer, *tokens), run_plain(plan, weights, *tokens)) < 1e-5
    # Nothing beside the arena holds weights.
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) == layer.expert_arena.numel()
    assert method.storage is not None
    assert method.storage.unquantized_weights == 3 * HIDDEN * INTERMEDIATE
    assert method.storage.quantized_weights == 9 * HIDDEN * INTERMEDIATE
    arena, table = layer.expert_arena, layer.expert_table
    finish(layer)
    assert layer.expert_arena is arena
    assert layer.expert_table is table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_equals_online(dtype: torch.dtype) -> None:
    plan = make_plan([("w3a8_g32", "w4a8_g-1"), PAIRS[1], *TERNARY_PAIRS])
    weights = {name: weight.to(torch.bfloat16) for name, weight in random_weights().items()}
    packed = make_layer(plan, dtype=dtype)
    load(packed, pack(plan, weights))
    finish(packed)
    online = make_layer(plan, is_packed=False, dtype=dtype)
    assert isinstance(online.quant_method, MxMoEOnlineMethod)
    load(online, {f"{name.removeprefix(LAYER + '.')}.weight": weight for name, weight in weights.items()})
    # vLLM's layerwise processing has seen the layer complete and called the method.
    assert torch.equal(packed.expert_arena, online.expert_arena)
    assert torch.equal(packed.expert_table, online.expert_table)
    assert packed.quant_method.storage == online.quant_method.storage
    x, ids, routing = make_tokens()
    assert torch.equal(run(packed, x.to(dtype), ids, routing), run(online, x.to(dtype), ids, routing))


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel_parts_add_up(tp_size: int) -> None:
    plan = make_plan([("w3a16_g32", "w4a16_g64"), ("w16a16", "w6a16_g64_sym"), TERNARY_PAIRS[0], PAIRS[3]])
    weights, tokens = random_weights(), make_tokens()
    total = torch.zeros(7, HIDDEN)
    for rank in range(tp_size):
        layer = make_layer(plan, tp=(rank, tp_size))
        load(layer, pack(plan, weights))
        total += run(finish(layer), *tokens)
    assert tolerances.relative_error(total, run_plain(plan, weights, *tokens)) < 1e-5


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_parallel_ranks_take_their_own_experts(placement: str) -> None:
    plan, weights, tokens = make_plan(), random_weights(), make_tokens()
    total = torch.zeros(7, HIDDEN)
    for rank in range(2):
        layer = make_layer(plan, ep=(rank, 2), placement=placement)
        load(layer, pack(plan, weights))
        finish(layer)
        expected = [rank, rank + 2] if placement == "round_robin" else [2 * rank, 2 * rank + 1]
        assert layer.quant_method.local_experts == expected
        assert [tuple(map(str, pair)) for pair in layer.quant_method.schemes] == [PAIRS[e] for e in expected]
        total += run(layer, *tokens)
    assert tolerances.relative_error(total, run_plain(plan, weights, *tokens)) < 1e-5


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("pair", "intermediate", "tp_size", "message"),
    [
        (("w4a16_g128", "w4a16_g128"), 256, 4, "1, down: .* over 4 ranks gives each 64 of the K=256 .* size 128"),
        (("w4a16_g128", "w3a16_g-1"), 24, 2, "1, down: .* each 12 of the K=24 inputs, whose 3-bit codes"),
        (("w4a16_g128", "w4a16_g64"), 96, 1, "1, down: .* group size 64 does not divide K=96"),
        (("w4a16_g128", "w1.6a16_g-1_sym"), 192, 2, "1, down: .* each 96 of the K=192 inputs, whose 1.6-bit codes"),
        (("w4a16_g128", "w1.6a16_g-1_sym"), 96, 1, "1, down: K=96 ternary codes .* multiple of 64"),
    ],
)
def test_sizes_a_scheme_cannot_take(
    is_packed: bool, pair: tuple[str, str], intermediate: int, tp_size: int, message: str
) -> None:
    plan = make_plan([("w16a16", "w16a16"), pair])
    with pytest.raises(ValueError, match=rf"^{re.escape(LAYER)}\.{message}"):
        make_layer(plan, is_packed, tp=(0, tp_size), intermediate=intermediate)


def test_padded_sizes_are_refused() -> None:
    layer = make_layer(make_plan())
    layer.moe_config.hidden_dim = 192
    with pytest.raises(ValueError, match=rf"^{LAYER}: vLLM pads hidden_dim from 128 to 192"):
        layer.quant_method.create_weights(layer, EXPERTS, 192, INTERMEDIATE, torch.float32)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("0.gate_proj.qweight", "w3a16_g32"),
        ("2.up_proj.scales", "w2a16_g64"),
        ("3.gate_proj.zeros", "w5a16_g-1"),
        ("1.up_proj.weight", "w16a16"),
        ("1.down_proj.scales", "w6a16_g64_sym"),
    ],
)
def test_missing_tensors_are_named(name: str, scheme: str) -> None:
    plan = make_plan()
    tensors = pack(plan, random_weights())
    del tensors[name]
    layer = make_layer(plan)
    load(layer, tensors)
    with pytest.raises(ValueError, match=rf"^{LAYER}\.{name} is not in the checkpoint, .* gives this module {scheme}:"):
        finish(layer)


def test_a_layer_without_tensors_names_the_first() -> None:
    layer = make_layer(make_plan())
    with pytest.raises(
        ValueError, match=rf"^{LAYER}.0.gate_proj.qweight \(and \d+ more tensors of this layer\) is not"
    ):
        finish(layer)


def test_dummy_weights_miss_nothing(vllm_config: VllmConfig) -> None:
    vllm_config.load_config.load_format = "dummy"
    layer = finish(make_layer(make_plan()))
    assert run(layer, *make_tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("0.gate_proj.qweight", lambda t: t[:-1], r"expected torch.uint8 \[256, 48\] .* found torch.uint8 \[255, 48\]"),
        ("0.gate_proj.scales", lambda t: t.float(), r"expected torch.float16 \[256, 4\] .* found torch.float32"),
        ("0.up_proj.zeros", lambda t: t.t(), r"found torch.uint8 \[4, 256\]"),
        ("2.down_proj.weight", lambda t: t[:, 1:], r"expected a float type \[128, 256\] .* found torch.float32"),
        ("1.gate_proj.weight", lambda t: t.to(torch.int32), r"found torch.int32 \[256, 128\]"),
        ("3.down_proj.scales", lambda t: t.index_fill(0, torch.tensor([5]), torch.nan), r"is nan at \[5, 0\]"),
    ],
)
def test_wrong_tensors_are_named(name: str, change: Any, found: str) -> None:
    plan = make_plan()
    tensors = pack(plan, random_weights())
    with pytest.raises(ValueError, match=rf"^{LAYER}\.{name}[: ].*{found}"):
        load(make_layer(plan), {name: change(tensors[name])})


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("1.down_proj.zeros", "w6a16_g64_sym, whose tensors are qweight, scales"), ("0.up_proj.weight", "w3a16_g32")],
)
def test_tensors_the_plan_does_not_know_are_named(name: str, tensors: str) -> None:
    layer = make_layer(make_plan())
    message = rf"^{LAYER}\.{name} is in the checkpoint, but the plan in config.json gives this module {tensors}"
    with pytest.raises(ValueError, match=message):
        load(layer, {name: torch.zeros(2, 2)})


def test_renamed_tensors_are_named_by_vllm() -> None:
    with pytest.raises(AttributeError, match=r"w13_qweights.*0.gate_proj.qweights"):
        load(make_layer(make_plan()), {"0.gate_proj.qweights": torch.zeros(2, 2)})


@pytest.mark.parametrize(("arrives", "missing"), [(True, "2.up_proj"), (False, "0.gate_proj")])
def test_an_incomplete_checkpoint_is_not_rounded(arrives: bool, missing: str) -> None:
    plan, weights = make_plan(), random_weights()
    tensors = {f"{name.removeprefix(LAYER + '.')}.weight": weight for name, weight in weights.items()}
    del tensors["2.up_proj.weight"]
    layer = make_layer(plan, is_packed=False)
    load(layer, tensors if arrives else {})
    # vLLM's own last step processes layers that are not complete, too, and those of which nothing came.
    with pytest.raises(ValueError, match=rf"^{LAYER}\.{missing}\.weight is not in the checkpoint"):
        layerwise.finalize_layerwise_processing(layer, SimpleNamespace(dtype=torch.float32))


def test_loaders_do_not_keep_the_layer_alive() -> None:
    plan = make_plan()
    layer = make_layer(plan)
    # vLLM keeps the parameters' attributes, our loaders among them, for as long as the process lives.
    layerwise.record_metadata_for_reloading(layer)
    load(layer, pack(plan, random_weights()))
    gone = weakref.ref(finish(layer))
    del layer
    gc.collect()
    assert gone() is None


def reload(layer: RoutedExperts, tensors: Weights) -> None:
    """What `llm.collective_rpc("reload_weights")` does with a layer."""
    layerwise.initialize_layerwise_reload(layer)
    load(layer, tensors)
    layerwise.finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))


def test_a_reload_fills_the_arena_in_place() -> None:
    plan, weights = make_plan(), random_weights()
    layer = make_layer(plan)
    layerwise.record_metadata_for_reloading(layer)
    load(layer, pack(plan, weights))
    finish(layer)
    address, table = layer.expert_arena.data_ptr(), layer.expert_table
    other = {name: 2 - weight.flip(0) for name, weight in weights.items()}
    reload(layer, pack(plan, other))
    # A compiled graph or a captured one holds the address.
    assert layer.expert_arena.data_ptr() == address
    assert layer.expert_table is table
    tokens = make_tokens()
    assert tolerances.relative_error(run(layer, *tokens), run_plain(plan, other, *tokens)) < 1e-5


def test_an_incomplete_reload_names_the_tensor() -> None:
    plan, weights = make_plan(), random_weights()
    layer = make_layer(plan)
    layerwise.record_metadata_for_reloading(layer)
    load(layer, pack(plan, weights))
    finish(layer)
    tensors = pack(plan, weights)
    del tensors["2.up_proj.scales"]
    with pytest.raises(ValueError, match=rf"^{LAYER}\.2\.up_proj\.scales is not in the checkpoint"):
        reload(layer, tensors)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("is_named", [False, True])
def test_experts_that_stay_are_not_left_to_a_method_that_crashes(is_packed: bool, is_named: bool) -> None:
    named = make_plan([("w16a16", "w16a16")] * EXPERTS)
    config = MxMoEConfig(named if is_named else Plan.parse({"model.lm_head": "w4a16_g128"}), is_packed)
    assert isinstance(config.get_quant_method(make_layer(make_plan()), LAYER), UnquantizedFusedMoEMethod)
    # vLLM's own kernel dies under expert parallelism on CPUs.
    method = config.get_quant_method(make_layer(make_plan(), ep=(0, 2)), LAYER)
    assert type(method) is (MxMoEPackedMethod if is_packed else MxMoEOnlineMethod)
    assert [str(scheme) for pair in method.global_schemes for scheme in pair] == ["w16a16"] * 2 * EXPERTS


def test_eplb_is_refused() -> None:
    config = MxMoEConfig(make_plan(), is_packed=True)
    layer = make_layer(make_plan())
    layer.moe_config.moe_parallel_config.enable_eplb = True
    with pytest.raises(ValueError, match=r"expert load balancing \(enable_eplb=True\)"):
        config.get_quant_method(layer, LAYER)


def test_stock_parallel_config_is_what_is_played() -> None:
    """The hand-made configuration above has the fields that vLLM's own has."""
    made = FusedMoEParallelConfig.make(1, 1, 1, 1, ParallelConfig())
    assert (made.tp_size, made.tp_rank, made.use_ep) == (1, 0, False)
