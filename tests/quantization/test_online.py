# SPDX-License-Identifier: Apache-2.0
"""The online method on one layer, without an engine: what it leaves behind, and what it computes."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe import MoEActivation

from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.kernels import tolerances
from vllm_ext.kernels.arena import Field, Layout
from vllm_ext.kernels.blocks import dequantize_block
from vllm_ext.quantization import resident
from vllm_ext.quantization.default_plan import choose_schemes
from vllm_ext.quantization.moe import LayerStorage
from vllm_ext.quantization.online import MxMoEOnlineMethod

EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128


def load_nothing() -> None:
    """Stands for vLLM's loader of a parameter."""


def make_layer(gate_up: torch.Tensor, down: torch.Tensor) -> torch.nn.Module:
    """A layer as vLLM hands it over when its weights are complete."""
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(gate_up.clone(), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(down.clone(), requires_grad=False)
    layer.w13_weight.weight_loader = layer.w2_weight.weight_loader = load_nothing
    layer.moe_config = SimpleNamespace(
        w13_num_shards=2,
        hidden_dim_unpadded=down.shape[1],
        intermediate_size_per_partition_unpadded=down.shape[2],
        moe_parallel_config=SimpleNamespace(dp_rank=0, tp_rank=0, ep_rank=0),
    )
    layer.activation = MoEActivation.SILU
    layer.expert_map = None
    layer.apply_router_weight_on_input = False
    return layer


def make_method(layer: torch.nn.Module) -> MxMoEOnlineMethod:
    method = MxMoEOnlineMethod(layer.moe_config, "layers.0.mlp.experts")
    method.process_weights_after_loading(layer)
    return method


def random_weights(
    dtype: torch.dtype, experts: int = EXPERTS, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    gate_up = torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5
    return gate_up.to(dtype), (torch.randn(experts, hidden, intermediate) / intermediate**0.5).to(dtype)


def run_plain_moe(
    x: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A stock MoE layer in float32 on full weights, every expert on every token."""
    gate, up = torch.einsum("th,enh->ten", x.float(), gate_up.float()).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, down.float())
    weights = torch.zeros(ids.shape[0], gate_up.shape[0]).scatter_add_(1, ids.long(), routing)
    return torch.einsum("te,teh->th", weights, outputs)


def make_routing(tokens: int, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(tokens, experts).topk(2).indices.to(torch.int32)
    return ids, torch.rand(tokens, 2) + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_the_layer_on_rounded_weights(dtype: torch.dtype) -> None:
    gate_up, down = random_weights(dtype)
    layer = make_layer(gate_up, down)
    method = make_method(layer)
    rounded = []
    for weights in (gate_up, down):
        schemes = choose_schemes(weights)
        rounded.append(
            torch.stack([dequantize(round_to_nearest(w, s), s) for w, s in zip(weights, schemes, strict=True)])
        )
    ids, routing = make_routing(9)
    x = torch.randn(9, HIDDEN).to(dtype)
    out = method.apply(layer, x, routing, ids, None, None)
    assert out.dtype == dtype
    expected = run_plain_moe(x, ids, routing, *rounded)
    assert tolerances.relative_error(out, expected) <= tolerances.MIXED_MOE[dtype, 16].relative
    # Rounding to 3 and 4 bits is far from nothing: the weights really are rounded.
    assert tolerances.relative_error(out, run_plain_moe(x, ids, routing, gate_up, down)) > 0.05


def test_it_mixes_widths_and_drops_the_full_weights() -> None:
    layer = make_layer(*random_weights(torch.bfloat16))
    method = make_method(layer)
    assert method.schemes is not None
    for block in (0, 1):
        assert Counter(str(pair[block]) for pair in method.schemes) == {"w4a16_g128": 2, "w3a16_g128": 2}
    # The names stay, empty and with their loader: vLLM looks them up for experts of other ranks.
    for emptied in (layer.w13_weight, layer.w2_weight):
        assert emptied.untyped_storage().nbytes() == 0
        assert emptied.weight_loader is load_nothing
    assert sum(p.numel() * p.element_size() for p in layer.parameters()) == layer.expert_arena.numel()
    assert layer.expert_arena.dtype == torch.uint8
    assert layer.expert_table.shape == (EXPERTS, 2, 7)
    assert "expert_table" not in layer.state_dict()
    assert layer.expert_table[:, :, 0].tolist() == [[scheme.weight_bits for scheme in pair] for pair in method.schemes]


def test_storage_is_the_true_number_of_bytes() -> None:
    layer = make_layer(*random_weights(torch.bfloat16))
    storage = make_method(layer).storage
    weights = EXPERTS * 3 * HIDDEN * INTERMEDIATE
    # Half of the weights have 3-bit, half 4-bit codes; every 128 share two bytes of scale and one of zero point.
    # In memory the zero points take two bytes.
    resident = weights * 3.5 / 8 + weights / 128 * 4
    assert storage == LayerStorage(weights * 3.5 / 8 + weights / 128 * 3, weights, 0, 0, resident)
    assert storage.resident_bytes == layer.expert_arena.numel()
    assert storage.bits_per_weight == 3.6875


def test_a_float32_layer_stays_as_it_is_stored() -> None:
    layer = make_layer(*random_weights(torch.float32))
    storage = make_method(layer).storage
    assert storage is not None
    assert storage.resident_bytes == storage.quantized_bytes == layer.expert_arena.numel()
    assert set(layer.expert_table[:, :, Field.LAYOUT].flatten().tolist()) == {Layout.PLAIN_CODES}


def test_16_bit_layers_are_repacked_for_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = random_weights(torch.bfloat16)
    layer = make_layer(gate_up, down)
    method = make_method(layer)
    assert set(layer.expert_table[:, :, Field.LAYOUT].flatten().tolist()) == {Layout.CPU_RECORD}
    # Without them, the same codes in the plain layout, on torch's operators.
    monkeypatch.setattr(resident, "load_ops", lambda *_: None)
    plain = make_layer(gate_up, down)
    plain_method = make_method(plain)
    assert set(plain.expert_table[:, :, Field.LAYOUT].flatten().tolist()) == {Layout.PLAIN_CODES}
    for expert in range(EXPERTS):
        for block, shape in ((0, (2 * INTERMEDIATE, HIDDEN)), (1, (HIDDEN, INTERMEDIATE))):
            weights = [
                dequantize_block(
                    found.expert_arena.data, found.expert_table[expert, block].tolist(), *shape, block == 0
                )
                for found in (layer, plain)
            ]
            assert torch.equal(*weights)
    ids, routing = make_routing(9)
    x = torch.randn(9, HIDDEN).bfloat16()
    outputs = [m.apply(found, x, routing, ids, None, None) for m, found in ((method, layer), (plain_method, plain))]
    assert tolerances.relative_error(*outputs) < tolerances.MIXED_MOE[torch.bfloat16, 16].relative


def test_the_second_call_does_nothing() -> None:
    layer = make_layer(*random_weights(torch.bfloat16))
    method = make_method(layer)
    arena, table = layer.expert_arena, layer.expert_table
    method.process_weights_after_loading(layer)
    assert layer.expert_arena is arena
    assert layer.expert_table is table


def test_a_weight_reload_keeps_the_plan() -> None:
    gate_up, down = random_weights(torch.float32)
    layer = make_layer(gate_up, down)
    method = make_method(layer)
    table, arena = layer.expert_table, layer.expert_arena
    # Other errors: a new plan would rank the experts the other way round.
    scale = torch.arange(1.0, EXPERTS + 1).view(-1, 1, 1)
    new_layer = make_layer(gate_up * scale, down / scale)
    assert [str(pair) for pair in make_method(make_layer(gate_up * scale, down / scale)).schemes or []] != [
        str(pair) for pair in method.schemes or []
    ]
    method.process_weights_after_loading(new_layer)
    assert torch.equal(new_layer.expert_table, table)
    assert new_layer.expert_arena.shape == arena.shape
    assert not torch.equal(new_layer.expert_arena, arena)


def test_blocks_that_cannot_be_packed_stay_as_they_are() -> None:
    # K=36 of the down block is no multiple of 8; 160 columns of gate_up take groups of 32.
    gate_up, down = random_weights(torch.float32, hidden=160, intermediate=36)
    layer = make_layer(gate_up, down)
    method = make_method(layer)
    assert {str(pair[1]) for pair in method.schemes or []} == {"w16a16"}
    assert {pair[0].group_size for pair in method.schemes or []} == {32}
    assert method.storage is not None
    assert method.storage.unquantized_weights == EXPERTS * 160 * 36
    assert method.storage.unquantized_bytes >= 4 * EXPERTS * 160 * 36
    ids, routing = make_routing(5)
    x = torch.randn(5, 160)
    rounded = torch.stack(
        [dequantize(round_to_nearest(w, s), s) for w, s in zip(gate_up, choose_schemes(gate_up), strict=True)]
    )
    expected = run_plain_moe(x, ids, routing, rounded, down)
    assert tolerances.relative_error(method.apply(layer, x, routing, ids, None, None), expected) < 1e-5


def test_tensor_parallel_shards_add_up_to_the_whole() -> None:
    """Halves of the intermediate size: groups of 128 along K/2 are the same groups, so codes of equal width agree."""
    gate_up, down = random_weights(torch.float32, intermediate=512)
    whole = make_layer(gate_up, down)
    whole_method = make_method(whole)
    ids, routing = make_routing(6)
    x = torch.randn(6, HIDDEN)
    gate, up = gate_up.chunk(2, dim=1)
    total = torch.zeros(6, HIDDEN)
    for rank in range(2):
        part = slice(256 * rank, 256 * (rank + 1))
        shard = make_layer(torch.cat([gate[:, part], up[:, part]], dim=1), down[:, :, part])
        method = MxMoEOnlineMethod(shard.moe_config, "layers.0.mlp.experts")
        method.schemes = whole_method.schemes
        method.process_weights_after_loading(shard)
        total += method.apply(shard, x, routing, ids, None, None)
    expected = whole_method.apply(whole, x, routing, ids, None, None)
    assert tolerances.relative_error(total, expected) < 1e-5


def test_damaged_weights_are_named() -> None:
    gate_up, down = random_weights(torch.bfloat16)
    down[2, 7, 9] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts, down, expert 2 has 1 NaN .* \[7, 9\]"):
        make_method(make_layer(gate_up, down))
