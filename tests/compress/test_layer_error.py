# SPDX-License-Identifier: Apache-2.0
"""Sensitivities equal what a change of one block does to its layer, measured on the whole model; runs go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.compress.runnable_model import make_tokens, write_runnable
from vllm_ext.compress import layer_error
from vllm_ext.compress.cache import StageCache
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.layer_error import measure_sensitivities
from vllm_ext.compress.profile import load_model, stream_profile
from vllm_ext.compress.rounded_layer import round_inputs
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.compress.sensitivity import Unit, list_units
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.quantization.scheme import Scheme

TOKENS = make_tokens()
SCHEMES = [Scheme.parse(name) for name in ("w2a16_g32", "w4a16_g32_sym", "w4a8_g32_sym", "w16a16")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def source(model: Path) -> SourceModel:
    return open_source(model)


def list_experts(source: SourceModel) -> list[Unit]:
    return list_units([m for m in source.modules.values() if m.expert is not None], SCHEMES)


@pytest.fixture(autouse=True)
def without_spread_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that stand for unseen ones are tested apart: without them the whole model gives the same numbers."""
    if "spread" not in request.node.name:
        monkeypatch.setattr(layer_error, "SPREAD_TOKENS", 0)


def run_layers(model: torch.nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of the decoder layers, whose gradients are kept, and the mean loss."""
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]  # type: ignore[union-attr]
    ids = torch.from_numpy(TOKENS)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for handle in handles:
        handle.remove()
    return outputs, loss


@pytest.mark.parametrize("block", ["gate_up", "down"])
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_change_of_the_whole_layer(model: Path, source: SourceModel, layer: int, block: str) -> None:
    units = list_experts(source)
    found = measure_sensitivities(source, units, TOKENS)
    assert found.loss is not None
    whole = load_model(model, torch.float32, "cpu")
    outputs, loss = run_layers(whole)
    loss.backward()
    gradient = outputs[layer].grad
    before = outputs[layer].detach()
    scored = TOKENS[:, 1:].size
    row = next(r for r, u in enumerate(units) if (u.module.layer, u.module.expert, u.block.name) == (layer, 1, block))
    experts = whole.model.layers[layer].mlp.experts  # type: ignore[union-attr, index]
    stacked = experts.gate_up_proj if block == "gate_up" else experts.down_proj  # type: ignore[union-attr]
    kept = stacked[1].detach().clone()
    for column in (0, 1):  # the schemes of weights alone
        scheme = SCHEMES[column]
        with torch.no_grad():
            stacked[1] = dequantize(round_to_nearest(kept, scheme), scheme)
            change = (run_layers(whole)[0][layer] - before).double()
            stacked[1] = kept
        assert found.layer[row, column] == pytest.approx(float(change.square().sum()), rel=1e-4)
        assert gradient is not None
        expected = float((change * gradient.double()).square().sum()) * scored / 2
        assert found.loss[row, column] == pytest.approx(expected, rel=0.02)  # gradients wait in bf16
    assert found.layer[row, 3] == found.loss[row, 3] == 0


def test_activation_bits_count(source: SourceModel) -> None:
    """w4a8 adds the rounding of the inputs to that of the weights, here by hand for one down block."""
    from vllm_ext.compress.streaming import LayerStream

    units = list_experts(source)
    found = measure_sensitivities(source, units, TOKENS, gradients=False)
    assert found.loss is None
    assert found.layer[:, 2].sum() > found.layer[:, 1].sum()
    layer = next(iter(LayerStream(source, TOKENS).layers()))
    assert layer.routed is not None
    routed, experts = layer.routed, source.family.find_experts(layer.module)
    assert experts is not None
    expert = int(routed.ids[0, 0])
    gate_up, down = (source.family.expert_weight(experts, expert, block) for block in ("gate_up", "down"))
    rows, routing = routed.find_tokens(expert)
    inputs, scheme = apply_gate(routed.hidden[rows] @ gate_up.T), SCHEMES[2]
    weight = dequantize(round_to_nearest(down, scheme), scheme)
    change = round_inputs(inputs, scheme) @ weight.T - inputs @ down.T
    expected = float((change * routing[:, None]).double().square().sum())
    row = next(r for r, u in enumerate(units) if (u.module.layer, u.module.expert, u.block.name) == (0, expert, "down"))
    assert found.layer[row, 2] == pytest.approx(expected, rel=1e-4)


def test_gptq_probes_change_the_output_less(source: SourceModel) -> None:
    units = list_experts(source)
    nearest, chosen = (
        measure_sensitivities(source, units, TOKENS, gradients=False, rounding=rounding).layer[:, 0]
        for rounding in ("rtn", "gptq")
    )
    assert chosen.sum() < 0.9 * nearest.sum()
    with pytest.raises(ValueError, match="unknown rounding 'best' of sensitivities; known: rtn, gptq"):
        measure_sensitivities(source, units, TOKENS, rounding="best")


def test_spread_tokens_make_unseen_experts_cost_something(tmp_path: Path) -> None:
    """Three tokens reach at most six of twelve experts: the others are rare then, not free."""
    source = open_source(write_runnable(tmp_path / "model", num_experts=12))
    windows = TOKENS[:1, :3]
    counts = stream_profile(source, windows).counts["model.layers.0.mlp.experts"]
    assert (counts == 0).sum() >= 6
    units = [unit for unit in list_experts(source) if unit.module.layer == 0]
    for rounding in ("rtn", "gptq"):
        found = measure_sensitivities(source, units, windows, rounding=rounding)
        assert found.loss is not None
        for costs in (found.layer, found.loss):
            assert np.isfinite(costs).all()
            assert (costs[:, :3] > 0).all()
            unseen = np.array([counts[unit.module.expert] == 0 for unit in units])
            assert costs[unseen, 0].mean() < costs[~unseen, 0].mean()


def test_a_killed_run_goes_on_with_the_same_result(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = list_experts(source)
    expected = measure_sensitivities(source, units, TOKENS)
    cache = StageCache(tmp_path, {"test": 1})
    measured: list[int] = []
    inner = layer_error._measure_layer

    def measure(layer: Any, *arguments: Any) -> np.ndarray:
        if layer.index == 2 and len(measured) == 1:
            measured.append(-1)
            raise KeyboardInterrupt
        measured.append(layer.index)
        return inner(layer, *arguments)

    monkeypatch.setattr(layer_error, "_measure_layer", measure)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(source, units, TOKENS, cache=cache)
    found = measure_sensitivities(source, units, TOKENS, cache=cache)
    assert measured == [0, -1, 2]
    assert np.array_equal(found.layer, expected.layer)
    assert expected.loss is not None
    assert np.array_equal(found.loss, expected.loss)
    assert cache.load("gradient-2") is None
    again = measure_sensitivities(source, units, TOKENS, cache=cache)
    assert measured == [0, -1, 2]
    assert np.array_equal(again.loss, expected.loss)


def test_units_that_are_no_experts(source: SourceModel) -> None:
    """They are measured where there are no others, as groups of linears."""
    attention, expert = (source.modules[f"model.layers.0.{name}"] for name in ("self_attn.o_proj", "mlp.experts.1"))
    with pytest.raises(ValueError, match=r"self_attn\.o_proj is not an expert"):
        measure_sensitivities(source, list_units([expert, attention], SCHEMES), TOKENS)
    found = measure_sensitivities(source, list_units([attention], SCHEMES), TOKENS)
    assert found.loss is not None
    assert found.layer.shape == found.loss.shape == (1, len(SCHEMES))
    # Fewer bits change more, and what is left alone changes nothing.
    for scheme, layer, loss in zip(SCHEMES, found.layer[0], found.loss[0], strict=True):
        assert (layer > 0) == (loss > 0) == scheme.is_quantized
