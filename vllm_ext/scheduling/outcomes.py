# SPDX-License-Identifier: Apache-2.0
"""What became of the drafts of a step: read from what the model runner returned, taught to the controller later.

Steps that share one plan are learned from together, before the next plan: what that takes is mostly the time until
code and data are in the processor's caches again, and it is the same for one step as for eight.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_ext import observability
from vllm_ext.speculation.controller import GoodputController
from vllm_ext.speculation.draft_source import count_trials
from vllm_ext.speculation.step_time import StepFeatures

_STATUS, _STALE = operator.attrgetter("status"), operator.attrgetter("num_stale_output_tokens")


class StepNotes(NamedTuple):
    """What the mixin keeps of a scheduled step until its output arrives."""

    started: float  # seconds of time.perf_counter, at the start of schedule()
    #: Requests that had drafts of a drafter. What else vLLM schedules as drafts is padding.
    proposed: frozenset[str]
    #: Of these, how many at the front were certain, by request: no trials of the drafter.
    certain: Mapping[str, int]
    #: Of the step without what it had of prompts.
    features: StepFeatures
    #: A step with prompt tokens in it: its time says little about drafts.
    has_prompts: bool
    #: Whether the drafts that this step verifies come from a plan that was a probe. Plans made since are another's.
    is_probe: bool
    #: Seconds in which a plan was made and outcomes learned; 0 under an earlier step's plan. What trimming takes there
    #: is a cost of having drafts, and stays in the step's time.
    control: float


class Trials(NamedTuple):
    """The requests of a step whose output counts, and of each: verified drafts, accepted drafts, tokens put out."""

    request_ids: list[str]
    drafted: list[int]
    accepted: list[int]
    num_sampled: list[int]


class Outcome(NamedTuple):
    """A finished step. Milliseconds of all of it, and of control if its time was in these; is_timed: whether they say
    anything about drafts."""

    trials: Trials
    features: StepFeatures
    milliseconds: float
    control: float
    is_probe: bool
    is_timed: bool


def read_trials(
    requests: Mapping[str, Any], scheduler_output: Any, model_runner_output: Any, notes: StepNotes
) -> Trials:
    """What a step verified and accepted. To be read before vLLM's `update_from_output` drops requests that finish.

    requests: the scheduler's, by id.
    """
    sampled, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
    if not sampled:
        return Trials([], [], [], [])
    drafts = scheduler_output.scheduled_spec_decode_tokens
    ids = list(scheduler_output.num_scheduled_tokens)
    # Over maps of bound methods: 256 requests are many for the body of a loop.
    num_sampled = list(map(len, map(sampled.__getitem__, map(index.__getitem__, ids))))
    if not drafts:
        drafted = [0] * len(ids)
    else:
        if not drafts.keys() <= notes.proposed:
            drafts = {rid: tokens for rid, tokens in drafts.items() if rid in notes.proposed}
        drafted = list(map(len, map(drafts.get, ids, itertools.repeat(()))))
    # Output of before a preemption is counted twice once the request runs again.
    found = list(map(requests.get, ids))
    if not all(found) or not _all_are_current(found) or 0 in num_sampled:
        counts = [
            count > 0 and request is not None and request.num_stale_output_tokens == 0 and not request.is_finished()
            for count, request in zip(num_sampled, found, strict=True)
        ]
        ids, drafted, num_sampled = (list(itertools.compress(column, counts)) for column in (ids, drafted, num_sampled))
    if invalid := scheduler_output.num_invalid_spec_tokens:
        # vLLM pads new rows with drafts of -1 and drafts that the grammar forbids with -1: no trials of ours.
        drafted = [max(count - invalid.get(rid, 0), 0) for rid, count in zip(ids, drafted, strict=True)]
    accepted = list(map(min, map(operator.sub, num_sampled, itertools.repeat(1)), drafted))
    if notes.certain:
        rows = zip(ids, drafted, accepted, strict=True)
        pairs = [count_trials(count, passed, notes.certain.get(rid, 0)) for rid, count, passed in rows]
        drafted, accepted = [count for count, _ in pairs], [passed for _, passed in pairs]
    return Trials(ids, drafted, accepted, num_sampled)


def _all_are_current(requests: Sequence[Any]) -> bool:
    """Whether all of them run and wait for no output of before a preemption: the rule, and quickly told."""
    is_running = map(operator.is_, map(_STATUS, requests), itertools.repeat(RequestStatus.RUNNING))
    return all(is_running) and not any(map(_STALE, requests))


def teach(controller: GoodputController, outcomes: Sequence[Outcome]) -> None:
    """Have a controller learn from finished steps, in their order."""
    for (ids, drafted, accepted, sampled), features, milliseconds, control, is_probe, is_timed in outcomes:
        # Drafters may make more than they are asked for: V1's make the full number near the end of the context.
        tried, passed = (np.minimum(np.array(counts, np.int64), controller.k_max) for counts in (drafted, accepted))
        # What a step takes for control it takes whatever it drafts, and only where it had a plan of its own.
        time = milliseconds - control if is_timed else None
        made = np.array(sampled, np.int64)
        controller.observe(ids, tried, passed, features if ids else None, time, is_probe, made)


def report_outcomes(outcomes: Iterable[Outcome], predict: Callable[[StepFeatures], float], engine_index: int) -> None:
    """Count finished steps. predict: milliseconds of a step without control, by what was known when it ran."""
    verified = accepted = tokens = 0
    decoding, last = 0.0, None
    for outcome in outcomes:
        trials = outcome.trials
        verified += sum(trials.drafted)
        accepted += sum(trials.accepted)
        if outcome.is_timed:
            tokens += sum(trials.num_sampled)
            decoding += outcome.milliseconds
            last = outcome
    add, set_gauge = observability.add, observability.set_gauge
    add("vllm_ext:smartspec_verified_tokens_total", verified, engine_index)
    add("vllm_ext:smartspec_accepted_tokens_total", accepted, engine_index)
    if last is not None:
        set_gauge("vllm_ext:smartspec_predicted_step_seconds", predict(last.features) / 1e3, engine_index)
        set_gauge("vllm_ext:smartspec_measured_step_seconds", (last.milliseconds - last.control) / 1e3, engine_index)
        add("vllm_ext:smartspec_decoded_tokens_total", tokens, engine_index)
        add("vllm_ext:smartspec_decode_seconds_total", decoding / 1e3, engine_index)
