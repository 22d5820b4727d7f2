# SPDX-License-Identifier: Apache-2.0
"""What config.json of a model says, and whether the tensors beside it agree. Nothing here needs vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_ext.quantization.safetensors_io import CheckpointError

#: Names under which Hugging Face configurations give their number of routed experts.
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Names of tensors outside of the layers, the same in every family that `quantize` knows.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError where it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: give the directory of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}: copy it again")
    return config


def read_size(config: Mapping[str, Any], key: str) -> int:
    """A size that config.json must hold. Raises CheckpointError, naming key and value, where it is none."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json has {key} = {value!r}, expected a size: copy it again")
    return value


def count_experts(config: Mapping[str, Any]) -> int | None:
    """Routed experts of a layer according to config.json; None where it has no such key.

    Raises CheckpointError for a value that is not a count.
    """
    return next((read_size(config, key) for key in NUM_EXPERTS_KEYS if config.get(key) is not None), None)


def check_layer_count(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise CheckpointError, naming the tensor or layer, where the layers of the tensors are not those of config.json.

    names: of all tensors. num_nextn_predict_layers: layers behind the last that only a drafter has. Configurations
    without num_hidden_layers of their own, and tensors of other names, are not checked.
    """
    if "num_hidden_layers" not in config:
        return
    count = read_size(config, "num_hidden_layers")
    drafting = read_size(config, "num_nextn_predict_layers") if config.get("num_nextn_predict_layers") else 0
    layers = find_layers(names)
    if layers and max(layers) >= count + drafting:
        raise CheckpointError(
            f"config.json says {count} layers, but the checkpoint holds {layers[max(layers)]}: one of the two is "
            f"damaged or cut; copy config.json again, or remove the tensors of the layers it does not count"
        )
    check_layers_are_there(count, layers)


def check_layers_are_there(count: int, layers: Collection[int]) -> None:
    """Raise CheckpointError, naming the first, where the model has layers of which the checkpoint has no tensor.

    vLLM does not miss tensors of quantized models: it would run such a layer on what its memory happened to hold.
    layers: as `find_layers`; none where the tensors have other names.
    """
    missing = next((layer for layer in range(count) if layer not in layers), None) if layers else None
    if missing is not None:
        raise CheckpointError(
            f"the model has {count} layers (num_hidden_layers), but the checkpoint has no weight of "
            f"model.layers.{missing}: copy it again, or give the number of layers that it has"
        )


def find_layers(names: Iterable[str]) -> dict[int, str]:
    """{number of a decoder layer: one of its tensors} of tensors named as most families name them."""
    found: dict[int, str] = {}
    for name in names:
        match = _LAYER_TENSOR.match(name)
        if match is not None:
            found.setdefault(int(match[1]), name)
    return found


def check_head(config: Mapping[str, Any], infos: Collection[str]) -> None:
    """Raise CheckpointError where config.json wants an output head that the checkpoint does not hold."""
    if config.get("tie_word_embeddings") is False and EMBEDDING in infos and HEAD not in infos:
        raise CheckpointError(
            f"{HEAD} is missing, and config.json has tie_word_embeddings = false: copy the checkpoint again"
        )
