# SPDX-License-Identifier: Apache-2.0
"""What every family must do: all of its weights known, run layer by layer, rotated, rounded, packed and read again."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantization.family_models import FAMILY_PRESETS, make_family, make_full_plan
from tests.quantization.packed_models import find_scheme
from vllm_ext.compress.cache import hash_source
from vllm_ext.compress.evaluation import load_dequantized
from vllm_ext.compress.families import FAMILIES, QUANTIZABLE, Kind, find_family
from vllm_ext.compress.families.layout import LAYOUTS, REFUSED, format_table
from vllm_ext.compress.linear_error import has_experts
from vllm_ext.compress.profile import load_model, measure_profile, stream_profile
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.rotation import rotate_source
from vllm_ext.compress.rounders import NearestRounder
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.compress.router_repair import repair_routers
from vllm_ext.compress.sequential import split_plan
from vllm_ext.compress.source import SourceModel, open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.checkpoint import list_linears, validate_checkpoint
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.safetensors_io import CheckpointError
from vllm_ext.quantization.scheme import Scheme

MOE = [preset for preset, kind in FAMILY_PRESETS.items() if kind not in ("llama", "qwen2", "qwen3")]
DENSE = [preset for preset in FAMILY_PRESETS if preset not in MOE]
VOCABULARY = 4096
SLOW = pytest.mark.slow
#: What takes a second for each family is done for the most different ones, for all with the slow tests.
FEW = ("tiny-deepseek-v2-grouped", "tiny-mixtral", "tiny-qwen2-moe", "tiny-qwen2")


def mark_slow(presets: Iterable[str]) -> list[Any]:
    return [preset if preset in FEW else pytest.param(preset, marks=SLOW) for preset in presets]


def randomize_gains(directory: Path) -> None:
    """Norms of random models are ones, which hide a norm that is folded into the wrong weight."""
    generator = torch.Generator().manual_seed(5)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in sorted(tensors.items()):
        if name.endswith("norm.weight"):
            tensors[name] = tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """preset -> directory of its float32 model, made when it is first asked for."""

    @functools.cache
    def make(preset: str) -> Path:
        directory = make_family(preset, tmp_path_factory.mktemp("models") / preset, hidden=128, dtype="fp32")
        randomize_gains(directory)
        return directory

    return make


def draw_windows(windows: int = 3, context: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (windows, context))


def stream_logits(source: SourceModel, windows: np.ndarray) -> torch.Tensor:
    """Logits of all positions but the last of each window, layer by layer."""
    stream = LayerStream(source, windows)
    outputs: list[torch.Tensor] = []
    for layer in stream.layers():
        outputs = layer.outputs
    return torch.cat([logits for logits, _ in stream.iterate_logits(outputs)])


def test_the_table_has_no_family_twice() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
    assert not set(types) & set(REFUSED)
    assert set(FAMILY_PRESETS.values()) == set(types)
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


def test_the_page_has_the_table(repository: Path) -> None:
    page = (repository / "docs" / "mxmoe.md").read_text(encoding="utf-8")
    assert "\n".join(["", "", *format_table(), ""]) in page
    for name, _ in REFUSED.values():
        assert name in page


@pytest.mark.parametrize("preset", FAMILY_PRESETS)
def test_every_weight_is_known(models: Any, preset: str) -> None:
    source = open_source(models(preset))
    for module in source.modules.values():
        if module.layer is not None and module.kind is Kind.OTHER:
            assert source.family.explain_kept(module.path) is not None, module.path
    covered = {f"{path}.weight" for module in source.modules.values() for b in module.blocks for path in b.paths}
    assert all(info.shape[1:] == () for name, info in source.reader.infos.items() if name not in covered)
    kinds = {module.kind for module in source.modules.values()}
    assert (Kind.EXPERT in kinds) == (Kind.ROUTER in kinds) == has_experts(source) == (preset in MOE)


@pytest.mark.parametrize("preset", mark_slow(FAMILY_PRESETS))
def test_layer_by_layer_rotated_or_not_is_the_model(models: Any, preset: str) -> None:
    source, windows = open_source(models(preset)), draw_windows()
    with torch.inference_mode():
        whole = load_model(source.directory, torch.float32, "cpu")(input_ids=torch.from_numpy(windows)).logits
    expected = whole[:, :-1].flatten(0, 1)
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(stream_logits(source, windows), expected, rtol=1e-4, atol=1e-4)
    rotated = rotate_source(source, seed=2)
    torch.testing.assert_close(stream_logits(rotated, windows), expected, rtol=1e-3, atol=1e-3)
    # Something was rotated: every reader of the stream is another matrix.
    residual = source.family.describe_residual(source.config, source.reader.infos)
    readers = [*residual.readers, *(name for name in residual.writers if name.endswith("weight"))]
    assert len(readers) >= 7 * 2
    for name in readers:
        assert not torch.allclose(source.reader.read(name), rotated.reader.read(name), atol=0.01)


@pytest.mark.parametrize("preset", mark_slow(MOE))
def test_routing_is_counted_under_the_names_of_the_checkpoint(models: Any, preset: str) -> None:
    source, windows = open_source(models(preset)), draw_windows()
    streamed = stream_profile(source, windows)
    whole = measure_profile(load_model(source.directory, torch.float32, "cpu"), source.family, windows)
    layers = {m.path.rpartition(".")[0] for m in source.modules.values() if m.kind is Kind.EXPERT}
    assert set(streamed.counts) == set(whole.counts) == layers
    for layer in layers:
        assert np.abs(streamed.counts[layer] - whole.counts[layer]).sum() <= 2


@pytest.mark.parametrize("preset", mark_slow(MOE))
def test_routers_are_fitted(models: Any, preset: str) -> None:
    source = open_source(models(preset))
    experts = [m.path for m in source.modules.values() if m.kind is Kind.EXPERT]
    plan = Plan.parse({path: {"gate_up": "w2a16_g-1", "down": "w2a16_g-1"} for path in experts})
    linears = [m.path for m in source.modules.values() if m.kind is Kind.ATTENTION]
    plan = Plan({**dict.fromkeys(linears, Scheme.parse("w2a16_g-1")), **plan.modules})

    def read_codes(layer: Any) -> Any:
        return NearestRounder().round_layer(layer, *split_plan(source, plan, layer.index))

    windows = draw_windows(12, 48)
    found = repair_routers(source, plan, read_codes, windows[:8], windows[8:])
    routers = {m.layer for m in source.modules.values() if m.kind is Kind.ROUTER}
    assert {layer.layer for layer in found.layers} == routers
    assert 0 <= found.changed_after <= 1
    assert found.kept == (found.loss_after < found.loss_before)
    assert {name.rpartition(".")[2] for name in found.gates} <= {"weight"}
    assert all(source.modules[name.removesuffix(".weight")].kind is Kind.ROUTER for name in found.gates)


@pytest.fixture(scope="module")
def reader(repository: Path) -> dict[str, Any]:
    """The functions printed in docs/format.md."""
    text = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/format.md", "exec"), namespace)
    return namespace


def iterate_linears(plan: Plan) -> Iterator[tuple[str, Scheme]]:
    for module, schemes in plan.modules.items():
        yield from list_linears(module, schemes).items()


@pytest.mark.parametrize("preset", FAMILY_PRESETS)
def test_the_printed_reader_reads_the_output(models: Any, reader: dict[str, Any], preset: str, tmp_path: Path) -> None:
    model = models(preset)
    plan = make_full_plan(model)
    quantize_model(model, tmp_path / "packed", plan=plan, shard_bytes=3_000_000)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    original = load_file(model / "model.safetensors")
    tensors = reader["load"](tmp_path / "packed", "model.layers.")
    generator = torch.Generator().manual_seed(0)
    linears = dict(iterate_linears(plan))
    assert set(linears) == {
        name.removesuffix(".weight") for name in original if find_scheme(plan, name) is not None
    } | {path for path, scheme in linears.items() if not scheme.is_quantized}
    for path, scheme in linears.items():
        weight = original[f"{path}.weight"]
        x = torch.randn(3, weight.shape[1], generator=generator)
        rounded = dequantize(round_to_nearest(weight, scheme), scheme) if scheme.is_quantized else weight
        found = reader["linear"](x.numpy(), tensors, path, str(scheme))
        np.testing.assert_allclose(found, (x @ rounded.T).numpy(), rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("preset", FEW)
def test_codes_are_chosen_by_the_inputs_of_each_linear(models: Any, preset: str, tmp_path: Path) -> None:
    """Where some inputs are far larger than others, GPTQ with the right inputs is far better than none."""
    model, losses = tmp_path / "model", []
    shutil.copytree(models(preset), model)
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(6)
    for name, tensor in sorted(tensors.items()):
        if name.endswith("layernorm.weight"):
            tensors[name] = tensor * (0.3 + 4 * (torch.rand(tensor.shape, generator=generator) < 0.06))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    plan = Plan(
        {
            path: ExpertSchemes(*[Scheme.parse("w3a16_g-1")] * 2)
            if isinstance(schemes, ExpertSchemes)
            else Scheme.parse("w3a16_g-1")
            for path, schemes in make_full_plan(model).modules.items()
        }
    )
    windows = np.random.default_rng(3).integers(3, VOCABULARY, (4, 64))
    expected = stream_logits(open_source(model), windows)
    for rounding in ("rtn", "gptq", "gptaq"):
        output = tmp_path / rounding
        quantize_model(
            model, output, plan=plan, rounding=rounding, sweeps=0, calibration=["random"], num_windows=2
        )  # fmt: skip
        with torch.inference_mode():
            found = load_dequantized(output)(input_ids=torch.from_numpy(windows)).logits[:, :-1].flatten(0, 1)
        losses.append(float((found - expected).square().mean()))
    assert max(losses[1:]) < 0.7 * losses[0]


@pytest.mark.parametrize("preset", MOE)
def test_fused_experts_are_the_same_model(models: Any, preset: str, tmp_path: Path) -> None:
    model = models(preset)
    load_model(model, torch.float32, "cpu").save_pretrained(tmp_path / "fused", save_original_format=False)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert any(name.endswith(".experts.gate_up_proj") and tensor.dim() == 3 for name, tensor in stored.items())
    one, other = open_source(model), open_source(tmp_path / "fused")
    assert set(one.reader.infos) == set(other.reader.infos)
    same_config = {**other.config, "_name_or_path": one.config.get("_name_or_path")}
    assert {**one.config, "_name_or_path": None} == {**same_config, "_name_or_path": None}
    for name in one.reader.infos:
        assert torch.equal(one.reader.read(name), other.reader.read(name)), name
    if one.config == other.config:
        assert hash_source(one) == hash_source(other)
    name = next(name for name in stored if name.endswith(".experts.down_proj"))
    stored[name] = stored[name].mT.contiguous()
    if stored[name].shape[1] != stored[name].shape[2]:
        save_file(stored, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"experts fused into one tensor, of which .* is known"):
            open_source(tmp_path / "fused")


@pytest.mark.parametrize("preset", DENSE)
@pytest.mark.parametrize("rounding", ["rtn", pytest.param("gptq", marks=SLOW)])
def test_bits_of_a_dense_model_are_those_of_its_linears(
    models: Any, preset: str, rounding: str, tmp_path: Path
) -> None:
    model = models(preset)
    schemes = [Scheme.parse(name) for name in ("w2a16_g32", "w3a16_g32", "w6a16_g32")]
    calibration = [] if rounding == "rtn" else ["random"]
    report = quantize_model(
        model, tmp_path / "out", bits=4.0, schemes=schemes, rounding=rounding, calibration=calibration, num_windows=4,
        sweeps=0,
    )  # fmt: skip
    plan = validate_checkpoint(tmp_path / "out").plan
    source = open_source(model)
    assert set(plan.modules) == {path for path, module in source.modules.items() if module.kind in QUANTIZABLE}
    assert report.planned.bits_per_weight is not None
    assert 3.2 < report.planned.bits_per_weight <= 4.0
    source.check_plan(plan)
    assert report.planned.measure == ("loss" if calibration else "weight")
    if report.planned.chosen == "mixed":
        assert len(set(plan.modules.values())) > 1


def test_what_is_about_experts_is_refused_for_dense_models(models: Any, tmp_path: Path) -> None:
    options = {"plan": make_full_plan(models("tiny-llama")), "calibration": ["random"], "num_windows": 4}
    for name in ("balanced", "repair_router"):
        with pytest.raises(
            ValueError, match=rf"--{name.replace('_', '-')} is about routed experts, of which .* has none"
        ):
            quantize_model(models("tiny-llama"), tmp_path / "out", rounding="gptq", **{name: True}, **options)


def test_latent_attention(models: Any) -> None:
    """One or two linears for the queries, the fused pair, and the linear that stays."""
    prefix = "model.layers.0.self_attn"
    source = open_source(models("tiny-deepseek-v2"))
    source.check_plan(Plan.parse({f"{prefix}.q_proj": "w4a16_g32", f"{prefix}.kv_a_proj_with_mqa": "w3a16_g32"}))
    with pytest.raises(PlanError, match=r"kv_b_proj, which is not .* stays as it is, because vLLM's latent attention"):
        source.check_plan(Plan.parse({f"{prefix}.kv_b_proj": "w4a16_g32"}))
    grouped = open_source(models("tiny-deepseek-v2-grouped"))
    with pytest.raises(PlanError, match=r"one fused layer in vLLM.*kv_a_proj_with_mqa: not in the plan"):
        grouped.check_plan(Plan.parse({f"{prefix}.q_a_proj": "w4a16_g32"}))


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families_are_named(model_type: str) -> None:
    with pytest.raises(CheckpointError, match=rf"does not support {REFUSED[model_type][0]} .*; serve it without mxmoe"):
        find_family({"model_type": model_type})


def test_tensors_that_no_family_has(models: Any, tmp_path: Path) -> None:
    source = open_source(models("tiny-llama"))
    infos = {**source.reader.infos, "model.layers.0.mlp.extra_proj.weight": source.reader.infos["lm_head.weight"]}
    with pytest.raises(CheckpointError, match=r"extra_proj\.weight is no tensor of Llama"):
        source.family.describe_residual(source.config, infos)
    moe = open_source(models("tiny-olmoe"))
    infos = {**moe.reader.infos, "model.layers.0.mlp.experts.0.bias_proj.weight": moe.reader.infos["lm_head.weight"]}
    with pytest.raises(CheckpointError, match=r"bias_proj\.weight .* is no weight of an expert of OLMoE"):
        moe.family.list_modules(moe.config, infos)


def test_sliding_windows_that_differ_between_layers(models: Any) -> None:
    source = open_source(models("tiny-qwen3"))
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}
    mixed = SourceModel(source.directory, {**source.config, **kinds}, source.family, source.modules, source.reader)
    with pytest.raises(CheckpointError, match="through different masks"):
        LayerStream(mixed, draw_windows()).embed()
    # Windows that reach further than the text are no windows.
    wide = {**source.config, **kinds, "sliding_window": 512}
    LayerStream(
        SourceModel(source.directory, wide, source.family, source.modules, source.reader), draw_windows()
    ).embed()
