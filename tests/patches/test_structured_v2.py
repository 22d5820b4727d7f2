# SPDX-License-Identifier: Apache-2.0
"""Drafts of the scheduler in vLLM's V2 model runner: its classes and kernels, on the CPU in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.child import run_child
from vllm_ext.patches.structured_v2 import write_drafts

WIDTH = 4

#: vLLM's V2 runner needs Triton, and on CPUs its backend for them; the interpreter serves where neither is.
PREPARE = """
from types import SimpleNamespace
import triton.backends
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
import json, sys
"""

#: One step of prepare_inputs: three requests in their answers, two of them with drafts, of which one has forced ones.
STEP = (
    PREPARE
    + """
import numpy as np, torch
import vllm.v1.worker.cpu.shm
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import input_batch, model_runner, states
from vllm_ext.patches import structured_v2

structured_v2.wrap_prepare_inputs()
structured_v2.wrap_prepare_inputs()
device = torch.device("cpu")
requests = states.RequestState(8, 64, 64, 4, 4096, device)
for number, name in enumerate("abc"):
    requests.add_request(name, 5, [10 + number] * 5, 0, 20)
requests.apply_staged_writes()
for name, index in requests.req_id_to_index.items():
    # Past their prompts; one token was sampled, and the drafter has drafted.
    requests.num_computed_tokens_np[index] = 5
    requests.num_computed_prefill_tokens[index] = 5
    requests.num_computed_tokens.gpu[index] = 5
    requests.last_sampled_tokens[index] = 900 + ord(name)
    requests.draft_tokens[index] = torch.tensor([1, 2, 3, 4])

runner = SimpleNamespace(
    req_states=requests, input_buffers=input_batch.InputBuffers(8, 64, device), device=device, max_num_reqs=8,
    adaptive_verification=None, decode_query_len=5, pcp_manager=None, use_pp=False, fast_prefill=None,
    model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1), model_config=SimpleNamespace(rswa_window=None),
)
class_ = model_runner.GPUModelRunner
def prepare(drafts, forced):
    scheduled = SimpleNamespace(
        num_scheduled_tokens={name: 1 + len(drafts.get(name, ())) for name in "abc"},
        total_num_scheduled_tokens=3 + sum(map(len, drafts.values())), scheduled_spec_decode_tokens=drafts,
        has_structured_output_requests=True,
    )
    if forced is not None:
        scheduled.forced_drafts = forced
    batch, _ = class_.gather_batch_req_state(runner, scheduled, False)
    made = class_.prepare_inputs(
        runner, scheduled, batch, SimpleNamespace(num_tokens=0, num_reqs=None), 0
    )
    rows = {}
    for place, name in enumerate(made.req_ids):
        start, end = made.query_start_loc_np[place], made.query_start_loc_np[place + 1]
        rows[name] = made.input_ids[start:end].tolist()
    return rows, made.logits_indices.tolist()

# What the scheduler knows of b is not what the device has: only forced drafts are taken from it.
without = prepare({"a": [50, 51, -1], "b": [60, 61]}, None)
forced = prepare({"a": [50, 51, -1], "b": [60, 61]}, ("a",))
print(json.dumps({"without": without, "forced": forced}))
"""
)

INTERPRETER = {"TRITON_INTERPRET": "1"}


def make_states(**rows: int) -> Any:
    return SimpleNamespace(draft_tokens=torch.full((5, WIDTH), 7), req_id_to_index=rows)


def test_the_table_takes_forced_drafts_and_keeps_the_others() -> None:
    states = make_states(a=3, b=0)
    write_drafts(states, {"a": [5, 6, -1], "b": [8, 9], "c": [1]}, ["a"])
    expected = torch.full((5, WIDTH), 7)
    expected[3, :2] = torch.tensor([5, 6])
    assert torch.equal(states.draft_tokens, expected)
    # A request that is not in the step, as it was preempted; and one without drafts.
    write_drafts(states, {"a": []}, ["gone", "a"])
    assert torch.equal(states.draft_tokens, expected)
    write_drafts(states, {"b": [1, 2, 3, 4], "a": [0]}, ["a", "b"])
    assert states.draft_tokens[0].tolist() == [1, 2, 3, 4]
    assert states.draft_tokens[3].tolist() == [0, 6, 7, 7]


@pytest.mark.timeout(120)
def test_vllms_own_inputs_hold_forced_drafts() -> None:
    child = run_child(STEP, timeout=110, **INTERPRETER)
    assert child.value, child.stderr
    (stock, stock_rows), (ours, our_rows) = child.value["without"], child.value["forced"]
    assert stock == {"a": [997, 1, 2, 3], "b": [998, 1, 2], "c": [999]}
    assert ours == {"a": [997, 50, 51, 3], "b": [998, 1, 2], "c": [999]}
    assert stock_rows == our_rows
