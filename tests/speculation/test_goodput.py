# SPDX-License-Identifier: Apache-2.0
"""The chosen lengths against every combination there is."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.goodput import DraftCost, choose_lengths, choose_padded, choose_uniform

chances = st.floats(0.0, 1.0)
costs = st.builds(DraftCost, st.floats(0.1, 50), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))


def make_survival(hazards: list[list[float]]) -> np.ndarray:
    return np.cumprod(np.array(hazards, dtype=np.float64), axis=1)


def judge(survival: np.ndarray, lengths: Sequence[int], time: float, weights: np.ndarray) -> float:
    """The objective, written out."""
    made = [1 + survival[i, :length].sum() for i, length in enumerate(lengths)]
    return float(sum(w * (np.log(tokens) - np.log(time)) for w, tokens in zip(weights, made, strict=True)))


def measure(cost: DraftCost, lengths: Sequence[int], passes: Sequence[int]) -> float:
    """Milliseconds, written out."""
    longest = max(lengths)
    return cost.fixed + cost.per_token * sum(lengths) + cost.per_pass * passes[longest] + cost.once * (longest > 0)


def find_best(survival: np.ndarray, caps: np.ndarray, cost: DraftCost, weights: np.ndarray) -> float:
    return max(
        judge(survival, lengths, measure(cost, lengths, range(10)), weights)
        for lengths in itertools.product(*(range(cap + 1) for cap in caps))
    )


@given(st.data(), st.integers(1, 3), st.integers(1, 4), costs)
def test_no_combination_of_lengths_is_better(data: st.DataObject, n: int, k_max: int, cost: DraftCost) -> None:
    survival = make_survival([data.draw(st.lists(chances, min_size=k_max, max_size=k_max)) for _ in range(n)])
    caps = np.array(data.draw(st.lists(st.integers(0, k_max), min_size=n, max_size=n)))
    weights = np.array(data.draw(st.lists(st.floats(0.1, 5), min_size=n, max_size=n)))
    choice = choose_lengths(survival, caps, cost, weights)
    assert (choice.lengths <= caps).all()
    assert (choice.lengths >= 0).all()
    taken = sum(survival[i, :k].sum() for i, k in enumerate(choice.lengths))
    assert choice.tokens == pytest.approx(n + taken)
    assert choice.milliseconds == pytest.approx(measure(cost, choice.lengths.tolist(), range(10)))
    found = judge(survival, choice.lengths.tolist(), choice.milliseconds, weights)
    assert found >= find_best(survival, caps, cost, weights) - 1e-9


@given(st.data(), st.integers(1, 3), costs, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_no_combination_is_better_whatever_passes_a_length_takes(
    data: st.DataObject, n: int, cost: DraftCost, rises: list[int]
) -> None:
    survival = make_survival([data.draw(st.lists(chances, min_size=3, max_size=3)) for _ in range(n)])
    caps = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    passes = np.cumsum(rises).tolist()
    choice = choose_lengths(survival, caps, cost, passes=passes)
    assert choice.milliseconds == pytest.approx(measure(cost, choice.lengths.tolist(), passes))
    best = max(
        judge(survival, lengths, measure(cost, lengths, passes), np.ones(n))
        for lengths in itertools.product(*(range(cap + 1) for cap in caps))
    )
    assert judge(survival, choice.lengths.tolist(), choice.milliseconds, np.ones(n)) >= best - 1e-9
    padded = choose_padded(
        survival, caps, cost, cost.per_token, n, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), passes=passes
    )
    assert padded.lengths.tolist() == choice.lengths.tolist()


@given(st.integers(0, 10**6), st.integers(1, 40), costs)
def test_the_order_in_memory_decides_nothing(seed: int, n: int, cost: DraftCost) -> None:
    random = np.random.default_rng(seed)
    # Few values, so that many drafts are worth the same.
    survival = np.cumprod(random.choice([0.3, 0.9], (n, 4)), axis=1)
    caps = random.integers(0, 5, n)
    lengths = [choose_lengths(given, caps, cost).lengths for given in (survival, np.asfortranarray(survival))]
    assert (lengths[0] == lengths[1]).all()


@given(st.data(), st.integers(1, 4))
def test_the_best_of_a_few_uniform_lengths(data: st.DataObject, n: int) -> None:
    survival = make_survival([data.draw(st.lists(chances, min_size=4, max_size=4)) for _ in range(n)])
    lengths = [0, 1, 2, 4]
    times = data.draw(st.lists(st.floats(0.1, 20), min_size=4, max_size=4))
    choice = choose_uniform(survival, lengths, times)
    found = {k: judge(survival, [k] * n, time, np.ones(n)) for k, time in zip(lengths, times, strict=True)}
    assert len(set(choice.lengths)) == 1
    chosen = int(choice.lengths[0])
    assert found[chosen] == pytest.approx(max(found.values()))
    assert choice.tokens == pytest.approx(n + survival[:, :chosen].sum())
    assert choice.milliseconds == times[lengths.index(chosen)]


def test_free_drafts_are_all_taken_and_dear_ones_none() -> None:
    survival = make_survival([[0.9, 0.9], [0.2, 0.2]])
    caps = np.array([2, 2])
    assert choose_lengths(survival, caps, DraftCost(5.0, 0.0)).lengths.tolist() == [2, 2]
    assert choose_lengths(survival, caps, DraftCost(1.0, 5.0)).lengths.tolist() == [0, 0]
    # In between, the request that accepts more drafts more.
    assert choose_lengths(survival, caps, DraftCost(5.0, 1.0)).lengths.tolist() == [2, 0]


def test_a_heavier_request_drafts_more() -> None:
    survival = make_survival([[0.5], [0.5]])
    choice = choose_lengths(survival, np.array([1, 1]), DraftCost(4.0, 1.0), np.array([3.0, 0.5]))
    assert choice.lengths.tolist() == [1, 0]


@pytest.mark.parametrize(
    "cost", [DraftCost(0.0, 1.0), DraftCost(float("nan"), 1.0), DraftCost(1.0, -1.0), DraftCost(1.0, 0.0, 0.0, -1.0)]
)
def test_times_that_are_none(cost: DraftCost) -> None:
    with pytest.raises(ValueError, match="times must be positive, got DraftCost"):
        choose_lengths(np.ones((1, 1)), np.array([1]), cost)


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths \[0, 3\] do not fit 2 costs and k_max 2"):
        choose_uniform(np.ones((1, 2)), [0, 3], [1.0, 2.0])


@given(st.data(), st.integers(1, 3), costs, st.floats(0, 1))
def test_padded_steps_are_filled_as_well_as_any_combination(
    data: st.DataObject, n: int, cost: DraftCost, share: float
) -> None:
    survival = make_survival([data.draw(st.lists(chances, min_size=3, max_size=3)) for _ in range(n)])
    caps = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    padding, sizes = share * cost.per_token, (1, 2, 4, 8, 16)
    choice = choose_padded(survival, caps, cost, padding, n, sizes)
    assert (choice.lengths <= caps).all()
    best = -np.inf
    for lengths in itertools.product(*(range(cap + 1) for cap in caps)):
        drafts = sum(lengths)
        room = min(size for size in sizes if size >= n + drafts) - n
        time = measure(cost, lengths, range(10)) + padding * (room - drafts)
        best = max(best, judge(survival, lengths, time, np.ones(n)))
    assert judge(survival, choice.lengths.tolist(), choice.milliseconds, np.ones(n)) >= best - 1e-9


def test_a_request_that_makes_few_tokens_is_not_left_behind() -> None:
    survival, caps, cost = make_survival([[0.9] * 4, [0.3, 0.0, 0.0, 0.0]]), np.array([4, 4]), DraftCost(10.0, 1.9)
    # Of this step alone, tokens over time are more without the second request's draft.
    tokens = 2 + survival[0, :3].sum()
    assert tokens / (10 + 1.9 * 3) > (tokens + 0.3) / (10 + 1.9 * 4)
    # But each of its tokens is a larger part of its way.
    assert choose_lengths(survival, caps, cost).lengths.tolist() == [3, 1]


def test_a_batch_beyond_the_largest_size_is_not_padded() -> None:
    survival, caps, cost = make_survival([[0.9], [0.9]]), np.array([1, 1]), DraftCost(4.0, 1.0)
    padded = choose_padded(survival, caps, cost, 1.0, 2, (1,))
    assert padded.lengths.tolist() == choose_lengths(survival, caps, cost).lengths.tolist()


def test_a_padded_step_is_not_filled_where_drafts_cost_more_than_padding() -> None:
    choice = choose_padded(make_survival([[0.5], [0.25]]), np.array([1, 1]), DraftCost(2.0, 0.8), 0.0, 2, (4,))
    assert choice.lengths.tolist() == [0, 0]
