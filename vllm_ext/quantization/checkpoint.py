# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints: a Hugging Face directory whose quantized modules are stored as `Scheme.tensors` says.

Written, read and checked by that table alone; docs/format.md describes the files. Nothing here needs vLLM.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from vllm_ext import __version__
from vllm_ext.quantization.atomic_directory import check_output, make_directory
from vllm_ext.quantization.model_config import (
    NUM_EXPERTS_KEYS,
    check_head,
    check_layer_count,
    count_experts,
    read_config,
    read_size,
)
from vllm_ext.quantization.plan import ExpertSchemes, ModuleSchemes, Plan, PlanError, is_expert
from vllm_ext.quantization.safetensors_io import CheckpointError, ShardWriter, TensorInfo, TensorReader, suggest
from vllm_ext.quantization.scheme import Scheme

#: Data in one file before the next begins, as the Hugging Face hub splits.
SHARD_BYTES = 5_000_000_000

#: Projections of an expert in the checkpoint, gate, up and down, and the block each belongs to.
EXPERT_PROJECTIONS = {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
#: The same below another name of the layer's block: Mixtral's.
OTHER_PROJECTIONS = {"block_sparse_moe": {"w1": "gate_up", "w3": "gate_up", "w2": "down"}}

#: Files beside the weights that belong to the model: tokenizer, templates, generation config, licence. No code.
COMPANION_FILES = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*",
)  # fmt: skip
#: Folders of such files.
COMPANION_FOLDERS = ("additional_chat_templates",)
_NOT_COMPANIONS = ("config.json", "*.index.json")

_QUANTIZED_TENSOR = re.compile(r"(?P<linear>.+)\.(?P<suffix>qweight|scales|zeros)")


@dataclass(frozen=True)
class Checkpoint:
    """An opened packed checkpoint: its plan, config.json, and tensors by name."""

    directory: Path
    config: Mapping[str, Any]
    plan: Plan
    reader: TensorReader


def make_producer(**details: Any) -> dict[str, Any]:
    """The "producer" of a packed checkpoint: this package, its version, and what else tells how it was made."""
    return {"name": "vllm-ext", "version": __version__, **details}


def list_linears(module: str, schemes: ModuleSchemes) -> dict[str, Scheme]:
    """{checkpoint path of a linear weight: its scheme} of one module of a plan: three for an expert, else one."""
    if isinstance(schemes, Scheme):
        return {module: schemes}
    return {f"{module}.{projection}": getattr(schemes, block) for projection, block in find_projections(module).items()}


def find_projections(expert: str) -> dict[str, str]:
    """{projection, in the order gate, up, down: its block} of an expert by its checkpoint path."""
    parent = expert.split(".")[-3:-2]
    return OTHER_PROJECTIONS.get(parent[0], EXPERT_PROJECTIONS) if parent else EXPERT_PROJECTIONS


def list_tensors(path: str, scheme: Scheme, N: int, K: int, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """{tensor name: type and shape} of a linear weight [N, K] under a scheme.

    dtype: of the unquantized checkpoint. Raises ValueError for a scheme that K does not take.
    """
    return {
        f"{path}.{suffix}": TensorInfo(spec.dtype or dtype, spec.shape(N, K)) for suffix, spec in scheme.tensors.items()
    }


def pack_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """{suffix: tensor} of a quantized weight. codes uint8 [N, K]; scales fp16 and zeros uint8 [N, K/g]."""
    tensors = {"qweight": scheme.pack_codes(codes), "scales": scales}
    return tensors if zeros is None else {**tensors, "zeros": zeros}


def unpack_weight(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight [N, K] in float32 that {suffix: tensor} stand for; w16a16 is converted."""
    if not scheme.is_quantized:
        return tensors["weight"].float()
    scales = tensors["scales"].float()
    codes = scheme.unpack_codes(tensors["qweight"]).unflatten(1, (scales.shape[1], -1)).float()
    zeros = tensors["zeros"].float().unsqueeze(-1) if "zeros" in tensors else float(scheme.fixed_zero)
    return ((codes - zeros) * scales.unsqueeze(-1)).flatten(1)


def write_checkpoint(
    output: Path,
    *,
    plan: Plan,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    model_card: str,
    companions: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a packed checkpoint as one atomic step, and return the bytes of its tensors.

    plan: with a producer (`make_producer`). config: config.json of the unquantized model. infos: name, type and
    shape of every tensor. tensors: the same tensors with data, in any order, consumed one at a time. companions:
    directory to copy tokenizer, templates and generation config from.

    Everything is written into a hidden directory beside `output`, which is checked, flushed and renamed; on any error
    or interrupt it is removed. Raises CheckpointError where `output` exists, where the disk is full, and where the
    result would not validate.
    """
    if not plan.is_packed:
        raise CheckpointError("a packed checkpoint needs a producer in its plan: see make_producer")
    # auto_map names code of the original repository, which is not copied and must not be fetched unasked.
    config = {key: value for key, value in config.items() if key != "auto_map"}
    others = list_other_tensors(plan, infos)
    plan = Plan(plan.modules, plan.ignore, {**plan.producer, "other_tensors": others})
    config["quantization_config"] = plan.to_config()
    return _write_directory(output, config, infos, tensors, model_card, companions, shard_bytes, validate_checkpoint)


def list_other_tensors(plan: Plan, infos: Iterable[str]) -> list[str]:
    """Names of the tensors that no module of the plan owns: norms, embeddings, routers, what is not quantized."""
    linears = {path for module, schemes in plan.modules.items() for path in list_linears(module, schemes)}
    return [name for name in infos if name.rpartition(".")[0] not in linears]


def write_plain_checkpoint(
    output: Path,
    *,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    companions: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a checkpoint without quantization in the same way, for tools that read nothing else."""
    return _write_directory(output, config, infos, tensors, None, companions, shard_bytes, TensorReader)


def _write_directory(
    output: Path,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    model_card: str | None,
    companions: Path | None,
    shard_bytes: int,
    check: Callable[[Path], object],
) -> int:
    size = sum(info.num_bytes for info in infos.values())
    with make_directory(output, size) as partial:
        with ShardWriter(partial, infos, shard_bytes) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        if companions is not None:
            _copy_companions(companions, partial)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        check(partial)
    return size


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json and the headers of a packed checkpoint, unchecked against each other.

    Raises CheckpointError for a directory that is not a packed checkpoint or whose files are damaged, and PlanError
    for a bad plan, an unknown format version, and a plan whose hash is not the recorded one.
    """
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "mxmoe":
        found = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{directory} is not a packed mxmoe checkpoint (quant_method is {found!r}): make one with vllm-ext quantize"
        )
    plan = Plan.from_config(quantization)
    if not plan.is_packed:
        raise CheckpointError(
            f"{directory / 'config.json'} has a plan without a producer: the weights are not packed, and the plan is "
            f"applied when the model is loaded; pack them with vllm-ext quantize --plan"
        )
    return Checkpoint(directory, config, plan, TensorReader(directory))


def validate_checkpoint(directory: Path) -> Checkpoint:
    """Check a packed checkpoint by its headers alone, and return it opened.

    Every module of the plan has exactly the tensors of its scheme, with their types and shapes; the projections of
    an expert fit together; every layer's experts are complete; no tensor of a quantized module is left over; and the
    tensors that the writer left as they were are all there.
    Raises CheckpointError or PlanError naming the tensor, what was found, what was expected, and the fix.
    """
    checkpoint = open_checkpoint(directory)
    infos = checkpoint.reader.infos
    _check_experts(checkpoint)
    known: set[str] = set()
    for module, schemes in checkpoint.plan.modules.items():
        shapes = {}
        for path, scheme in list_linears(module, schemes).items():
            shapes[path] = _check_linear(path, scheme, infos, known)
        if isinstance(schemes, ExpertSchemes):
            _check_expert_shapes(module, shapes, checkpoint.config)
    for name in infos:
        match = _QUANTIZED_TENSOR.fullmatch(name)
        if match is not None and name not in known:
            raise CheckpointError(
                f"{name} ({infos[name]}) does not belong to the plan"
                f"{suggest(match['linear'], checkpoint.plan.modules)}: the plan and the tensors come from different "
                f"runs; quantize the model again"
            )
    for name in checkpoint.plan.producer.get("other_tensors", ()):
        if name not in infos:
            raise CheckpointError(f"{name} is missing{suggest(name, infos)}: copy or quantize the checkpoint again")
    check_layer_count(checkpoint.config, infos)
    check_head(checkpoint.config, infos)
    return checkpoint


def read_module(checkpoint: Checkpoint, module: str) -> dict[str, dict[str, torch.Tensor]]:
    """{checkpoint path of a linear weight: {suffix: tensor}} of one module of the plan.

    An expert has three linear weights, another module one, its own. Raises CheckpointError for a module the plan
    does not name.
    """
    schemes = checkpoint.plan.modules.get(module)
    if schemes is None:
        raise CheckpointError(
            f"the plan of {checkpoint.directory} does not name {module}{suggest(module, checkpoint.plan.modules)}"
        )
    return {
        path: {suffix: checkpoint.reader.read(f"{path}.{suffix}") for suffix in scheme.tensors}
        for path, scheme in list_linears(module, schemes).items()
    }


def list_expert_layers(plan: Plan) -> dict[str, int]:
    """{path of a layer's experts: number of them that the plan names}, in the plan's order."""
    layers: dict[str, int] = {}
    for module in filter(is_expert, plan.modules):
        layer = module.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + 1
    return layers


def _check_experts(checkpoint: Checkpoint) -> None:
    num_experts = count_experts(checkpoint.config)
    for layer, named in list_expert_layers(checkpoint.plan).items():
        checkpoint.plan.find_experts(layer, num_experts or named)


def _check_linear(path: str, scheme: Scheme, infos: Mapping[str, TensorInfo], known: set[str]) -> tuple[int, int]:
    """Check the tensors of one linear weight; returns (N, K), which the first of them tells."""
    suffixes = list(scheme.tensors)
    for suffix in suffixes:
        name = f"{path}.{suffix}"
        if name not in infos:
            raise CheckpointError(
                f"{name} is missing, {scheme} needs {', '.join(suffixes)}{suggest(name, infos)}: "
                f"copy or quantize the checkpoint again"
            )
        known.add(name)
    first = infos[f"{path}.{suffixes[0]}"]
    if len(first.shape) != 2:
        raise CheckpointError(f"{path}.{suffixes[0]} is {first}, expected two dimensions: quantize the model again")
    N, columns = first.shape
    try:
        K = scheme.count_inputs(columns) if scheme.is_quantized else columns
    except ValueError as error:
        raise CheckpointError(
            f"{path}.qweight is {first}, but {error}: the plan and the tensors come from different runs; quantize the "
            f"model again"
        ) from error
    if scheme.is_quantized and f"{path}.weight" in infos:
        raise CheckpointError(
            f"{path}.weight lies beside the packed {path}.qweight ({scheme}): quantize the model again"
        )
    try:
        expected = list_tensors(path, scheme, N, K, first.dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the plan and the tensors do not belong together") from error
    for name, info in expected.items():
        if infos[name] != info:
            raise CheckpointError(
                f"{name} is {infos[name]}, expected {info} for {scheme} and a weight of {[N, K]}: "
                f"quantize the model again"
            )
    return N, K


def _check_expert_shapes(module: str, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]) -> None:
    names = list(find_projections(module))
    gate, up, down = (shapes[f"{module}.{projection}"] for projection in names)
    if gate != up or down != gate[::-1]:
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, (gate, up, down), strict=True))
        raise CheckpointError(
            f"{module}: shapes are {shown}, but gate and up must agree and down be their transpose: the plan or the "
            f"tensors are damaged; quantize the model again"
        )
    expected = (config.get("moe_intermediate_size", gate[0]), config.get("hidden_size", gate[1]))
    if gate != expected:
        raise CheckpointError(
            f"{module}: {names[0]} is {list(gate)}, config.json says {list(expected)}: quantize the model again"
        )


def _copy_companions(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in COMPANION_FILES)
        if wanted and not any(fnmatch(path.name, pattern) for pattern in _NOT_COMPANIONS) and path.is_file():
            shutil.copyfile(path, target / path.name)
    for folder in COMPANION_FOLDERS:
        if (source / folder).is_dir():
            (target / folder).mkdir()
            _copy_companions(source / folder, target / folder)


__all__ = [
    "COMPANION_FILES", "COMPANION_FOLDERS", "EXPERT_PROJECTIONS", "NUM_EXPERTS_KEYS", "SHARD_BYTES", "Checkpoint",
    "CheckpointError", "PlanError", "TensorInfo", "TensorReader", "check_output", "count_experts",
    "find_projections",
    "list_expert_layers", "list_linears", "list_other_tensors", "list_tensors", "make_producer", "open_checkpoint",
    "pack_weight", "read_config", "read_module", "read_size", "unpack_weight", "validate_checkpoint",
    "write_checkpoint", "write_plain_checkpoint",
]  # fmt: skip
