# SPDX-License-Identifier: Apache-2.0
"""Layer by layer gives what the whole model gives: outputs, loss, gradients, and what experts see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.compress.runnable_model import EXPERTS, LAYERS, VOCABULARY, make_tokens, write_runnable
from tests.compress.small_model import edit_tensors
from vllm_ext.compress.families.decoder import apply_gate
from vllm_ext.compress.profile import load_model, measure_profile
from vllm_ext.compress.source import open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.safetensors_io import CheckpointError

TOKENS = make_tokens()


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "hidden_size": 96},
        {"use_sliding_window": True, "sliding_window": 8, "norm_topk_prob": False},
    ],
    ids=["tied", "bias", "sliding"],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("models") / "model", **request.param)


def run_whole(model: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, Any]:
    """(outputs of the layers, gradients of the loss at them, loss, the model)."""
    whole = load_model(model, torch.float32, "cpu")
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for layer in whole.model.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(keep)
    ids = torch.from_numpy(TOKENS)
    logits = whole(input_ids=ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = [output.grad for output in outputs if output.grad is not None]
    assert len(gradients) == LAYERS
    return outputs, gradients, loss.detach(), whole


@pytest.mark.parametrize("batch_windows", [4, 1, 9])
def test_outputs_and_loss(model: Path, batch_windows: int) -> None:
    outputs, _, loss, _ = run_whole(model)
    stream = LayerStream(open_source(model), TOKENS, batch_windows=batch_windows)
    last: list[torch.Tensor] = []
    for layer in stream.layers():
        assert [len(hidden) for hidden in layer.inputs] == [
            len(batch) for batch in torch.arange(6).split(batch_windows)
        ]
        torch.testing.assert_close(torch.cat(layer.outputs), outputs[layer.index].detach(), rtol=1e-4, atol=1e-5)
        last = layer.outputs
    assert stream.loss(last) == pytest.approx(float(loss), rel=1e-5)


def test_logits_in_parts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ext.compress.streaming.HEAD_ROWS", 40)
    stream = LayerStream(open_source(model), TOKENS, batch_windows=4)
    for layer in stream.layers():
        last = layer.outputs
    whole = load_model(model, torch.float32, "cpu")
    with torch.no_grad():
        expected = whole(input_ids=torch.from_numpy(TOKENS), use_cache=False).logits[:, :-1].flatten(0, 1)
    parts = []
    # Two at a time, as two models are compared: the caller keeps its gradients, in between and afterwards.
    for (logits, targets), (again, _) in zip(stream.iterate_logits(last), stream.iterate_logits(last), strict=True):
        assert torch.is_grad_enabled()
        assert not logits.requires_grad
        assert torch.equal(logits, again)
        parts.append((logits, targets))
    assert torch.is_grad_enabled()
    assert len(parts) > 3
    torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), expected, rtol=1e-4, atol=1e-5)
    assert torch.cat([targets for _, targets in parts]).tolist() == TOKENS[:, 1:].flatten().tolist()
    for place, (logits, _) in enumerate(stream.iterate_logits(last, every=3)):
        assert torch.equal(logits, parts[3 * place][0])
    assert place == (len(parts) - 1) // 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_gradients(model: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    _, expected, _, _ = run_whole(model)
    stream = LayerStream(open_source(model), TOKENS, batch_windows=4)
    found = []
    for index, parts in stream.loss_gradients(tmp_path, dtype):
        found.append(index)
        difference = torch.cat(parts) - expected[index]
        assert float(difference.norm() / expected[index].norm()) < tolerance
    assert found == list(reversed(range(LAYERS)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_loss_that_is_no_number_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_runnable(tmp_path / "model")
    tensor = open_source(directory).reader.read(name).clone()
    tensor.view(-1)[3] = float("nan")
    edit_tensors(directory, **{name: tensor})
    stream = LayerStream(open_source(directory), TOKENS)
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match=r"loss of the windows is nan: a weight of .*model is damaged"):
        next(stream.loss_gradients(tmp_path / "work"))
    for layer in stream.layers():
        outputs = layer.outputs
    with pytest.raises(ValueError, match="loss of the windows is nan"):
        stream.loss(outputs)


def test_blocks_rebuild_the_output_of_the_experts(model: Path) -> None:
    """Adding up what the blocks give, by routing weight, is what the layer's experts give."""
    source = open_source(model)
    profile = measure_profile(load_model(model, torch.float32, "cpu"), source.family, TOKENS)
    for layer in LayerStream(source, TOKENS).layers():
        experts = source.family.find_experts(layer.module)
        if layer.index == 1:
            assert (experts, layer.routed, layer.num_experts) == (None, None, 0)
            continue
        assert experts is not None
        assert layer.routed is not None
        routed, counts = layer.routed, []
        total = torch.zeros_like(routed.hidden)
        for expert in range(EXPERTS):
            rows, routing = routed.find_tokens(expert)
            counts.append(len(rows))
            module = source.modules[f"model.layers.{layer.index}.mlp.experts.{expert}"]
            weights = [source.family.expert_weight(experts, expert, block) for block in ("gate_up", "down")]
            for block, weight in zip(module.blocks, weights, strict=True):
                assert torch.equal(weight, torch.cat([part for _, part in source.read_weights(block)]).float())
            output = functional.linear(apply_gate(functional.linear(routed.hidden[rows], weights[0])), weights[1])
            total.index_add_(0, rows, output * routing[:, None])
        expected = experts(routed.hidden, routed.ids, routed.weights)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
        assert counts == profile.counts[f"model.layers.{layer.index}.mlp.experts"].tolist()


def test_one_layer_of_weights_at_a_time(model: Path) -> None:
    stream = LayerStream(open_source(model), TOKENS)
    kept = []
    for layer in stream.layers():
        kept.append(layer)
        alive = [sum(parameter.numel() for parameter in one.module.parameters()) for one in kept]
        assert alive[-1] > 0
        assert alive[:-1] == [0] * (len(kept) - 1)
    assert all(parameter.is_meta for parameter in stream._model.parameters())


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 4), np.int64), "not empty"),
        (np.zeros(4, np.int64), r"got \[4\]"),
        (np.full((1, 4), VOCABULARY), f"hold tokens from {VOCABULARY} to {VOCABULARY}, the model has 0 to"),
    ],
)
def test_bad_windows(model: Path, windows: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerStream(open_source(model), windows)


def test_a_tensor_that_is_missing_or_too_many(tmp_path: Path) -> None:
    """In every layer: one that a single layer lacks is missed when the checkpoint is opened."""
    directory = write_runnable(tmp_path / "model")

    def change(name: str, value: torch.Tensor | None) -> None:
        names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS)]
        edit_tensors(directory, **{name: None if value is None else value.clone() for name in names})

    change("q_norm.weight", None)
    with pytest.raises(CheckpointError, match=r"layer 0 of .* lacks self_attn\.q_norm\.weight"):
        next(LayerStream(open_source(directory), TOKENS).layers())
    change("q_norm.weight", torch.ones(16))
    change("q_proj.bias", torch.ones(64))
    with pytest.raises(CheckpointError, match=r"has the unexpected self_attn\.q_proj\.bias"):
        next(LayerStream(open_source(directory), TOKENS).layers())


def test_batches_of_another_size_are_refused(model: Path) -> None:
    stream = LayerStream(open_source(model), TOKENS, batch_windows=3)
    layer = next(stream.layers())
    with pytest.raises(ValueError, match=r"batch of 2 windows: this stream has \[3\]"):
        layer.run(layer.module, [layer.inputs[0][:2]])


def test_experts_with_another_activation(tmp_path: Path) -> None:
    directory = write_runnable(tmp_path / "model", hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act = 'gelu'; experts are run with silu alone"):
        LayerStream(open_source(directory), TOKENS)
