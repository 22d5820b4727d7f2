# SPDX-License-Identifier: Apache-2.0
"""vllm/v1: draft lengths by request in the V1 model runner, and the start-up sweep after the workers' warm-up."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_drafting() -> None:
    """Both changes of record `drafting`: lengths by request, and the pack's drafters in the place of the n-gram one."""
    from vllm_ext.patches import lookup_drafters

    wrap_propose_draft_token_ids()
    lookup_drafters.wrap_model_runner()


def wrap_propose_draft_token_ids() -> None:
    """Wrap `GPUModelRunner.propose_draft_token_ids` (V1, the CPU runner included) to honour `draft_lengths`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "propose_draft_token_ids", _honour_draft_lengths)


def _honour_draft_lengths(original: Any) -> Any:
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        lengths = getattr(scheduler_output, "draft_lengths", None)
        if lengths is None or not isinstance(sampled_token_ids, list):
            return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        ids = self.input_batch.req_ids
        drafts = original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        if not isinstance(drafts, list):
            return drafts
        return [draft[: lengths.get(rid, len(draft))] for rid, draft in zip(ids, drafts, strict=False)]

    return propose_draft_token_ids


def wrap_compile_or_warm_up_model() -> None:
    """Wrap `Executor.compile_or_warm_up_model`: afterwards, measure step times for engines that use smartspec."""
    from vllm.v1.executor.abstract import Executor

    wrap(Executor, "compile_or_warm_up_model", _measure_afterwards)


def _measure_afterwards(original: Any) -> Any:
    def compile_or_warm_up_model(self: Any) -> None:
        original(self)
        if "smartspec" in str(self.vllm_config.scheduler_config.scheduler_cls):
            from vllm_ext.scheduling import step_sweep

            step_sweep.store_measured_prior(self)

    return compile_or_warm_up_model
