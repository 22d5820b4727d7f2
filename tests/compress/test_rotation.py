# SPDX-License-Identifier: Apache-2.0
"""The rotated model is the same function, as an ordinary checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compress.runnable_model import make_tokens, write_runnable
from tests.compress.small_model import edit_tensors
from vllm_ext.compress.profile import load_model
from vllm_ext.compress.rotation import Rotation, rotate_source
from vllm_ext.compress.source import open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.checkpoint import write_plain_checkpoint
from vllm_ext.quantization.safetensors_io import CheckpointError


@given(size=st.integers(2, 200), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_orthogonal_and_flat(size: int, seed: int) -> None:
    matrix = Rotation(size, seed).apply(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    # Each input spreads over all outputs: no entry is large. The cosine part of an odd size allows sqrt(2).
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-9


def test_same_seed_same_matrix_and_hadamard_values() -> None:
    one, same, other = (Rotation(16, seed).apply(torch.eye(16)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(one.abs(), torch.full((16, 16), 0.25, dtype=torch.float64))
    rows = torch.randn(5, 3, 16)
    torch.testing.assert_close(Rotation(16, 3).apply(rows), rows.double() @ one)
    with pytest.raises(ValueError, match="at least two dimensions, got 1"):
        Rotation(1)


MODELS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "attention_bias": True, "hidden_size": 96},
    {"hidden_size": 40, "norm_topk_prob": False},
]


@pytest.mark.parametrize("changes", MODELS, ids=["tied", "bias, 3*32", "5*8"])
def test_logits_are_unchanged(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = write_runnable(tmp_path / "model", **changes)
    source = open_source(directory)
    rotated = rotate_source(source, seed=2)
    assert rotated.config["tie_word_embeddings"] is False
    write_plain_checkpoint(
        tmp_path / "rotated", config=rotated.config, infos=rotated.reader.infos,
        tensors=((name, rotated.reader.read(name)) for name in rotated.reader.infos), companions=directory,
    )  # fmt: skip
    ids = torch.from_numpy(make_tokens())
    with torch.inference_mode():
        expected, found = (
            load_model(place, torch.float32, "cpu")(input_ids=ids).logits for place in (directory, tmp_path / "rotated")
        )
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    changed = [
        name
        for name in source.reader.infos
        if not torch.equal(source.reader.read(name).float(), rotated.reader.read(name).float())
    ]
    kept = set(source.reader.infos) - set(changed)
    assert all("q_norm" in name or "k_norm" in name or name.endswith("bias") for name in kept)
    assert set(rotated.modules) >= {"lm_head", "model.embed_tokens"}


def test_outliers_become_mild(tmp_path: Path) -> None:
    source = open_source(write_runnable(tmp_path / "model"))
    rotated = rotate_source(source)

    def kurtosis(weight: torch.Tensor) -> float:
        centred = weight.double() - weight.double().mean()
        return float(centred.pow(4).mean() / centred.square().mean() ** 2)

    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert kurtosis(source.reader.read(name)) > 6
    assert 2.5 < kurtosis(rotated.reader.read(name)) < 3.5


def test_types_stay_unless_another_is_asked_for(tmp_path: Path) -> None:
    directory = write_runnable(tmp_path / "model", dtype=torch.bfloat16)
    source = open_source(directory)
    own, wide = rotate_source(source), rotate_source(source, dtype=torch.float32)
    assert {name: info for name, info in own.reader.infos.items() if name != "lm_head.weight"} == source.reader.infos
    for name in own.reader.infos:
        assert own.reader.read(name).dtype == own.reader.infos[name].dtype == torch.bfloat16
        assert wide.reader.read(name).dtype == wide.reader.infos[name].dtype
        torch.testing.assert_close(own.reader.read(name).float(), wide.reader.read(name).float(), rtol=0.01, atol=1e-6)
    losses = []
    for model in (source, wide, own):
        stream = LayerStream(model, make_tokens())
        outputs: list[torch.Tensor] = []
        for layer in stream.layers():
            outputs = layer.outputs
        losses.append(stream.loss(outputs))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.02)


def test_a_stream_of_another_width_is_refused(tmp_path: Path) -> None:
    directory = write_runnable(tmp_path / "model")
    edit_tensors(directory, model__layers__0__mlp__gate__weight=torch.zeros(4, 32))
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight is .*32.*, config.json says hidden_size = 64"):
        rotate_source(open_source(directory))
    edit_tensors(directory, model__layers__0__mlp__gate__weight=torch.zeros(4, 64), model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        rotate_source(open_source(directory))
