# SPDX-License-Identifier: Apache-2.0
"""Registers `torch.ops.vllm_ext.act_quant`: the schema, the fake implementation, one implementation for the CPU and
one for all other devices. That is the reference: it has no host sync and no loop, so on a GPU it is a handful of
kernels, slower than a fused one but capturable, and no warning is due."""

from __future__ import annotations

import torch

from ..arena import num_groups
from . import cpu, reference

SCHEMA = "act_quant(Tensor x, int group_size) -> (Tensor, Tensor)"


def _act_quant_fake(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    reference.check_arguments(x, group_size)
    scales = x.new_empty((x.shape[0], num_groups(x.shape[1], group_size)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales


def _register() -> torch.library.Library | None:
    """Define the op once per process; None where another copy of this module has done so."""
    if hasattr(torch.ops.vllm_ext, "act_quant"):
        return None
    library = torch.library.Library("vllm_ext", "FRAGMENT")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("act_quant", cpu.act_quant, "CPU")
    library.impl("act_quant", reference.act_quant, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_ext::act_quant", _act_quant_fake, lib=library)
    return library


# The op lives as long as this object; a re-import must not drop the one that holds it.
_library = _register() or globals().get("_library")
