# SPDX-License-Identifier: Apache-2.0
"""Chances of drafts, and what outcomes teach (`acceptance.AcceptanceModel`).

What calls each other stays in one file: the compiled code that is kept is made anew only where the caller's own file
has changed.

Arrays that several functions share:

    histories      int64 [slots]               each request's group and last two outcomes: 16 group + 4 older + newer
    state_counts   float64 [16 g, k_max, 2]    successes and trials after each history, g groups
    shared_counts  float64 [g, k_max, 2]       the same whatever the history, by the number of requests
    opinions       float64 [16 g, k_max, 3]    logits of the chance at each position, each less the one before: of all
                                               requests less over all positions, after the newer outcome, after both
    odds           float64 [16 g, k_max]       against a draft, these mixed: exp(-(logit over all positions + opinions @
                                               weights[group, :3])); of a request times its factor, which saves an
                                               exponential for each of its positions
    shared         float64 [g, k_max]          chances of an average request at each position
    pooled         float64 [g]                 and over all of them
    weights        float64 [g, 4]              of the three opinions, and of what a request does better than anybody
    totals         float64 [slots, 3]          of each request: successes, trials, successes expected of anybody
    slots          int64 [n]                   places of the requests of a step

"Anybody" and "all" are the requests of a group: nothing that one group does is learned of another.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_ext.speculation.compiled.jit import compile_loop

#: What a step can teach of a request: no draft was tried, the first was wrong, some were right, all were right.
NUM_OUTCOMES = 4
NUM_HISTORIES = NUM_OUTCOMES * NUM_OUTCOMES

#: Trials that what all requests do counts for in what one request does.
_REQUEST_STRENGTH = 2.0
#: Logits stay within 6: nothing observed in a finite number of steps is impossible or certain.
_LEAST_CHANCE = 1.0 / (1.0 + math.exp(6.0))
_LARGEST_WEIGHT = 1.5
#: Trials that a history counts for which was not seen yet.
_RARE_HISTORY = 1e-3
#: Part of a step's drafts that may be left out for the sake of its number of tokens.
_MOST_DROPPED = 0.2
#: Trials of a step from which on weights follow no faster.
_MOST_TRIALS = 64


@compile_loop
def _follow(history: int, outcome: int) -> int:
    return NUM_HISTORIES * (history // NUM_HISTORIES) + NUM_OUTCOMES * (history % NUM_OUTCOMES) + outcome


@compile_loop
def _advance(history: int, drafted: int, accepted: int) -> int:
    """The history after one more step of so many verified and accepted drafts."""
    outcome = 0 if drafted == 0 else 1 if accepted == 0 else 2 if accepted < drafted else 3
    return _follow(history, outcome)


@compile_loop
def advance_histories(histories: np.ndarray, slots: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> None:
    """Add a step's outcomes, in place. drafted, accepted: int64 [n]."""
    for row in range(len(slots)):
        slot = slots[row]
        histories[slot] = _advance(histories[slot], drafted[row], accepted[row])


@compile_loop
def _pool_counts(shared_counts: np.ndarray, shared: np.ndarray, initial: float, strength: float) -> float:
    """The chance of an average request of one group over all positions; those at each position are set in `shared`."""
    successes, trials = 0.0, 0.0
    for place in range(len(shared_counts)):
        successes += shared_counts[place, 0]
        trials += shared_counts[place, 1]
    pooled = (successes + initial) / (trials + 1.0)
    for place in range(len(shared_counts)):
        shared[place] = (shared_counts[place, 0] + strength * pooled) / (shared_counts[place, 1] + strength)
    return pooled


@compile_loop
def _find_logit(chance: float) -> float:
    chance = min(max(chance, _LEAST_CHANCE), 1.0 - _LEAST_CHANCE)
    return math.log(chance / (1.0 - chance))


@compile_loop
def _find_opinions(
    opinions: np.ndarray,
    odds: np.ndarray,
    state_counts: np.ndarray,
    shared: np.ndarray,
    pooled: float,
    strength: float,
    weights: np.ndarray,
) -> None:
    """What the counts of one group say of every history and position: opinions and odds, in place.

    strength: trials that the chance of all counts for after one outcome, and that after one outcome for the chance
    after two.
    """
    everywhere = _find_logit(pooled)
    for newer in range(NUM_OUTCOMES):
        for place in range(len(shared)):
            successes, trials = 0.0, 0.0
            for older in range(NUM_OUTCOMES):
                successes += state_counts[NUM_OUTCOMES * older + newer, place, 0]
                trials += state_counts[NUM_OUTCOMES * older + newer, place, 1]
            common = (successes + strength * shared[place]) / (trials + strength)
            of_all, after_newer = _find_logit(shared[place]), _find_logit(common)
            for older in range(NUM_OUTCOMES):
                history = NUM_OUTCOMES * older + newer
                known, opinion = state_counts[history, place], opinions[history, place]
                after_both = _find_logit((known[0] + strength * common) / (known[1] + strength))
                opinion[0] = of_all - everywhere
                opinion[1] = after_newer - of_all
                opinion[2] = after_both - after_newer
                logit = everywhere + weights[0] * opinion[0] + weights[1] * opinion[1] + weights[2] * opinion[2]
                odds[history, place] = math.exp(-logit)


@compile_loop
def find_chances(
    chances: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    stale: np.ndarray,
    least_stale: float,
    state_counts: np.ndarray,
    shared_counts: np.ndarray,
    weights: np.ndarray,
    rates: tuple[float, ...],
) -> None:
    """Set chances, (opinions, odds, shared, pooled), to what the counts are now, of every group that at least so many
    steps were learned from since its own were found: `stale`, int64 [groups], which is set to 0 there.

    rates: as `AcceptanceModel` orders them.
    """
    initial, shared_strength, history_strength = rates[:3]
    opinions, odds, shared, pooled = chances
    for group in range(len(stale)):
        if stale[group] >= least_stale:
            begin, end = NUM_HISTORIES * group, NUM_HISTORIES * (group + 1)
            pooled[group] = _pool_counts(shared_counts[group], shared[group], initial, shared_strength)
            _find_opinions(
                opinions[begin:end],
                odds[begin:end],
                state_counts[begin:end],
                shared[group],
                pooled[group],
                history_strength,
                weights[group],
            )
            stale[group] = 0


@compile_loop
def _find_offset(totals: np.ndarray, pooled: float) -> float:
    """How much better one request does than anybody of its group would at the same positions, as a difference of
    logits.

    totals: float64 [3].
    """
    prior = _REQUEST_STRENGTH * pooled
    all_trials = totals[1] + _REQUEST_STRENGTH
    return _find_logit((totals[0] + prior) / all_trials) - _find_logit((totals[2] + prior) / all_trials)


@compile_loop
def _find_factor(
    totals: np.ndarray, histories: np.ndarray, slot: int, weights: np.ndarray, pooled: np.ndarray
) -> float:
    """What the odds against a request's drafts are multiplied by for what it does better."""
    group = histories[slot] // NUM_HISTORIES
    return math.exp(-weights[group, 3] * _find_offset(totals[slot], pooled[group]))


@compile_loop
def _find_chance(odds: float, lowest: float, highest: float) -> float:
    return min(max(1.0 / (1.0 + odds), lowest), highest)


@compile_loop
def _fill_survival(survival: np.ndarray, odds: np.ndarray, factor: float, lowest: float, highest: float) -> None:
    """P(the first j drafts are all accepted) of one request after one history; survival, odds: float64 [k_max]."""
    alive = 1.0
    for place in range(len(odds)):
        alive *= _find_chance(factor * odds[place], lowest, highest)
        survival[place] = alive


@compile_loop
def predict_survival(
    odds: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
    pooled: np.ndarray,
    lowest: float,
    highest: float,
) -> np.ndarray:
    """P(the first j drafts are all accepted): float64 [n, k_max].

    lowest, highest: bounds of the chance at one position.
    """
    survival = np.empty((len(slots), odds.shape[1]))
    for row in range(len(slots)):
        slot = slots[row]
        factor = _find_factor(totals, histories, slot, weights, pooled)
        _fill_survival(survival[row], odds[histories[slot]], factor, lowest, highest)
    return survival


@compile_loop
def predict_best(
    odds: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
    pooled: np.ndarray,
    lowest: float,
    highest: float,
) -> np.ndarray:
    """The most that `predict_survival` may say after one more step, whatever its outcome, by what is learned now:
    float64 [n, k_max]."""
    k_max = odds.shape[1]
    best, survival = np.zeros((len(slots), k_max)), np.empty(k_max)
    for row in range(len(slots)):
        slot = slots[row]
        factor = _find_factor(totals, histories, slot, weights, pooled)
        for outcome in range(NUM_OUTCOMES):
            history = _follow(histories[slot], outcome)
            _fill_survival(survival, odds[history], factor, lowest, highest)
            for place in range(k_max):
                best[row, place] = max(best[row, place], survival[place])
    return best


@compile_loop
def predict_mean(
    state_counts: np.ndarray,
    odds: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
    pooled: np.ndarray,
    lowest: float,
    highest: float,
) -> np.ndarray:
    """`predict_survival` of a step that may come after any two outcomes, by how often drafts were tried after them:
    float64 [n, k_max]. Long drafts survive more often than chances at each position would say: good steps come in
    rows."""
    k_max = odds.shape[1]
    mean, survival, total = np.zeros((len(slots), k_max)), np.empty(k_max), np.zeros(len(pooled))
    for history in range(len(state_counts)):
        total[history // NUM_HISTORIES] += state_counts[history, 0, 1] + _RARE_HISTORY
    for row in range(len(slots)):
        factor = _find_factor(totals, histories, slots[row], weights, pooled)
        group = histories[slots[row]] // NUM_HISTORIES
        for history in range(NUM_HISTORIES * group, NUM_HISTORIES * (group + 1)):
            share = (state_counts[history, 0, 1] + _RARE_HISTORY) / total[group]
            _fill_survival(survival, odds[history], factor, lowest, highest)
            for place in range(k_max):
                mean[row, place] += share * survival[place]
    return mean


@compile_loop
def drop_least(lengths: np.ndarray, values: np.ndarray, base_tokens: int, multiple: int) -> None:
    """Shorten drafts, those worth least first, until the tokens of a step are a multiple; in place. Where that would be
    more than a part of them nothing is changed: steps with few drafts have few sizes.

    lengths: int64 [n]; values: float64 [n, k_max], falling along k_max, only those of `lengths` are read; base_tokens:
    of the step without drafts.
    """
    total = np.sum(lengths)
    excess = (base_tokens + total) % multiple
    if excess == 0 or excess > _MOST_DROPPED * total:
        return
    last = np.full(len(lengths), np.inf)
    for row in range(len(lengths)):
        if lengths[row] > 0:
            last[row] = values[row, lengths[row] - 1]
    for _ in range(excess):
        worst = np.argmin(last)
        lengths[worst] -= 1
        last[worst] = values[worst, lengths[worst] - 1] if lengths[worst] > 0 else np.inf


@compile_loop
def choose_again(
    odds: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
    pooled: np.ndarray,
    lowest: float,
    highest: float,
    usual: np.ndarray,
    share: float,
    request_weights: np.ndarray,
    caps: np.ndarray,
    price: float,
    per_token: float,
    once: float,
    multiple: int,
) -> np.ndarray:
    """`choose_lengths` by `value_drafts` of `predict_survival` in one go, where a step's time does not depend on its
    longest draft: int64 [n].

    usual: float64 [slots]; request_weights: float64 [n], or empty; caps: int64 [n]; once: what any drafts at all take
    more; multiple: as `drop_least`; all else as there.
    """
    least, gained = price * per_token, 0.0
    lengths, values = np.zeros(len(slots), np.int64), np.empty((len(slots), odds.shape[1]))
    for row in range(len(slots)):
        slot = slots[row]
        against = odds[histories[slot]]
        factor, alive = _find_factor(totals, histories, slot, weights, pooled), 1.0
        request_weight = request_weights[row] if len(request_weights) else 1.0
        average = usual[slot] + share * (1.0 - usual[slot])
        for place in range(min(len(against), caps[row])):
            alive *= _find_chance(factor * against[place], lowest, highest)
            more = share * alive
            value = request_weight * math.log1p(more / average) / share
            # They fall along a draft.
            if value <= least:
                break
            values[row, place] = value
            gained += value - least
            average += more
            lengths[row] += 1
    if gained <= price * once:
        lengths[:] = 0
    drop_least(lengths, values, len(slots), multiple)
    return lengths


@compile_loop
def _sum_first_drafts(
    odds: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    group: int,
    weight: float,
    pooled: float,
    slots: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
) -> tuple[int, float, float, int]:
    """Of one group: (how many first drafts were tried, sum of their chances, of these squared, how many were accepted).

    weight, pooled: the group's.
    """
    count, total, squares, passed = 0, 0.0, 0.0, 0
    for row in range(len(slots)):
        history = histories[slots[row]]
        if drafted[row] > 0 and history // NUM_HISTORIES == group:
            factor = math.exp(-weight * _find_offset(totals[slots[row]], pooled))
            chance = _find_chance(factor * odds[history, 0], 0.0, 1.0)
            count += 1
            total += chance
            squares += chance * chance
            passed += accepted[row] > 0
    return count, total, squares, passed


@compile_loop
def _learn_outcomes(
    group: int,
    opinions: np.ndarray,
    odds: np.ndarray,
    shared: np.ndarray,
    pooled: float,
    state_counts: np.ndarray,
    shared_counts: np.ndarray,
    weights: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    usual: np.ndarray,
    num_requests: int,
    slots: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    made: np.ndarray,
    usual_rate: float,
    weight_rate: float,
    request_memory: float,
    idle_memory: float,
    shared_memory: float,
    untried_memory: float,
) -> None:
    """Learn from what one group did in one step: counts, weights, histories and tokens of usual steps, all in place.

    opinions, odds, shared, pooled: by which chances are predicted (`find_chances`), the last two of the group, as are
    shared_counts and weights; num_requests: of the group in the step. usual: float64 [slots]; drafted, accepted, made:
    int64 [n]. weight_rate: how fast weights follow; memories: what counts keep at each step.
    """
    k_max = len(shared)
    successes, trials = np.zeros(k_max), np.zeros(k_max)
    gradient, num_trials = np.zeros(len(weights)), 0
    for history in range(NUM_HISTORIES * group, NUM_HISTORIES * (group + 1)):
        for place in range(k_max):
            state_counts[history, place, 0] *= shared_memory
            state_counts[history, place, 1] *= shared_memory
    for row in range(len(slots)):
        slot, given, right = slots[row], drafted[row], accepted[row]
        history, own = histories[slot], totals[slot]
        if history // NUM_HISTORIES != group:
            continue
        usual[slot] += usual_rate * (made[row] - usual[slot])
        offset = _find_offset(own, pooled)
        factor = math.exp(-weights[3] * offset)
        histories[slot] = _advance(history, given, right)
        memory = request_memory if given > 0 else idle_memory
        for kind in range(3):
            own[kind] *= memory
        # Censored: nothing is known of what is behind the first failure.
        for place in range(min(right + 1, given)):
            passed = 1.0 if place < right else 0.0
            error = passed - _find_chance(factor * odds[history, place], 0.0, 1.0)
            for kind in range(3):
                gradient[kind] += error * opinions[history, place, kind]
            gradient[3] += error * offset
            num_trials += 1
            own[0] += passed
            own[1] += 1.0
            own[2] += shared[place]
            state_counts[history, place, 0] += passed
            state_counts[history, place, 1] += 1.0
            successes[place] += passed
            trials[place] += 1.0
    for place in range(k_max):
        # What is known of a position that nobody tried fades slowly: it is tried again some time.
        memory = shared_memory if trials[place] > 0 else untried_memory
        shared_counts[place, 0] = shared_counts[place, 0] * memory + successes[place] / num_requests
        shared_counts[place, 1] = shared_counts[place, 1] * memory + trials[place] / num_requests
    if num_trials:
        # Many trials tell more than few, but a step that grew with them would go too far.
        norm = max(math.sqrt(num_trials), num_trials / math.sqrt(_MOST_TRIALS))
        for kind in range(len(weights)):
            moved = weights[kind] + weight_rate * gradient[kind] / norm
            weights[kind] = min(max(moved, 0.0), _LARGEST_WEIGHT)


@compile_loop
def detect_change(
    sums: np.ndarray, count: int, expected: float, squares: float, succeeded: int, limits: tuple[float, ...]
) -> bool:
    """`change.ChangeDetector.observe`; sums: float64 [2], in place; limits: its four numbers."""
    reference, threshold, most_witnesses, largest = limits
    if count == 0:
        return False
    variance = (expected - squares) / count / min(float(count), most_witnesses)
    surprise = (succeeded - expected) / count / math.sqrt(max(variance, 1e-6))
    surprise = min(max(surprise, -largest), largest)
    sums[0] = max(0.0, sums[0] + surprise - reference)
    sums[1] = max(0.0, sums[1] - surprise - reference)
    if max(sums[0], sums[1]) < threshold:
        return False
    # Half way to the next alarm: what became better may be better still than it seems after one forgotten past.
    sums[0], sums[1] = threshold / 2 if sums[0] >= threshold else 0.0, 0.0
    return True


@compile_loop
def _fade(counts: np.ndarray, most: float) -> None:
    """Have the largest count of trials be no more than `most`, in place. counts: float64 [rows, columns], trials in the
    second column."""
    largest = 1e-9
    for row in range(len(counts)):
        largest = max(largest, counts[row, 1])
    for row in range(len(counts)):
        for column in range(counts.shape[1]):
            counts[row, column] *= min(1.0, most / largest)


@compile_loop
def _fade_requests(totals: np.ndarray, histories: np.ndarray, group: int, most: float) -> None:
    """The same of one group's requests."""
    mine = np.flatnonzero(histories // NUM_HISTORIES == group)
    counts = totals[mine]
    _fade(counts, most)
    for row in range(len(mine)):
        totals[mine[row]] = counts[row]


@compile_loop
def learn_steps(
    state_counts: np.ndarray,
    shared_counts: np.ndarray,
    totals: np.ndarray,
    histories: np.ndarray,
    learned_histories: np.ndarray,
    usual: np.ndarray,
    weights: np.ndarray,
    change: np.ndarray,
    chances: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    stale: np.ndarray,
    averages: np.ndarray,
    ends: np.ndarray,
    is_noted: np.ndarray,
    slots: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    made: np.ndarray,
    rates: tuple[float, ...],
    limits: tuple[float, ...],
) -> int:
    """Learn from steps, one after another: how often a group's past was forgotten. What comes before `ends` is changed
    in place.

    usual: float64 [slots], tokens of a request's usual steps; change: float64 [groups, 2], of `detect_change`; chances,
    stale: of `find_chances`; averages: float64 [groups, 2], tokens of an average request's usual steps, and steps
    learned from. ends: int64 [steps], where each step's rows end; is_noted: int64 [steps], whether its outcomes are
    among histories; slots, drafted, accepted, made: int64 [rows]. rates: as `AcceptanceModel` orders them; limits: of
    `detect_change`.
    """
    (
        _,
        _,
        _,
        refresh_every,
        least_usual_rate,
        weight_rate,
        request_memory,
        idle_memory,
        shared_memory,
        untried_memory,
        trials_after_change,
    ) = rates
    opinions, odds, shared, pooled = chances
    begin, num_forgotten, num_groups = 0, 0, len(pooled)
    num_requests, num_tokens = np.zeros(num_groups, np.int64), np.zeros(num_groups)
    for step in range(len(ends)):
        end = ends[step]
        where, tried, passed, tokens = slots[begin:end], drafted[begin:end], accepted[begin:end], made[begin:end]
        begin = end
        if is_noted[step] == 0:
            advance_histories(histories, where, tried, passed)
        find_chances(chances, stale, refresh_every, state_counts, shared_counts, weights, rates)
        num_requests[:], num_tokens[:] = 0, 0.0
        for row in range(len(where)):
            group = learned_histories[where[row]] // NUM_HISTORIES
            num_requests[group] += 1
            num_tokens[group] += tokens[row]
        for group in range(num_groups):
            if num_requests[group] == 0:
                continue
            count, expected, squares, succeeded = _sum_first_drafts(
                odds, totals, learned_histories, group, weights[group, 3], pooled[group], where, tried, passed
            )
            if detect_change(change[group], count, expected, squares, succeeded, limits):
                # What was learned is kept as a guess: another text, another load, and none of it holds.
                states = state_counts[NUM_HISTORIES * group : NUM_HISTORIES * (group + 1)]
                _fade(shared_counts[group], trials_after_change)
                _fade(states.reshape(-1, 2), trials_after_change)
                _fade_requests(totals, learned_histories, group, trials_after_change)
                stale[group], num_forgotten = int(refresh_every), num_forgotten + 1
                find_chances(chances, stale, refresh_every, state_counts, shared_counts, weights, rates)
            averages[group, 1] += 1.0
            usual_rate = max(least_usual_rate, 1.0 / averages[group, 1])
            averages[group, 0] += usual_rate * (num_tokens[group] / num_requests[group] - averages[group, 0])
            _learn_outcomes(
                group,
                opinions,
                odds,
                shared[group],
                pooled[group],
                state_counts,
                shared_counts[group],
                weights[group],
                totals,
                learned_histories,
                usual,
                num_requests[group],
                where,
                tried,
                passed,
                tokens,
                usual_rate,
                weight_rate,
                request_memory,
                idle_memory,
                shared_memory,
                untried_memory,
            )
            stale[group] += 1
    return num_forgotten
