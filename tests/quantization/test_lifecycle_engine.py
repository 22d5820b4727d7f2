# SPDX-License-Identifier: Apache-2.0
"""What an engine may be asked for beside requests: new weights, adapters, sleep. It works or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantization.family_models import make_family, make_full_plan
from tests.quantization.packed_models import fake_quantize_model, pack_model
from tests.quantization.test_families_engine import make_windows, start
from tests.quantization.test_plan_engine import digest_arenas, score_with_transformers, score_with_vllm
from vllm_ext.compress.quantize import quantize_model
from vllm_ext.config import ConfigError

pytestmark = pytest.mark.engine

#: What the plan leaves as it is: on CPUs vLLM keeps prepacked copies of such linears, which a reload does not change.
KEPT = ("lm_head", "embed_tokens", "gate", "kv_b_proj")


def perturb_planned(source: Path, target: Path) -> Path:
    """The same model, every weight that a full plan names changed by about a tenth, and every norm."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        if name.split(".")[-2] not in KEPT:
            tensors[name] = (tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "online"])
@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-mixtral", "tiny-deepseek-v2"])
def test_new_weights_are_those_of_a_fresh_start(
    preset: str, is_packed: bool, tmp_path: Path, engine_in_process: None
) -> None:
    model = make_family(preset, tmp_path / "model")
    other = perturb_planned(model, tmp_path / "other")
    plan, windows = make_full_plan(model), make_windows()
    served, new = model, other
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": plan.to_config()}}
    if is_packed:
        served, options = pack_model(str(model), tmp_path / "packed", plan), {}
        new = pack_model(str(other), tmp_path / "new", plan)
    llm = start(served, distributed_executor_backend="uni", **options)
    try:
        (before,) = llm.apply_model(digest_arenas)
        first = score_with_vllm(llm, windows)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
        (after,) = llm.apply_model(digest_arenas)
        second = score_with_vllm(llm, windows)
        # And back again.
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(served)})
        assert llm.apply_model(digest_arenas) == [before]
        assert torch.equal(score_with_vllm(llm, windows), first)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    for name, source, found in (("old", model, first), ("perturbed", other, second)):
        rounded = fake_quantize_model(str(source), tmp_path / name, plan)
        assert (found - score_with_transformers(rounded, windows)).abs().max() < 1e-4, name
    assert (first - second).abs().max() > 0.05


LORA = ({"enable_lora": True}, ConfigError, "mxmoe does not run with --enable-lora.*: .*drop --enable-lora")
#: vLLM's own words: it has no allocator that can put the pages of a CPU to sleep.
SLEEP = ({"enable_sleep_mode": True}, ValueError, "Sleep mode is not supported on current platform")


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "online"])
@pytest.mark.parametrize(
    ("preset", "option", "error", "message"),
    [
        ("tiny-mixtral", *LORA),
        ("tiny-mixtral", *SLEEP),
        ("tiny-llama", *SLEEP),
    ],
    ids=["mixtral lora", "mixtral sleep", "llama sleep"],
)
def test_what_is_refused_is_refused_before_anything_is_loaded(
    preset: str,
    is_packed: bool,
    option: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    engine_in_process: None,
) -> None:
    model = make_family(preset, tmp_path / "model", hidden=128)
    plan = make_full_plan(model)
    if is_packed:
        quantize_model(model, tmp_path / "packed", plan=plan)
        model = tmp_path / "packed"
    else:
        option = {**option, "hf_overrides": {"quantization_config": plan.to_config()}}
    with pytest.raises(error, match=message):
        start(model, distributed_executor_backend="uni", **option)
