# SPDX-License-Identifier: Apache-2.0
"""The chosen lengths against every combination there is, and what choosing so leads to over many steps."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.speculation.goodput import (
    Choice,
    DraftCost,
    choose_lengths,
    choose_padded,
    choose_uniform,
    drop_least,
    value_drafts,
)

chances = st.floats(0.0, 1.0)
costs = st.builds(DraftCost, st.floats(0.1, 50), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
prices = st.floats(0.0, 3.0)


def make_survival(hazards: list[list[float]]) -> np.ndarray:
    return np.cumprod(np.array(hazards, dtype=np.float64), axis=1)


def draw_batch(data: st.DataObject, n: int, k_max: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Survival, values and caps."""
    survival = make_survival([data.draw(st.lists(chances, min_size=k_max, max_size=k_max)) for _ in range(n)])
    usual = np.array(data.draw(st.lists(st.floats(1, 9), min_size=n, max_size=n)))
    weights = np.array(data.draw(st.lists(st.floats(0.1, 5), min_size=n, max_size=n)))
    caps = np.array(data.draw(st.lists(st.integers(0, k_max), min_size=n, max_size=n)))
    share = data.draw(st.floats(0.01, 1))
    return survival, value_drafts(survival, usual, share, weights), caps


def judge(values: np.ndarray, lengths: Sequence[int], time: float, price: float) -> float:
    """The objective, written out."""
    return float(sum(values[i, :length].sum() for i, length in enumerate(lengths))) - price * time


def measure(cost: DraftCost, lengths: Sequence[int], passes: Sequence[int]) -> float:
    """Milliseconds, written out."""
    longest = max(lengths)
    return cost.fixed + cost.per_token * sum(lengths) + cost.per_pass * passes[longest] + cost.once * (longest > 0)


def is_as_good(found: float, best: float) -> bool:
    return found >= best - 1e-9 * max(1.0, abs(best))


def test_the_value_of_a_draft_is_its_part_of_a_usual_step() -> None:
    survival, usual = make_survival([[0.5, 0.5], [0.8, 0.5]]), np.array([1.0, 4.0])
    assert value_drafts(survival, usual, 1e-9) == pytest.approx(np.array([[0.5, 0.25], [0.2, 0.1]]))
    weights = np.array([2.0, 1.0])
    assert value_drafts(survival, usual, 1e-9, weights) == pytest.approx(np.array([[1.0, 0.5], [0.2, 0.1]]))


@given(st.data(), st.integers(1, 3), st.floats(0.01, 1.0))
def test_values_are_what_averages_gain(data: st.DataObject, n: int, share: float) -> None:
    survival = make_survival([data.draw(st.lists(chances, min_size=4, max_size=4)) for _ in range(n)])
    usual = np.array(data.draw(st.lists(st.floats(1, 9), min_size=n, max_size=n)))
    values = value_drafts(survival, usual, share)
    tokens = 1 + np.cumsum(survival, axis=1)
    gained = np.log(usual[:, None] + share * (tokens - usual[:, None])) - np.log(usual + share * (1 - usual))[:, None]
    assert np.cumsum(values, axis=1) * share == pytest.approx(gained, abs=1e-9)
    assert (np.diff(values, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match="share of steps in an average must be above 0"):
        value_drafts(np.ones((1, 1)), np.ones(1), share)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), costs, prices)
def test_no_combination_of_lengths_is_better(
    data: st.DataObject, n: int, k_max: int, cost: DraftCost, price: float
) -> None:
    survival, values, caps = draw_batch(data, n, k_max)
    choice = choose_lengths(survival, values, caps, cost, price)
    assert (choice.lengths <= caps).all()
    assert (choice.lengths >= 0).all()
    taken = sum(survival[i, :k].sum() for i, k in enumerate(choice.lengths))
    assert choice.tokens == pytest.approx(n + taken)
    assert choice.milliseconds == pytest.approx(measure(cost, choice.lengths.tolist(), range(10)))
    found = judge(values, choice.lengths.tolist(), choice.milliseconds, price)
    best = max(
        judge(values, lengths, measure(cost, lengths, range(10)), price)
        for lengths in itertools.product(*(range(cap + 1) for cap in caps))
    )
    assert is_as_good(found, best)


@given(st.data(), st.integers(1, 3), costs, prices, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_no_combination_is_better_whatever_passes_a_length_takes(
    data: st.DataObject, n: int, cost: DraftCost, price: float, rises: list[int]
) -> None:
    survival, values, caps = draw_batch(data, n, 3)
    passes = np.cumsum(rises).tolist()
    choice = choose_lengths(survival, values, caps, cost, price, passes)
    assert choice.milliseconds == pytest.approx(measure(cost, choice.lengths.tolist(), passes))
    best = max(
        judge(values, lengths, measure(cost, lengths, passes), price)
        for lengths in itertools.product(*(range(cap + 1) for cap in caps))
    )
    assert is_as_good(judge(values, choice.lengths.tolist(), choice.milliseconds, price), best)
    # Sizes without steps between them pad nothing.
    padded = choose_padded(survival, values, caps, cost, price, cost.per_token, n, range(1, 13), passes)
    assert is_as_good(judge(values, padded.lengths.tolist(), measure(cost, padded.lengths, passes), price), best)


@given(st.integers(0, 10**6), st.integers(1, 40), costs, prices)
def test_the_order_in_memory_decides_nothing(seed: int, n: int, cost: DraftCost, price: float) -> None:
    random = np.random.default_rng(seed)
    # Few values, so that many drafts are worth the same.
    survival = np.cumprod(random.choice([0.3, 0.9], (n, 4)), axis=1)
    caps, usual = random.integers(0, 5, n), random.choice([1.0, 3.0], n)
    lengths = [
        choose_lengths(given, value_drafts(given, usual, 0.05), caps, cost, price).lengths
        for given in (survival, np.asfortranarray(survival))
    ]
    assert (lengths[0] == lengths[1]).all()


@given(st.data(), st.integers(1, 4), prices)
def test_the_best_of_a_few_uniform_lengths(data: st.DataObject, n: int, price: float) -> None:
    survival, values, _ = draw_batch(data, n, 4)
    lengths = [0, 1, 2, 4]
    times = data.draw(st.lists(st.floats(0.1, 20), min_size=4, max_size=4))
    choice = choose_uniform(survival, values, lengths, times, price)
    found = {k: judge(values, [k] * n, time, price) for k, time in zip(lengths, times, strict=True)}
    assert len(set(choice.lengths)) == 1
    chosen = int(choice.lengths[0])
    assert found[chosen] == pytest.approx(max(found.values()))
    assert choice.tokens == pytest.approx(n + survival[:, :chosen].sum())
    assert choice.milliseconds == times[lengths.index(chosen)]


@given(st.data(), st.integers(1, 3), costs, prices, st.floats(0, 1))
def test_padded_steps_are_filled_as_well_as_any_combination(
    data: st.DataObject, n: int, cost: DraftCost, price: float, share: float
) -> None:
    survival, values, caps = draw_batch(data, n, 3)
    padding, sizes = share * cost.per_token, (1, 2, 4, 8, 16)
    choice = choose_padded(survival, values, caps, cost, price, padding, n, sizes)
    assert (choice.lengths <= caps).all()
    best = -np.inf
    for lengths in itertools.product(*(range(cap + 1) for cap in caps)):
        drafts = sum(lengths)
        room = min(size for size in sizes if size >= n + drafts) - n
        best = max(best, judge(values, lengths, measure(cost, lengths, range(10)) + padding * (room - drafts), price))
    assert is_as_good(judge(values, choice.lengths.tolist(), choice.milliseconds, price), best)


def choose_first(
    survival: np.ndarray, caps: np.ndarray | int, cost: DraftCost, weights: np.ndarray | None = None
) -> Choice:
    """Where nothing was drafted yet: a usual step makes one token for each request."""
    values = value_drafts(survival, np.ones(len(survival)), 0.05, weights)
    return choose_lengths(survival, values, caps, cost, len(survival) / cost.fixed)


def test_free_drafts_are_all_taken_and_dear_ones_none() -> None:
    survival = make_survival([[0.9, 0.9], [0.2, 0.2]])
    assert choose_first(survival, 2, DraftCost(5.0, 0.0)).lengths.tolist() == [2, 2]
    assert choose_first(survival, 2, DraftCost(1.0, 5.0)).lengths.tolist() == [0, 0]
    # In between, the request that accepts more drafts more.
    assert choose_first(survival, 2, DraftCost(5.0, 1.0)).lengths.tolist() == [2, 0]


def test_a_heavier_request_drafts_more() -> None:
    survival = make_survival([[0.5], [0.5]])
    choice = choose_first(survival, np.array([1, 1]), DraftCost(4.0, 1.0), np.array([3.0, 0.5]))
    assert choice.lengths.tolist() == [1, 0]


def serve(chances: np.ndarray, cost: DraftCost, steps: int, rate: float) -> tuple[np.ndarray, float]:
    """(tokens [n] and milliseconds of a step on average) where each step is chosen by the averages of those before.

    chances: [phases, n, k], in turn.
    """
    usual, time = np.ones(chances.shape[1]), cost.fixed
    made, spent = np.zeros(chances.shape[1]), 0.0
    for step in range(steps):
        survival = np.cumprod(chances[step % len(chances)], axis=1)
        choice = choose_lengths(survival, value_drafts(survival, usual, rate), 4, cost, len(survival) / time)
        tokens = 1 + (survival * (np.arange(4) < choice.lengths[:, None])).sum(axis=1)
        usual, time = usual + rate * (tokens - usual), time + rate * (choice.milliseconds - time)
        if step >= steps // 2:
            made, spent = made + tokens, spent + choice.milliseconds
    return made / (steps - steps // 2), spent / (steps - steps // 2)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.02, 1.0), st.floats(0, 0.5), st.floats(0, 0.5))
def test_steps_chosen_one_by_one_have_the_best_averages(
    seed: int, n: int, per_token: float, per_pass: float, once: float
) -> None:
    chances, cost = np.random.default_rng(seed).random((1, n, 4)), DraftCost(4.0, per_token, per_pass, once)
    tokens, time = serve(chances, cost, 600, 0.02)
    best = -np.inf
    survival = np.cumprod(chances[0], axis=1)
    for lengths in itertools.product(range(5), repeat=n):
        made = np.array([1 + survival[i, :length].sum() for i, length in enumerate(lengths)])
        best = max(best, np.log(made).sum() - n * np.log(measure(cost, lengths, range(5))))
    assert np.log(tokens).sum() - n * np.log(time) >= best - 0.01 * n


def test_a_request_that_makes_few_tokens_is_not_left_behind() -> None:
    chances, cost = np.array([[[0.9] * 4, [0.3, 0.0, 0.0, 0.0]]]), DraftCost(10.0, 1.9)
    survival = np.cumprod(chances[0], axis=1)
    # Of one step alone, tokens over time are more without the second request's draft.
    alone = 2 + survival[0, :3].sum()
    assert alone / (10 + 1.9 * 3) > (alone + 0.3) / (10 + 1.9 * 4)
    # But each of its tokens is a larger part of its way.
    tokens, _ = serve(chances, cost, 400, 0.05)
    assert tokens[1] > 1.25


def test_a_burst_is_drafted_long() -> None:
    # Nine steps of ten a lookup finds nothing; then all it finds is accepted.
    chances = np.zeros((10, 1, 4))
    chances[0], cost = 0.98, DraftCost(4.0, 3.4)
    survival = np.cumprod(chances[0, 0])
    rates = [(10 + survival[:k].sum()) / (10 * 4.0 + 3.4 * k) for k in range(5)]
    assert np.argmax(rates) == 4
    tokens, _ = serve(chances, cost, 1000, 0.02)
    assert tokens[0] == pytest.approx(1 + survival.sum() / 10)
    # By the logarithms of that step alone it would be shorter.
    of_step = [np.log(1 + survival[:k].sum()) - np.log(4.0 + 3.4 * k) for k in range(5)]
    assert np.argmax(of_step) == 3


@pytest.mark.parametrize(
    "cost", [DraftCost(0.0, 1.0), DraftCost(float("nan"), 1.0), DraftCost(1.0, -1.0), DraftCost(1.0, 0.0, 0.0, -1.0)]
)
def test_times_that_are_none(cost: DraftCost) -> None:
    with pytest.raises(ValueError, match="times must be positive, got DraftCost"):
        choose_lengths(np.ones((1, 1)), np.ones((1, 1)), np.array([1]), cost, 1.0)


@pytest.mark.parametrize("price", [-1.0, float("nan")])
def test_prices_that_are_none(price: float) -> None:
    with pytest.raises(ValueError, match="the price of a millisecond must not be negative"):
        choose_lengths(np.ones((1, 1)), np.ones((1, 1)), np.array([1]), DraftCost(1.0, 1.0), price)


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths \[0, 3\] do not fit 2 costs and k_max 2"):
        choose_uniform(np.ones((1, 2)), np.ones((1, 2)), [0, 3], [1.0, 2.0], 1.0)


def test_a_batch_beyond_the_largest_size_is_not_padded() -> None:
    survival, caps, cost = make_survival([[0.9], [0.9]]), np.array([1, 1]), DraftCost(4.0, 1.0)
    padded = choose_padded(survival, survival, caps, cost, 0.5, 1.0, 2, (1,))
    assert padded.lengths.tolist() == choose_lengths(survival, survival, caps, cost, 0.5).lengths.tolist() == [1, 1]


def test_a_padded_step_is_not_filled_where_drafts_cost_more_than_padding() -> None:
    survival = make_survival([[0.5], [0.25]])
    choice = choose_padded(survival, survival, np.array([1, 1]), DraftCost(2.0, 0.8), 1.0, 0.0, 2, (4,))
    assert choice.lengths.tolist() == [0, 0]


@settings(deadline=None)
@given(st.data())
def test_drafts_worth_least_are_left_out_for_an_even_number_of_tokens(data: st.DataObject) -> None:
    n, k_max = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    _, values, lengths = draw_batch(data, n, k_max)
    base, multiple = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 16))
    before, total = lengths.copy(), int(lengths.sum())
    drop_least(lengths, values, base, multiple)
    excess = (base + total) % multiple
    if excess > 0.2 * total:
        assert (lengths == before).all()
        return
    assert (base + lengths.sum()) % multiple == 0
    assert total - lengths.sum() == excess
    taken = np.arange(k_max) < before[:, None]
    left = np.arange(k_max) < lengths[:, None]
    # Values fall along a draft, so the least ones of all are its end.
    assert values[taken & ~left].sum() == pytest.approx(np.sort(values[taken])[:excess].sum())
