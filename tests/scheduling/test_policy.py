# SPDX-License-Identifier: Apache-2.0
"""`smartspec.policy` over vLLM's own requests and scheduler: who is in a hurry is given the longer drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from tests.scheduling.real_scheduler import add_request, build_scheduler, hand_drafts, run_model
from vllm_ext import config
from vllm_ext.scheduling.policy import DEADLINE_KEY, POLICIES, RequestPolicy, make_policy
from vllm_ext.speculation.policy import MOST_WEIGHT
from vllm_ext.speculation.step_time import COEFFICIENTS, StepFeatures, StepTimeModel

K = 4


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_request(rid: str, deadline: object = None, priority: int = 0, arrival: float = 1000.0) -> Request:
    extra = None if deadline is None else {DEADLINE_KEY: deadline}
    parameters = SamplingParams(max_tokens=100, extra_args=extra)
    return Request(rid, [1, 2], parameters, None, priority=priority, arrival_time=arrival)


def make_requests(*requests: Request) -> dict[str, Request]:
    return {request.request_id: request for request in requests}


def test_without_a_policy_there_are_no_weights() -> None:
    assert make_policy("equal", {}) is None
    assert set(POLICIES) == {"equal", "priority", "deadline", "priority+deadline"}


@pytest.mark.parametrize("name", ["priority", "deadline", "priority+deadline"])
def test_requests_that_say_nothing_weigh_exactly_one(name: str) -> None:
    policy = make_policy(name, make_requests(*(make_request(rid) for rid in "abc")))
    assert policy is not None
    assert policy("abc").tolist() == [1.0, 1.0, 1.0]


def test_priorities_are_relative_to_the_batch() -> None:
    requests = make_requests(
        make_request("a", priority=3), make_request("b", priority=1), make_request("c", priority=3)
    )
    policy = RequestPolicy(requests, priorities=True, deadlines=False)
    assert policy("abc").tolist() == [0.75, 1.5, 0.75]
    assert policy("ac").tolist() == [1.0, 1.0]


def test_priorities_of_any_size() -> None:
    """vLLM's Python interfaces take any integer; an error here would end the engine for all."""
    requests = make_requests(
        make_request("a", priority=2**63), make_request("b", priority=-(2**80)), make_request("c", priority=0)
    )
    weights = RequestPolicy(requests, priorities=True, deadlines=False)("abc")
    assert weights / weights[1] == pytest.approx([0.25, 1.0, 0.5])


def test_a_deadline_weighs_by_the_pace_of_its_request() -> None:
    clock = Clock()
    requests = make_requests(make_request("slow", 500), make_request("idle"), make_request("calm", 60_000.0))
    policy = RequestPolicy(requests, priorities=False, deadlines=True, clock=clock)
    ids = ["slow", "idle", "calm"]
    # Nothing is measured at first.
    assert policy(ids).tolist() == [1.0, 1.0, 1.0]
    for request in requests.values():
        request.append_output_token_ids([7] * 20)
    clock.now += 0.2
    # 10 ms a token, 80 tokens and 300 ms left: 2.67 times too slow.
    weights = policy(ids)
    assert weights / weights[1] == pytest.approx(np.array([800 / 300, 1.0, 1.0]))
    clock.now += 0.29
    weights = policy(ids)
    assert weights[0] / weights[1] == pytest.approx(MOST_WEIGHT)
    # Past it: others come first again.
    clock.now += 0.2
    assert policy(ids).tolist() == [1.0, 1.0, 1.0]


def test_an_id_that_is_used_again_and_requests_that_left() -> None:
    clock = Clock()
    requests = make_requests(make_request("a", 500))
    policy = RequestPolicy(requests, priorities=False, deadlines=True, clock=clock)
    policy("a")
    requests["a"] = make_request("a", arrival=1001.0)
    clock.now = 1001.4
    assert policy("a").tolist() == [1.0]
    assert policy._due["a"].arrival == 1001.0
    for number in range(500):
        requests.clear()
        requests[str(number)] = make_request(str(number), 100)
        policy([str(number)])
    assert len(policy._due) < 100


@pytest.mark.parametrize("value", ["soon", -5, 0, float("nan"), float("inf"), True, [100]])
def test_a_deadline_that_is_none_is_named_and_does_not_count(value: object, messages: list[str]) -> None:
    requests = make_requests(make_request("a", value), make_request("b", value))
    policy = RequestPolicy(requests, priorities=False, deadlines=True)
    assert policy("ab").tolist() == [1.0, 1.0]
    (warning,) = messages
    assert f"{DEADLINE_KEY} of request a is {value!r}" in warning
    assert "give milliseconds" in warning


def test_unknown_names_are_refused() -> None:
    with pytest.raises(config.ConfigError, match="policy must be one of 'equal', 'priority', 'deadline'"):
        config.parse({"smartspec": {"policy": "urgent"}})


class TightStepTime(StepTimeModel):
    """Drafts cost nearly as much as they are worth, and the machine's times do not count."""

    def __init__(self) -> None:
        super().__init__({name: {"step": 1.0, "tokens": 1.0}.get(name, 0.0) for name in COEFFICIENTS})

    def observe(self, features: StepFeatures, milliseconds: float) -> None:
        """Learn nothing."""


def measure_planned(tmp_path: Path, **smartspec: Any) -> dict[str, float]:
    """Mean draft length by request, of four requests whose drafts are right in two of three steps."""
    scheduler = build_scheduler(K, tmp_path, **smartspec)
    scheduler._controller.step_time = TightStepTime()
    for number, rid in enumerate("abcd"):
        add_request(scheduler, rid, priority=0 if rid == "b" else 1, arrival_time=float(number))
    planned: dict[str, list[int]] = {rid: [] for rid in "abcd"}
    for step in range(120):
        output = scheduler.schedule()
        model = run_model(output, lambda rid, drafts, step=step: [*drafts, 9] if step % 3 else [9])  # type: ignore[misc]
        scheduler.update_from_output(output, model)
        hand_drafts(scheduler, {rid: [5] * length for rid, length in output.draft_lengths.items()})
        if step >= 40:
            for rid, length in output.draft_lengths.items():
                planned[rid].append(length)
    return {rid: float(np.mean(lengths)) for rid, lengths in planned.items()}


def test_the_scheduler_drafts_more_for_the_urgent_request(tmp_path: Path) -> None:
    by_priority = measure_planned(tmp_path, policy="priority")
    others = [by_priority[rid] for rid in "acd"]
    assert by_priority["b"] > max(others) + 0.5
    # Neutral unless asked for.
    plain, equal = measure_planned(tmp_path), measure_planned(tmp_path, policy="equal")
    assert plain == equal
    assert max(plain.values()) - min(plain.values()) < 0.5
