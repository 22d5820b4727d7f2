# SPDX-License-Identifier: Apache-2.0
"""The file of calibrated tensors beside a model: safetensors, one tensor per layer, side and field.

    <layer>.key.order     int64   [kv heads, D]         <layer>: as vLLM names it, model.layers.0.self_attn.attn
    <layer>.key.smooth    float32 [kv heads, D]         every field is optional; .value likewise
    <layer>.key.shift     float32 [kv heads, D]
    <layer>.key.clip      float32 [kv heads, groups]    per-channel keys: [kv heads, D]
    <layer>.key.levels    float32 [levels]

The header's metadata hold {"format": "vllm-ext-kv", "version": "2", "preset": ..., "head_dim": ..., "num_kv_heads":
..., "group_size": "key,value", "model": ..., "layers": a JSON list}: tensors of one preset or model would be read by
another without an error, and wrongly. `layers` names those without tensors, too, which no calibration helped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.presets import Preset

FORMAT, VERSION = "vllm-ext-kv", "2"
#: What tells models apart that a checkpoint keeps when its weights are quantized: not the weights themselves.
MODEL_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
SIDES = ("key", "value")

#: Layer name -> (tensors of K, tensors of V).
LayerTensors = Mapping[str, tuple[CodecTensors, CodecTensors]]


class SidecarError(ValueError):
    """A calibration file that cannot be used; the message names the file, the tensor and the fix."""


def describe_model(text_config: Any) -> str:
    """A model's type and sizes in words, from its transformers configuration (of the text part)."""
    return " ".join(f"{name}={getattr(text_config, name, None)}" for name in MODEL_FIELDS)


def write_sidecar(
    path: Path, layers: LayerTensors, preset: Preset, num_kv_heads: int, head_dim: int, model: str = ""
) -> None:
    """Write the tensors of every layer, all heads of the model. Replaces the file in one step.

    layers: all of the model, those without tensors included. model: `describe_model`. The bytes depend on the
    arguments alone. Raises SidecarError for tensors that `read_sidecar` would refuse.
    """
    fitted = preset.fit(head_dim)
    tensors: dict[str, torch.Tensor] = {}
    for layer, sides in layers.items():
        for side, codec_tensors in zip(SIDES, sides, strict=True):
            _check_side(f"{path}: {layer}.{side}", codec_tensors, getattr(fitted, side), num_kv_heads, head_dim)
            for field, tensor in codec_tensors._asdict().items():
                if tensor is not None:
                    tensors[f"{layer}.{side}.{field}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not tensors:
        raise SidecarError(f"{path}: there is nothing to write; calibrate at least one layer")
    metadata = {**_describe(preset, num_kv_heads, head_dim, model), "layers": json.dumps(sorted(layers))}
    content = _sort_header(save(tensors, metadata))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sort_header(content: bytes) -> bytes:
    """A safetensors file with its header in alphabetical order: the library writes metadata in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def read_sidecar(
    path: Path, preset: Preset, num_kv_heads: int, head_dim: int, model: str = ""
) -> dict[str, tuple[CodecTensors, CodecTensors]]:
    """Tensors of every layer in the file, checked, for all heads of the model (a rank takes its own).

    Layers that no calibration helped have empty ones. Raises SidecarError for a file that is missing, unreadable,
    damaged, of another format, preset, head size or model, and for a tensor with an unknown name, another type or
    shape, or values that no calibration gives.
    """
    fitted = preset.fit(head_dim)
    try:
        if not path.is_file():
            raise SidecarError(f"calibration file {path} does not exist: write one with `vllm-ext calibrate-kv`")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            expected = _describe(preset, num_kv_heads, head_dim, model)
            for key, wanted in expected.items():
                if metadata.get(key) != wanted:
                    raise SidecarError(
                        f"{path} has {key} {metadata.get(key)!r}, but this engine needs {wanted!r}: calibrate again"
                    )
            fields: dict[str, dict[str, dict[str, torch.Tensor]]] = {
                layer: {} for layer in _parse_layers(path, metadata.get("layers", ""))
            }
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                layer, side, field = _split_name(path, name)
                if layer not in fields:
                    raise SidecarError(f"{path} holds {name}, whose layer is not among its own: calibrate again")
                fields[layer].setdefault(side, {})[field] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise SidecarError(f"{path} is not a usable safetensors file ({error}): calibrate again") from error
    layers = {}
    for layer, sides in fields.items():
        key_tensors, value_tensors = (CodecTensors(**sides.get(side, {})) for side in SIDES)
        _check_side(f"{path}: {layer}.key", key_tensors, fitted.key, num_kv_heads, head_dim)
        _check_side(f"{path}: {layer}.value", value_tensors, fitted.value, num_kv_heads, head_dim)
        layers[layer] = (key_tensors, value_tensors)
    return layers


def _parse_layers(path: Path, text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SidecarError(f"{path} has layers {text!r}, which is no list of names: calibrate again")
    return names


def _describe(preset: Preset, num_kv_heads: int, head_dim: int, model: str) -> dict[str, str]:
    fitted = preset.fit(head_dim)
    return {
        "format": FORMAT,
        "version": VERSION,
        "preset": preset.name,
        "head_dim": str(head_dim),
        "num_kv_heads": str(num_kv_heads),
        "group_size": f"{fitted.key.group_size},{fitted.value.group_size}",
        "model": model,
    }


def _split_name(path: Path, name: str) -> tuple[str, str, str]:
    parts = name.rsplit(".", 2)
    if len(parts) != 3 or not parts[0] or parts[1] not in SIDES or parts[2] not in CodecTensors._fields:
        raise SidecarError(
            f"{path} holds {name!r}, which is no <layer>.<{'|'.join(SIDES)}>.<{'|'.join(CodecTensors._fields)}>"
        )
    return parts[0], parts[1], parts[2]


def _check_side(where: str, tensors: CodecTensors, codec: Codec, num_kv_heads: int, head_dim: int) -> None:
    channels = (num_kv_heads, head_dim)
    groups = (num_kv_heads, head_dim if codec.per_channel else head_dim // codec.group_size)
    _check_tensor(f"{where}.order", tensors.order, torch.int64, channels, _is_order, "a permutation of each head")
    _check_tensor(f"{where}.smooth", tensors.smooth, torch.float32, channels, _is_positive, "positive and finite")
    _check_tensor(f"{where}.shift", tensors.shift, torch.float32, channels, _is_finite, "finite")
    _check_tensor(f"{where}.clip", tensors.clip, torch.float32, groups, _is_share, "above 0 and at most 1")
    _check_tensor(
        f"{where}.levels", tensors.levels, torch.float32, (codec.num_levels,), _is_ascending, "ascending and finite"
    )


def _check_tensor(
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    is_valid: Callable[[torch.Tensor], bool],
    rule: str,
) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise SidecarError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
    if not is_valid(tensor):
        raise SidecarError(f"{name} must be {rule}: calibrate again")


def _is_order(x: torch.Tensor) -> bool:
    return bool((x.sort(-1).values == torch.arange(x.shape[-1])).all())


def _is_finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())


def _is_positive(x: torch.Tensor) -> bool:
    return _is_finite(x) and bool((x > 0).all())


def _is_share(x: torch.Tensor) -> bool:
    return bool(((x > 0) & (x <= 1)).all())


def _is_ascending(x: torch.Tensor) -> bool:
    return _is_finite(x) and bool((x.diff() > 0).all())
