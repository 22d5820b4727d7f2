# SPDX-License-Identifier: Apache-2.0
"""config.json and tensors that do not agree about the layers: named by the command, and before an engine loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.quantization.family_models import FAMILY_PRESETS, make_family, make_full_plan
from vllm_ext import cli
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.compress.source import open_source
from vllm_ext.compress.streaming import LayerStream
from vllm_ext.quantization.checkpoint import open_checkpoint, validate_checkpoint
from vllm_ext.quantization.config import MxMoEConfig
from vllm_ext.quantization.model_config import check_layer_count
from vllm_ext.quantization.safetensors_io import INDEX_FILE, CheckpointError

#: One of each kind, for what takes a second.
FEW = ("tiny-mixtral", "tiny-deepseek-v2", "tiny-llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """preset -> directory of its model of two layers, made when it is first asked for."""
    made: dict[str, Path] = {}

    def make(preset: str) -> Path:
        if preset not in made:
            made[preset] = make_family(preset, tmp_path_factory.mktemp("models") / preset, hidden=128)
        return made[preset]

    return make


def change_config(source: Path, target: Path, **changes: Any) -> Path:
    """The same directory with other values in config.json."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def name_layers(count: int, prefix: str = "model.layers.") -> list[str]:
    return [f"{prefix}{layer}.self_attn.o_proj.weight" for layer in range(count)]


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"num_hidden_layers": 3}, name_layers(2), r"has 3 layers .* has no weight of model\.layers\.2"),
        ({"num_hidden_layers": 2}, name_layers(3), r"says 2 layers, but .* holds model\.layers\.2\.self_attn"),
        ({"num_hidden_layers": 2}, name_layers(2)[1:], r"no weight of model\.layers\.0: copy it again, or"),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, name_layers(4), r"holds model\.layers\.3\.self_attn"),
        ({"num_hidden_layers": "2"}, name_layers(2), r"num_hidden_layers = '2', expected a size"),
        ({"num_hidden_layers": 10**30}, name_layers(2), r"has no weight of model\.layers\.2"),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": "x"}, name_layers(2), r"num_nextn_predict_layers = 'x'"),
    ],
)  # fmt: skip
def test_layers_are_counted(config: dict[str, Any], names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_layer_count(config, names)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"num_hidden_layers": 2}, [*name_layers(2), "lm_head.weight"]),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, name_layers(3)),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, name_layers(2)),
        ({}, name_layers(2)),
        # Names of another kind of model are left to vLLM.
        ({"num_hidden_layers": 2}, name_layers(9, "language_model.layers.")),
    ],
)
def test_layers_that_agree_or_cannot_be_told(config: dict[str, Any], names: list[str]) -> None:
    check_layer_count(config, names)


@pytest.mark.parametrize("preset", FAMILY_PRESETS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (1, "says 1 layers, but the checkpoint holds model.layers.1."),
        (3, "has 3 layers (num_hidden_layers), but the checkpoint has no weight of model.layers.2"),
    ],
    ids=["fewer", "more"],
)
def test_the_command_refuses_a_model_of_another_depth(
    models: Any, preset: str, layers: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = change_config(models(preset), tmp_path / "model", num_hidden_layers=layers)
    assert cli.main(["quantize", str(model), "-o", str(tmp_path / "out"), "--bits", "4.5"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", FEW)
def test_a_packed_directory_of_another_depth_is_refused(models: Any, preset: str, tmp_path: Path) -> None:
    """Cut short it would be another model; with a layer more, weights that nobody wrote."""
    plan = make_full_plan(models(preset))
    packed = tmp_path / "packed"
    quantize_model(models(preset), packed, plan=plan)
    names = list(validate_checkpoint(packed).reader.infos)
    for layers, message in (
        (1, r"says 1 layers, but the checkpoint holds model\.layers\.1\."),
        (3, r"has 3 layers .* no weight of model\.layers\.2: copy it again"),
    ):
        damaged = change_config(packed, tmp_path / f"{layers} layers", num_hidden_layers=layers)
        with pytest.raises(CheckpointError, match=message):
            validate_checkpoint(damaged)
        # What an engine asks before any process loads.
        config = MxMoEConfig.from_config(open_checkpoint(damaged).config["quantization_config"])
        with pytest.raises(CheckpointError, match=message):
            config.maybe_update_config(str(damaged))
    assert "lm_head.weight" in names
    head = tmp_path / "head"
    quantize_model(drop_head(models(preset), tmp_path / "tied"), head, plan=plan)
    untied = change_config(head, tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight is missing, and config\.json has tie_word_embeddings"):
        validate_checkpoint(untied)


def drop_head(source: Path, target: Path) -> Path:
    """The same model with the embedding as its output head."""
    change_config(source, target, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "online"])
def test_overrides_of_the_depth(models: Any, is_packed: bool, tmp_path: Path) -> None:
    """A layer more than there are tensors of is refused by the configuration; fewer are left to the plan's check."""
    directory = models("tiny-llama")
    plan = make_full_plan(directory)
    if is_packed:
        quantize_model(directory, tmp_path / "packed", plan=plan)
        directory = tmp_path / "packed"
        config = MxMoEConfig.from_config(open_checkpoint(directory).config["quantization_config"])
    else:
        config = MxMoEConfig(plan)
    for layers in (1, 2):
        config.maybe_update_config(str(directory), LlamaConfig(num_hidden_layers=layers))
    message = r"has 3 layers \(num_hidden_layers\), .* no weight of model\.layers\.2: copy it again, or give the number"
    with pytest.raises(CheckpointError, match=message):
        config.maybe_update_config(str(directory), LlamaConfig(num_hidden_layers=3))


def test_a_file_that_is_not_there_is_missed_online(models: Any, tmp_path: Path) -> None:
    """vLLM reads the files that it finds."""
    directory = change_config(models("tiny-llama"), tmp_path / "model")
    weight_map = dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index"
    ):
        MxMoEConfig(make_full_plan(models("tiny-llama"))).maybe_update_config(str(directory), LlamaConfig())


@pytest.mark.parametrize("preset", ["tiny-deepseek-v2", "tiny-deepseek-v2-grouped"])
def test_routing_that_transformers_does_not_compute_is_not_calibrated(models: Any, preset: str, tmp_path: Path) -> None:
    """transformers' DeepSeek-V2 does not normalise routing weights; without calibration that does not matter."""
    model = change_config(models(preset), tmp_path / "model", norm_topk_prob=True)
    message = r"norm_topk_prob = True, which vLLM applies and transformers' DeepseekV2ForCausalLM does not read: .*"
    with pytest.raises(CheckpointError, match=message + "quantize without --calibration"):
        LayerStream(open_source(model), torch.zeros(1, 8, dtype=torch.int64))
    options = {"plan": make_full_plan(model), "calibration": ["random"], "num_windows": 4, "rounding": "gptq"}
    with pytest.raises(CheckpointError, match=message):
        quantize_model(model, tmp_path / "out", **options)
    LayerStream(open_source(models(preset)), torch.zeros(1, 8, dtype=torch.int64))
