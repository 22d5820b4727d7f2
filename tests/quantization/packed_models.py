# SPDX-License-Identifier: Apache-2.0
"""Packed and fake-quantized copies of a model, made from its tensors without the pack's own writer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.quantization.plan import ExpertSchemes, Plan
from vllm_ext.quantization.scheme import Scheme

PRODUCER = {"name": "vllm-ext", "version": "test"}

_EXPERT = re.compile(r"(.+\.experts\.\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")


def find_scheme(plan: Plan, name: str) -> Scheme | None:
    """Scheme of a tensor `<module>.weight`; None where it stays as it is."""
    module = name.removesuffix(".weight")
    match = _EXPERT.fullmatch(module)
    schemes = plan.modules.get(match[1] if match else module)
    if isinstance(schemes, ExpertSchemes):
        assert match is not None
        schemes = schemes.down if match[2] in ("down_proj", "w2") else schemes.gate_up
    return schemes if schemes is not None and schemes.is_quantized else None


def pack_weight(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The scheme's tensors of one weight [N, K]."""
    codes, scales, zeros = round_to_nearest(weight, scheme)
    tensors = {"qweight": scheme.pack_codes(codes), "scales": scales}
    return tensors if zeros is None else tensors | {"zeros": zeros}


def pack_model(source: str, target: Path, plan: Plan) -> Path:
    """A packed directory; what an earlier call left at `target` is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(f"{source}/model.safetensors").items():
        scheme = find_scheme(plan, name)
        if scheme is None:
            packed[name] = tensor
        else:
            module = name.removesuffix(".weight")
            packed |= {f"{module}.{suffix}": part for suffix, part in pack_weight(tensor, scheme).items()}
    config = json.loads(Path(source, "config.json").read_text())
    config["quantization_config"] = Plan(plan.modules, plan.ignore, PRODUCER).to_config()
    return write_model(source, target, packed, config)


def fake_quantize_model(source: str, target: Path, plan: Plan) -> Path:
    """The same weights in float32, rounded by the plan."""
    rounded: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(f"{source}/model.safetensors").items():
        scheme = find_scheme(plan, name)
        rounded[name] = tensor.float() if scheme is None else dequantize(round_to_nearest(tensor, scheme), scheme)
    return write_model(source, target, rounded, json.loads(Path(source, "config.json").read_text()))


def write_model(source: str, target: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    """A model directory with the tokenizer of `source`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.txt", "*.safetensors", "config.json"))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target
