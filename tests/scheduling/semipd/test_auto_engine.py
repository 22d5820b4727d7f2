# SPDX-License-Identifier: Apache-2.0
"""`mode: auto` in a real engine: batches of both phases where they are better, and stock's tokens whatever is mixed."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.scheduling.semipd.test_engine import (
    check_clean,
    find_scheduler,
    list_outputs,
    make_requests,
    make_server,
    start,
)
from vllm_ext.scheduling.phases import pacer
from vllm_ext.scheduling.phases.mixing import MixedModel
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd.step import LaneStep

pytestmark = pytest.mark.engine


def count_turns(scheduler: Any, period: int, interval: float = 0.0) -> list[LaneStep]:
    """Mix and cease to mix every so many turns, whatever the controller says, or have decode wait and not wait; returns
    the turns to come. interval: seconds."""
    turns: list[LaneStep] = []
    schedule = scheduler.schedule

    def schedule_and_flip(*args: Any, **kwargs: Any) -> LaneStep:
        is_on = len(turns) // period % 2 == 0
        scheduler.pacer.is_mixing, scheduler.pacer.decode_interval = is_on and not interval, interval if is_on else 0.0
        turns.append(schedule(*args, **kwargs))
        return turns[-1]

    scheduler.schedule = schedule_and_flip
    return turns


def list_lanes(step: LaneStep) -> list[Lane]:
    return [launch.batch.lane for launch in step.launches if launch.batch.tokens]


def run_fresh(llm: LLM, *requests: Any) -> list[list[int]]:
    assert llm.reset_prefix_cache()
    return list_outputs(llm, *requests)


def test_auto_mixes_and_tokens_are_those_of_stock(
    tiny_moe: str, engine_in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(24)
    stock = start(tiny_moe, False)
    expected = list_outputs(stock, *requests)
    del stock

    monkeypatch.setattr(pacer, "PERIOD", 0.02)
    # First tokens are due at once, and the controller takes mixed batches for as fast as that. What it really thinks of
    # them here depends on the machine.
    block = {"slo_ttft_ms": 1, "slo_tpot_ms": 60_000}
    with monkeypatch.context() as patched:
        patched.setattr(MixedModel, "predict", lambda *_: (1e-9, 1e-9))
        ours = start(tiny_moe, True, additional_config={"vllm_ext": {"semipd": block}})
        scheduler = find_scheduler(ours)
        counts = scheduler.lanes.counts
        assert list_outputs(ours, *requests) == expected
    # The lanes measured both phases, and then they were mixed.
    assert counts.batches[Lane.PREFILL] > 0
    assert scheduler.pacer.counts.switches == 1
    assert scheduler.pacer.is_mixing
    assert counts.mixed > 3
    assert scheduler.pacer.counts.mixed_busy > 0
    check_clean(scheduler)

    # Requests go from runner to runner in the middle of their prompts, and the prefill lane is drained each time.
    schedule = scheduler.schedule
    for period in (3, 10):
        before = (counts.mixed, counts.batches[Lane.PREFILL], counts.overlapping)
        turns = count_turns(scheduler, period)
        # How many there are of each depends on how many turns the prompts last: on a busy machine one run has too few.
        for _ in range(5):
            assert run_fresh(ours, *requests) == expected
            after = (counts.mixed, counts.batches[Lane.PREFILL], counts.overlapping)
            if all(now > then for now, then in zip(after, before, strict=True)):
                break
        scheduler.schedule = schedule
        assert counts.mixed > before[0]
        assert counts.batches[Lane.PREFILL] > before[1]
        assert counts.overlapping > before[2]
        flags = {launch.batch.is_mixed for step in turns for launch in step.launches if launch.batch.tokens}
        assert flags == {False, True}
        check_clean(scheduler)

    # Decode waits while prompts are computed, which have all cores.
    turns = count_turns(scheduler, 7, interval=0.02)
    for _ in range(5):
        assert run_fresh(ours, *requests) == expected
        if any(step.wake is not None and list_lanes(step) == [Lane.PREFILL] for step in turns):
            break
    scheduler.schedule, scheduler.pacer.decode_interval = schedule, 0.0
    assert any(step.wake is not None and list_lanes(step) == [Lane.PREFILL] for step in turns)
    # Woken in good time, while the prompts of an earlier turn are computed.
    assert any(
        list_lanes(step) == [Lane.DECODE]
        and sum(step.launches[0].batch.tokens.values()) < step.total_num_scheduled_tokens
        for step in turns
    )
    assert {launch.has_all for step in turns for launch in step.launches if launch.batch.tokens} == {False, True}
    check_clean(scheduler)

    # No objective can be met in no time: who comes in behind others is held back, and served as all others are.
    assert scheduler.pacer.max_queued_tokens is not None
    assert run_fresh(ours, *requests) == expected
    assert scheduler.pacer.counts.late > 0
    assert len(scheduler.policies.late) == 0
    check_clean(scheduler)


def send(base_url: str, number: int) -> tuple[int, str]:
    """Status and text of the answer to a long prompt that no other one begins like."""
    words = " ".join(["And the LORD spake unto Moses saying"] * 90)
    body = {"model": "m", "prompt": f"{number} {words}", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_late_prompts_are_refused_at_the_door(tiny_moe: str, tmp_path: Path) -> None:
    """`admission: refuse` in a server: the controller's limit reaches the API process, and a burst is told at once."""
    block = {"slo_ttft_ms": 1, "slo_tpot_ms": 1, "admission": "refuse"}
    server = make_server(tiny_moe, tmp_path, "--additional-config", json.dumps({"vllm_ext": {"semipd": block}}))
    server.start()
    try:
        numbers, statuses = itertools.count(), []
        deadline = time.monotonic() + 120
        with ThreadPoolExecutor(12) as clients:
            while 503 not in statuses and time.monotonic() < deadline:
                burst = [next(numbers) for _ in range(24)]
                answers = list(clients.map(lambda number: send(server.base_url, number), burst))
                statuses += [status for status, _ in answers]
        # Some are refused, with a reason; others are served, and nobody gets anything else.
        assert set(statuses) == {200, 503}
        refused = next(text for status, text in answers if status == 503)
        assert "prefill token backlog limit" in refused
        assert server.read_metric("vllm_ext:semipd_max_queued_tokens")
        assert server.read_metric("vllm:admission_rejections_total") == statuses.count(503)
        assert server.read_metric("vllm_ext:semipd_held_requests_total") == 0.0
        # Whoever comes alone is served, however short of time the objectives are.
        assert [send(server.base_url, next(numbers))[0] for _ in range(3)] == [200] * 3
    finally:
        assert server.stop() == 0
