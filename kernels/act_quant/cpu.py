# SPDX-License-Identifier: Apache-2.0
"""`vllm_ext::act_quant` on the CPU: cpu.cpp, or the reference where the kernels are not compiled."""

from __future__ import annotations

import torch

from ..native.load import load_ops
from . import reference


def act_quant(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments, result and errors as `vllm_ext.kernels.act_quant.act_quant`."""
    reference.check_arguments(x, group_size)
    ops = load_ops()
    return reference.act_quant(x, group_size) if ops is None else ops.act_quant(x, group_size)
