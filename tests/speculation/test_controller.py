# SPDX-License-Identifier: Apache-2.0
"""The controller: it stops speculating where that costs, comes back where it pays, and keeps to what is allowed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.speculation.server import COMPUTE_BOUND, Server, Step, find_recovery, measure_goodput
from vllm_ext.speculation.controller import Batch, FinishedStep, GoodputController
from vllm_ext.speculation.goodput import load_compiled
from vllm_ext.speculation.probing import PROBE_SHARE
from vllm_ext.speculation.step_time import COEFFICIENTS, StepFeatures, StepTimeModel

#: A step of 10 ms; a draft costs 1 ms to make for all requests and 0.3 ms to verify for each.
PRIOR = {**dict.fromkeys(COEFFICIENTS, 0.0), "step": 10.0, "tokens": 0.3, "passes": 1.0}
#: One pass for each position, and one where nothing is asked for.
PASSES = [1, 1, 2, 3, 4, 5, 6]
REQUESTS = ["a", "b", "c", "d"]


def make_controller(prior: Mapping[str, float] | None = PRIOR, **settings: object) -> GoodputController:
    return GoodputController(6, step_time=StepTimeModel(prior), **settings)  # type: ignore[arg-type]


def make_server(**settings: object) -> Server:
    return Server(make_controller(passes=PASSES, **settings), PRIOR, 4, passes=PASSES)


def find_planned(steps: list[Step]) -> np.ndarray:
    """Lengths [steps, n]."""
    return np.array([step.planned for step in steps])


def test_good_drafts_are_long_and_bad_ones_stop() -> None:
    assert find_planned(make_server().serve(0.95, 150))[50:].mean() > 4
    # A first draft takes no pass that is not made anyway, and 0.3 ms of 12: nothing at all is less.
    assert find_planned(make_server().serve(0.01, 300))[100:].mean() < 0.2


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize(("token", "chance"), [(0.9, 0.02), (0.9, 0.15), (3.0, 0.3)])
def test_probes_keep_to_their_share_whatever_is_accepted(count: int, token: float, chance: float) -> None:
    """What the drafts of a server that should not speculate take, less what they bring."""
    cost = {**COMPUTE_BOUND, "tokens": token}
    shares = []
    # One server alone may be lucky in what it tries, and then pays for believing it.
    for seed in range(12):
        server = Server(GoodputController(8, step_time=StepTimeModel(cost)), cost, count, seed=seed)
        steps = server.serve(chance, 800)[200:]
        assert any(step.verified.any() for step in steps), "nothing is tried any more"
        shares.append(measure_goodput(steps) / (count / steps[0].plain))
    assert np.mean(shares) > 1 - 1.5 * PROBE_SHARE


def test_probes_take_turns() -> None:
    cost = {**COMPUTE_BOUND, "step": 30.0}
    for passes in (None, PASSES):
        controller = GoodputController(6, step_time=StepTimeModel(cost), passes=passes)
        steps = Server(controller, {**cost, "passes": 0.0}, 4, passes=passes).serve(0.02, 600)[100:]
        probes = [step.verified for step in steps if step.is_probe and step.verified.any()]
        assert len(probes) > 10
        assert all(verified.max() == 1 for verified in probes)
        assert min(np.sum(probes, axis=0)) > 0.5 * max(np.sum(probes, axis=0))


@pytest.mark.parametrize("count", [1, 4, 16])
def test_not_speculating_is_not_for_ever(count: int) -> None:
    for seed in range(2):
        server = Server(GoodputController(8, step_time=StepTimeModel(COMPUTE_BOUND)), COMPUTE_BOUND, count, seed=seed)
        server.serve(0.05, 300)
        # Half of the length that is best.
        assert find_recovery(server.serve(0.95, 100), {1: 2.0, 4: 1.0, 16: 0.5}[count]) < 100


@pytest.mark.parametrize("count", [4, 16])
def test_a_lookup_that_seldom_finds_anything_comes_back(count: int) -> None:
    """Everybody is asked, and those that have drafts are tried: a probe that finds none is none."""
    cost = {**COMPUTE_BOUND, "tokens": 0.3}
    for seed in range(2):
        server = Server(GoodputController(8, step_time=StepTimeModel(cost)), cost, count, seed=seed)
        server.serve(0.05, 300, matches=0.2)
        after = server.serve(0.95, 120, matches=0.2)
        assert find_recovery(after, 0.15) < 100


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_drafter_that_decides_itself_is_probed_by_trimming(count: int) -> None:
    cost = {**COMPUTE_BOUND, "tokens": 0.5}
    controller = GoodputController(8, step_time=StepTimeModel(cost), plans_drafts=False)
    server = Server(controller, cost, count, asks=8)
    before = server.serve(0.02, 400)[200:]
    assert measure_goodput(before) * before[0].plain / count > 1 - 2 * PROBE_SHARE
    assert any(step.verified.any() for step in before)
    assert find_recovery(server.serve(0.95, 150), 0.5) < 120


def test_drafts_that_are_planned_and_cut_are_tried_too() -> None:
    """Alone, the drafts of few requests may not pay where those of all would: nothing would ever be learned."""
    controller = make_controller({**PRIOR, "tokens": 1.0})
    batch = Batch(REQUESTS, 4, 1000)
    tried = 0
    for _ in range(100):
        kept = controller.trim_drafts(batch, np.array([1, 0, 0, 0]))
        controller.acceptance.observe(controller.acceptance.find_slots(REQUESTS), kept, np.zeros(4, np.int64))
        tried += int(kept.sum())
        controller.plan_drafts(batch)
    assert 1 < tried < 30


def test_a_lookup_whose_drafts_are_not_trimmed_pays_for_its_probes() -> None:
    server = Server(GoodputController(8, step_time=StepTimeModel(COMPUTE_BOUND)), COMPUTE_BOUND, 4, trims=False)
    steps = server.serve(0.02, 600)[100:]
    assert any(step.verified.any() for step in steps)
    # One step in four is as many requests more than the budget has: whole batches are probed, and more seldom.
    assert measure_goodput(steps) > (1 - 4 * PROBE_SHARE) * 4 / steps[0].plain


@pytest.mark.parametrize("chance", [0.1, 0.4])
@pytest.mark.parametrize("each_pass", [1.1, 4.0])
def test_a_pass_that_runs_anyway_is_used(each_pass: float, chance: float) -> None:
    """No drafts save no pass, and one draft costs none."""
    cost = {**COMPUTE_BOUND, "step": 10.0, "tokens": 0.05, "passes": each_pass}
    controller = GoodputController(6, step_time=StepTimeModel(cost), passes=PASSES)
    server = Server(controller, cost, 1, passes=PASSES)
    assert measure_goodput(server.serve(chance, 700)[150:]) > 0.97 * server.find_best(chance)


def test_a_drafter_that_makes_all_drafts_in_one_pass() -> None:
    cost = {**COMPUTE_BOUND, "step": 10.0, "tokens": 0.05, "passes": 4.0}
    controller = GoodputController(6, step_time=StepTimeModel(cost), passes=[1] * 7)
    server = Server(controller, cost, 2, passes=[1] * 7)
    steps = server.serve(0.8, 200)[50:]
    assert measure_goodput(steps) > 0.98 * server.find_best(0.8)


@pytest.mark.parametrize("chance", [0.15, 0.7])
@pytest.mark.parametrize(("step", "token"), [(1.0, 1.0), (3.0, 0.9), (18.0, 0.06)])
def test_a_guess_is_replaced_by_the_first_steps(step: float, token: float, chance: float) -> None:
    cost = {**COMPUTE_BOUND, "step": step, "tokens": token}
    server = Server(GoodputController(8, step_time=StepTimeModel(None)), cost, 1)
    assert measure_goodput(server.serve(chance, 900)[300:]) > 0.95 * server.find_best(chance)


@pytest.mark.parametrize("chance", [0.02, 0.4])
@pytest.mark.parametrize("count", [64, 256])
def test_dear_uniform_probes_are_seldom(count: int, chance: float) -> None:
    """Five drafts for everybody take several steps' time: they wait until it is earned."""
    cost = {**COMPUTE_BOUND, "step": 9.0, "tokens": 0.12}
    controller = GoodputController(5, step_time=StepTimeModel(cost), uniform_lengths=(0, 5), passes=[0] * 6)
    server = Server(controller, cost, count, trims=False)
    steps = server.serve(chance, 700)[100:]
    assert measure_goodput(steps) > 0.975 * server.count / steps[0].plain


def test_uniform_lengths_learn_what_no_drafts_cost() -> None:
    """A prior that takes drafts for cheap is found out, though no step without drafts would ever be chosen."""
    cost = {**COMPUTE_BOUND, "step": 18.0, "tokens": 0.06, "passes": 3.0}
    passes, prior = [0, 1, 2, 3, 4, 5], {**cost, "passes": 0.3}
    controller = GoodputController(5, step_time=StepTimeModel(prior), uniform_lengths=(0, 5), passes=passes)
    server = Server(controller, cost, 32, passes=passes, trims=False)
    lengths = find_planned(server.serve(0.5, 1500))
    assert (lengths[:8] == 5).all()
    assert (lengths[-300:] == 5).mean() < 0.1


def test_prompts_change_no_draft() -> None:
    """The time of 512 tokens of a prompt passes whatever is drafted, and a draft beside them takes as long as ever."""
    controller = GoodputController(8, step_time=StepTimeModel(COMPUTE_BOUND))
    Server(controller, COMPUTE_BOUND, 8).serve(0.85, 150)
    ids = list(range(8))
    alone, beside = (controller.plan_drafts(Batch(ids, 8 + more, 8000)).lengths.tolist() for more in (0, 512))
    assert alone == beside
    assert any(alone)
    kept = [controller.trim_drafts(Batch(ids, 8 + more, 8000), np.full(8, 8)).tolist() for more in (0, 512)]
    assert kept[1] == kept[0]


def test_one_length_for_all_changes_beside_a_prompt_as_without_it() -> None:
    cost = {**COMPUTE_BOUND, "step": 20.0, "tokens": 0.1}
    lengths = []
    for prompt in (0, 4000):
        controller = GoodputController(4, step_time=StepTimeModel(cost), uniform_lengths=(0, 2, 4))
        ids = list(range(4))
        for _ in range(60):
            features = StepFeatures(20, 4000, 4, 0, 16, 1)
            controller.observe([FinishedStep(ids, [4] * 4, [4] * 4, [5] * 4, features, 22.0)])
            lengths.append(int(controller.plan_drafts(Batch(ids, 4 + prompt, 4000)).lengths.max()))
    assert lengths[:60] == lengths[60:]
    # Now and then the next one is tried.
    assert lengths[-10:].count(4) >= 8


@pytest.mark.parametrize("hold", [1, 8])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"uniform_lengths": (0, 2, 4)}, {"graph_sizes": (4, 8, 16)}, {"policy": lambda ids: np.ones(len(ids))}],
    ids=["each", "uniform", "padded", "weighted"],
)
def test_nothing_is_compiled_once_requests_run(arguments: dict[str, Any], hold: int) -> None:
    controller = GoodputController(4, **arguments)
    functions = [function for function in vars(load_compiled()).values() if hasattr(function, "signatures")]
    # Those of other tests are no witnesses.
    for function in functions:
        function.overloads.clear()
    controller.warm_up()
    known = {function.__name__: len(function.overloads) for function in functions}
    steps = Server(controller, COMPUTE_BOUND, 3, trims="uniform_lengths" not in arguments, hold=hold).serve(0.9, 60)
    assert any(step.is_standing for step in steps) == (hold > 1)
    assert {function.__name__: len(function.overloads) for function in functions} == known


def test_steps_are_filled_up_to_the_size_of_a_graph() -> None:
    """Nine requests run as sixteen: seven drafts cost nothing, an eighth as much as sixteen."""
    sizes, cost = (8, 16, 32), {**COMPUTE_BOUND, "tokens": 0.5}
    controller = GoodputController(6, step_time=StepTimeModel(cost), graph_sizes=sizes)
    batch, ids = Batch(list(range(9)), 9, 9000), list(range(9))
    for _ in range(30):
        features = StepFeatures(18, 9000, 9, 0, 9)
        controller.observe([FinishedStep(ids, [1] * 9, [1, 0, 0] * 3, [2, 1, 1] * 3, features, 3 + 0.5 * 32)])
    # A lookup drafts what the outcome of the step in between may make worth verifying.
    assert controller.plan_drafts(batch).lengths.sum() > 7
    assert controller.trim_drafts(batch, np.full(9, 6)).sum() == 7
    assert controller.predict(StepFeatures(18, 9000, 9, 0, 9)) == pytest.approx(3 + 0.5 * 32, rel=0.02)
    assert controller.predict(StepFeatures(32, 9000, 9, 0, 9)) == pytest.approx(3 + 0.5 * 32, rel=0.02)


def test_only_what_pays_is_verified() -> None:
    server = make_server()
    server.serve(0.01, 200)
    batch, drafted = Batch(list(range(4)), 4, 1000), np.array([6, 3, 0, 1])
    trimmed = server.controller.trim_drafts(batch, drafted)
    assert (trimmed <= drafted).all()
    assert trimmed.sum() <= 1
    assert (server.controller.trim_drafts(batch, drafted, is_probe=True) == drafted).all()
    server.serve(0.97, 100)
    assert server.controller.trim_drafts(batch, drafted).tolist() == [6, 3, 0, 1]


def test_one_length_for_all_where_graphs_need_it() -> None:
    controller = make_controller(uniform_lengths=(0, 1, 2, 4), passes=PASSES)
    lengths = find_planned(Server(controller, PRIOR, 4, passes=PASSES, trims=False).serve(0.9, 150))
    assert (lengths == lengths[:, :1]).all()
    assert set(lengths[:, 0].tolist()) <= {0, 1, 2, 4}
    assert lengths[40:].mean() > 1.5


def test_what_is_expected_is_said_without_a_bonus() -> None:
    controller = make_controller(uniform_lengths=(0, 2), passes=PASSES)
    Server(controller, PRIOR, 4, passes=PASSES, trims=False).serve(0.9, 101)
    batch = Batch(list(range(4)), 4, 4000)
    decision = controller.plan_drafts(batch)
    verified = int(decision.lengths.sum())
    assert verified == 8
    expected = controller.predict(controller.describe_step(batch, verified, decision.lengths))
    assert decision.expected_milliseconds == pytest.approx(expected, rel=1e-9)


def test_a_policy_weighs_requests() -> None:
    def favour_the_first(request_ids: object) -> np.ndarray:
        return np.array([4.0, 0.25, 0.25, 0.25])

    lengths = find_planned(make_server(policy=favour_the_first).serve(0.6, 200))[50:].mean(axis=0)
    assert lengths[0] > lengths[1:].max() + 0.5


def test_a_policy_is_asked_once_a_step() -> None:
    asked: list[object] = []

    def weigh(request_ids: object) -> np.ndarray:
        asked.append(request_ids)
        return np.ones(4)

    controller, batch = make_controller(policy=weigh), Batch(REQUESTS, 4, 1000)
    for step in range(1, 4):
        controller.trim_drafts(batch, np.array([1, 0, 2, 0]))
        controller.plan_drafts(batch)
        assert len(asked) == step
    # Other requests than were trimmed have other weights.
    controller.trim_drafts(batch, np.array([1, 0, 2, 0]))
    controller.plan_drafts(Batch(REQUESTS[::-1], 4, 1000))
    assert asked[-2:] == [REQUESTS, REQUESTS[::-1]]


def test_gone_requests_are_forgotten() -> None:
    server = make_server()
    server.serve(0.5, 10)
    server.controller.forget({1: None})
    assert len(server.controller.acceptance) == 1


def test_lengths_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match=r"uniform lengths \[1, 9\] need 0 and nothing above k_max=6"):
        make_controller(uniform_lengths=[1, 9])


@pytest.mark.parametrize("passes", [[0] * 6, [0] * 8, [-1] * 7, [1, 0, 1, 1, 1, 1, 1]])
def test_passes_that_do_not_fit(passes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"need 7 numbers that do not fall, one for each length 0\.\.6"):
        make_controller(passes=passes)


def test_no_drafts_stand_after_they_were_cut() -> None:
    """Where drafts stop passing, the trim sees it before the plan: after that, plans of none stand like any other."""
    cost = {**COMPUTE_BOUND, "tokens": 0.3, "verifies": 0.2, "drafted": 0.002}
    server = Server(GoodputController(6, step_time=StepTimeModel(cost)), cost, 4, hold=8)
    assert np.mean([step.planned.sum() for step in server.serve(0.9, 300)[50:280]]) > 8
    late = server.serve(0.0, 300)[100:]
    assert np.mean([step.planned.sum() for step in late]) < 1.5
    assert np.mean([step.is_standing for step in late]) > 2 / 3


@pytest.mark.parametrize("count", [1, 2, 4, 6])
@pytest.mark.parametrize(("drafted", "once"), [(0.0, 0.2), (0.002, 0.2), (0.0096, 0.1)])
def test_a_probe_that_is_offered_can_be_paid_for(count: int, drafted: float, once: float) -> None:
    """Asking a lookup costs a little: that is saved up with the probe, or there would be offers and never a probe."""
    cost = {**COMPUTE_BOUND, "drafted": drafted, "verifies": once}
    steps = Server(GoodputController(6, step_time=StepTimeModel(cost)), cost, count).serve(0.05, 900)[300:]
    offered = [step for step in steps if step.is_probe]
    verified = sum(step.verified.any() for step in offered)
    assert 0 < verified >= 0.8 * len(offered)


def teach(controller: GoodputController, ids: list[int], accepted: int, steps: int = 1) -> None:
    """Steps of 4 verified drafts for each request, each in the time that the controller expects."""
    features = StepFeatures(5 * len(ids), 1000, len(ids), 0, 4 * len(ids), 1)
    for _ in range(steps):
        counts = [4] * len(ids), [accepted] * len(ids), [accepted + 1] * len(ids)
        controller.observe([FinishedStep(ids, *counts, features, controller.predict(features))])


def test_few_drafts_get_lengths_that_are_good_after_any_outcome() -> None:
    """Where trimming takes longer than it saves, as it does for one request, the newest outcome is not followed."""
    lengths: dict[tuple[int, float], list[int]] = {}
    trims = {}
    for count, trim_time in ((1, 0.0), (1, 0.2), (16, 0.2)):
        # A drafter that is a model: a lookup's plans are as long as any outcome may want.
        controller, ids = make_controller(passes=PASSES), list(range(count))
        batch = Batch(ids, count, 1000)
        for accepted in (4, 4, 4, 0, 0) * 20:
            teach(controller, ids, accepted)
        for accepted in (4, 0):
            teach(controller, ids, accepted, 2)
            decision = controller.plan_drafts(batch, trim_time=trim_time)
            trims[count, trim_time] = decision.trims
            lengths.setdefault((count, trim_time), []).append(int(decision.lengths.max()))
    assert trims == {(1, 0.0): True, (1, 0.2): False, (16, 0.2): True}
    # Good steps come after two bad ones, always, and bad ones after good ones.
    after_good, after_bad = lengths[1, 0.0]
    assert after_good < after_bad
    assert abs(lengths[1, 0.2][0] - lengths[1, 0.2][1]) <= 1


@pytest.mark.parametrize("settings", [{"kept_shapes": 2}, {"is_ragged": False}])
def test_some_drafts_are_trimmed_whatever_it_takes(settings: dict[str, Any]) -> None:
    """Where the sizes of steps matter, and where all get as many as the one that gets most."""
    controller, ids = make_controller({**COMPUTE_BOUND, "tokens": 0.3}, **settings), list(range(3))
    teach(controller, ids, 4, 40)
    assert controller.plan_drafts(Batch(ids, 3, 1000), trim_time=1e9).trims
    alone = controller.plan_drafts(Batch(ids[:1], 1, 1000), trim_time=1e9)
    assert alone.trims == ("kept_shapes" in settings)


def test_lengths_in_common_are_trimmed_by_nobody() -> None:
    controller = make_controller({**COMPUTE_BOUND, "tokens": 0.3}, uniform_lengths=(0, 2, 4))
    ids = list(range(3))
    teach(controller, ids, 4, 40)
    assert controller.plan_drafts(Batch(ids, 3, 1000), trim_time=1e9).lengths.tolist() == [4, 4, 4]


def test_half_of_the_steps_of_a_plan_are_timed() -> None:
    """The first among them: it verifies what the plan before it asked for."""
    controller = make_controller()
    timed: list[int] = []
    controller.step_time.observe = lambda features, time: timed.append(int(time))  # type: ignore[method-assign]
    features = StepFeatures(2, 1000, 1, 0, 1, 1)
    steps = [FinishedStep([0], [1], [1], [2], features, float(step)) for step in range(9)]
    controller.observe(steps)
    assert timed == [0, 2, 4, 6, 8]
    controller.observe(steps[:7])
    assert timed[5:] == list(range(7))
