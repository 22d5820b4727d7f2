# SPDX-License-Identifier: Apache-2.0
"""Sensitivities of a dense model's linears equal what the change of one group does to its layer in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compress.test_layer_error import run_layers
from tests.quantization.family_models import make_family
from vllm_ext.compress import linear_error
from vllm_ext.compress.hessian import measure_moments
from vllm_ext.compress.layer_error import measure_sensitivities
from vllm_ext.compress.linear_error import list_linear_groups
from vllm_ext.compress.profile import load_model
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.compress.sensitivity import list_units
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.quantization.plan import Plan
from vllm_ext.quantization.scheme import Scheme

TOKENS = np.random.default_rng(0).integers(3, 4096, (2, 24))
#: The first one twice: columns of a default plan may be the same scheme.
SCHEMES = [Scheme.parse(name) for name in ("w3a16_g32", "w2a16_g64", "w3a16_g32", "w3a8_g32", "w16a16")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    directory: Path = make_family("tiny-llama", tmp_path_factory.mktemp("models") / "m", hidden=128, dtype="fp32")
    return open_source(directory)


@pytest.mark.parametrize("group", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)])
def test_equals_the_change_of_the_whole_layer(
    source: SourceModel, group: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.compress.test_layer_error.TOKENS", TOKENS)
    paths = tuple(f"model.layers.1.{name}" for name in group)
    units = list_units([m for m in list_linear_groups(source, Plan({})) if m.blocks[0].paths == paths], SCHEMES)
    found = measure_sensitivities(source, units, TOKENS)
    whole = load_model(source.directory, torch.float32, "cpu")
    outputs, loss = run_layers(whole)
    loss.backward()
    before, gradient = outputs[1].detach(), outputs[1].grad
    assert gradient is not None
    for column, scheme in enumerate(SCHEMES[:2]):
        with torch.no_grad():
            for path in paths:
                weight = whole.get_parameter(f"{path}.weight")
                weight.copy_(dequantize(round_to_nearest(source.reader.read(f"{path}.weight"), scheme), scheme))
            change = (run_layers(whole)[0][1] - before).double()
            for path in paths:
                whole.get_parameter(f"{path}.weight").copy_(source.reader.read(f"{path}.weight"))
        assert found.layer[0, column] == pytest.approx(float(change.square().sum()), rel=1e-4)
        assert found.loss is not None
        expected = float((change * gradient.double()).square().sum()) * TOKENS[:, 1:].size / 2
        assert found.loss[0, column] == pytest.approx(expected, rel=0.02)  # gradients wait in bf16
    assert found.layer[0, 2] == found.layer[0, 0] != found.layer[0, 3]
    assert found.layer[0, 4] == 0


def test_inputs_are_measured_once_for_each_way_to_round_them(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def count(*arguments: Any, **options: Any) -> Any:
        measured.append(options["name"])
        return measure_moments(*arguments, **options)

    monkeypatch.setattr(linear_error, "measure_moments", count)
    units = list_units([m for m in list_linear_groups(source, Plan({})) if m.layer == 1], SCHEMES)
    found = measure_sensitivities(source, units, TOKENS, gradients=False, rounding="gptq", sweeps=0)
    assert len(units) == 4
    # As they are, and as int8, for all the linears of a group.
    assert sorted(measured) == sorted([unit.module.path for unit in units] * 2)
    nearest = measure_sensitivities(source, units, TOKENS, gradients=False)
    assert (found.layer[:, :2] < nearest.layer[:, :2]).all()
