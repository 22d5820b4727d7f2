# SPDX-License-Identifier: Apache-2.0
"""vllm/v1/structured_output/utils.py: masks on the CPU are applied to logits in the dtype that they have."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_apply_grammar_bitmask() -> None:
    """Give the V1 model runner `masks.apply_mask_on_cpu` for logits on the CPU; others pass through."""
    from vllm.v1.worker import gpu_model_runner

    wrap(gpu_model_runner, "apply_grammar_bitmask", _apply_on_cpu)


def _apply_on_cpu(original: Any) -> Any:
    def apply_grammar_bitmask(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: Any) -> None:
        if not logits.is_cpu:
            original(scheduler_output, grammar_output, input_batch, logits)
            return
        from vllm_ext.structured.masks import apply_mask_on_cpu

        apply_mask_on_cpu(scheduler_output, grammar_output, input_batch, logits)

    return apply_grammar_bitmask
