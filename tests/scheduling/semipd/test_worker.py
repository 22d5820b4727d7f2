# SPDX-License-Identifier: Apache-2.0
"""The worker of two lanes without a model: what its runners share, and what it refuses."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.worker import LaneCPUWorker, SharedCounts, check_groups, spare_seeds


class FakeBatch:
    """Rows of requests, as vLLM's InputBatch."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.num_reqs = 0
        self.generators: dict[int, torch.Generator] = {}

    def remove_request(self, request_id: str) -> None:
        self.removed.append(request_id)


class FakeRunner:
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        self.input_batch = FakeBatch()
        self.discard_request_mask = SimpleNamespace(np=np.zeros(4, dtype=bool))
        self.ran: list[Any] = []

    def execute_model(self, output: Any) -> Any:
        self.ran.append(output)
        return None if output.num_scheduled_tokens else "nothing"

    def sample_tokens(self, grammar: Any) -> Any:
        return f"tokens, {grammar}"


def make_output(cached: tuple[str, ...] = (), new: tuple[str, ...] = (), finished: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys((*cached, *new), 1),
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached)),
        finished_req_ids=set(finished),
    )


@pytest.fixture
def worker() -> LaneCPUWorker:
    made = object.__new__(LaneCPUWorker)
    made.runners = {lane: FakeRunner() for lane in Lane}
    made._latest = {}
    return made


def test_a_request_comes_from_the_other_lane_anew(worker: LaneCPUWorker) -> None:
    batches = {lane: worker.runners[lane].input_batch for lane in Lane}
    assert worker.run_lane(Lane.PREFILL, make_output(new=("a", "b")), "masks") == "tokens, masks"
    worker.run_lane(Lane.PREFILL, make_output(cached=("a", "b")), None)
    assert not batches[Lane.PREFILL].removed
    worker.run_lane(Lane.DECODE, make_output(cached=("a",)), None)
    worker.run_lane(Lane.DECODE, make_output(cached=("a",)), None)
    assert batches[Lane.DECODE].removed == ["a"]
    # Preempted, and its tokens computed again.
    worker.run_lane(Lane.PREFILL, make_output(cached=("a", "b")), None)
    assert batches[Lane.PREFILL].removed == ["a"]
    assert worker.run_lane(Lane.DECODE, make_output(finished=("a", "b")), None) == "nothing"
    assert not worker._latest


def test_one_goes_through_while_another_adds() -> None:
    counts = SharedCounts({str(number): number for number in range(200)})
    is_over = threading.Event()

    def change() -> None:
        number = 1000
        while not is_over.is_set():
            counts[str(number)] = number
            counts.pop(str(number - 3), None)
            number += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            assert sum(value < 200 for _, value in counts.items()) == 200
    finally:
        is_over.set()
        thread.join()
    # In the middle of a pass, which a plain dictionary refuses to go on with.
    for name, _ in counts.items():
        counts.pop(name)
    assert not counts


def make_spec(kind: type[KVCacheSpec], **fields: Any) -> KVCacheConfig:
    spec = kind(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, **fields)
    groups = [KVCacheGroupSpec(["model.layers.3.self_attn.attn"], spec)]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)


def test_other_caches_are_refused() -> None:
    check_groups(make_spec(FullAttentionSpec))
    with pytest.raises(ValueError, match=r"cache of SlidingWindowSpec \(model.layers.3.self_attn.attn\)"):
        check_groups(make_spec(SlidingWindowSpec, sliding_window=32))


def test_unfinished_prompts_leave_their_generators_alone() -> None:
    runner: Any = FakeRunner()
    mine, theirs = torch.Generator(), torch.Generator()
    runner.input_batch.num_reqs = 3
    runner.input_batch.generators = {0: mine, 2: theirs}
    # The row behind the batch is left from an earlier one.
    runner.discard_request_mask.np[:] = (True, True, False, True)

    def fail() -> None:
        with spare_seeds(runner):
            assert runner.input_batch.generators == {2: theirs}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert runner.input_batch.generators == {0: mine, 2: theirs}


def test_both_runners_hear_of_changes(worker: LaneCPUWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    worker.second_runner = SimpleNamespace(update_max_model_len=lambda length: heard.append(("second", length)))
    worker.vllm_config = SimpleNamespace(load_config="new")
    monkeypatch.setattr(CPUWorker, "update_max_model_len", lambda self, length: heard.append(("first", length)))
    monkeypatch.setattr(CPUWorker, "update_config", lambda self, overrides: heard.append(overrides))
    worker.update_max_model_len(77)
    worker.update_config({"load_config": {}})
    assert heard == [("first", 77), ("second", 77), {"load_config": {}}]
    assert worker.second_runner.load_config == "new"


def test_reloaded_layers_are_those_of_torch(worker: LaneCPUWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    seen: list[Any] = []
    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    monkeypatch.setattr(CPUWorker, "reload_weights", lambda self, *args: seen.append(_custom_ops._supports_onednn))
    monkeypatch.setattr(LaneCPUWorker, "_pack_linear_layers", lambda self: seen.append("packed"))
    monkeypatch.setattr(LaneCPUWorker, "_lock_scratch", lambda self: seen.append("locked"))
    worker.reload_weights()
    assert seen == [False, "packed", "locked"]
    assert _custom_ops._supports_onednn
