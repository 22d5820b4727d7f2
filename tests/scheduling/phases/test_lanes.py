# SPDX-License-Identifier: Apache-2.0
"""The lanes under an adversary: no order of events may corrupt, lose, repeat or leak anything, and no fence is idle."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduling.phases.fake_engine import Scenario, generate, serve
from tests.scheduling.phases.fake_pool import BLOCK_SIZE
from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.view import find_phase


def draw_scenario(seed: int, depths: tuple[int, int]) -> Scenario:
    """Requests with common prefixes, some of them other requests' conversations continued, on a tight machine."""
    rng = random.Random(seed)
    stop_every = rng.choice((7, 13, 1 << 40))
    prompts: list[tuple[str, list[int], int]] = []
    common = [rng.randrange(3) for _ in range(rng.randrange(4, 14))]
    for number in range(rng.randrange(2, 9)):
        max_tokens = rng.randrange(1, 14)
        if prompts and rng.random() < 0.5:
            _, earlier, length = rng.choice(prompts)
            prompt = earlier + generate(earlier, length, stop_every)[: rng.randrange(length + 1)]
            if rng.random() < 0.5:
                prompt.append(rng.randrange(3))
        else:
            prompt = common[: rng.randrange(len(common))] + [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        # Ids come back, but not often.
        rid = f"r{rng.randrange(number + 1)}" if rng.random() < 0.25 else f"r{number}"
        prompts.append((rid, prompt, max_tokens))
    largest = max(-(-(len(prompt) + tokens) // BLOCK_SIZE) for _, prompt, tokens in prompts)
    return Scenario(
        prompts,
        # One more than the largest request needs: a partial hit holds its source while it copies.
        num_blocks=largest + 1 + rng.choice((0, 1, 3, 30)),
        budget=rng.choice((2, 5, 16)),
        max_active=rng.choice((1, 2, 4, 8)),
        depths=depths,
        whole_prompt_fits=rng.random() < 0.5,
        publishes_last=rng.random() < 0.5,
        abort_chance=rng.choice((0.0, 0.01, 0.05)),
        stop_every=stop_every,
        mix_chance=rng.choice((0.0, 0.02, 0.2)),
        seed=seed,
    )


DEPTHS = [(1, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("depths", DEPTHS)
@settings(max_examples=120)
@given(seed=st.integers(0, 2**48))
def test_any_order_of_events(depths: tuple[int, int], seed: int) -> None:
    serve(draw_scenario(seed, depths))


#: Fence -> how it answers where it is missing, as vLLM for one stream.
WITHOUT: dict[str, Callable[..., Any]] = {
    "may_schedule": lambda lanes, lane, request: find_phase(request) is lane,
    "may_preempt": lambda lanes, request_id: True,
    "holds_blocks": lambda lanes, request_id: False,
    "retains_copies": lambda lanes: False,
    "delays_hashes": lambda lanes, lane: False,
    "count_written": lambda lanes, request: min(request.num_computed_tokens, request.num_tokens),
    "is_deliverable": lambda lanes, lane, request_id: True,
    "tells_all_lanes": lambda lanes: False,
    "is_settled": lambda lanes, request_id: True,
    "may_mix": lambda lanes: True,
    "waits_for_mixed": lambda lanes: False,
}


@pytest.mark.parametrize("fence", WITHOUT)
def test_no_fence_is_idle(fence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of them a schedule goes wrong; what passes here would pass with a fence forgotten."""
    monkeypatch.setattr(Lanes, fence, WITHOUT[fence])
    for seed in range(3000):
        scenario = draw_scenario(seed, DEPTHS[seed % len(DEPTHS)])
        try:
            serve(scenario, max_actions=10_000)
        except (AssertionError, KeyError, IndexError, ValueError):
            return
    pytest.fail(f"nothing goes wrong without {fence}")


def test_every_fence_is_tested() -> None:
    """The list of the module's docstring, the methods marked as fences, and the mutations are the same."""
    marked = {name for name, method in vars(Lanes).items() if (method.__doc__ or "").startswith("Fence:")}
    assert marked == set(WITHOUT)


@pytest.mark.slow
@pytest.mark.parametrize("depths", DEPTHS)
def test_ten_thousand_orders_of_events(depths: tuple[int, int]) -> None:
    for seed in range(10_000):
        serve(draw_scenario(seed, depths))


def test_schedules_reach_what_the_fences_are_for() -> None:
    """Schedules in which nothing is aborted, preempted, copied or overlapping would prove nothing."""
    counts = [serve(draw_scenario(seed, (1, 1))) for seed in range(100)]
    assert sum(scheduler.lanes.counts.overlapping for scheduler in counts) > 300
    assert sum(scheduler.lanes.counts.mixed for scheduler in counts) > 40
    assert (
        min(
            sum(scheduler.num_preemptions for scheduler in counts),
            sum(scheduler.lanes.counts.deferred_frees for scheduler in counts),
            sum(scheduler.lanes.counts.retained_copies for scheduler in counts),
            sum(scheduler.lanes.counts.withheld_finishes for scheduler in counts),
        )
        > 10
    )
