# SPDX-License-Identifier: Apache-2.0
"""The pipeline: true bytes against the budget, determinism, what stays as it was, plans given, bad input by message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.compress.small_model import EXPERTS, HIDDEN, LAYERS, edit_tensors, make_tensors, write_model
from vllm_ext.compress.allocation import AllocationError
from vllm_ext.compress.evaluation import load_dequantized, measure_perplexity
from vllm_ext.compress.plan_file import read_plan
from vllm_ext.compress.planning import make_plan
from vllm_ext.compress.profile import ActivationProfile, load_model
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.compress.sensitivity import list_units, measure_weight_errors, weigh_by_frequency
from vllm_ext.compress.source import open_source
from vllm_ext.evaluate import measure_checkpoint
from vllm_ext.quantization.checkpoint import list_linears, read_module, unpack_weight, validate_checkpoint
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.safetensors_io import CheckpointError
from vllm_ext.quantization.scheme import Scheme

ATTENTION = {f"model.layers.{layer}.self_attn.{name}_proj": "w8a16_g64" for layer in range(LAYERS) for name in "qkv"}
EXPERT = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = make_tensors()
    # An expert with far larger weights: it is the one that needs the bits.
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{EXPERT}.2.{name}.weight"] *= 8
    return write_model(tmp_path_factory.mktemp("models") / "small", tensors)


def stored_bytes(directory: Path) -> int:
    checkpoint = validate_checkpoint(directory)
    return sum(
        tensor.nbytes
        for module in checkpoint.plan.modules
        for tensors in read_module(checkpoint, module).values()
        for tensor in tensors.values()
    )


@pytest.mark.parametrize("bits", [2.5, 3.25, 4.25, 6.0])
@pytest.mark.parametrize("uniform", [False, True])
def test_bits_are_true_bytes_below_the_budget(model: Path, tmp_path: Path, bits: float, uniform: bool) -> None:
    report = quantize_model(model, tmp_path / "out", bits=bits, uniform=uniform)
    weights = LAYERS * EXPERTS * 3 * 64 * HIDDEN
    assert report.planned.quantized_weights == weights
    assert report.planned.quantized_bytes == stored_bytes(tmp_path / "out")
    assert report.planned.bits_per_weight == 8 * stored_bytes(tmp_path / "out") / weights <= bits
    assert report.total_bytes == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    plan = validate_checkpoint(tmp_path / "out").plan
    assert plan.sha256 == report.planned.plan.sha256
    widths = {scheme.weight_bits for schemes in plan.modules.values() for scheme in schemes}  # type: ignore[union-attr]
    assert len(widths) == 1 if uniform else len(widths) > 1
    if not uniform:
        # The smallest step is a bit of a down block: nothing larger may be left over.
        assert bits * weights / 8 - report.planned.quantized_bytes < HIDDEN * 64 / 8
        damaged, other = plan.modules[f"{EXPERT}.2"], plan.modules[f"{EXPERT}.1"]
        assert isinstance(damaged, ExpertSchemes)
        assert isinstance(other, ExpertSchemes)
        assert damaged.down.weight_bits > other.down.weight_bits


def test_ternary_blocks_take_the_mean_below_two_bits(model: Path, tmp_path: Path) -> None:
    schemes = [Scheme.parse(name) for name in ("w1.6a16_g64_sym", "w1.6a16_g-1_sym", "w2a16_g64", "w3a16_g64")]
    report = quantize_model(model, tmp_path / "out", bits=2.1, schemes=schemes)
    plan = validate_checkpoint(tmp_path / "out").plan
    chosen = {str(scheme) for pair in plan.modules.values() for scheme in pair}  # type: ignore[union-attr]
    assert any(name.startswith("w1.6") for name in chosen)
    assert any(not name.startswith("w1.6") for name in chosen)
    weights = LAYERS * EXPERTS * 3 * 64 * HIDDEN
    assert 2.0 < 8 * stored_bytes(tmp_path / "out") / weights <= 2.1
    assert measure_checkpoint(tmp_path / "out")[:2] == (report.planned.bits_per_weight, report.planned.quantized_bytes)


def test_values_are_those_of_round_to_nearest_and_the_rest_is_copied(model: Path, tmp_path: Path) -> None:
    quantize_model(model, tmp_path / "out", bits=3.5, plan=Plan.parse(ATTENTION))
    checkpoint = validate_checkpoint(tmp_path / "out")
    original = load_file(model / "model.safetensors")
    replaced = set()
    for module, schemes in checkpoint.plan.modules.items():
        linears = list_linears(module, schemes)
        for path, tensors in read_module(checkpoint, module).items():
            weight = original[f"{path}.weight"]
            expected = dequantize(round_to_nearest(weight, linears[path]), linears[path])
            assert torch.equal(unpack_weight(tensors, linears[path]), expected)
            replaced.add(f"{path}.weight")
    assert set(ATTENTION) <= set(checkpoint.plan.modules)
    for name, tensor in original.items():
        assert (name in checkpoint.reader.infos) == (name not in replaced)
        if name not in replaced:
            assert torch.equal(checkpoint.reader.read(name), tensor)
            assert checkpoint.reader.infos[name].dtype == tensor.dtype
    assert {"model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.0.self_attn.o_proj"} <= set(
        checkpoint.plan.ignore
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "w8a16_g64" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_same_inputs_same_files(model: Path, tmp_path: Path, shard_bytes: int) -> None:
    for name in ("a", "b"):
        quantize_model(model, tmp_path / name, bits=3.25, seed=5, shard_bytes=shard_bytes)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_plan_reproduces_the_checkpoint(model: Path, tmp_path: Path) -> None:
    planned = make_plan(open_source(model), bits=3.25)
    (tmp_path / "plan.json").write_text(json.dumps(planned.plan.to_config()))
    report = quantize_model(model, tmp_path / "given", plan=read_plan(tmp_path / "plan.json"))
    assert report.planned.plan.sha256 == planned.plan.sha256
    quantize_model(model, tmp_path / "made", bits=3.25)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("given", "made")]
    assert weights[0] == weights[1]


def test_w16a16_and_sixteen_bit_experts_keep_their_weight(model: Path, tmp_path: Path) -> None:
    fixed = {f"{EXPERT}.{e}": {"gate_up": "w16a16", "down": "w4a16_g32"} for e in range(EXPERTS)}
    report = quantize_model(model, tmp_path / "out", plan=Plan.parse(fixed))
    checkpoint = validate_checkpoint(tmp_path / "out")
    assert set(read_module(checkpoint, f"{EXPERT}.0")[f"{EXPERT}.0.gate_proj"]) == {"weight"}
    planned = report.planned
    assert planned.quantized_bytes + planned.unquantized_bytes == stored_bytes(tmp_path / "out")
    assert planned.unquantized_bytes == EXPERTS * 2 * 64 * HIDDEN * 2
    assert planned.bits_per_weight == 4 + 24 / 32
    assert "65536 weights left as they are, 131072 bytes" in planned.describe_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_stays_as_it_is_counts_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors().items()}
    source = write_model(tmp_path / "model", tensors)
    schemes = [Scheme.parse("w4a16_g32"), Scheme.parse("w16a16")]
    report = quantize_model(source, tmp_path / "out", bits=9, schemes=schemes)
    planned = report.planned
    assert planned.quantized_bytes + planned.unquantized_bytes == stored_bytes(tmp_path / "out")
    weights = LAYERS * EXPERTS * 3 * 64 * HIDDEN
    assert planned.quantized_weights + planned.unquantized_weights == weights
    assert 7 < 8 * stored_bytes(tmp_path / "out") / weights <= 9
    # The two commands mean the same by a bit.
    assert measure_checkpoint(tmp_path / "out")[:2] == (planned.bits_per_weight, planned.quantized_bytes)


def test_ignored_experts_get_no_bits(model: Path, tmp_path: Path) -> None:
    ignored = tuple(f"{EXPERT}.{expert}" for expert in range(EXPERTS))
    quantize_model(model, tmp_path / "out", bits=3.5, plan=Plan({}, ignored))
    plan = validate_checkpoint(tmp_path / "out").plan
    assert set(ignored) <= set(plan.ignore)
    assert not set(ignored) & set(plan.modules)
    with pytest.raises(PlanError, match=r"ignore names model\.layer, which the model does not have"):
        quantize_model(model, tmp_path / "no", bits=3.5, plan=Plan({}, ("model.layer",)))
    with pytest.raises(PlanError, match=r"experts\.0 is in the plan and in ignore: take it out of one"):
        Plan.parse({ignored[0]: {"gate_up": "w16a16", "down": "w16a16"}}, ignored)


def test_frequency_moves_bits_to_the_experts_in_use(model: Path) -> None:
    source = open_source(model)
    experts = [module for module in source.modules.values() if module.expert is not None]
    units = list_units(experts, [])
    errors = measure_weight_errors(source, units)
    assert (np.diff(errors, axis=1) < 0).all()
    scheme = units[0].options[1]
    assert scheme is not None
    by_hand = sum(
        float((dequantize(round_to_nearest(weight, scheme), scheme) - weight.float()).square().sum())
        for _, weight in source.read_weights(units[0].block)
    )
    assert errors[0, 1] == pytest.approx(by_hand, rel=1e-6)
    layers = {f"model.layers.{layer}.mlp.experts": EXPERTS for layer in range(LAYERS)}
    counts = {layer: np.array([999, 0, 0, 0]) for layer in layers}
    profile = ActivationProfile(999, counts, counts)
    weighted = weigh_by_frequency(errors, units, profile, layers)
    plain = weigh_by_frequency(errors, units, None, layers)
    assert plain == pytest.approx(errors / EXPERTS)
    ratio = weighted[:, 0] / errors[:, 0]
    for unit, share in zip(units, ratio, strict=True):
        assert share == pytest.approx(1000 / 1003 if unit.module.expert == 0 else 1 / 1003)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"bits": 1.5},
            AllocationError,
            r"1\.5 bits a weight is out of reach: w2a16_g128, .*w2a16_g64.* give 2\.2.* to 8\.2",
        ),
        ({"bits": 9}, AllocationError, r"9 bits a weight is out of reach"),
        ({"bits": 2, "uniform": True}, AllocationError, "out of reach"),
        ({"bits": 5, "schemes": [Scheme.parse("w4a16_g32")]}, AllocationError, r"w4a16_g32 give 4\.7500 to 4\.7500"),
        ({"bits": 4, "schemes": [Scheme.parse("w3a16_g128")]}, PlanError, "down takes none .*128 does not divide K=64"),
        ({"plan": Plan({})}, PlanError, "names no module: give --bits"),
        ({"bits": 3, "rounding": "hqq"}, ValueError, "unknown rounding 'hqq'; known: rtn, gptq, gptaq"),
        ({"bits": 3, "rounding": "gptq"}, ValueError, "--rounding gptq needs calibration text: give --calibration"),
        ({"bits": 3, "balanced": True}, ValueError, "--balanced chooses calibration text for gptq and gptaq"),
        ({"bits": 3, "repair_router": True}, ValueError, "--repair-router needs calibration text: give --calibration"),
        (
            {"bits": 3, "rounding": "gptq", "calibration": ["a.txt"], "sweeps": -1},
            ValueError,
            "sweeps must not be negative, got -1",
        ),
        ({"bits": 3, "calibration": ["nowhere.txt"]}, ValueError, "no usable tokenizer|does not exist"),
    ],
)
def test_bad_requests_leave_nothing(
    model: Path, tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        quantize_model(model, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bits_and_experts_in_the_plan(model: Path, tmp_path: Path) -> None:
    layer_0 = {f"{EXPERT}.{e}": {"gate_up": "w8a16_g64", "down": "w8a16_g64"} for e in range(EXPERTS)}
    plan = make_plan(open_source(model), bits=3.25, fixed=Plan.parse(layer_0)).plan
    assert {name: scheme for name, scheme in plan.to_json().items() if name in layer_0} == layer_0
    assert len(plan.modules) == LAYERS * EXPERTS
    both = {
        name.replace("layers.0", f"layers.{layer}"): value for name, value in layer_0.items() for layer in range(LAYERS)
    }
    with pytest.raises(PlanError, match="no expert is left to allocate bits to"):
        make_plan(open_source(model), bits=3.25, fixed=Plan.parse(both))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_named(tmp_path: Path, value: float) -> None:
    directory = write_model(tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj"
    weight = load_file(directory / "model.safetensors")[f"{name}.weight"]
    weight[5, 7] = value
    edit_tensors(directory, **{f"{name}.weight": weight})
    with pytest.raises(
        ValueError, match=rf"{name}.* has 1 NaN or infinite values.* at \[5, 7\]: the checkpoint is damaged"
    ):
        quantize_model(directory, tmp_path / "out", bits=3.25)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_output_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists already"):
        quantize_model("no such model", tmp_path / "out", bits=3.25)


def test_shipped_model_keeps_its_perplexity(tiny_moe: str, tmp_path: Path) -> None:
    """4 bits cost next to nothing, 2 bits a lot, the mix under 3.25 bits lies between; few windows, so few digits."""
    from vllm_ext.compress.calibration import load_tokenizer, make_windows

    windows = make_windows(
        [Path(tiny_moe) / "kjv_val.txt", Path(tiny_moe) / "py_val.txt"], load_tokenizer(Path(tiny_moe)),
        context=128, num_windows=8,
    )  # fmt: skip
    full = measure_perplexity(load_model(Path(tiny_moe), torch.float32, "cpu"), windows)
    found = {}
    for bits in (2.1875, 3.25, 4.1875):
        quantize_model(tiny_moe, tmp_path / str(bits), bits=bits)
        found[bits] = measure_perplexity(load_dequantized(tmp_path / str(bits)), windows)
    assert found[4.1875] == pytest.approx(full, rel=0.02)
    assert full < found[3.25] < found[2.1875]
    assert found[3.25] == pytest.approx(full, rel=0.08)
