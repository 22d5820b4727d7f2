# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a plan in vLLM's own layer classes, with vLLM's own loaders; ranks are played one by one."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.reload import layerwise

from tests.quantization.packed_models import pack_weight
from vllm_ext import observability
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.kernels import tolerances
from vllm_ext.quantization.config import MxMoEConfig
from vllm_ext.quantization.linear import MxMoELinearMethod, MxMoEOnlineLinearMethod
from vllm_ext.quantization.moe import list_storage
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 128, 4, 2, 32
PARENT = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def play_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Layers made after `play_rank(rank, size)` are those of that tensor-parallel rank."""

    def play(rank: int, size: int) -> None:
        for module in (vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    play(0, 1)
    return play


def make_config(schemes: dict[str, str], is_packed: bool = True) -> MxMoEConfig:
    modules = {f"{PARENT}.{name}": scheme for name, scheme in schemes.items()}
    config = MxMoEConfig(Plan.parse(modules), is_packed)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def make_qkv(scheme: str, is_packed: bool = True, **options: Any) -> QKVParallelLinear:
    config = make_config({name: scheme for name in ("q_proj", "k_proj", "v_proj")}, is_packed)
    options = {"bias": False, "quant_config": config, "prefix": f"{PARENT}.qkv_proj"} | options
    return QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, **options)


def load(layer: LinearBase, weights: dict[Any, torch.Tensor], leave_out: tuple[Any, str] | None = None) -> None:
    """Every part's packed tensors through the parameters' loaders, as `load_weights` of the layer passes them on."""
    for shard_id, weight in weights.items():
        for suffix, tensor in pack_weight(weight, layer.quant_method.scheme).items():
            if (shard_id, suffix) != leave_out:
                target = getattr(layer, suffix)
                target.weight_loader(target, tensor, *([] if shard_id is None else [shard_id]))


def round_weight(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    parsed = Scheme.parse(scheme)
    return dequantize(round_to_nearest(weight, parsed), parsed)


def qkv_weights() -> dict[Any, torch.Tensor]:
    rows = {"q": HEADS * HEAD_SIZE, "k": KV_HEADS * HEAD_SIZE, "v": KV_HEADS * HEAD_SIZE}
    return {shard: random_weight(count, HIDDEN, seed) for seed, (shard, count) in enumerate(rows.items())}


@pytest.mark.parametrize("scheme", ["w3a16_g32", "w6a16_g64_sym", "w5a16_g-1", "w2a16_g128", "w1.6a16_g64_sym"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_q_k_and_v_are_fused_and_split_by_vllm(scheme: str, tp_size: int, play_rank: Any) -> None:
    weights = qkv_weights()
    rounded = {shard: round_weight(weight, scheme) for shard, weight in weights.items()}
    x = torch.randn(5, HIDDEN)
    for rank in range(tp_size):
        play_rank(rank, tp_size)
        layer = make_qkv(scheme)
        assert isinstance(layer.quant_method, MxMoELinearMethod)
        load(layer, weights)
        layer.quant_method.process_weights_after_loading(layer)
        # With four ranks and two key heads, pairs of ranks share one.
        kv_rank, kv_ranks = (rank // 2, 2) if tp_size == 4 else (rank, tp_size)
        parts = [rounded["q"].chunk(tp_size)[rank], *(rounded[s].chunk(kv_ranks)[kv_rank] for s in ("k", "v"))]
        expected = x @ torch.cat(parts).T
        assert tolerances.relative_error(layer(x)[0], expected) < 1e-5
        assert tolerances.relative_error(expected, x @ torch.cat(list(weights.values()))[: expected.shape[1]].T) > 1e-3
        assert all(getattr(layer, suffix).numel() == 0 for suffix in layer.quant_method.scheme.tensors)


def test_a_reload_fills_the_arena_in_place(play_rank: Any) -> None:
    scheme, weights = "w3a16_g32", qkv_weights()
    layer = make_qkv(scheme)
    layerwise.record_metadata_for_reloading(layer)
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    address = layer.linear_arena.data_ptr()
    other = {shard: -weight for shard, weight in weights.items()}
    layerwise.initialize_layerwise_reload(layer)
    load(layer, other)
    layerwise.finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    # A compiled graph or a captured one holds the address.
    assert layer.linear_arena.data_ptr() == address
    x = torch.randn(5, HIDDEN)
    expected = x @ torch.cat([round_weight(weight, scheme) for weight in other.values()]).T
    assert tolerances.relative_error(layer(x)[0], expected) < 1e-5


@pytest.mark.parametrize("arrived", [("q", "v"), ()])
def test_an_incomplete_checkpoint_is_not_rounded(arrived: tuple[str, ...], play_rank: Any) -> None:
    layer = make_qkv("w4a16_g64", is_packed=False)
    weights = qkv_weights()
    for shard in arrived:
        layer.weight.weight_loader(layer.weight, weights[shard], shard)
    # vLLM's own last step processes layers that are not complete, too.
    message = rf"^{PARENT}\.qkv_proj\.weight is not in the checkpoint, or not all of it: .* of 32768 elements came"
    with pytest.raises(ValueError, match=message):
        layerwise.finalize_layerwise_processing(layer, SimpleNamespace(dtype=torch.float32))


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w3a16_g-1", "w1.6a16_g64_sym", "w1.6a16_g-1_sym"])
def test_row_parallel_parts_add_up(scheme: str, play_rank: Any) -> None:
    weight = random_weight(24, HIDDEN, 7)
    x = torch.randn(3, 2, HIDDEN)
    total = torch.zeros(3, 2, 24)
    for rank in range(2):
        play_rank(rank, 2)
        config = make_config({"o_proj": scheme})
        layer = RowParallelLinear(HIDDEN, 24, bias=False, quant_config=config, prefix=f"{PARENT}.o_proj")
        load(layer, {None: weight})
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x.chunk(2, dim=-1)[rank].contiguous())
    assert tolerances.relative_error(total, x @ round_weight(weight, scheme).T) < 1e-5


def test_gate_and_up_are_fused_with_bias_and_int8_activations(play_rank: Any) -> None:
    scheme = "w4a8_g64"
    weights = {part: random_weight(48, HIDDEN, part) for part in (0, 1)}
    config = make_config({"gate_proj": scheme, "up_proj": scheme})
    prefix = f"{PARENT}.gate_up_proj"
    layer = MergedColumnParallelLinear(HIDDEN, [48, 48], bias=True, quant_config=config, prefix=prefix)
    layer.bias.data.copy_(torch.arange(96.0))
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, HIDDEN)
    groups = x.view(5, 2, 64)
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).view(5, HIDDEN)
    expected = rounded @ round_weight(torch.cat([weights[0], weights[1]]), scheme).T + torch.arange(96.0)
    assert tolerances.relative_error(layer(x)[0], expected) < 1e-5
    storage = list_storage(torch.nn.ModuleList([layer]))
    assert storage[prefix].quantized_weights == 96 * HIDDEN
    assert storage[prefix].bits_per_weight == 4 + 24 / 64


def test_stored_and_resident_bytes_are_reported_once(
    vllm_config: VllmConfig, play_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[str, float, int]] = []
    monkeypatch.setattr(observability, "add", lambda *call: reported.append(call))
    vllm_config.parallel_config.data_parallel_index = 3
    layer = make_qkv("w1.6a16_g128_sym", params_dtype=torch.bfloat16)
    layerwise.record_metadata_for_reloading(layer)
    load(layer, qkv_weights())
    layer.quant_method.process_weights_after_loading(layer)
    weights = 256 * HIDDEN
    stored = weights * 26 // 128 + weights // 128 * 2
    assert layer.quant_method.storage is not None
    resident = layer.quant_method.storage.resident_bytes
    assert resident == layer.linear_arena.numel() >= stored
    expected = [
        ("vllm_ext:mxmoe_linear_weight_bytes", stored, 3),
        ("vllm_ext:mxmoe_linear_weight_count", weights, 3),
        ("vllm_ext:mxmoe_linear_resident_bytes", resident, 3),
    ]
    assert reported == expected
    layerwise.initialize_layerwise_reload(layer)
    load(layer, qkv_weights())
    layerwise.finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
    assert reported == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_online_equals_packed(dtype: torch.dtype, play_rank: Any) -> None:
    weights = {shard: weight.to(dtype) for shard, weight in qkv_weights().items()}
    packed = make_qkv("w3a8_g32", params_dtype=dtype)
    load(packed, weights)
    packed.quant_method.process_weights_after_loading(packed)
    online = make_qkv("w3a8_g32", is_packed=False, params_dtype=dtype)
    method = online.quant_method
    assert isinstance(method, MxMoEOnlineLinearMethod)
    assert online.weight.is_meta
    for shard, weight in weights.items():
        online.weight.weight_loader(online.weight, weight, shard)
    # With the last part vLLM has seen the layer complete and called the method.
    assert torch.equal(online.linear_arena, packed.linear_arena)
    assert torch.equal(online.linear_table, packed.linear_table)
    assert online.weight.numel() == 0
    x = torch.randn(4, HIDDEN).to(dtype)
    assert online(x)[0].dtype == dtype
    assert torch.equal(online(x)[0], packed(x)[0])
    arena = online.linear_arena
    method.process_weights_after_loading(online)
    assert online.linear_arena is arena


def test_a_bias_that_comes_before_the_weights_is_waited_for(play_rank: Any) -> None:
    """As the names of a file sort: k_proj.bias, k_proj.weight, q_proj.bias, ..."""
    weights = qkv_weights()
    biases = {shard: torch.randn(len(weight)) for shard, weight in weights.items()}
    online = make_qkv("w4a16_g32", is_packed=False, bias=True, params_dtype=torch.float32)
    config = online.quant_config
    assert isinstance(config, MxMoEConfig)
    config.get_checkpoint_weight_mapper()
    for shard in ("k", "q", "v"):
        assert not hasattr(online, "linear_arena")
        for target, tensor in ((online.bias, biases[shard]), (online.weight, weights[shard])):
            target.weight_loader(target, tensor, shard)
    # All of it is there, so vLLM has had it rounded at once.
    assert online.linear_arena.numel() > 0
    x = torch.randn(5, HIDDEN)
    whole = torch.cat([round_weight(weight, "w4a16_g32") for weight in weights.values()])
    expected = x @ whole.T + torch.cat(list(biases.values()))
    assert tolerances.relative_error(online(x)[0], expected) < 1e-5


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("scheme", "K", "tp_size", "message"),
    [
        ("w4a16_g64", 192, 2, "over 2 ranks gives each 96 of the K=192 inputs, .* group size 64 of w4a16_g64"),
        ("w3a16_g-1", 24, 2, "gives each 12 of the K=24 inputs, whose 3-bit codes do not fill whole bytes"),
        ("w4a16_g128", 192, 1, "group size 128 does not divide K=192"),
        ("w3a16_g-1", 12, 1, "K=12 codes of bits=3 do not fill whole bytes"),
    ],
)
def test_sizes_a_scheme_cannot_take(
    is_packed: bool, scheme: str, K: int, tp_size: int, message: str, play_rank: Any
) -> None:
    play_rank(1, tp_size)
    config = make_config({"o_proj": scheme}, is_packed)
    with pytest.raises(ValueError, match=message) as caught:
        RowParallelLinear(K, 16, quant_config=config, prefix=f"{PARENT}.o_proj")
    assert str(caught.value).startswith(f"{PARENT}.o_proj: ")


@pytest.mark.parametrize(
    ("leave_out", "name"),
    [(("k", "scales"), "k_proj.scales"), (("v", "qweight"), "v_proj.qweight"), (("q", "zeros"), "q_proj.zeros")],
)
def test_missing_tensors_are_named(leave_out: tuple[str, str], name: str, play_rank: Any) -> None:
    layer = make_qkv("w4a16_g64")
    load(layer, qkv_weights(), leave_out)
    with pytest.raises(ValueError, match=rf"^{PARENT}.{name} is not in the checkpoint, .* w4a16_g64"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_layer_that_got_nothing_is_named(play_rank: Any) -> None:
    config = make_config({"o_proj": "w4a16_g64_sym"})
    layer = ReplicatedLinear(HIDDEN, 16, quant_config=config, prefix=f"{PARENT}.o_proj")
    message = rf"^{PARENT}.o_proj.qweight \(and 1 more tensors of this layer\) is not in the checkpoint"
    with pytest.raises(ValueError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


def test_dummy_weights_miss_nothing(vllm_config: VllmConfig, play_rank: Any) -> None:
    vllm_config.load_config.load_format = "dummy"
    layer = make_qkv("w4a16_g64")
    layer.quant_method.process_weights_after_loading(layer)
    assert layer(torch.randn(2, HIDDEN))[0].shape == (2, 256)


@pytest.mark.parametrize(
    ("suffix", "change", "found"),
    [
        ("qweight", lambda t: t[:, :-1], r"expected torch.uint8 \[64, 64\] .* found torch.uint8 \[64, 63\]"),
        ("qweight", lambda t: torch.cat([t, t]), r"found torch.uint8 \[128, 64\]"),
        ("qweight", lambda t: t.to(torch.int32), r"found torch.int32 \[64, 64\]"),
        ("scales", lambda t: t.float(), r"expected torch.float16 \[64, 2\] .* found torch.float32 \[64, 2\]"),
        ("scales", lambda t: t.index_fill(0, torch.tensor([5]), torch.nan), r"is nan at \[5, 0\]: .* is damaged"),
        ("scales", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf), r"is inf at \[3, 0\]"),
        ("zeros", lambda t: t[:, :1], r"expected torch.uint8 \[64, 2\] .* found torch.uint8 \[64, 1\]"),
    ],
)
@pytest.mark.parametrize("kind", ["qkv", "column"])
def test_wrong_tensors_are_named(suffix: str, change: Any, found: str, kind: str, play_rank: Any) -> None:
    if kind == "qkv":
        layer, name, shard = make_qkv("w4a16_g64"), "k_proj", ["k"]
    else:
        config = make_config({"up_proj": "w4a16_g64"})
        layer = ColumnParallelLinear(HIDDEN, 64, quant_config=config, prefix=f"{PARENT}.up_proj")
        name, shard = "up_proj", []
    tensor = change(pack_weight(random_weight(64, HIDDEN, 1), Scheme.parse("w4a16_g64"))[suffix])
    target = getattr(layer, suffix)
    with pytest.raises(ValueError, match=rf"^{re.escape(PARENT)}.{name}.{suffix}[: ].*{found}"):
        target.weight_loader(target, tensor, *shard)


def test_damaged_full_weights_are_named(play_rank: Any) -> None:
    layer = make_qkv("w4a16_g64", is_packed=False)
    weights = qkv_weights()
    weights["q"][3, 4] = torch.nan
    for shard in ("q", "k"):
        layer.weight.weight_loader(layer.weight, weights[shard], shard)
    with pytest.raises(ValueError, match=rf"{PARENT}.qkv_proj has 1 NaN .* \[3, 4\]"):
        layer.weight.weight_loader(layer.weight, weights["v"], "v")


def test_a_tensor_fused_in_the_checkpoint_is_one_part(play_rank: Any) -> None:
    config = make_config({"qkv_proj": "w4a16_g64"})
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    prefix = f"{PARENT}.qkv_proj"
    layer = QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, bias=False, quant_config=config, prefix=prefix)
    weight = random_weight(256, HIDDEN, 0)
    load(layer, {None: weight})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, HIDDEN)
    assert tolerances.relative_error(layer(x)[0], x @ round_weight(weight, "w4a16_g64").T) < 1e-5
