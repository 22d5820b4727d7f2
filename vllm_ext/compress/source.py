# SPDX-License-Identifier: Apache-2.0
"""The unquantized model that a plan is made for: its directory, family, modules and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ext.compress.families import QUANTIZABLE, Block, Family, Kind, Module, find_family
from vllm_ext.quantization.checkpoint import count_experts, list_expert_layers, read_config
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorReader, suggest

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class SourceModel:
    """An opened checkpoint. modules: by path, layer by layer. No weight has been read."""

    directory: Path
    config: Mapping[str, Any]
    family: Family
    modules: Mapping[str, Module]
    reader: TensorReader

    def read_weights(self, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
        """(module path, weight [N, K]) of each linear weight of a block, read when asked for."""
        for path in block.paths:
            yield path, self.reader.read(f"{path}.weight")

    def check_plan(self, plan: Plan) -> None:
        """Raises PlanError, naming the module and the fix, for a plan that this model cannot take.

        Every module exists and is quantizable; every layer has all its experts or none; modules that vLLM fuses
        agree; every scheme fits its shapes and vLLM's dtypes.
        """
        num_experts = count_experts(self.config)
        for layer, named in list_expert_layers(plan).items():
            if not any(module.startswith(f"{layer}.") for module in self.modules):
                raise PlanError(f"the plan names experts of {layer}, which the model does not have")
            plan.find_experts(layer, num_experts or named)
        for path, schemes in plan.modules.items():
            module = self.modules.get(path)
            if module is None:
                raise PlanError(f"the plan names {path}, which the model does not have{suggest(path, self.modules)}")
            if module.kind not in QUANTIZABLE:
                what = "a router" if module.kind is Kind.ROUTER else "not an expert, attention or dense linear"
                reason = self.family.explain_kept(path)
                why = "" if reason is None else f", because {reason}"
                raise PlanError(f"the plan names {path}, which is {what} and stays as it is{why}: leave it out")
            pairs = zip(module.blocks, schemes if isinstance(schemes, ExpertSchemes) else (schemes,), strict=True)
            for block, scheme in pairs:
                try:
                    scheme.stored_bytes(block.N, block.K)
                except ValueError as error:
                    raise PlanError(f"{path} {block.name}: {error}") from error
            self._check_fused(plan, path)
        for path in plan.ignore:
            if path not in self.modules:
                raise PlanError(f"ignore names {path}, which the model does not have{suggest(path, self.modules)}")

    def _check_fused(self, plan: Plan, path: str) -> None:
        parent, _, name = path.rpartition(".")
        for group in self.family.fused:
            if name in group:
                # DeepSeek has its queries in one linear or in two, and only one of the two is fused.
                plan.find_linear(path, [shard for shard in group if f"{parent}.{shard}" in self.modules])


def open_source(model: str | Path) -> SourceModel:
    """Open an unquantized model directory: headers and config.json only.

    Raises CheckpointError for a path that is no directory, a model that is quantized already, an unknown family, and
    damaged or missing tensors.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise CheckpointError(
            f"{model} is not a directory: give a local model directory, for example one made by "
            f"hf download NAME --local-dir DIR"
        )
    config = read_config(directory)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"{directory} is quantized already ({method}): give the unquantized model")
    family = find_family(config)
    reader = family.open_reader(directory, config)
    modules = {module.path: module for module in family.list_modules(config, reader.infos)}
    for module in modules.values():
        for path in (path for block in module.blocks for path in block.paths):
            if module.kind in QUANTIZABLE and (info := reader.infos[f"{path}.weight"]).dtype not in _FLOATS:
                raise CheckpointError(f"{path}.weight is {info}: weights to quantize must be bf16, fp16 or fp32")
    return SourceModel(directory, config, family, modules, reader)
