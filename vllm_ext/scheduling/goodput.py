# SPDX-License-Identifier: Apache-2.0
"""The scheduler mixin of smartspec: trims what is verified, chooses what is drafted next, and learns from outcomes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_ext import observability
from vllm_ext.scheduling import goodput_setup
from vllm_ext.speculation.controller import Batch, Decision
from vllm_ext.speculation.draft_source import count_trials
from vllm_ext.speculation.step_time import StepFeatures


class StepNotes(NamedTuple):
    """What the mixin keeps of a scheduled step until its output arrives."""

    started: float  # seconds of time.perf_counter, at the start of schedule()
    #: Requests that had drafts of a drafter. What else vLLM schedules as drafts is padding.
    proposed: frozenset[str]
    #: Of these, how many at the front were certain, by request: no trials of the drafter.
    certain: Mapping[str, int]
    #: None for a step with prompt tokens in it, whose time says little about drafts.
    features: StepFeatures | None
    #: Whether the drafts that this step verifies come from a plan that was a probe. Plans made since are another's.
    is_probe: bool


class GoodputMixin:
    """Draft lengths by goodput, around vLLM's `Scheduler` or `AsyncScheduler`.

    schedule                trims drafts before super() counts tokens and KV slots for them
    _update_after_schedule  sets how much the step drafts: `num_spec_tokens_to_schedule`, which all model runners
                            read, and `draft_lengths` by request, which the V1 runner's patch reads
    update_from_output      accepted drafts by request, and the time of the step

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
        #: Running requests when schedule() began, and what they have in the KV cache.
        self._ids: list[str] = []
        self._context = self._longest = 0
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
        drafted = list(map(len, [request.spec_token_ids for request in running]))
        if self._plan.trims and any(drafted):
            drafted = self._trim(running, np.array(drafted, np.int64)).tolist()
        self._proposed = frozenset(itertools.compress(self._ids, drafted))
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _trim(self, running: Sequence[Any], given: np.ndarray) -> np.ndarray:
        """Cut the drafts of running requests, `given` of each; returns how many are left."""
        certain: np.ndarray | int = 0
        free = given
        if self.certain_drafts:
            certain = np.minimum([self.certain_drafts.get(rid, 0) for rid in self._ids], given)
            free = given - certain
        # Requests without drafts count too: time that the drafts of others take is time that they wait. So do prompts
        # that go on beside them: the longer a step takes anyway, the less a draft adds to it.
        tokens = len(running) + int(np.sum(certain))
        if prompts := [request for request in running if request.is_prefill_chunk]:
            left = [request.num_tokens - request.num_computed_tokens for request in prompts]
            tokens = self._add_prompts(tokens, left)
        batch = Batch(self._ids, tokens, self._context)
        most = 0 if self._is_drafter_full else self._plan.k_max
        kept = certain + self._controller.trim_drafts(batch, np.minimum(free, most), self._is_probe)
        for row in np.flatnonzero(kept < given).tolist():
            # A new list: asynchronous scheduling gives all requests the same one.
            running[row].spec_token_ids = running[row].spec_token_ids[: kept[row]]
        return kept

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
            if self._plan.plans_drafts:
                tokens = self._look_ahead(scheduled) if has_prompts else len(ids)
                decision = self._controller.plan_drafts(Batch(ids, tokens, context))
                self._decision = decision
                lengths = [0] * len(ids) if self._is_drafter_full else decision.lengths.tolist()
                scheduler_output.num_spec_tokens_to_schedule = max(lengths)
                scheduler_output.draft_lengths = dict(zip(ids, lengths, strict=True))
                planned = sum(lengths)
                self._report_plan(decision, planned)
            else:
                planned = scheduler_output.num_spec_tokens_to_schedule * len(ids)
            features = None
            if not has_prompts:
                passes = self._plan.passes[scheduler_output.num_spec_tokens_to_schedule]
                drafted = len(ids) * passes if self._has_passes else planned
                features = StepFeatures(len(ids) + verified, context, len(ids), passes, drafted)
            self._notes[id(scheduler_output)] = StepNotes(
                self._started, self._proposed, self.certain_drafts, features, self._is_probe
            )
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _look_ahead(self, scheduled: Mapping[str, int]) -> int:
        """Tokens without drafts that the step after the one of `scheduled` tokens by request will have."""
        requests = map(self.requests.__getitem__, scheduled)  # type: ignore[attr-defined]
        have = [request.num_tokens - request.num_computed_tokens for request in requests]
        left = [tokens - count for tokens, count in zip(have, scheduled.values(), strict=True)]
        return self._add_prompts(len(scheduled), [count for count in left if count > 0])

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's; outcomes are read before it, since it drops the requests that finish."""
        notes = self._notes.pop(id(scheduler_output), None)
        if notes is None:
            return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        ids, drafted, accepted, tokens = self._read_outcomes(scheduler_output, model_runner_output, notes)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        now = time.perf_counter()
        # Asynchronous steps overlap: a step's share begins when the one before it was done.
        milliseconds = (now - max(notes.started, self._finished)) * 1e3
        self._finished = now
        controller, most, features = self._controller, self._plan.k_max, notes.features if ids else None
        if features is not None:
            self._report_step(tokens, controller.predict(features), milliseconds)
        # Drafters may make more than they are asked for: V1's make the full number near the end of the context.
        learned = np.minimum(drafted, most), np.minimum(accepted, most)
        controller.observe(ids, *learned, features, milliseconds, notes.is_probe)
        controller.forget(self.requests)  # type: ignore[attr-defined]
        index = self._engine_index
        observability.add("vllm_ext:smartspec_verified_tokens_total", int(drafted.sum()), index)
        observability.add("vllm_ext:smartspec_accepted_tokens_total", int(accepted.sum()), index)
        return outputs

    def _read_outcomes(
        self, scheduler_output: Any, model_runner_output: Any, notes: StepNotes
    ) -> tuple[list[str], np.ndarray, np.ndarray, int]:
        """(request ids, verified drafts, accepted drafts, tokens put out) of the requests whose output counts."""
        sampled, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        if not sampled:
            return [], np.zeros(0, np.int64), np.zeros(0, np.int64), 0
        drafts, running = scheduler_output.scheduled_spec_decode_tokens, RequestStatus.RUNNING
        ids = list(scheduler_output.num_scheduled_tokens)
        # Over maps of bound methods: 256 requests are many for the body of a loop.
        outputs = map(sampled.__getitem__, map(index.__getitem__, ids))
        num_sampled = np.fromiter(map(len, outputs), np.int64, len(ids))
        if not drafts.keys() <= notes.proposed:
            drafts = {rid: tokens for rid, tokens in drafts.items() if rid in notes.proposed}
        drafted = np.fromiter(map(len, map(drafts.get, ids, itertools.repeat(()))), np.int64, len(ids))
        # Output of before a preemption is counted twice once the request runs again.
        is_current = [
            request is not None
            and request.num_stale_output_tokens == 0
            and (request.status is running or not request.is_finished())
            for request in map(self.requests.get, ids)  # type: ignore[attr-defined]
        ]
        counts = np.array(is_current) & (num_sampled > 0)
        if not counts.all():
            ids = list(itertools.compress(ids, counts))
            num_sampled, drafted = num_sampled[counts], drafted[counts]
        if invalid := scheduler_output.num_invalid_spec_tokens:
            # vLLM pads new rows with drafts of -1 and drafts that the grammar forbids with -1: no trials of ours.
            drafted = np.maximum(drafted - [invalid.get(rid, 0) for rid in ids], 0)
        accepted = np.minimum(num_sampled - 1, drafted)
        for row, rid in enumerate(ids) if notes.certain else ():
            drafted[row], accepted[row] = count_trials(drafted[row], accepted[row], notes.certain.get(rid, 0))
        return ids, drafted, accepted, int(num_sampled.sum())

    def _report_plan(self, decision: Decision, planned: int) -> None:
        set_gauge, index = observability.set_gauge, self._engine_index
        set_gauge("vllm_ext:smartspec_draft_length", planned / len(decision.lengths), index)
        goodput = 1e3 * decision.expected_tokens / decision.expected_milliseconds
        set_gauge("vllm_ext:smartspec_expected_tokens_per_second", goodput, index)
        observability.add("vllm_ext:smartspec_planned_tokens_total", planned, index)
        if decision.is_probe:
            observability.add("vllm_ext:smartspec_probe_steps_total", 1, index)

    def _report_step(self, tokens: int, predicted: float, milliseconds: float) -> None:
        set_gauge, add, index = observability.set_gauge, observability.add, self._engine_index
        set_gauge("vllm_ext:smartspec_predicted_step_seconds", predicted / 1e3, index)
        set_gauge("vllm_ext:smartspec_measured_step_seconds", milliseconds / 1e3, index)
        add("vllm_ext:smartspec_decoded_tokens_total", tokens, index)
        add("vllm_ext:smartspec_decode_seconds_total", milliseconds / 1e3, index)
