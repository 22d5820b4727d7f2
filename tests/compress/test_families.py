# SPDX-License-Identifier: Apache-2.0
"""Checkpoint adapters: what every tensor is, and models that cannot be read, by message."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.compress.small_model import CONFIG, EXPERTS, HIDDEN, INTERMEDIATE, edit_tensors, make_tensors, write_model
from vllm_ext.compress.families import FAMILIES, Kind, find_family
from vllm_ext.compress.source import open_source
from vllm_ext.quantization.plan import Plan, PlanError
from vllm_ext.quantization.safetensors_io import CheckpointError

MIXED = {"gate_up": "w3a16_g32", "down": "w4a16_g32"}
LAYER_0 = {f"model.layers.0.mlp.experts.{e}": MIXED for e in range(EXPERTS)}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", make_tensors(dense_layer=1))


def test_modules_of_a_small_model(model: Path) -> None:
    source = open_source(model)
    kinds = Counter(module.kind for module in source.modules.values())
    assert kinds == {Kind.EXPERT: EXPERTS, Kind.ATTENTION: 8, Kind.LINEAR: 3, Kind.ROUTER: 1, Kind.OTHER: 1}
    expert = source.modules["model.layers.0.mlp.experts.3"]
    assert (expert.layer, expert.expert) == (0, 3)
    gate_up, down = expert.blocks
    assert (gate_up.name, gate_up.N, gate_up.K) == ("gate_up", 2 * INTERMEDIATE, HIDDEN)
    assert (down.name, down.N, down.K) == ("down", HIDDEN, INTERMEDIATE)
    tensors = make_tensors(dense_layer=1)
    read = dict(source.read_weights(gate_up))
    assert list(read) == [f"{expert.path}.gate_proj", f"{expert.path}.up_proj"]
    assert all(torch.equal(weight, tensors[f"{path}.weight"]) for path, weight in read.items())


def test_every_weight_of_the_shipped_model_is_known(tiny_moe: str) -> None:
    source = open_source(tiny_moe)
    covered = {f"{path}.weight" for module in source.modules.values() for b in module.blocks for path in b.paths}
    left = {name for name in source.reader.infos if name not in covered}
    assert all(name.endswith("norm.weight") for name in left)
    kinds = Counter(module.kind for module in source.modules.values())
    assert kinds == {Kind.EXPERT: 80, Kind.ATTENTION: 20, Kind.ROUTER: 5, Kind.OTHER: 1}
    order = [module.layer for module in source.modules.values()]
    assert order == sorted(order, key=lambda layer: -1 if layer is None else layer)


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no adapter for model_type 'gpt2'; known families: qwen3_moe"):
        find_family({"model_type": "gpt2"})
    assert find_family({"model_type": "qwen3_moe"}) is FAMILIES[0]


def test_fused_experts_of_another_shape_name_the_way_out(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 8, 8)}
    with pytest.raises(CheckpointError, match=r"of which \[4, 128, 128\] is known: save the model with"):
        open_source(write_model(tmp_path / "fused", tensors))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.0.mlp.experts.2.up_proj.weight", None, r"experts\.2\.up_proj\.weight is missing"),
        (
            "model.layers.0.mlp.experts.2.up_proj.weight",
            torch.zeros(8, HIDDEN),
            r"up_proj.*\[8, 128\], config.json says",
        ),
        ("model.layers.0.mlp.experts.4.up_proj.weight", torch.zeros(8, 8), "experts.4, config.json says 4 experts"),
        (f"{ATTENTION}.q_proj.weight", torch.zeros(128, HIDDEN, dtype=torch.int8), "must be bf16, fp16 or fp32"),
    ],
)
def test_damaged_models(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    directory = write_model(tmp_path / "model")
    edit_tensors(directory, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        open_source(directory)


def test_models_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory: give a local model directory"):
        open_source("org/name")
    quantized = write_model(tmp_path / "quantized", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"is quantized already \(gptq\)"):
        open_source(quantized)
    config = {key: value for key, value in CONFIG.items() if key != "num_experts"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="needs num_experts"):
        open_source(quantized)


@pytest.mark.parametrize("method", ["fp8", ["x"]])
def test_quantization_configs_of_any_kind(tmp_path: Path, method: object) -> None:
    directory = write_model(tmp_path / "quantized", quantization_config=method)
    with pytest.raises(CheckpointError, match=rf"is quantized already \({re.escape(str(method))}\)"):
        open_source(directory)
    # Some tools write the key without a value.
    open_source(write_model(tmp_path / "plain", quantization_config=None))


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "128"), ("num_hidden_layers", None), ("num_experts", -1)])
def test_sizes_that_are_none(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json has {key} = {value!r}, expected a size"):
        open_source(write_model(tmp_path / "model", **{key: value}))


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_layer_that_is_not_there(tmp_path: Path, part: str) -> None:
    tensors = {name: tensor for name, tensor in make_tensors().items() if f"layers.1.{part}" not in name}
    with pytest.raises(CheckpointError, match=rf"says 2 layers, but .* no weight of model\.layers\.1\.{part}"):
        open_source(write_model(tmp_path / "model", tensors))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (".mlp.experts.", r"says 2 layers, but .* no weight of model\.layers\.1\.mlp\.experts: copy it again"),
        (".mlp.gate.", r"says 2 layers, but .* no weight of model\.layers\.\d\.mlp\.gate: copy it again"),
        (".self_attn.k_proj.", r"model\.layers\.1\.self_attn\.k_proj\.weight is missing, which other layers have"),
        (".input_layernorm.", r"model\.layers\.1\.input_layernorm\.weight is missing, which other layers have"),
    ],
)
def test_a_layer_that_is_not_complete(tmp_path: Path, part: str, message: str) -> None:
    """vLLM does not miss tensors of quantized models: it would serve what its memory happened to hold."""
    tensors = make_tensors()
    layer = "" if part == ".mlp.gate." else "layers.1"
    if part == ".mlp.gate.":
        # Of all layers, which have something else beside their experts, as Qwen2-MoE has.
        for number in (0, 1):
            tensors[f"model.layers.{number}.mlp.down_proj.weight"] = torch.zeros(HIDDEN, CONFIG["intermediate_size"])
    tensors = {name: tensor for name, tensor in tensors.items() if f"{layer}{part}" not in name}
    with pytest.raises(CheckpointError, match=message):
        open_source(write_model(tmp_path / "model", tensors))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_what_stands_outside_of_the_layers(tmp_path: Path, name: str) -> None:
    tensors = {**make_tensors(), "lm_head.weight": torch.zeros(CONFIG["vocab_size"], HIDDEN)}
    open_source(write_model(tmp_path / "whole", tensors, tie_word_embeddings=False))
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)} is missing.*: copy the checkpoint again"):
        open_source(write_model(tmp_path / "damaged", tensors, tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({f"{ATTENTION}.o_porj": "w4a16_g32"}, r"o_porj, which the model does not have \(nearest: .*o_proj\)"),
        ({"model.layers.0.mlp.gate": "w8a16_g32"}, "mlp.gate, which is a router and stays as it is"),
        ({"model.embed_tokens": "w8a16_g32"}, "embed_tokens, which is not an expert, attention or dense linear"),
        ({f"{ATTENTION}.q_proj": "w4a16_g32"}, "q_proj is one fused layer .*k_proj: not in the plan"),
        (
            {f"{ATTENTION}.{name}_proj": f"w{bits}a16_g32" for name, bits in (("q", 4), ("k", 3), ("v", 4))},
            "parts have different schemes .*q_proj: w4a16_g32, k_proj: w3a16_g32",
        ),
        ({"model.layers.1.mlp.gate_proj": "w4a16_g32"}, "gate_proj is one fused layer .*up_proj: not in the plan"),
        (
            {f"{ATTENTION}.o_proj": "w4a16_g-1", **dict(list(LAYER_0.items())[:-1])},
            r"names 3 of the 4 experts .*experts\.3",
        ),
        ({**LAYER_0, "model.layers.0.mlp.experts.9": MIXED}, r"names .*experts\.9, but the layer has 4 experts"),
        ({f"model.layers.1.mlp.experts.{e}": MIXED for e in range(EXPERTS)}, "does not have"),
        (
            {path: {**MIXED, "down": "w4a16_g128"} for path in LAYER_0},
            r"experts\.0 down: scheme w4a16_g128: group size 128 does not divide K=64; group sizes that do: 32, 64",
        ),
    ],
)
def test_plans_the_model_cannot_take(model: Path, plan: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        open_source(model).check_plan(Plan.parse(plan))


def test_plan_the_model_takes(model: Path) -> None:
    linears = {f"{ATTENTION}.{name}_proj": "w8a8_g-1_sym" for name in "qkv"}
    dense = {f"model.layers.1.mlp.{name}_proj": "w4a16_g64" for name in ("gate", "up")}
    open_source(model).check_plan(Plan.parse({**linears, **dense, **LAYER_0}))
