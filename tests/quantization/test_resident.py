# SPDX-License-Identifier: Apache-2.0
"""Which layout packed weights get in memory."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed import parallel_state

from tests.child import run_child
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.native import load
from vllm_ext.quantization import resident


@pytest.mark.parametrize(
    ("isa", "variable", "expected"),
    [
        ("avx2", None, Layout.CPU_RECORD),
        ("scalar", None, Layout.PLAIN_CODES),
        ("scalar", "scalar", Layout.CPU_RECORD),
    ],
)
def test_kernels_slower_than_torch_are_used_only_where_asked_for(
    isa: str, variable: str | None, expected: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Operators:
        @staticmethod
        def isa() -> str:
            return isa

    monkeypatch.setattr(resident, "load_ops", lambda *_: Operators)
    monkeypatch.delenv(load.ISA_ENV, raising=False)
    if variable is not None:
        monkeypatch.setenv(load.ISA_ENV, variable)
    assert resident.choose_layout(torch.bfloat16, torch.device("cpu")) == expected
    assert resident.choose_layout(torch.float32, torch.device("cpu")) == Layout.PLAIN_CODES


@pytest.mark.parametrize(("sound", "expected"), [(True, Layout.GPU_FRAGMENT), (False, Layout.PLAIN_CODES)])
def test_a_gpu_gets_its_layout_where_its_kernels_pass_the_check(
    sound: bool, expected: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident.selfcheck, "is_sound", lambda device, dtype: sound)
    resident.is_sound_on_all_ranks.cache_clear()
    layout = resident.choose_layout(torch.bfloat16, torch.device("cuda"))
    assert layout == expected
    stored = BlockFormat(4, 16, 128)
    assert resident.place_in_memory(stored, layout).layout == expected
    assert resident.choose_layout(torch.float32, torch.device("cuda")) == Layout.PLAIN_CODES
    resident.is_sound_on_all_ranks.cache_clear()


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_a_rank_votes_whatever_becomes_of_its_check(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    votes: list[torch.Tensor] = []

    def check(device: torch.device, dtype: torch.dtype) -> bool:
        if error is not None:
            raise error
        return True

    group = SimpleNamespace(world_size=2, cpu_group="ranks")
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op, group: votes.append(tensor.clone()))
    monkeypatch.setattr(resident.selfcheck, "is_sound", check)
    resident.is_sound_on_all_ranks.cache_clear()
    # As loaders have it, where no tensor of the default device could go through gloo.
    with torch.device("meta"), nullcontext() if error is None else pytest.raises(RuntimeError, match="illegal memory"):
        assert resident.is_sound_on_all_ranks(torch.device("cuda"), torch.bfloat16)
    resident.is_sound_on_all_ranks.cache_clear()
    (vote,) = votes
    assert vote.device.type == "cpu"
    assert vote.tolist() == [int(error is None)]


RANKS = """
import json
import os
import sys
import tempfile
import torch
import torch.multiprocessing
from types import SimpleNamespace
from vllm.distributed import parallel_state
from vllm_ext.quantization import resident

def play(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
    parallel_state.model_parallel_is_initialized = lambda: True
    parallel_state.get_tp_group = lambda: group
    # The second rank's kernels are wrong, and only in fp16; its check of the third dtype dies.
    def check(device, dtype):
        if rank == 1 and dtype == torch.float64:
            raise RuntimeError("died")
        return rank == 0 or dtype == torch.bfloat16
    resident.selfcheck.is_sound = check
    for dtype in (torch.bfloat16, torch.float16, torch.float16, torch.float64):
        try:
            found = resident.is_sound_on_all_ranks(torch.device("cuda", rank), dtype)
        except RuntimeError as error:
            found = str(error)
        results.put((rank, str(dtype), found))
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        children = [context.Process(target=play, args=(rank, f"{directory}/store", results)) for rank in range(2)]
        for child in children:
            child.start()
        found = sorted(results.get() for _ in range(8))
        for child in children:
            child.join()
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_ranks_agree_on_the_kernels() -> None:
    child = run_child(RANKS)
    assert child.value is not None, child.stderr
    answers = [("torch.bfloat16", True), ("torch.float16", False), ("torch.float16", False)]
    # Nobody waits for the rank that died.
    last = [("torch.float64", False), ("torch.float64", "died")]
    assert child.value == [[rank, *answer] for rank in range(2) for answer in (*answers, last[rank])]
