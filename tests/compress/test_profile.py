# SPDX-License-Identifier: Apache-2.0
"""The activation profile equals a count by hand of what the routers chose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compress.small_model import EXPERTS, LAYERS, make_tensors, write_model
from vllm_ext.compress.families import find_family
from vllm_ext.compress.profile import ActivationProfile, load_model, measure_profile, stream_profile
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.safetensors_io import CheckpointError

LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = make_tensors()
    for layer in range(LAYERS):
        for name in ("post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            size = 32 if "self" in name else 128
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(size).bfloat16()
    return write_model(tmp_path_factory.mktemp("models") / "model", tensors, max_position_embeddings=64)


def test_profile_equals_a_count_by_hand(directory: Path) -> None:
    model = load_model(directory, torch.float32, "cpu")
    windows = np.random.default_rng(0).integers(0, 96, (6, 20))
    family = find_family({"model_type": "qwen3_moe"})
    hooks = [len(router._forward_hooks) for router in family.find_routers(model).values()]
    profile = measure_profile(model, family, windows)
    assert [len(router._forward_hooks) for router in family.find_routers(model).values()] == hooks
    assert list(profile.counts) == [f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)]
    assert profile.tokens == 120
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(windows), output_router_logits=True).router_logits
    for layer, scores in zip(profile.counts, logits, strict=True):
        weights, ids = scores.float().softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(EXPERTS):
            assert profile.counts[layer][expert] == int((ids == expert).sum())
            assert profile.mass[layer][expert] == pytest.approx(float(weights[ids == expert].sum()), rel=1e-5)
        chosen = torch.zeros(len(ids), EXPERTS).scatter_(1, ids, 1.0)
        assert np.array_equal(profile.coactivation[layer], (chosen.T @ chosen).long().numpy())
        assert np.array_equal(np.diagonal(profile.coactivation[layer]), profile.counts[layer])
        assert profile.counts[layer].sum() == 240
        assert profile.mass[layer].sum() == pytest.approx(120, rel=1e-5)


def test_streaming_gives_the_same_profile(directory: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 96, (6, 20))
    source = open_source(directory)
    whole = measure_profile(load_model(directory, torch.float32, "cpu"), source.family, windows)
    streamed = stream_profile(source, windows)
    assert streamed.tokens == whole.tokens
    assert list(streamed.counts) == list(whole.counts)
    for layer in whole.counts:
        assert np.array_equal(streamed.coactivation[layer], whole.coactivation[layer])
        assert streamed.mass[layer] == pytest.approx(whole.mass[layer], rel=1e-5)


def test_layers_of_the_model_are_those_of_the_checkpoint(directory: Path) -> None:
    model, source = load_model(directory, torch.float32, "cpu"), open_source(directory)
    experts = {path.rpartition(".")[0] for path, module in source.modules.items() if module.expert is not None}
    assert set(source.family.find_routers(model)) == experts


def test_frequencies_never_vanish() -> None:
    profile = ActivationProfile(10, {LAYER: np.array([0, 10, 6])}, {LAYER: np.array([0.0, 5.0, 5.0])})
    assert profile.frequencies(LAYER).tolist() == pytest.approx([1 / 19, 11 / 19, 7 / 19])


def test_json_round_trip() -> None:
    profile = ActivationProfile(4, {LAYER: np.array([1, 7])}, {LAYER: np.array([0.25, 3.75])})
    value = json.loads(json.dumps(profile.to_json()))
    assert ActivationProfile.from_json(value).coactivation == {}
    profile = ActivationProfile(4, profile.counts, profile.mass, {LAYER: np.array([[1, 0], [0, 7]])})
    value = json.loads(json.dumps(profile.to_json()))
    again = ActivationProfile.from_json(value)
    assert again.coactivation[LAYER].dtype == np.int64
    assert again.to_json() == profile.to_json()
    assert again.counts[LAYER].dtype == np.int64
    with pytest.raises(CheckpointError, match="not an activation profile"):
        ActivationProfile.from_json({"tokens": 3})


def test_models_that_cannot_be_profiled(directory: Path) -> None:
    family = find_family({"model_type": "qwen3_moe"})
    with pytest.raises(CheckpointError, match="has no routed experts"):
        measure_profile(torch.nn.Linear(2, 2), family, np.zeros((1, 4), np.int64))
    model = load_model(directory, torch.float32, "cpu")
    with torch.no_grad():
        next(iter(family.find_routers(model).values())).weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"router of model\.layers\.0\.mlp\.experts gave NaN"):
        measure_profile(model, family, np.zeros((1, 4), np.int64))
