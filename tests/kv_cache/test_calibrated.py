# SPDX-License-Identifier: Apache-2.0
"""The calibration file in an engine: of this model and preset, every layer's part, every rank's heads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from tests.kv_cache.configs import LAYERS, make_config, restore_state, write_calibration  # noqa: F401  (a fixture)
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache import calibrated, engine_setup
from vllm_ext.kv_cache.calibrated import _cut
from vllm_ext.kv_cache.settings import choose_preset


def make_impl(preset: Any, layer_name: str) -> Any:
    """What is read of a KVCacheImpl."""
    return SimpleNamespace(
        preset=preset, head_size=64, num_kv_heads=1, layer_name=layer_name, device=torch.device("cpu")
    )


def test_calibration_of_another_preset_is_refused(tiny_moe: str, tmp_path: Path) -> None:
    path = tmp_path / "sidecar.safetensors"
    tensors = CodecTensors(smooth=torch.ones(2, 64))
    write_calibration(path, tiny_moe, {LAYERS[0]: tensors}, "skvq_k2v15")
    make_config(tiny_moe, "skvq_k2v15", {"calibration": str(path)})
    with pytest.raises(ValueError, match="has preset 'skvq_k2v15', but this engine needs 'skvq_k2v2'"):
        make_config(tiny_moe, "skvq_k2v2", {"calibration": str(path)})


def test_a_layer_takes_its_tensors_from_the_file(
    tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = tmp_path / "sidecar.safetensors", "model.layers.1.self_attn.attn"
    order = torch.stack([torch.randperm(64), torch.arange(64)])
    write_calibration(path, tiny_moe, {name: CodecTensors(order=order)}, layers=LAYERS[:2])
    built = make_config(tiny_moe, block={"calibration": str(path)})
    layers: dict[str, Any] = {name: object(), "model.layers.0.self_attn.attn": object()}
    monkeypatch.setattr(built.compilation_config, "static_forward_context", layers)
    monkeypatch.setattr(built.parallel_config, "tensor_parallel_size", 2)
    monkeypatch.setattr(calibrated, "get_tensor_model_parallel_rank", lambda: 1)
    preset = choose_preset("skvq_k2v2", None, 64)
    with set_current_vllm_config(built):
        found = [calibrated.find_tensors(make_impl(preset, layer)) for layer in layers]
        assert found[0][0].order is not None
        assert found[0][0].order.tolist() == [list(range(64))]
        assert found[1] == (CodecTensors(), CodecTensors())
        # A file that is calibrated again between two engines of a process is read again.
        write_calibration(path, tiny_moe, {name: CodecTensors(order=order.flip(-1))}, layers=LAYERS[:2])
        os.utime(path, ns=(0, 0))
        impl = make_impl(preset, name)
        assert calibrated.find_tensors(impl)[0].order.tolist() == [list(range(63, -1, -1))]
        impl = make_impl(preset, "model.layers.0.self_attn.attn")
        unknown = make_impl(preset, "model.layers.7")
        with pytest.raises(ValueError, match=r"has nothing about model\.layers\.7: calibrate this model"):
            calibrated.find_tensors(unknown)
        del layers[name]
        with pytest.raises(ValueError, match=r"holds model\.layers\.1\.self_attn\.attn, which is no attention layer"):
            calibrated.find_tensors(impl)


def test_a_rank_takes_its_heads() -> None:
    tensors = CodecTensors(smooth=torch.arange(8.0).view(4, 2), levels=torch.arange(4.0))
    cut = _cut(tensors, 2, 2)
    assert cut.smooth is not None
    assert cut.smooth.tolist() == [[4, 5], [6, 7]]
    assert cut.levels is tensors.levels
    assert cut.order is None


def test_calibration_of_another_model_is_refused(tiny_moe: str, tmp_path: Path) -> None:
    """Same heads, another width: without the check its orders and scales would be used without a word."""
    path, other = tmp_path / "sidecar.safetensors", tmp_path / "other"
    shutil.copytree(tiny_moe, other, ignore=shutil.ignore_patterns("*.safetensors", "*.txt"))
    changed = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(changed | {"hidden_size": 2 * changed["hidden_size"]}))
    write_calibration(path, str(other), {LAYERS[0]: CodecTensors(smooth=torch.ones(2, 64))})
    with pytest.raises(ValueError, match=r"has model '.*hidden_size=.*, but this engine needs '.*calibrate again"):
        make_config(tiny_moe, block={"calibration": str(path)})


def test_the_log_says_how_many_layers_are_calibrated(
    tiny_moe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, messages = tmp_path / "sidecar.safetensors", []
    write_calibration(path, tiny_moe, {LAYERS[2]: CodecTensors(smooth=torch.ones(2, 64))})
    monkeypatch.setattr(engine_setup.logger, "info", lambda text, *values: messages.append(text % values))
    make_config(tiny_moe, block={"calibration": str(path)})
    assert f"KV-cache calibration {path}: 1 of 5 layers calibrated" in messages
