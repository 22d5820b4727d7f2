# SPDX-License-Identifier: Apache-2.0
"""The calibration file of `kv_cache.calibration` in a worker: read once, checked against the model, cut for a rank."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_ext import config
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.presets import Preset
from vllm_ext.kv_cache.sidecar import SidecarError, describe_model, read_sidecar

Sides = tuple[CodecTensors, CodecTensors]


def find_tensors(impl: Any) -> Sides:
    """Tensors of K and V of the layer of a `KVCacheImpl`, for this rank's heads; empty ones without calibration.

    Raises SidecarError, naming file, tensor and fix, for a file that is not one of this model and preset.
    """
    vllm_config = get_current_vllm_config()
    settings = config.read_settings(vllm_config).kv_cache
    if settings is None or settings.calibration is None:
        return CodecTensors(), CodecTensors()
    path = Path(settings.calibration).expanduser()
    total = vllm_config.model_config.get_total_num_kv_heads()
    model = describe_model(vllm_config.model_config.hf_text_config)
    layers = _read(path, _find_change(path), impl.preset, total, impl.head_size, model)
    known = vllm_config.compilation_config.static_forward_context
    for name in layers:
        if name not in known:
            raise SidecarError(f"{path} holds {name}, which is no attention layer of this model: calibrate this model")
    if impl.layer_name not in layers:
        raise SidecarError(f"{path} has nothing about {impl.layer_name}: calibrate this model")
    # Ranks beyond the number of heads share them.
    size = vllm_config.parallel_config.tensor_parallel_size
    first = get_tensor_model_parallel_rank() * total // size
    key, value = (_cut(side, first, impl.num_kv_heads) for side in layers[impl.layer_name])
    return _move(key, impl.device), _move(value, impl.device)


def _find_change(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        # `read_sidecar` says what is wrong with it.
        return 0


@functools.lru_cache(maxsize=1)
def _read(
    path: Path, _changed: int, preset: Preset, num_kv_heads: int, head_dim: int, model: str
) -> Mapping[str, Sides]:
    return read_sidecar(path, preset, num_kv_heads, head_dim, model)


def _move(tensors: CodecTensors, device: torch.device) -> CodecTensors:
    return CodecTensors(*(x if x is None else x.to(device) for x in tensors))


def _cut(tensors: CodecTensors, first: int, count: int) -> CodecTensors:
    """Heads first .. first + count - 1. The codebook is one for all heads."""

    def take(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[first : first + count].contiguous()

    return tensors._replace(
        order=take(tensors.order), smooth=take(tensors.smooth), shift=take(tensors.shift), clip=take(tensors.clip)
    )
