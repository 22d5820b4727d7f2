# SPDX-License-Identifier: Apache-2.0
"""Checks that every loader of packed tensors makes: what arrives must be what the plan's scheme says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload import layerwise

from vllm_ext.quantization.scheme import Scheme, TensorSpec


def find_spec(name: str, scheme: Scheme, suffix: str) -> TensorSpec:
    """What a scheme says about its tensor `suffix`. Raises ValueError, naming `name`, where it has none."""
    spec = scheme.tensors.get(suffix)
    if spec is None:
        raise ValueError(
            f"{name} is in the checkpoint, but the plan in config.json gives this module {scheme}, whose tensors are "
            f"{', '.join(scheme.tensors)}: plan and tensors do not belong together; quantize the model again"
        )
    return spec


def check_tensor(name: str, tensor: torch.Tensor, spec: TensorSpec, shape: Sequence[int]) -> None:
    """Raise ValueError naming the tensor, what was expected and what was found.

    shape: of the tensor in the checkpoint, before it is split over ranks. Floats must also be finite.
    """
    right_dtype = tensor.dtype.is_floating_point if spec.dtype is None else tensor.dtype == spec.dtype
    if not right_dtype or list(tensor.shape) != list(shape):
        raise ValueError(
            f"{name}: expected {spec.dtype or 'a float type'} {list(shape)} by the plan in config.json, found "
            f"{tensor.dtype} {list(tensor.shape)}: the checkpoint is damaged or the plan is not its own"
        )
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        row, column = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise ValueError(
            f"{name} is {float(tensor[row, column])} at [{row}, {column}]: the checkpoint is damaged; write it again"
        )


def check_split(name: str, scheme: Scheme, K: int, tp_size: int) -> None:
    """Raise ValueError, naming layer, K, ranks and group, where a scheme's rows cannot be split into `tp_size` parts.

    K: inputs of the whole layer; tp_size: 1 where K is not split.
    """
    try:
        for spec in scheme.tensors.values():
            spec.shape(1, K)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if tp_size == 1 or not scheme.is_quantized:
        return
    part = K // tp_size
    if scheme.group_size != -1 and part % scheme.group_size:
        raise ValueError(
            f"{name}: tensor parallelism over {tp_size} ranks gives each {part} of the K={K} inputs, which is no "
            f"multiple of the group size {scheme.group_size} of {scheme}; use fewer ranks, expert parallelism, or "
            f"a plan with smaller groups"
        )
    try:
        scheme.packed_size(part)
    except ValueError as error:
        raise ValueError(
            f"{name}: tensor parallelism over {tp_size} ranks gives each {part} of the K={K} inputs, whose "
            f"{scheme.weight_bits:g}-bit codes do not fill whole bytes; use fewer ranks or another width"
        ) from error


def narrow_to_rank(tensor: torch.Tensor, split_dim: int | None, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's part of a checkpoint tensor; the whole of it where `split_dim` is None."""
    if split_dim is None or tp_size == 1:
        return tensor
    size = tensor.shape[split_dim] // tp_size
    return tensor.narrow(split_dim, tp_rank * size, size)


def list_arrived(layer: torch.nn.Module) -> list[dict[str, Any]] | None:
    """Arguments of every loader call that vLLM kept for a layer it is about to process online.

    None where it reads no checkpoint into the layer: made-up weights, and layers that stand alone. Empty where the
    checkpoint holds nothing of the layer, which vLLM processes all the same
    (`reload.layerwise.finalize_layerwise_processing`, "No weights were loaded").
    """
    info = layerwise.get_layerwise_info(layer)
    if is_dummy_load() or not info.can_load():
        return None
    return [call.arguments for _, call in info.loaded_weights]


def check_linear_arrived(layer: torch.nn.Module, name: str) -> None:
    """Raise ValueError where only some elements of a linear layer, or none, came before it is rounded.

    vLLM processes a layer that is not complete all the same, with whatever its memory held
    (`reload.layerwise.finalize_layerwise_processing`).
    """
    info = layerwise.get_layerwise_info(layer)
    if list_arrived(layer) is not None and info.load_numel < (info.load_numel_total or 0):
        raise ValueError(
            f"{describe_missing_weight(f'{name}.weight')} ({info.load_numel} of {info.load_numel_total} elements came)"
        )


def describe_missing_weight(name: str) -> str:
    """The error text for a weight to be rounded that is not there."""
    return f"{name} is not in the checkpoint, or not all of it: the checkpoint is incomplete; copy it again"


def is_dummy_load() -> bool:
    """Whether vLLM makes weights up (`--load-format dummy`), so that nothing can be missing."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def describe_missing(missing: Sequence[str], scheme: Scheme) -> str:
    """The error text for tensors that never arrived; `scheme` is that of the first."""
    more = f" (and {len(missing) - 1} more tensors of this layer)" if len(missing) > 1 else ""
    return (
        f"{missing[0]}{more} is not in the checkpoint, but the plan in config.json gives this module {scheme}: the "
        f"checkpoint is incomplete; copy it again or quantize the model again"
    )
