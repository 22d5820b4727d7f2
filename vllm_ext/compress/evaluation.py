# SPDX-License-Identifier: Apache-2.0
"""What quantization did, without a serving engine: the dequantized model in float32, and perplexity by transformers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vllm_ext.compress.profile import load_model
from vllm_ext.compress.progress import track
from vllm_ext.quantization.checkpoint import (
    Checkpoint,
    list_linears,
    read_module,
    unpack_weight,
    validate_checkpoint,
    write_plain_checkpoint,
)
from vllm_ext.quantization.safetensors_io import TensorInfo

#: Windows of one forward pass.
BATCH_WINDOWS = 4


def dequantize_checkpoint(directory: Path, output: Path) -> None:
    """Write the float32 model that a packed checkpoint stands for, as an ordinary directory without quantization.

    Every value is what the kernels multiply by, so a weight-only plan served by an engine has this model's
    perplexity up to the arithmetic. Raises CheckpointError where `output` exists, and as `validate_checkpoint`.
    """
    checkpoint = validate_checkpoint(directory)
    infos: dict[str, TensorInfo] = {}
    packed = _list_packed(checkpoint)
    for name, info in checkpoint.reader.infos.items():
        if name not in packed:
            infos[name] = TensorInfo(torch.float32 if info.dtype.is_floating_point else info.dtype, info.shape)
    for schemes in checkpoint.plan.modules.items():
        for path, scheme in list_linears(*schemes).items():
            if scheme.is_quantized:
                N, columns = checkpoint.reader.infos[f"{path}.qweight"].shape
                infos[f"{path}.weight"] = TensorInfo(torch.float32, (N, scheme.count_inputs(columns)))
    config = {
        key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    write_plain_checkpoint(
        output,
        config={**config, "dtype": "float32"},
        infos=infos,
        tensors=_dequantize(checkpoint, infos),
        companions=directory,
    )


def load_dequantized(directory: Path) -> torch.nn.Module:
    """The float32 transformers model that a packed checkpoint stands for; needs room for it in the temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model"
        dequantize_checkpoint(directory, plain)
        return load_model(plain, torch.float32)


def measure_perplexity(model: torch.nn.Module, windows: np.ndarray, *, progress: bool = False) -> float:
    """exp of the mean negative log likelihood (nats) of windows, int64 [windows, context].

    The first token of each is given and not scored. Raises ValueError for windows without a token to score.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [windows, context], two tokens at least, got {list(windows.shape)}")
    total = 0.0
    batches = [windows[start : start + BATCH_WINDOWS] for start in range(0, len(windows), BATCH_WINDOWS)]
    with torch.inference_mode():
        for batch in track(batches, "perplexity", len(batches), progress):
            ids = torch.from_numpy(batch).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _list_packed(checkpoint: Checkpoint) -> set[str]:
    return {
        f"{path}.{suffix}"
        for module, schemes in checkpoint.plan.modules.items()
        for path, scheme in list_linears(module, schemes).items()
        if scheme.is_quantized
        for suffix in scheme.tensors
    }


def _dequantize(checkpoint: Checkpoint, infos: dict[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in infos:
        if name in checkpoint.reader.infos:
            yield name, checkpoint.reader.read(name).to(infos[name].dtype)
    for module, schemes in checkpoint.plan.modules.items():
        linears = list_linears(module, schemes)
        for path, tensors in read_module(checkpoint, module).items():
            if linears[path].is_quantized:
                yield f"{path}.weight", unpack_weight(tensors, linears[path])
