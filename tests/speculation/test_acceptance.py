# SPDX-License-Identifier: Apache-2.0
"""Acceptance is learned as it is, per position and request, whatever was censored."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.acceptance import HIGHEST, USUAL_RATE, AcceptanceModel, Verified
from vllm_ext.speculation.goodput import DraftCost, choose_again, choose_lengths, value_drafts


def draw_accepted(rng: np.random.Generator, hazards: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """How many of `drafted` are accepted, by hazards [n, k_max]."""
    passed = np.cumprod(rng.random(hazards.shape) < hazards, axis=1)
    return np.minimum(passed.sum(axis=1), drafted)


def learn(hazards: np.ndarray, steps: int, draw_drafted: object = None, **settings: float) -> np.ndarray:
    """Survival that a model believes in after `steps`, drafts of random lengths."""
    rng = np.random.default_rng(0)
    n, k_max = hazards.shape
    model = AcceptanceModel(k_max, **settings)
    slots = model.find_slots(range(n))
    for _ in range(steps):
        drafted = rng.integers(0, k_max + 1, n)
        model.observe(slots, drafted, draw_accepted(rng, hazards, drafted))
    return model.predict_survival(slots)


@pytest.mark.parametrize("hazard", [0.2, 0.6, 0.95])
def test_constant_acceptance_is_found(hazard: float) -> None:
    survival = learn(np.full((32, 5), hazard), 200)
    assert survival.mean(axis=0) == pytest.approx(hazard ** np.arange(1, 6), abs=0.05)


def test_positions_differ() -> None:
    hazards = np.tile([0.9, 0.9, 0.3, 0.9], (64, 1))
    survival = learn(hazards, 300).mean(axis=0)
    assert survival == pytest.approx(np.cumprod(hazards[0]), abs=0.06)


def test_requests_differ_also_where_they_were_never_tried() -> None:
    rng = np.random.default_rng(0)
    model = AcceptanceModel(6)
    slots = model.find_slots(["good", "bad"])
    hazards = np.array([[0.95] * 6, [0.15] * 6])
    predicted = []
    for _ in range(80):
        drafted = np.array([2, 2])
        model.observe(slots, drafted, draw_accepted(rng, hazards, drafted))
        predicted.append(model.predict_survival(slots))
    # What a request did last counts for much: one acceptance of the bad one is believed for a few steps.
    good, bad = np.mean(predicted[40:], axis=0)
    assert good[1] > 0.75
    assert bad[1] < 0.15
    assert good[5] > 5 * bad[5]


def test_censoring_is_no_failure() -> None:
    """Drafts that are all accepted say nothing about what would have come behind them."""
    model = AcceptanceModel(8, initial=0.5)
    slots = model.find_slots([0])
    for _ in range(50):
        model.observe(slots, np.array([2]), np.array([2]))
    survival = model.predict_survival(slots)[0]
    assert survival[1] > 0.9
    assert survival[2] > 0.8


def test_a_change_is_followed() -> None:
    rng = np.random.default_rng(1)
    model = AcceptanceModel(4)
    slots = model.find_slots(range(4))
    for hazard in (0.95, 0.05):
        for _ in range(60):
            drafted = np.full(4, 4)
            model.observe(slots, drafted, draw_accepted(rng, np.full((4, 4), hazard), drafted))
        assert model.num_forgotten >= (hazard < 0.5)
        assert abs(model.predict_survival(slots)[:, 0].mean() - hazard) < 0.1


def test_an_idle_request_drifts_to_what_the_others_do() -> None:
    model = AcceptanceModel(2)
    slots = model.find_slots(["idle", "other"])
    for _ in range(20):
        model.observe(slots[:1], np.array([2]), np.array([0]))
    low = model.predict_survival(slots)[0, 0]
    for _ in range(200):
        model.observe(slots, np.array([0, 2]), np.array([0, 2]))
    assert low < 0.15
    assert model.predict_survival(slots)[0, 0] > 0.6


def test_new_requests_start_where_the_others_are_and_slots_are_used_again() -> None:
    model = AcceptanceModel(3)
    for request in range(500):
        slots = model.find_slots([request])
        model.observe(slots, np.array([3]), np.array([3]))
        model.keep_only({request: None})
        assert len(model) == 1
    assert len(model._totals) <= 16
    assert model.predict_survival(model.find_slots(["new"]))[0, 2] > 0.7


def test_groups_learn_nothing_of_each_other() -> None:
    """A group that comes back after a while finds what it knew, whatever the other one did in between."""
    model = AcceptanceModel(4, find_group=lambda request: int(str(request) > "m"))
    most = np.full(3, 4)
    for _ in range(60):
        model.observe(model.find_slots("abc"), most, most)
    known = model.predict_survival(model.find_slots("d"))[0].copy()
    usual = model.find_usual(model.find_slots("d"))[0]
    model.keep_only("d")
    assert known[3] > 0.9
    for step in range(300):
        slots = model.find_slots("xyz")
        if not step:
            # The other group's first request is at the prior, and not where this one is.
            assert model.predict_survival(slots)[0, 0] == pytest.approx(AcceptanceModel(4)._rates[0], abs=0.01)
        model.observe(slots, most, np.zeros(3, np.int64))
    assert model.predict_survival(model.find_slots("x"))[0, 0] < 0.05
    assert (model.predict_survival(model.find_slots("e"))[0] == known).all()
    assert model.find_usual(model.find_slots("e"))[0] == usual == pytest.approx(5, abs=0.1)
    assert model.find_usual(model.find_slots("z"))[0] == pytest.approx(1, abs=0.1)


def test_what_an_absent_group_was_about_to_notice_is_forgotten() -> None:
    model = AcceptanceModel(2, find_group=lambda request: int(str(request) > "m"))
    slots, one = model.find_slots("a"), np.ones(1, np.int64)
    for _ in range(60):
        model.observe(slots, one, one * 0)
    for _ in range(2):
        model.observe(slots, one, one)
    hope = model.hope
    assert hope > 1
    # As long as only its own requests come and go it counts.
    model.keep_only("")
    model.find_slots("b")
    assert model.hope == hope
    model.keep_only("")
    model.find_slots("x")
    assert model.hope == 0
    model.find_slots("c")
    assert model.hope == 0


@given(st.integers(0, 1000), st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_batch_of_both_groups_is_two_batches(seed: int, steps: list[tuple[bool, int]]) -> None:
    """One model that sees both groups in the same steps says what two say that see one group each."""
    rng = np.random.default_rng(seed)
    mixed = AcceptanceModel(3, find_group=lambda request: int(str(request) > "m"))
    alone = AcceptanceModel(3), AcceptanceModel(3)
    for is_both, drafted in steps:
        ids = "axby" if is_both else "xy"
        counts = np.full(len(ids), drafted)
        passed = np.minimum(rng.integers(0, 4, len(ids)), counts)
        mixed.observe(mixed.find_slots(ids), counts, passed)
        for group, model in enumerate(alone):
            rows = [row for row, request in enumerate(ids) if (request > "m") == group]
            model.observe(model.find_slots([ids[row] for row in rows]), counts[rows], passed[rows])
    for group, ids in enumerate(("ab", "xy")):
        for predict in ("predict_survival", "predict_best", "predict_mean"):
            found, expected = (getattr(model, predict)(model.find_slots(ids)) for model in (mixed, alone[group]))
            assert found == pytest.approx(expected)
        assert mixed.hope == pytest.approx(alone[group].hope)
    assert mixed.num_forgotten == sum(model.num_forgotten for model in alone)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5)), max_size=40),
    st.lists(st.integers(0, 7), min_size=5, max_size=5),
    st.builds(DraftCost, st.floats(0.1, 9), st.floats(0, 2), st.just(0.0), st.floats(0, 2)),
    st.floats(0, 2),
    st.floats(0.01, 1),
    st.one_of(st.none(), st.lists(st.floats(0.1, 5), min_size=5, max_size=5)),
)
def test_choosing_in_one_go_is_choosing(
    history: list[tuple[int, int, int]],
    caps: list[int],
    cost: DraftCost,
    price: float,
    share: float,
    weights: list[float] | None,
) -> None:
    model = AcceptanceModel(5)
    for request, drafted, accepted in history:
        model.observe(model.find_slots([request]), np.array([drafted]), np.array([min(drafted, accepted)]))
    slots, most = model.find_slots(range(5)), np.array(caps)
    weighted = None if weights is None else np.array(weights)
    survival = model.predict_survival(slots)
    values = value_drafts(survival, model.find_usual(slots), share, weighted)
    choice = choose_lengths(survival, values, most, cost, price, [0] * 6)
    at_once = choose_again(model.describe(slots), model.usual, most, cost, price, share, weighted)
    assert at_once.tolist() == choice.lengths.tolist()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_any_history_gives_chances(history: list[tuple[int, int, int]]) -> None:
    model = AcceptanceModel(5)
    for request, drafted, accepted in history:
        model.observe(model.find_slots([request]), np.array([drafted]), np.array([min(drafted, accepted)]))
    survival = model.predict_survival(model.find_slots(range(10)))
    assert ((survival > 0) & (survival <= HIGHEST)).all()
    assert (np.diff(survival, axis=1) <= 0).all()


@pytest.mark.parametrize(("drafted", "accepted"), [(2, 3), (6, 1), (2, -1)])
def test_impossible_observations(drafted: int, accepted: int) -> None:
    model = AcceptanceModel(5)
    with pytest.raises(ValueError, match=rf"accepted \[{accepted}\] of drafted \[{drafted}\] with k_max 5"):
        model.observe(model.find_slots(["a"]), np.array([drafted]), np.array([accepted]))


def test_k_max_must_allow_a_draft() -> None:
    with pytest.raises(ValueError, match="k_max must be at least 1, got 0"):
        AcceptanceModel(0)


def test_what_is_known_of_untried_positions_fades() -> None:
    model = AcceptanceModel(3)
    slots = model.find_slots(["a", "b"])
    for _ in range(40):
        # The second draft is never accepted.
        model.observe(slots, np.array([3, 3]), np.array([1, 1]))
    known = model.predict_survival(slots)[0]
    assert known[1] < 0.15
    for _ in range(1000):
        model.observe(slots, np.array([1, 1]), np.array([1, 1]))
    # One draft at a time tells nothing of the second: it is worth another try.
    assert model.predict_survival(slots)[0, 1] > 0.5


def test_what_is_kept_between_calls_is_never_stale() -> None:
    model = AcceptanceModel(3)
    requests = ["a", "b"]
    slots = model.find_slots(requests)
    before = model.predict_survival(slots)
    assert model.predict_survival(model.find_slots(requests)) is before
    model.observe(slots, np.array([3, 3]), np.array([3, 0]))
    after = model.predict_survival(slots)
    assert after[0, 0] > before[0, 0] > after[1, 0]
    # The caller's own list, changed in place.
    requests.reverse()
    assert model.find_slots(requests).tolist() == slots[::-1].tolist()
    assert (model.predict_survival(model.find_slots(requests)) == after[::-1]).all()
    # Another request in the slot of one that has left.
    model.keep_only({"b": None})
    requests[1] = "c"
    again = model.find_slots(requests)
    assert sorted(again.tolist()) == sorted(slots.tolist())
    assert model.predict_survival(again)[1, 0] < after[0, 0]


def test_a_name_used_again_is_another_request() -> None:
    """However many others wait, of whom nothing is known yet."""
    model = AcceptanceModel(3)
    slots = model.find_slots(["a", "b"])
    for _ in range(30):
        model.observe(slots, np.array([3, 3]), np.array([0, 3]))
    before = model.predict_survival(model.find_slots(["a", "b"]))[0, 0]
    waiting = dict.fromkeys(range(1000))
    model.keep_only({"b": None, **waiting})
    assert len(model) == 1
    assert model.predict_survival(model.find_slots(["a", "b"]))[0, 0] > before + 0.1
    model.keep_only({"b"})
    assert len(model) == 1


def test_nothing_is_forgotten_while_nothing_changes() -> None:
    forgotten = 0
    for seed, (count, chance) in enumerate(itertools.product((1, 4, 32), (0.1, 0.5, 0.9))):
        rng, model = np.random.default_rng(seed), AcceptanceModel(3)
        slots, drafted = model.find_slots(range(count)), np.full(count, 3)
        for _ in range(600):
            model.observe(slots, drafted, draw_accepted(rng, np.full((count, 3), chance), drafted))
        forgotten += model.num_forgotten
    assert forgotten <= 2


def test_requests_that_are_alike_do_not_seem_to_differ() -> None:
    """What a few trials differ by is luck, and the weights learn that."""
    rng, model = np.random.default_rng(0), AcceptanceModel(4)
    spreads = []
    for life in range(150):
        ids = [(life, row) for row in range(16)]
        for _ in range(5):
            slots, drafted = model.find_slots(ids), np.full(16, 4)
            model.observe(slots, drafted, draw_accepted(rng, np.full((16, 4), 0.6), drafted))
            spreads.append(float(model.predict_survival(slots)[:, 0].std()))
        model.keep_only(dict.fromkeys(ids))
    assert np.mean(spreads[:50]) > 0.06
    assert np.mean(spreads[-250:]) < 0.04


def serve_stretches(rng: np.random.Generator, model: AcceptanceModel, steps: int, is_noted: bool) -> float:
    """Mean chance of first drafts where texts repeat themselves, less that where they do not: stretches of 10 steps
    with all drafts right or all wrong, of 8 requests. is_noted: outcomes are learned from every 8th step only."""
    slots, pending, gaps = model.find_slots(range(8)), [], []
    is_good = rng.random(8) < 0.5
    for step in range(steps):
        chances = model.predict_survival(slots)[:, 0]
        if step > steps // 2 and is_good.any() and not is_good.all():
            gaps.append(chances[is_good].mean() - chances[~is_good].mean())
        drafted = np.full(8, 4)
        accepted = draw_accepted(rng, np.where(is_good, 0.95, 0.1)[:, None] * np.ones(4), drafted)
        is_good = np.where(rng.random(8) < 0.1, ~is_good, is_good)
        if not is_noted:
            model.observe(slots, drafted, accepted)
            continue
        model.note(slots, drafted, accepted)
        pending.append((slots, drafted, accepted))
        if len(pending) == 8:
            model.observe_all([Verified(*outcome, outcome[2] + 1, True) for outcome in pending])
            pending = []
    return float(np.mean(gaps))


@pytest.mark.parametrize("is_noted", [False, True])
def test_texts_that_come_in_stretches(is_noted: bool) -> None:
    """The last outcomes say which stretch a request is in, also before they are learned from."""
    gap = serve_stretches(np.random.default_rng(0), AcceptanceModel(4), 400, is_noted)
    # Of 0.95 less 0.1, where one step in ten is the first of another stretch and 0.68 is the most that can be known.
    assert gap > 0.35


def test_noted_outcomes_are_not_counted_twice() -> None:
    rng, outcomes = np.random.default_rng(0), []
    for _ in range(24):
        drafted = rng.integers(0, 4, 3)
        outcomes.append((drafted, np.minimum(rng.integers(0, 4, 3), drafted)))
    at_once, later = AcceptanceModel(3), AcceptanceModel(3)
    for model in (at_once, later):
        slots = model.find_slots("abc")
    for place in range(0, 24, 4):
        for outcome in outcomes[place : place + 4]:
            at_once.observe(slots, *outcome)
            later.note(slots, *outcome)
        newest = later._histories.copy()
        for outcome in outcomes[place : place + 4]:
            later.observe_all([Verified(slots, *outcome, outcome[1] + 1, True)])
            assert (later._histories == newest).all()
    assert (later.predict_survival(later.find_slots("abc")) == at_once.predict_survival(slots)).all()


def test_steps_learned_together_are_learned_as_one_by_one() -> None:
    """Also of other requests each, with some of them noted, past fresh chances and past an alarm."""
    rng, steps = np.random.default_rng(0), []
    for step in range(60):
        ids = [f"{row}" for row in range(1 + step % 4)]
        drafted = rng.integers(1, 4, len(ids))
        passed = rng.random(len(ids)) < (0.02 if step < 40 else 0.98)
        steps.append((ids, drafted, drafted * passed))
    single, together = AcceptanceModel(3), AcceptanceModel(3)
    for model in (single, together):
        model.find_slots("0123")
    for ids, drafted, accepted in steps:
        single.observe(single.find_slots(ids), drafted, accepted)
    for place in range(0, 60, 12):
        batch = []
        for row, (ids, drafted, accepted) in enumerate(steps[place : place + 12]):
            slots, counts = together.find_slots(ids), (drafted.tolist(), accepted.tolist(), (accepted + 1).tolist())
            if row < 5:
                together.note(slots, *counts[:2])
            batch.append(Verified(slots, *counts, is_noted=row < 5))
        together.observe_all(batch)
    assert single.num_forgotten == together.num_forgotten > 0
    expected, found = (model.predict_survival(model.find_slots("0123")) for model in (single, together))
    assert (expected == found).all()
    assert (single.usual == together.usual).all()
    with pytest.raises(ValueError, match="k_max 3"):
        together.observe_all([Verified(together.find_slots("0"), [4], [0], [1], False)])


def test_the_mean_of_what_a_step_may_come_after() -> None:
    """As often as drafts were tried after two outcomes, so often is their chance in it."""
    rng, model = np.random.default_rng(2), AcceptanceModel(3)
    slots = model.find_slots("ab")
    none = model.predict_mean(slots)
    assert none == pytest.approx(model.predict_survival(slots))
    is_good = np.array([True, False])
    for _ in range(200):
        accepted = draw_accepted(rng, np.where(is_good, 0.95, 0.1)[:, None] * np.ones(3), np.full(2, 3))
        model.observe(slots, np.full(2, 3), accepted)
        is_good = np.where(rng.random(2) < 0.1, ~is_good, is_good)
    mean, survivals = model.predict_mean(slots), []
    for history in range(16):
        model._histories[:] = history
        model._last_survival = None
        survivals.append(model.predict_survival(slots))
    tried = model._state_counts[:16, 0, 1] + 1e-3
    assert mean == pytest.approx(np.tensordot(tried / tried.sum(), survivals, 1))
    assert (np.diff(mean, axis=1) <= 0).all()
    # Good steps come in rows, so long drafts survive more often than their positions' chances would say.
    assert mean[0, 2] > 1.1 * mean[0, 0] ** 3


def test_the_best_that_a_step_may_bring() -> None:
    """Predictions after any outcome stay below it, and one of them reaches it."""
    rng, model = np.random.default_rng(1), AcceptanceModel(3)
    slots = model.find_slots("ab")
    for _ in range(100):
        drafted = rng.integers(0, 4, 2)
        model.observe(slots, drafted, np.minimum(rng.integers(0, 4, 2), drafted))
    best, histories, seen = model.predict_best(slots), model._histories.copy(), []
    for drafted, accepted in [(0, 0), (3, 0), (3, 1), (3, 3)]:
        model._histories[:] = histories
        model.note(slots, np.full(2, drafted), np.full(2, accepted))
        seen.append(model.predict_survival(slots))
    assert (np.max(seen, axis=0) == best).all()


def test_tokens_of_a_usual_step() -> None:
    """A running average by request; one that has just come begins at that of all, also in a slot that was another's."""
    model = AcceptanceModel(4)
    slots = model.find_slots(["good", "bad"])
    assert model.find_usual(slots).tolist() == [1.0, 1.0]
    for _ in range(200):
        model.observe(slots, np.array([4, 4]), np.array([4, 0]))
    assert model.find_usual(slots) == pytest.approx(np.array([5.0, 1.0]), abs=0.01)
    model.observe(slots, np.array([4, 4]), np.array([0, 0]))
    assert model.find_usual(slots)[0] == pytest.approx(5 - USUAL_RATE * 4, abs=0.01)
    model.observe(slots, np.array([0, 0]), np.array([0, 0]), np.array([1, 9]))
    assert model.find_usual(slots)[1] == pytest.approx(1 + USUAL_RATE * 8, abs=0.01)
    model.remove("good")
    assert model.find_usual(model.find_slots(["new"]))[0] == pytest.approx(3.0, abs=0.2)


def test_the_first_steps_count_for_more() -> None:
    model = AcceptanceModel(4)
    slots = model.find_slots(["a"])
    for accepted in (4, 2):
        model.observe(slots, np.array([4]), np.array([accepted]))
    assert model.find_usual(slots).tolist() == [4.0]
