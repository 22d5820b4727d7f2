# SPDX-License-Identifier: Apache-2.0
"""The goodput mixin over vLLM's real schedulers: what is verified depends on outcomes alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.scheduling.real_scheduler import add_request, build_scheduler, hand_drafts, run_model
from vllm_ext.scheduling import goodput
from vllm_ext.speculation.step_time import COEFFICIENTS, StepFeatures, StepTimeModel

K = 4
VOCABULARY = 4
#: Token 0 is always followed by token 1, as where a grammar forces it.
TARGET = np.array([[0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.55, 0.15, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
#: The drafter's, wrong on purpose.
DRAFTER = np.array([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.5, 0.2, 0.2]])


class FrozenStepTime(StepTimeModel):
    """A step of 5 ms and so many for each token: drafts must be worth it, and the machine's times do not count."""

    def __init__(self, token: float) -> None:
        super().__init__({name: {"step": 5.0, "tokens": token}.get(name, 0.0) for name in COEFFICIENTS})

    def observe(self, features: StepFeatures, milliseconds: float) -> None:
        """Learn nothing."""


class Sampler:
    """A target model and a drafter with the probabilities above, and speculative sampling as vLLM's rejection sampler.

    Source: Leviathan et al. (arXiv:2211.17192), section 2.3.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def draft(self, last: int, count: int) -> list[int]:
        """Tokens by the drafter; behind token 0 the one that is certain."""
        tokens: list[int] = []
        for _ in range(count):
            last = 1 if last == 0 and not tokens else int(self.random.choice(VOCABULARY, p=DRAFTER[last]))
            tokens.append(last)
        return tokens

    def verify(self, last: int, drafts: list[int], most: int) -> list[int]:
        """Tokens put out: drafts up to the first that is rejected, and one by the target."""
        tokens: list[int] = []
        for draft in drafts[: most - 1]:
            target = TARGET[last]
            drafted = np.eye(VOCABULARY)[1] if last == 0 and not tokens else DRAFTER[last]
            if self.random.random() * drafted[draft] < target[draft]:
                tokens.append(draft)
                last = draft
                continue
            rest = np.maximum(target - drafted, 0.0)
            return [*tokens, int(self.random.choice(VOCABULARY, p=rest / rest.sum()))]
        return [*tokens, int(self.random.choice(VOCABULARY, p=TARGET[last]))]


def count_outputs(scheduler: Any, seed: int, requests: int) -> tuple[Counter[tuple[int, ...]], Counter[int]]:
    """(how often each output of three tokens came, how often each number of drafts was verified)."""
    scheduler._controller.step_time = FrozenStepTime(0.02)
    sampler, outputs, verified = Sampler(seed), Counter[tuple[int, ...]](), Counter[int]()
    texts: dict[str, list[int]] = {}
    for number in range(requests):
        # Prompts end in 1: that is what the first token follows.
        add_request(scheduler, str(number), 2, max_tokens=3)
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        verified.update(len(drafts) for drafts in output.scheduled_spec_decode_tokens.values())

        def sample(rid: str, drafts: list[int]) -> list[int]:
            text = texts.setdefault(rid, [])
            new = sampler.verify(text[-1] if text else 1, drafts, 3 - len(text))
            text += new
            return new

        scheduler.update_from_output(output, run_model(output, sample))
        unfinished = [rid for rid in output.num_scheduled_tokens if len(texts[rid]) < 3]
        # Drafters that are not told a length draft all: what is cut is cut by the trim.
        drafts = {rid: sampler.draft(texts[rid][-1], K) for rid in unfinished}
        # As the mixin of forced tokens does, before every schedule().
        scheduler.certain_drafts = {rid: 1 for rid, draft in drafts.items() if texts[rid][-1] == 0 and draft}
        hand_drafts(scheduler, drafts)
        outputs.update(tuple(texts.pop(rid)) for rid in set(output.num_scheduled_tokens) - set(unfinished))
    return outputs, verified


def compute_chance(outputs: Counter[tuple[int, ...]]) -> float:
    """Probability that frequencies as far from the target's as these come by luck (Pearson's chi-square test)."""
    chances = TARGET[1][:, None, None] * TARGET[:, :, None] * TARGET[None, :, :]
    possible = [output for output in np.ndindex(chances.shape) if chances[output] > 0]
    assert set(outputs) <= set(possible)
    total = sum(outputs.values())
    return float(chisquare([outputs[one] for one in possible], [total * chances[one] for one in possible]).pvalue)


def test_the_distribution_of_the_target_is_kept(tmp_path: Path) -> None:
    scheduler = build_scheduler(K, tmp_path, num_seqs=128)
    outputs, verified = count_outputs(scheduler, seed=0, requests=6000)
    # Drafts of several lengths were verified, and few of them whole.
    assert len(verified) >= 3
    assert sum(verified.values()) > 1000
    assert verified[K] < sum(verified.values()) / 4
    assert compute_chance(outputs) > 0.01


def test_the_test_sees_a_trim_that_looks_at_drafts(tmp_path: Path) -> None:
    """The same, where a draft is verified only if it is the token that the drafter likes too much."""
    scheduler = build_scheduler(K, tmp_path, num_seqs=128)

    def trim(running: list[Any], given: np.ndarray) -> np.ndarray:
        for request in running:
            if request.spec_token_ids[:1] != [0]:
                request.spec_token_ids = []
        return np.array([len(request.spec_token_ids) for request in running])

    scheduler._trim = trim
    assert compute_chance(count_outputs(scheduler, seed=0, requests=6000)[0]) < 1e-6


@settings(max_examples=15)
@given(st.lists(st.tuples(st.lists(st.integers(0, K), min_size=3, max_size=3), st.booleans()), min_size=3, max_size=25))
def test_values_of_tokens_decide_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[list[int], bool]]
) -> None:
    """Two schedulers that see the same outcomes of other tokens verify and draft the same lengths, step by step."""
    scheduled = []
    folder = tmp_path_factory.mktemp("cache")
    for token in (11, 977):
        scheduler = build_scheduler(K, folder)
        scheduler._controller.step_time = FrozenStepTime(1.0)
        for rid in "abc":
            add_request(scheduler, rid)
        history = []
        for accepted, is_drafted in steps:
            output = scheduler.schedule()
            drafts = output.scheduled_spec_decode_tokens
            history.append((dict(output.num_scheduled_tokens), dict(output.draft_lengths)))
            right = dict(zip("abc", accepted, strict=True))
            sampled = run_model(output, lambda rid, tokens, right=right, last=token + 1: [*tokens[: right[rid]], last])  # type: ignore[misc]
            scheduler.update_from_output(output, sampled)
            assert set(drafts) <= set("abc")
            if is_drafted:
                hand_drafts(scheduler, {rid: [token] * length for rid, length in output.draft_lengths.items()})
        scheduled.append(history)
    assert scheduled[0] == scheduled[1]


@pytest.mark.parametrize(("others", "verified"), [(0, 1), (3, 0)])
def test_a_draft_must_be_worth_the_time_that_others_wait(others: int, verified: int, tmp_path: Path) -> None:
    scheduler = build_scheduler(K, tmp_path)
    scheduler._controller.step_time = FrozenStepTime(3.0)
    for number in range(1 + others):
        add_request(scheduler, str(number))
    output = scheduler.schedule()
    scheduler.update_from_output(output, run_model(output, lambda rid, drafts: [9]))
    hand_drafts(scheduler, {"0": [11]})
    assert len(scheduler.schedule().scheduled_spec_decode_tokens.get("0", [])) == verified


def test_asynchronous_steps_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in flight, as vLLM runs them: placeholders are trimmed, outcomes go to the step that verified them."""
    seconds = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: seconds[0])
    scheduler = build_scheduler(K, tmp_path, base="AsyncScheduler", method="ngram_gpu")
    timed: list[float] = []
    observe = scheduler._controller.observe

    def note(steps: Any) -> None:
        timed.extend(step.milliseconds for step in steps)
        observe(steps)

    scheduler._controller.observe = note
    requests = {rid: add_request(scheduler, rid, max_tokens=60) for rid in "abc"}
    flying: list[Any] = []
    longest, put_out = 0, dict.fromkeys("abc", 0)
    for step in range(400):
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            flying.append(output)
            for rid, drafts in output.scheduled_spec_decode_tokens.items():
                assert drafts == [-1] * len(drafts)
                assert output.num_scheduled_tokens[rid] == 1 + len(drafts)
                longest = max(longest, len(drafts))
        seconds[0] += 0.010
        if len(flying) == 2 or (flying and not output.num_scheduled_tokens):
            done = flying.pop(0)
            wrong = step % 5 == 0
            model = run_model(
                done, lambda rid, drafts, wrong=wrong: [20] * (1 + len(drafts) - (wrong and bool(drafts)))
            )  # type: ignore[misc]
            for rid, tokens in zip(model.req_ids, model.sampled_token_ids, strict=True):
                put_out[rid] += len(tokens)
            scheduler.update_from_output(done, model)
        if not scheduler.has_unfinished_requests() and not flying:
            break
    assert all(request.num_output_tokens == 60 for request in requests.values())
    assert longest > 1
    assert scheduler._notes == {}
    # From when the step before was done, not from when this one was scheduled.
    assert timed[2:-1] == pytest.approx([10.0] * len(timed[2:-1]))
    scheduler._controller.forget(scheduler.requests)
    assert len(scheduler._controller.acceptance) == 0


def test_what_stands_for_drafts_at_the_end_of_the_context_is_not_verified(tmp_path: Path) -> None:
    """While one request has less than K tokens of room, vLLM's V1 runner drafts for none, and hands back zeros."""
    scheduler = build_scheduler(K, tmp_path)
    long = add_request(scheduler, "long", 2048 - 12 * K, max_tokens=12 * K)
    add_request(scheduler, "short", 16)
    verified: list[tuple[bool, int]] = []
    is_full, lengths = False, {}
    while not long.is_finished():
        hand_drafts(scheduler, {rid: [0 if is_full else 9] * length for rid, length in lengths.items()})
        output = scheduler.schedule()
        verified.append((is_full, sum(map(len, output.scheduled_spec_decode_tokens.values()))))
        # The runner's own condition, on the lengths that include this step.
        is_full = max(request.num_computed_tokens for request in scheduler.running) + K > 2048
        lengths = dict.fromkeys(output.draft_lengths, K) if is_full else output.draft_lengths
        assert not is_full or not any(output.draft_lengths.values())
        model = run_model(output, lambda rid, drafts: [9] * (1 + drafts.count(9)))
        scheduler.update_from_output(output, model)
    assert sum(count for full, count in verified if not full) > 0
    assert [count for full, count in verified if full] == [0] * sum(full for full, _ in verified)
    assert sum(full for full, _ in verified) > 0
