# SPDX-License-Identifier: Apache-2.0
"""Calibration files: what is written is read, and damage is a clear error, never a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.kv_cache.sidecar import SidecarError, read_sidecar, write_sidecar

PRESET, HEADS, HEAD_DIM = PRESETS["skvq_k2v2"], 2, 16
LAYER = "model.layers.0.self_attn.attn"


def make_tensors(seed: int = 0) -> CodecTensors:
    generator = torch.Generator().manual_seed(seed)
    return CodecTensors(
        order=torch.rand(HEADS, HEAD_DIM, generator=generator).argsort(-1),
        smooth=torch.rand(HEADS, HEAD_DIM, generator=generator) + 0.5,
        shift=torch.randn(HEADS, HEAD_DIM, generator=generator),
        clip=torch.full((HEADS, 1), 0.9),
        levels=torch.tensor([0.0, 0.9, 2.1, 3.0]),
    )


def write(folder: Path) -> Path:
    path = folder / "kv.safetensors"
    layers = {LAYER: (make_tensors(), CodecTensors(smooth=torch.ones(HEADS, HEAD_DIM))), "1": (make_tensors(1),) * 2}
    write_sidecar(path, layers, PRESET, HEADS, HEAD_DIM)
    return path


def read(path: Path) -> dict[str, tuple[CodecTensors, CodecTensors]]:
    return read_sidecar(path, PRESET, HEADS, HEAD_DIM)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    layers = read(path)
    assert set(layers) == {LAYER, "1"}
    for expected, actual in zip(make_tensors(), layers[LAYER][0], strict=True):
        assert torch.equal(expected, actual)
    assert layers[LAYER][1].order is None
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors alone writes metadata in another order each time."""
    layers = {"1": (make_tensors(1), CodecTensors()), LAYER: (make_tensors(), make_tensors(2))}
    contents = set()
    for number, order in enumerate([list(layers), list(reversed(layers))] * 4):
        path = tmp_path / str(number)
        write_sidecar(path, {name: layers[name] for name in order}, PRESET, HEADS, HEAD_DIM)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damage_never_gets_through_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        layers = read(path)
    except SidecarError as error:
        assert str(path) in str(error)  # noqa: PT017 - not every damage can be told
        return
    # Changed digits of a tensor cannot be told from others; what is read still keeps every rule.
    write_sidecar(path, layers, PRESET, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{LAYER}.key.order", torch.zeros(HEADS, HEAD_DIM, dtype=torch.int64), "order must be a permutation"),
        (f"{LAYER}.key.smooth", torch.zeros(HEADS, HEAD_DIM), "smooth must be positive and finite"),
        (f"{LAYER}.key.shift", torch.full((HEADS, HEAD_DIM), torch.nan), "shift must be finite"),
        (f"{LAYER}.key.clip", torch.full((HEADS, 1), 1.5), "clip must be above 0 and at most 1"),
        (f"{LAYER}.key.levels", torch.zeros(4), "levels must be ascending"),
        (f"{LAYER}.key.levels", torch.arange(3.0), r"levels is torch\.float32 \[3\], expected torch\.float32 \[4\]"),
        (f"{LAYER}.value.smooth", torch.ones(HEADS, HEAD_DIM).half(), r"smooth is torch\.float16"),
        (f"{LAYER}.key.scale", torch.ones(1), r"holds 'model.layers.0.self_attn.attn.key.scale', which is no"),
        ("order", torch.ones(1), "holds 'order', which is no"),
    ],
)
def test_bad_tensors_are_refused_by_name(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    path = write(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), name: tensor}, path, metadata)
    with pytest.raises(SidecarError, match=message):
        read(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(SidecarError, match="has preset 'skvq_k2v2', but this engine needs 'skvq_k2v15'"):
        read_sidecar(path, PRESETS["skvq_k2v15"], HEADS, HEAD_DIM)
    with pytest.raises(SidecarError, match="has head_dim '16', but this engine needs '32'"):
        read_sidecar(path, PRESET, HEADS, 32)
    with pytest.raises(SidecarError, match="does not exist: write one with `vllm-ext calibrate-kv`"):
        read(tmp_path / "missing")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(SidecarError, match="has format None"):
        read(path)


def test_files_that_cannot_be_opened_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)

    def deny(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", deny)
    with pytest.raises(SidecarError, match=r"kv\.safetensors is not a usable safetensors file .*Permission denied"):
        read(path)
    monkeypatch.undo()
    with pytest.raises(SidecarError, match="does not exist"):
        read(tmp_path)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(SidecarError, match="has model '', but this engine needs 'model_type=llama': calibrate again"):
        read_sidecar(path, PRESET, HEADS, HEAD_DIM, "model_type=llama")
    # A layer that nothing helped is in the file without tensors; one that it does not name is no layer of its model.
    write_sidecar(path, {LAYER: (make_tensors(), CodecTensors()), "1": (CodecTensors(),) * 2}, PRESET, HEADS, HEAD_DIM)
    assert read(path)["1"] == (CodecTensors(), CodecTensors())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for layers, message in (
        ("[1]", "is no list of names"),
        ("{", "is no list of names"),
        ('["1"]', "not among its own"),
    ):
        save_file(load_file(path), path, {**metadata, "layers": layers})
        with pytest.raises(SidecarError, match=message):
            read(path)


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    wrong = CodecTensors(smooth=torch.ones(HEADS, 8))
    with pytest.raises(SidecarError, match=r"layer.key.smooth is torch\.float32 \[2, 8\]"):
        write_sidecar(tmp_path / "kv", {"layer": (wrong, CodecTensors())}, PRESET, HEADS, HEAD_DIM)
    with pytest.raises(SidecarError, match="there is nothing to write"):
        write_sidecar(tmp_path / "kv", {}, PRESET, HEADS, HEAD_DIM)
    assert list(tmp_path.iterdir()) == []
