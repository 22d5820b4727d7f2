# SPDX-License-Identifier: Apache-2.0
"""Registers `torch.ops.vllm_ext.mixed_linear`: the schema, the fake implementation, and one implementation per
device."""

from __future__ import annotations

from typing import Any

import torch

from ..fallback import warn_no_fast_path
from ..gpu import launch
from . import cpu, reference
from .arguments import check_arguments

SCHEMA = "mixed_linear(Tensor x, Tensor arena, Tensor table, int out_features, Tensor? bias) -> Tensor"


def _mixed_linear_cuda(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    if launch.serves(x):
        # Loads triton, which a process without such calls must not do.
        from . import triton

        with launch.use_device(x.device):
            out = triton.mixed_linear(x, *arguments)
        if out is not None:
            return out
    return _mixed_linear_reference(x, *arguments)


def _mixed_linear_reference(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    warn_no_fast_path("mixed_linear", x.device.type)
    return reference.mixed_linear(x, *arguments)


def _mixed_linear_fake(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    check_arguments(x, arena, table, out_features, bias)
    return x.new_empty((*x.shape[:-1], out_features))


def _register() -> torch.library.Library | None:
    """Define the op once per process; None where another copy of this module has done so."""
    if hasattr(torch.ops.vllm_ext, "mixed_linear"):
        return None
    library = torch.library.Library("vllm_ext", "FRAGMENT")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("mixed_linear", cpu.mixed_linear, "CPU")
    library.impl("mixed_linear", _mixed_linear_cuda, "CUDA")
    library.impl("mixed_linear", _mixed_linear_reference, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_ext::mixed_linear", _mixed_linear_fake, lib=library)
    return library


# The op lives as long as this object; a re-import must not drop the one that holds it.
_library = _register() or globals().get("_library")
