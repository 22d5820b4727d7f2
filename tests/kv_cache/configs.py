# SPDX-License-Identifier: Apache-2.0
"""Finished configurations of engines with a quantized KV cache, and calibration files for their model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_ext import activation, observability
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kv_cache.presets import PRESETS
from vllm_ext.kv_cache.sidecar import describe_model, write_sidecar

#: Layers of the shipped model as vLLM names them, and an empty calibration.
LAYERS = tuple(f"model.layers.{number}.self_attn.attn" for number in range(5))
NOTHING = (CodecTensors(), CodecTensors())


@pytest.fixture(autouse=True)
def restore_state() -> Iterator[None]:
    """The hook writes the environment of this process; children of other tests must not inherit it."""
    yield
    for name in (activation.ACTIVE_ENV, observability.DIRECTORY_ENV):
        os.environ.pop(name, None)


def make_config(model: str, dtype: str = "skvq_k2v2", block: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """The configuration of an engine that would start; block: the `kv_cache` settings."""
    block = {"vllm_ext": {"kv_cache": block}} if block is not None else {}
    given = {"max_model_len": 256, "enforce_eager": True, **arguments}
    return EngineArgs(model=model, kv_cache_dtype=dtype, additional_config=block, **given).create_engine_config()


def write_calibration(
    path: Path, model: str, tensors: Mapping[str, CodecTensors], preset: str = "skvq_k2v2", layers: Any = LAYERS
) -> None:
    """A calibration file of K of some layers of the shipped model; of the others nothing helped."""
    from transformers import AutoConfig

    sides = {name: (tensors[name], CodecTensors()) if name in tensors else NOTHING for name in layers}
    described = describe_model(AutoConfig.from_pretrained(model).get_text_config())
    write_sidecar(path, sides, PRESETS[preset], 2, 64, described)
