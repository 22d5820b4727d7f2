# SPDX-License-Identifier: Apache-2.0
"""Models loaded without an engine: stages of a pipeline, played in turn, and checkpoints that lack something."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
    parallel_state,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import utils
from vllm.model_executor.models.utils import PPMissingLayer

from tests.quantization.family_models import make_family, make_full_plan
from tests.quantization.test_plan_engine import digest_arenas
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.quantization.moe import list_storage
from vllm_ext.quantization.plan import Plan, PlanError

STAGES, LAYERS = 2, 3
PRESETS = ("tiny-mixtral", "tiny-deepseek-v2", "tiny-llama")
#: One in the default run, of the family whose layers are all alike.
CASES = [
    pytest.param(preset, is_packed, marks=[] if is_packed and preset == PRESETS[0] else pytest.mark.slow)
    for preset in PRESETS
    for is_packed in (True, False)
]


@pytest.fixture
def build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_in_process: None
) -> Iterator[Callable[..., torch.nn.Module]]:
    """build(model, stage) -> what one stage of a pipeline of two loads; the whole model where no stage is given."""
    started = False
    # As vLLM's model runner does on CPUs (`cpu_model_runner._set_torch_accelerator_to_noop`).
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)

    def make(model: Path, stage: int | None = None, **options: Any) -> torch.nn.Module:
        nonlocal started
        config = EngineArgs(
            model=str(model), dtype="float32", max_model_len=128, enforce_eager=True, **options
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not parallel_state.model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{tmp_path / 'group'}", 0, "gloo")
                initialize_model_parallel()
                started = True
            with monkeypatch.context() as patch:
                # By id of a model, which a later one may get again; an engine loads one model in its life.
                patch.setattr(utils, "_model_to_pp_missing_layer_names", {})
                if stage is not None:
                    group = SimpleNamespace(
                        rank_in_group=stage,
                        world_size=STAGES,
                        is_first_rank=stage == 0,
                        is_last_rank=stage == STAGES - 1,
                    )
                    patch.setattr(parallel_state, "_PP", group)
                return get_model(vllm_config=config)

    yield make
    if started:
        cleanup_dist_env_and_memory()


def list_missing(model: torch.nn.Module) -> set[int]:
    """Numbers of the layers that a stage does not have."""
    return {number for number, layer in enumerate(model.model.layers) if isinstance(layer, PPMissingLayer)}


@pytest.mark.parametrize(("preset", "is_packed"), CASES)
def test_a_stage_loads_its_own_layers(preset: str, is_packed: bool, tmp_path: Path, build: Any) -> None:
    model = make_family(preset, tmp_path / "model", layers=LAYERS, hidden=128)
    plan = make_full_plan(model)
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": plan.to_config()}}
    if is_packed:
        quantize_model(model, tmp_path / "packed", plan=plan)
        model, options = tmp_path / "packed", {}
    whole = build(model, **options)
    arenas, storage = digest_arenas(whole), list_storage(whole)
    assert {name.split(".")[2] for name in arenas} == {"0", "1", "2"}
    found: dict[str, str] = {}
    built: list[set[int]] = []
    for stage in range(STAGES):
        part = build(model, stage, **options)
        own = digest_arenas(part)
        layers = set(range(LAYERS)) - list_missing(part)
        assert {int(name.split(".")[2]) for name in own} == layers
        assert not own.keys() & found.keys()
        assert list_storage(part) == {
            name: value for name, value in storage.items() if int(name.split(".")[2]) in layers
        }
        built.append(layers)
        found |= own
    assert built[0] | built[1] == set(range(LAYERS))
    assert max(built[0]) < min(built[1])
    assert found == arenas


@pytest.mark.slow
def test_only_the_stage_of_a_missing_tensor_misses_it(tmp_path: Path, build: Any) -> None:
    model = make_family("tiny-mixtral", tmp_path / "model", hidden=128)
    options = {"hf_overrides": {"quantization_config": make_full_plan(model).to_config()}}
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert digest_arenas(build(model, 0, **options))
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} is not in the checkpoint, or not all of it"):
        build(model, 1, **options)


def test_experts_without_any_tensor_are_not_rounded(tmp_path: Path, build: Any) -> None:
    """vLLM processes such a layer, too, with what its memory happens to hold."""
    model = make_family("tiny-mixtral", tmp_path / "model", hidden=128)
    tensors = load_file(model / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "layers.1.block_sparse_moe.experts" not in name}
    save_file(left, model / "model.safetensors", {"format": "pt"})
    message = r"^model\.layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight is not in the checkpoint, or not all of it"
    for stage in (None, 1):
        with pytest.raises(ValueError, match=message):
            build(model, stage, quantization="mxmoe")
    assert digest_arenas(build(model, 0, quantization="mxmoe"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_vllm_misses_what_the_plan_leaves_as_it_is_where_it_is_asked_to(
    preset: str, tmp_path: Path, build: Any
) -> None:
    """docs/mxmoe.md names this option, because vLLM does not miss tensors of quantized models by itself."""
    model = make_family(preset, tmp_path / "model", hidden=128)
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": make_full_plan(model).to_config()}}
    options["model_loader_extra_config"] = {"enable_weights_track": True}
    assert digest_arenas(build(model, **options))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"not initialized from checkpoint: \{'model\.layers\.1\.post_attention_layern"
    ):
        build(model, **options)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_too_many_in_a_full_checkpoint(preset: str, tmp_path: Path, build: Any) -> None:
    """A model that --hf-overrides cuts short: a plan of all its layers, and one of those that are left."""
    model = make_family(preset, tmp_path / "model", layers=LAYERS, hidden=128)
    plan = make_full_plan(model)
    cut = Plan({name: schemes for name, schemes in plan.modules.items() if "layers.2." not in name})
    shorter = {"num_hidden_layers": LAYERS - 1}
    with pytest.raises(PlanError, match=r"names model\.layers\.2\..*, which is no quantizable layer of this model"):
        build(model, hf_overrides={**shorter, "quantization_config": plan.to_config()})
    # vLLM's own words, without a plan and with one.
    for overrides in (shorter, {**shorter, "quantization_config": cut.to_config()}):
        with pytest.raises((ValueError, KeyError), match=r"layers\.2"):
            build(model, hf_overrides=overrides)
