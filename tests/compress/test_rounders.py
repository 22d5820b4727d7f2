# SPDX-License-Identifier: Apache-2.0
"""Rounding along the quantized path: less loss than rounding to nearest, every kind of linear, rare experts, order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.compress.runnable_model import EXPERTS, make_tokens, write_runnable
from tests.compress.small_model import edit_tensors
from vllm_ext.compress.rounded_layer import build_rounded_layer, join_block, list_experts, split_block
from vllm_ext.compress.rounders import ROUNDERS, HessianOptions, HessianRounder, NearestRounder, Rounder, make_rounder
from vllm_ext.compress.rounding import QuantizedWeight, dequantize, round_to_nearest
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.scheme import Scheme

TOKENS = make_tokens(windows=16)
LOW, MIDDLE = Scheme(2, 16, 32), Scheme(3, 16, 32, symmetric=True)
EXPERT_SCHEMES = {(e, block): LOW if e % 2 else MIDDLE for e in range(EXPERTS) for block in ("gate_up", "down")}
LINEARS = {
    **{f"model.layers.{layer}.self_attn.{name}_proj": MIDDLE for layer in range(3) for name in "qkvo"},
    **{f"model.layers.1.mlp.{name}_proj": LOW for name in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(write_runnable(tmp_path_factory.mktemp("models") / "model"))


def list_schemes(layer: int, scheme: Scheme | None = None) -> dict[tuple[int, str], Scheme]:
    return {} if layer == 1 else {key: scheme or value for key, value in EXPERT_SCHEMES.items()}


def round_model(
    source: SourceModel, rounder: Rounder, scheme: Scheme | None = None, linears: bool = False
) -> tuple[list[dict[str, QuantizedWeight]], float]:
    """(codes per layer, squared distance of the last layer's outputs to the unquantized ones, as a share)."""
    stream = LayerStream(source, TOKENS)
    codes, hidden, reference = [], None, []
    for layer in stream.layers():
        chosen = {path: s for path, s in LINEARS.items() if linears and f"layers.{layer.index}." in path}
        codes.append(rounder.round_layer(layer, list_schemes(layer.index, scheme), chosen))
        module = build_rounded_layer(layer, list_schemes(layer.index, scheme), chosen, codes[-1])
        hidden = layer.run(module, layer.inputs if hidden is None else hidden)
        reference = layer.outputs
    assert hidden is not None
    if isinstance(rounder, HessianRounder):
        assert rounder.outputs is not None
        assert all(torch.equal(one, other) for one, other in zip(rounder.outputs, hidden, strict=True))
    distance = sum(float((a - b).square().sum()) for a, b in zip(hidden, reference, strict=True))
    return codes, distance / sum(float(b.square().sum()) for b in reference)


def test_less_error_than_rounding_to_nearest(source: SourceModel) -> None:
    for linears in (False, True):
        errors = {name: round_model(source, make(), linears=linears)[1] for name, make in ROUNDERS.items()}
        assert errors["gptq"] < 0.8 * errors["rtn"]
        assert errors["gptaq"] < 0.8 * errors["rtn"]


def test_nearest_rounder_is_round_to_nearest(source: SourceModel) -> None:
    codes, _ = round_model(source, NearestRounder(), linears=True)
    assert set(codes[1]) == {path for path in LINEARS if "layers.1." in path}
    for layer in codes:
        for path, found in layer.items():
            scheme = LINEARS.get(path)
            if scheme is None:
                expert, name = path.split(".")[-2:]
                scheme = EXPERT_SCHEMES[int(expert), "down" if name == "down_proj" else "gate_up"]
            expected = round_to_nearest(source.reader.read(f"{path}.weight"), scheme)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ROUNDERS)
def test_replay_leads_to_the_same_codes(source: SourceModel, name: str) -> None:
    expected, _ = round_model(source, ROUNDERS[name](), linears=True)
    rounder = ROUNDERS[name]()
    for layer in LayerStream(source, TOKENS).layers():
        linears = {path: scheme for path, scheme in LINEARS.items() if f"layers.{layer.index}." in path}
        if layer.index < 2:
            rounder.replay_layer(layer, list_schemes(layer.index), linears, expected[layer.index])
            continue
        found = rounder.round_layer(layer, list_schemes(layer.index), linears)
        assert set(found) == set(expected[2])
        for path, codes in found.items():
            assert torch.equal(codes.codes, expected[2][path].codes)
            assert torch.equal(codes.scales, expected[2][path].scales)


def test_sweeps_are_those_asked_for(source: SourceModel) -> None:
    assert isinstance(make_rounder("rtn", 0), NearestRounder)
    found = {sweeps: round_model(source, make_rounder("gptaq", sweeps)) for sweeps in (0, 3)}
    usual, _ = round_model(source, ROUNDERS["gptaq"]())
    for path, codes in usual[0].items():
        assert torch.equal(codes.codes, found[3][0][0][path].codes)
    assert any(not torch.equal(codes.codes, found[0][0][0][path].codes) for path, codes in usual[0].items())
    assert make_rounder("gptaq", 0).options.asymmetric  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_chunks_of_experts_change_nothing(source: SourceModel, chunk_bytes: int) -> None:
    whole, _ = round_model(source, HessianRounder(HessianOptions(asymmetric=True)))
    found, _ = round_model(source, HessianRounder(HessianOptions(asymmetric=True, chunk_bytes=chunk_bytes)))
    same = [
        float((one[path].codes == other[path].codes).float().mean())
        for one, other in zip(whole, found, strict=True)
        for path in one
    ]
    assert sum(same) / len(same) > 0.98


@pytest.mark.parametrize("asymmetric", [False, True])
def test_experts_that_no_token_reaches(tmp_path: Path, asymmetric: bool) -> None:
    directory = write_runnable(tmp_path / "model", num_experts_per_tok=1)
    gate = open_source(directory).reader.read("model.layers.0.mlp.gate.weight")
    # Of two opposite logits one is above zero: experts whose logit is always zero are never chosen.
    gate[0], gate[2], gate[3] = 0.0, -gate[1], 0.0
    edit_tensors(directory, model__layers__0__mlp__gate__weight=gate)
    source = open_source(directory)
    layer = next(LayerStream(source, TOKENS).layers())
    assert layer.routed is not None
    counts = [int((layer.routed.ids == expert).sum()) for expert in range(EXPERTS)]
    assert counts[0] == counts[3] == 0
    codes = HessianRounder(HessianOptions(asymmetric=asymmetric)).round_layer(layer, list_schemes(0))
    assert len(codes) == 3 * EXPERTS
    path = "model.layers.0.mlp.experts.0.gate_proj"
    weight, scheme = source.reader.read(f"{path}.weight"), EXPERT_SCHEMES[0, "gate_up"]
    inputs = layer.routed.hidden
    errors = [
        float((inputs @ (dequantize(one, scheme) - weight).T).square().sum())
        for one in (codes[path], round_to_nearest(weight, scheme))
    ]
    assert errors[0] < errors[1]


def test_eight_bit_activations_are_seen(source: SourceModel) -> None:
    """The quantized path of a8 schemes carries the rounding of activations, so later layers make up for it."""
    layer = next(LayerStream(source, TOKENS).layers())
    outputs = {}
    for act_bits in (8, 16):
        schemes = {key: Scheme(8, act_bits, 32) for key in EXPERT_SCHEMES}
        linears = {path: Scheme(8, act_bits, 32) for path in LINEARS if "layers.0." in path}
        rounder = HessianRounder()
        rounder.round_layer(layer, schemes, linears)
        assert rounder.outputs is not None
        outputs[act_bits] = sum(
            float((one - other).square().sum()) for one, other in zip(rounder.outputs, layer.outputs, strict=True)
        )
    assert outputs[8] > 1.3 * outputs[16]
    assert outputs[8] < 0.01 * sum(float(hidden.square().sum()) for hidden in layer.outputs)


def test_sixteen_bit_blocks_keep_their_weights(source: SourceModel) -> None:
    layer = next(LayerStream(source, TOKENS).layers())
    schemes = {**list_schemes(0), (1, "gate_up"): Scheme(16), (2, "down"): Scheme(16)}
    codes = HessianRounder(HessianOptions(asymmetric=True)).round_layer(layer, schemes)
    assert len(codes) == 3 * EXPERTS - 3
    module = build_rounded_layer(layer, dict.fromkeys(schemes, Scheme(16)), {}, {})
    for one, other in zip(layer.run(module, layer.inputs), layer.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_layers_come_in_order(source: SourceModel) -> None:
    layers = LayerStream(source, TOKENS).layers()
    next(layers)
    with pytest.raises(ValueError, match="expected layer 0, got layer 1"):
        HessianRounder().round_layer(next(layers), {})


def test_blocks_split_and_join(source: SourceModel) -> None:
    module = list_experts(source, 0)[2]
    weight = torch.cat([weight for _, weight in source.read_weights(module.blocks[0])])
    for scheme in (LOW, MIDDLE):
        stacked = round_to_nearest(weight, scheme)
        parts = split_block(module, "gate_up", stacked)
        assert list(parts) == [f"{module.path}.gate_proj", f"{module.path}.up_proj"]
        assert torch.equal(
            torch.cat([dequantize(part, scheme) for part in parts.values()]), dequantize(stacked, scheme)
        )
        assert torch.equal(dequantize(join_block(module, "gate_up", parts), scheme), dequantize(stacked, scheme))
