# SPDX-License-Identifier: Apache-2.0
"""vllm/v1/worker/gpu: drafts of the scheduler in the V2 model runner, which knows those of its own drafter alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_prepare_inputs() -> None:
    """Wrap `GPUModelRunner.prepare_inputs` (V2) to take the drafts that a step's `forced_drafts` names from the step.

    The runner reads only the lengths of `scheduled_spec_decode_tokens`; the tokens come from a table on the device,
    where its drafter left them. Masks are filled for the scheduler's tokens, so both must be the same.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "prepare_inputs", _write_drafts_first)


def _write_drafts_first(original: Any) -> Any:
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        forced = getattr(scheduler_output, "forced_drafts", ())
        if forced:
            write_drafts(self.req_states, scheduler_output.scheduled_spec_decode_tokens, forced)
        return original(self, scheduler_output, *args, **kwargs)

    return prepare_inputs


def write_drafts(states: Any, scheduled: Mapping[str, Sequence[int]], request_ids: Iterable[str]) -> None:
    """Write the drafts of these requests into the runner's table, int64 [requests, drafts] on its device.

    states: vLLM's RequestState. scheduled: drafts by request; what pads them (-1) is left as it is. One copy from
    pinned memory and one scatter on the current stream: the device is not waited for.
    """
    from vllm.utils import torch_utils

    table = states.draft_tokens
    width = table.shape[1]
    places: list[int] = []
    tokens: list[int] = []
    for request_id in request_ids:
        drafts = scheduled.get(request_id, ())
        start = width * states.req_id_to_index[request_id] if drafts else 0
        for place, token in enumerate(drafts):
            if token >= 0:
                places.append(start + place)
                tokens.append(token)
    if places:
        # Through the module: vLLM replaces the function on CPUs.
        moved = torch_utils.async_tensor_h2d([places, tokens], device=table.device, dtype=table.dtype)
        table.view(-1).scatter_(0, moved[0], moved[1])
