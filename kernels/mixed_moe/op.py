# SPDX-License-Identifier: Apache-2.0
"""Registers `torch.ops.vllm_ext.mixed_moe`: the schema, the fake implementation, and one implementation per device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..fallback import warn_no_fast_path
from ..gpu import launch
from . import cpu, reference
from .arguments import check_arguments

SCHEMA = (
    "mixed_moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor arena, Tensor table, "
    "Tensor? expert_map, int intermediate_size, str activation, bool weight_on_input) -> Tensor"
)

#: Told the number of (token, expert) pairs that each call of the CPU implementation computed. Whoever counts
#: them sets it; the kernels know nobody.
call_observer: Callable[[int], None] | None = None


def _mixed_moe_cpu(*arguments: Any) -> torch.Tensor:
    return cpu.mixed_moe(*arguments, observer=call_observer)


def _mixed_moe_cuda(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    if launch.serves(x):
        # Loads triton, which a process without such calls must not do.
        from . import triton

        with launch.use_device(x.device):
            out = triton.mixed_moe(x, *arguments)
        if out is not None:
            return out
    return _mixed_moe_reference(x, *arguments)


def _mixed_moe_reference(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    warn_no_fast_path("mixed_moe", x.device.type)
    return reference.mixed_moe(x, *arguments)


def _mixed_moe_fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate_size: int,
    activation: str,
    weight_on_input: bool,
) -> torch.Tensor:
    check_arguments(x, topk_ids, topk_weights, arena, table, expert_map, intermediate_size, activation)
    return x.new_empty(x.shape)


def _register() -> torch.library.Library | None:
    """Define the op once per process; None where another copy of this module has done so."""
    if hasattr(torch.ops.vllm_ext, "mixed_moe"):
        return None
    library = torch.library.Library("vllm_ext", "FRAGMENT")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("mixed_moe", _mixed_moe_cpu, "CPU")
    library.impl("mixed_moe", _mixed_moe_cuda, "CUDA")
    library.impl("mixed_moe", _mixed_moe_reference, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_ext::mixed_moe", _mixed_moe_fake, lib=library)
    return library


# The op lives as long as this object; a re-import must not drop the one that holds it.
_library = _register() or globals().get("_library")
