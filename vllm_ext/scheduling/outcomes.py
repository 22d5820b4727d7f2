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

from vllm_ext import observability
from vllm_ext.speculation.controller import FinishedStep, GoodputController
from vllm_ext.speculation.draft_source import count_trials
from vllm_ext.speculation.step_time import StepFeatures


class StepNotes(NamedTuple):
    """What the mixin keeps of a scheduled step until its output arrives."""

    started: float  # seconds of time.perf_counter, at the start of schedule()
    #: Running requests at that time, and how many drafts of a drafter each had after the trim. What else vLLM schedules
    #: as drafts is padding.
    request_ids: list[str]
    proposed: list[int]
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


class Output(NamedTuple):
    """What counts of the output of a finished step. It is read when someone asks for it, with others: by itself,
    between two forward passes, that would take several times as long."""

    notes: StepNotes
    request_ids: list[str]
    drafts: Mapping[str, Sequence[int]]
    num_invalid: Mapping[str, int] | None
    #: Tokens that the runner returned for each of its rows, and the rows of requests.
    num_sampled: list[int]
    rows: Mapping[str, int]
    #: Whether each request's output counts; None where all do.
    is_current: list[bool] | None


class Trials(NamedTuple):
    """The requests of a step whose output counts, and of each: verified drafts, accepted drafts, tokens put out. No
    arrays: those are made for all steps that are learned from together."""

    request_ids: list[str]
    drafted: list[int]
    accepted: list[int]
    made: list[int]


class UnreadStep(NamedTuple):
    """A finished step whose output is not read yet. Milliseconds of all of it, and of control if its time was in
    these."""

    output: Output
    milliseconds: float
    control: float


class Outcome(NamedTuple):
    """A finished step as `UnreadStep`, read; is_timed: whether its time says anything about drafts; is_noted: whether
    the controller was told of its trials (`GoodputController.note`)."""

    trials: Trials
    features: StepFeatures
    milliseconds: float
    control: float
    is_probe: bool
    is_timed: bool
    is_noted: bool


def keep_output(
    requests: Mapping[str, Any] | None, scheduler_output: Any, model_runner_output: Any, notes: StepNotes
) -> Output:
    """What is to be kept of a step before vLLM's `update_from_output`, which shortens the lists of tokens and drops
    requests that finish.

    requests: the scheduler's, by id; None where none can have been aborted or preempted since the step was scheduled.
    """
    ids, sampled = list(scheduler_output.num_scheduled_tokens), model_runner_output.sampled_token_ids
    is_current = None
    if requests is not None:
        # Output of before a preemption is counted twice once the request runs again.
        found = list(map(requests.get, ids))
        is_current = [
            request is not None and request.num_stale_output_tokens == 0 and not request.is_finished()
            for request in found
        ]
    return Output(
        notes,
        ids,
        scheduler_output.scheduled_spec_decode_tokens,
        scheduler_output.num_invalid_spec_tokens,
        list(map(len, sampled)),
        model_runner_output.req_id_to_index,
        is_current,
    )


def read_outcome(finished: UnreadStep, k_max: int, is_noted: bool) -> Outcome:
    """What a finished step verified and accepted. k_max: drafts of a request that count at most: drafters may make more
    than they are asked for, V1's the full number near the end of the context."""
    output, milliseconds, control = finished
    notes, trials = output.notes, _read_trials(output, k_max)
    is_timed = not notes.has_prompts and bool(trials.request_ids)
    return Outcome(trials, notes.features, milliseconds, control, notes.is_probe, is_timed, is_noted)


def _read_trials(output: Output, k_max: int) -> Trials:
    notes, ids, drafts, invalid, num_sampled, rows, is_current = output
    if not num_sampled:
        return Trials([], [], [], [])
    made = [num_sampled[rows[rid]] for rid in ids]
    if is_current is not None or 0 in made:
        counts = [count > 0 for count in made]
        if is_current is not None:
            counts = list(map(operator.and_, counts, is_current))
        ids, made = list(itertools.compress(ids, counts)), list(itertools.compress(made, counts))
    if not drafts:
        return Trials(ids, [0] * len(ids), [0] * len(ids), made)
    proposed = set(itertools.compress(notes.request_ids, notes.proposed))
    if not drafts.keys() <= proposed:
        drafts = {rid: tokens for rid, tokens in drafts.items() if rid in proposed}
    drafted = list(map(len, map(drafts.get, ids, itertools.repeat(()))))
    if invalid:
        # vLLM pads new rows with drafts of -1 and drafts that the grammar forbids with -1: no trials of ours.
        drafted = [max(count - invalid.get(rid, 0), 0) for rid, count in zip(ids, drafted, strict=True)]
    # No min(): 256 requests are many for a call each.
    accepted = [count - 1 if count <= most else most for count, most in zip(made, drafted, strict=True)]
    if notes.certain:
        trials = zip(ids, drafted, accepted, strict=True)
        pairs = [count_trials(count, passed, notes.certain.get(rid, 0)) for rid, count, passed in trials]
        drafted, accepted = [count for count, _ in pairs], [passed for _, passed in pairs]
    if max(drafted, default=0) > k_max:
        drafted, accepted = (list(map(min, counts, itertools.repeat(k_max))) for counts in (drafted, accepted))
    return Trials(ids, drafted, accepted, made)


def teach(controller: GoodputController, outcomes: Sequence[Outcome]) -> None:
    """Have a controller learn from finished steps, in their order."""
    controller.observe(
        [
            FinishedStep(
                *outcome.trials,
                outcome.features if outcome.trials.request_ids else None,
                # What a step takes for control it takes whatever it drafts, and only where it had a plan of its own.
                outcome.milliseconds - outcome.control if outcome.is_timed else None,
                outcome.is_probe,
                outcome.is_noted,
            )
            for outcome in outcomes
        ]
    )


def report_outcomes(outcomes: Iterable[Outcome], predict: Callable[[StepFeatures], float], engine_index: int) -> None:
    """Count finished steps. predict: milliseconds of a step without control, by what was known when it ran."""
    verified = accepted = tokens = 0
    decoding, last = 0.0, None
    for outcome in outcomes:
        trials = outcome.trials
        verified += sum(trials.drafted)
        accepted += sum(trials.accepted)
        if outcome.is_timed:
            tokens += sum(trials.made)
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
