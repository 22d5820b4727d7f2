# SPDX-License-Identifier: Apache-2.0
"""The scheduler mixin of smartspec: trims what is verified, chooses what is drafted next, and learns from outcomes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from vllm_ext import observability
from vllm_ext.scheduling import goodput_setup
from vllm_ext.scheduling.outcomes import (
    Outcome,
    StepNotes,
    UnreadStep,
    keep_output,
    read_outcome,
    report_outcomes,
    teach,
)
from vllm_ext.speculation.controller import Batch, Decision
from vllm_ext.speculation.pace import Pace
from vllm_ext.speculation.standing import Standing
from vllm_ext.speculation.step_time import StepFeatures


class GoodputMixin:
    """Draft lengths by goodput, around vLLM's `Scheduler` or `AsyncScheduler`.

    schedule                trims drafts before super() counts tokens and KV slots for them
    _update_after_schedule  sets how much the step drafts: `num_spec_tokens_to_schedule`, which all model runners
                            read, and `draft_lengths` by request, which the V1 runner's patch reads
    update_from_output      keeps what it says of accepted drafts, and the time of the step

    Where control would take more than a hundredth of a step, a plan stands for a few steps (`pace.Pace`). These trim
    by what every request's last outcomes say, if there are drafts enough for that, and learn nothing; the next step
    with a plan of its own learns from all of them. Asynchronous steps have a plan each: while one is computed the next
    is planned, and what that takes is not seen.

    Whatever Python does once between two forward passes takes several times as long as a second time: processors'
    caches are full of the model. So little is done in a step that could be done with others.

    Lengths depend on finished steps only, never on the drafts they cut: the output distribution stays that of the
    target model.

    Source: SmartSpec (arXiv:2406.14066, section 4); vLLM's dynamic speculation puts a table at the same place.
    """

    #: Drafts at the front of spec_token_ids that are certain (speculation/draft_source.py), by request. A mixin around
    #: this one that puts them there sets it anew before every schedule().
    certain_drafts: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        self._plan = goodput_setup.plan_control(vllm_config)
        self._controller = goodput_setup.make_controller(vllm_config, self._plan, self.requests)  # type: ignore[attr-defined]
        self._engine_index = vllm_config.parallel_config.data_parallel_index
        #: Without a model behind it the drafter is asked by request; a model makes as many drafts for each.
        self._has_passes = self._plan.passes[-1] > 0
        if self._plan.uniform_lengths is None and self.dynamic_sd_lookup is None:  # type: ignore[has-type]
            # For the sake of full CUDA graphs vLLM pads new rows with drafts of -1 up to the full number. Here are no
            # such graphs, and rows of all lengths; where a table of draft lengths is in use it does not.
            most = self.num_spec_tokens  # type: ignore[attr-defined]
            self.dynamic_sd_lookup = [most] * (vllm_config.scheduler_config.max_num_seqs + 1)
        self._notes: dict[int, StepNotes] = {}
        self._decision: Decision | None = None
        self._is_probe = False
        self._started = self._finished = 0.0
        #: Whether anything ran on when the last step was finished.
        self._goes_on = False
        #: Running requests when schedule() began, and what they have in the KV cache.
        self._ids: list[str] = []
        #: Drafts that each of them has to be verified.
        self._drafted: list[int] = []
        self._context = self._longest = 0
        self._pace = Pace(self._plan.hold_steps)
        #: The plan that the next steps may share, and how many steps there were since it was made, with that one.
        self._standing: Standing | None = None
        self._stood = 1
        #: Finished steps whose output was not read yet, those that nothing was learned from yet, and drafts planned
        #: that were not counted yet.
        self._unread: list[UnreadStep] = []
        self._outcomes: list[Outcome] = []
        self._planned = 0
        #: Whether a step is finished before the next is scheduled, and none of its requests was aborted meanwhile.
        self._is_serial, self._is_undisturbed = vllm_config.max_concurrent_batches == 1, True
        #: Seconds that this step has taken for control so far.
        self._control = 0.0
        #: Whether the V1 runner's drafter had no room for the longest request of the last step. It then drafts for
        #: none, and hands back tokens of 0 in place of drafts.
        self._is_drafter_full = False
        speculative = vllm_config.speculative_config
        draft_model = speculative.draft_model_config or vllm_config.model_config
        self._drafter_room = draft_model.max_model_len - speculative.num_speculative_tokens

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with the least promising drafts left out."""
        self._started = time.perf_counter()
        running = self.running  # type: ignore[attr-defined]
        self._ids = [request.request_id for request in running]
        computed = [request.num_computed_tokens for request in running]
        self._context, self._longest = sum(computed), max(computed, default=0)
        # Of the newest plan, asynchronously too: its placeholders are what is verified next.
        self._is_probe = self._decision is not None and self._decision.is_probe
        self._control, self._is_undisturbed = 0.0, True
        self._drafted = list(map(len, [request.spec_token_ids for request in running]))
        standing = self._standing
        if standing is not None and (self.certain_drafts or not standing.covers(len(running))):
            standing = None
        is_covered = standing is not None and standing.lasts(self._stood)
        if not is_covered:
            self._standing = None
            self._learn()
        keeps_all = standing is not None and standing.keeps_all(sum(self._drafted))
        if self._plan.trims and not keeps_all and any(self._drafted):
            given = np.array(self._drafted, np.int64)
            kept = self._trim_again(given) if is_covered else self._trim(running, given)
            self._drafted = kept.tolist()
            for row in np.flatnonzero(kept < given).tolist():
                # A new list: asynchronous scheduling gives all requests the same one.
                request = running[row]
                request.spec_token_ids = request.spec_token_ids[: self._drafted[row]]
        if not is_covered:
            self._control = time.perf_counter() - self._started
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _trim(self, running: Sequence[Any], given: np.ndarray) -> np.ndarray:
        """How many of the drafts of running requests to verify, `given` of each."""
        certain: np.ndarray | int = 0
        free = given
        if self.certain_drafts:
            certain = np.minimum([self.certain_drafts.get(rid, 0) for rid in self._ids], given)
            free = given - certain
        # Requests without drafts count too: time that the drafts of others take is time that they wait. Tokens of
        # prompts that go on beside them do where steps are padded to the sizes of graphs.
        tokens = len(running) + int(np.sum(certain))
        if prompts := [request for request in running if request.is_prefill_chunk]:
            left = [request.num_tokens - request.num_computed_tokens for request in prompts]
            tokens = self._add_prompts(tokens, left)
        batch = Batch(self._ids, tokens, self._context)
        most = 0 if self._is_drafter_full else self._plan.k_max
        return certain + self._controller.trim_drafts(batch, np.minimum(free, most), self._is_probe)

    def _trim_again(self, given: np.ndarray) -> np.ndarray:
        """The same under a plan that stands, made for decoding requests only."""
        for outcome in self._read_outcomes(is_noted=True):
            self._controller.note(*outcome.trials[:3])
        batch = Batch(self._ids, len(self._ids), self._context)
        return self._controller.trim_again(batch, given)

    def _add_prompts(self, tokens: int, left: Sequence[int]) -> int:
        """Tokens of a step of which `tokens` are known, one for each request among them, with what it takes of prompts.

        left: tokens that each unfinished prompt of these requests still has. Prompts that wait for admission are not
        among them: whether they fit is known later.
        """
        most = self.max_num_scheduled_tokens  # type: ignore[attr-defined]
        chunk = self.scheduler_config.long_prefill_token_threshold or most  # type: ignore[attr-defined]
        return max(tokens, min(most, tokens + sum(min(count, chunk) - 1 for count in left)))

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        # Before super(): AsyncScheduler makes the placeholders of the next step out of this number.
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled:
            requests = self.requests  # type: ignore[attr-defined]
            ids = list(scheduled)
            context, longest = self._context, self._longest
            if ids != self._ids:
                computed = [requests[rid].num_computed_tokens for rid in ids]
                context, longest = sum(computed), max(computed)
            # Most batches are far from it: then the two maxima tell.
            self._is_drafter_full = longest + max(scheduled.values()) > self._drafter_room and any(
                requests[rid].num_computed_tokens + count > self._drafter_room for rid, count in scheduled.items()
            )
            verified = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
            # Every request has one token and its drafts, or tokens of its prompt.
            has_prompts = scheduler_output.total_num_scheduled_tokens - verified > len(ids)
            # Of the next step, without drafts: more than one for each where prompts go on.
            tokens = self._look_ahead(scheduled) if has_prompts else len(ids)
            standing = self._standing
            if standing is not None and standing.covers(len(ids)) and tokens == len(ids) and not self._is_drafter_full:
                self._stood += 1
                standing = self._standing = standing.follow(ids)
                longest, planned = standing.longest, standing.total
                scheduler_output.num_spec_tokens_to_schedule = longest
                scheduler_output.draft_lengths = standing.lengths
            elif self._plan.plans_drafts:
                self._standing = None
                planned = self._plan_drafts(scheduler_output, Batch(ids, tokens, context))
                longest = scheduler_output.num_spec_tokens_to_schedule
            else:
                longest = scheduler_output.num_spec_tokens_to_schedule
                planned = longest * len(ids)
            if self._plan.plans_drafts:
                self._planned += planned
            passes = self._plan.passes[longest]
            drafted = len(ids) * passes if self._has_passes else planned
            features = StepFeatures(len(ids) + verified, context, len(ids), passes, drafted, int(verified > 0))
            self._notes[id(scheduler_output)] = StepNotes(
                self._started,
                self._ids,
                self._drafted,
                self.certain_drafts,
                features,
                has_prompts,
                self._is_probe,
                self._control,
            )
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _plan_drafts(self, scheduler_output: Any, batch: Batch) -> int:
        """Ask the controller how much to draft; returns the sum of all lengths."""
        began = time.perf_counter()
        # Prompts go on, say, and a plan that stood when the step began does so no longer.
        self._learn()
        learned = time.perf_counter()
        decision = self._decision = self._controller.plan_drafts(batch, self._stood, self._pace.trim_time)
        self._stood, ids = 1, list(scheduler_output.num_scheduled_tokens)
        lengths = [0] * len(ids) if self._is_drafter_full else decision.lengths.tolist()
        longest, planned = max(lengths), sum(lengths)
        scheduler_output.num_spec_tokens_to_schedule = longest
        scheduler_output.draft_lengths = dict(zip(ids, lengths, strict=True))
        self._report_plan(decision, planned)
        if decision.may_stand and batch.tokens == len(ids) and not self._is_drafter_full:
            self._standing = Standing.begin(self._pace.steps, scheduler_output.draft_lengths, decision.trims)
        ended = time.perf_counter()
        self._control += ended - began
        self._pace.observe_plan((ended - learned) * 1e3)
        return planned

    def _look_ahead(self, scheduled: Mapping[str, int]) -> int:
        """Tokens without drafts that the step after the one of `scheduled` tokens by request will have."""
        requests = map(self.requests.__getitem__, scheduled)  # type: ignore[attr-defined]
        have = [request.num_tokens - request.num_computed_tokens for request in requests]
        left = [tokens - count for tokens, count in zip(have, scheduled.values(), strict=True)]
        return self._add_prompts(len(scheduled), [count for count in left if count > 0])

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's; what counts of the output is kept before it, since it drops the requests that finish."""
        notes = self._notes.pop(id(scheduler_output), None)
        if notes is None:
            return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        requests = None if self._is_serial and self._is_undisturbed else self.requests  # type: ignore[attr-defined]
        output = keep_output(requests, scheduler_output, model_runner_output, notes)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        now = time.perf_counter()
        # Asynchronous steps overlap: a step's share begins when the one before it was done, and control takes none of
        # it where the step before was still being computed.
        control = notes.control * 1e3 if notes.started >= self._finished else 0.0
        # While anything runs the engine goes on at once: what it does between two steps, such as the text of an offline
        # engine's outputs, is the later one's time too. A pause is none of it: longer than a step it is no step's.
        gap = max(notes.started - self._finished, 0.0)
        spent = now - max(notes.started, self._finished)
        milliseconds = (spent + gap if self._goes_on and gap < spent else spent) * 1e3
        self._goes_on = bool(self.running)  # type: ignore[attr-defined]
        self._unread.append(UnreadStep(output, milliseconds, control))
        self._finished = now
        standing = self._standing
        if standing is None or not standing.lasts(self._stood) or not self.running:  # type: ignore[attr-defined]
            self._learn()
            # What was learned just now is control, and no time of the next step.
            self._finished = time.perf_counter()
        return outputs

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; after the last request is aborted no output comes that would have it learned from."""
        self._is_undisturbed = False
        finished = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        if not self.running:  # type: ignore[attr-defined]
            self._learn()
        return finished

    def _learn(self) -> None:
        """Teach the controller what became of the steps since it was asked last, and count them."""
        if not self._unread and not self._outcomes:
            return
        began = time.perf_counter()
        self._read_outcomes(is_noted=False)
        controller, outcomes, self._outcomes = self._controller, self._outcomes, []
        report_outcomes(outcomes, controller.predict, self._engine_index)
        teach(controller, outcomes)
        controller.forget(self.requests)  # type: ignore[attr-defined]
        observability.add("vllm_ext:smartspec_planned_tokens_total", self._planned, self._engine_index)
        self._planned = 0
        learning = (time.perf_counter() - began) * 1e3
        for outcome in outcomes:
            if outcome.control and outcome.is_timed:
                self._pace.observe(learning + outcome.control, outcome.milliseconds - outcome.control)

    def _read_outcomes(self, is_noted: bool) -> list[Outcome]:
        """Read the output of finished steps that nobody has read; is_noted: whether the controller is told at once."""
        steps, self._unread = self._unread, []
        outcomes = [read_outcome(step, self._controller.k_max, is_noted) for step in steps]
        self._outcomes += outcomes
        return outcomes

    def _report_plan(self, decision: Decision, planned: int) -> None:
        set_gauge, index = observability.set_gauge, self._engine_index
        set_gauge("vllm_ext:smartspec_draft_length", planned / len(decision.lengths), index)
        goodput = 1e3 * decision.expected_tokens / decision.expected_milliseconds
        set_gauge("vllm_ext:smartspec_expected_tokens_per_second", goodput, index)
        if decision.is_probe:
            observability.add("vllm_ext:smartspec_probe_steps_total", 1, index)
