# SPDX-License-Identifier: Apache-2.0
"""The scheduler mixin of structured generation: tokens that a grammar forces become drafts, and masks are batched."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_ext import observability
from vllm_ext.scheduling.slow_masks import SlowMasks, has_room, leave_out
from vllm_ext.speculation.draft_source import DraftToken, merge_drafts
from vllm_ext.structured import carrier
from vllm_ext.structured.grammar_states import StateMaker
from vllm_ext.structured.lookahead import ForcedTokens, GrammarState, find_forced_tokens
from vllm_ext.structured.masks import MaskFiller
from vllm_ext.structured.spellings import SpellingObserver, Spellings

#: Of the scheduler's token budget of a step: what drafts may take of it, so that prompts go on.
DRAFT_SHARE = 0.5
#: Milliseconds that a look at what a grammar forces takes at most as a rule, and what a request may take beyond that
#: before nobody looks at its grammar any more: every request of the batch waits for it.
LOOK_MS, MOST_EXCESS_MS = 2.0, 6.0


class _Drafts(NamedTuple):
    """What is kept of a structured request while it runs; `state` is None where it gets no forced tokens."""

    request: Any
    state: GrammarState | None
    observer: SpellingObserver
    #: Of grammars with a budget (structured/budgets.py): what it takes to look at them is charged, in milliseconds.
    charge: Callable[[float], None] | None
    #: Milliseconds that its looks took beyond LOOK_MS each.
    excess_ms: float = 0.0


class ForcedTokensMixin:
    """Forced tokens around vLLM's `Scheduler` or `AsyncScheduler`, and around the goodput mixin.

    schedule            puts forced tokens into spec_token_ids, and says in certain_drafts how many cannot be rejected;
                        leaves out requests that wait for a slow mask
    get_grammar_bitmask fills masks many rows at a time; of a certain draft the mask is known
    update_from_output  counts what became of them

    A request's drafts depend on its past output and on how others spelled the same texts, never on what is drawn next:
    the output distribution stays that of the target model.
    """

    #: Read by GoodputMixin, which never trims certain drafts.
    certain_drafts: Mapping[str, int] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config: Any = self.vllm_config  # type: ignore[attr-defined]
        self._engine_index = vllm_config.parallel_config.data_parallel_index
        manager = self.structured_output_manager  # type: ignore[attr-defined]
        self._masks = MaskFiller(manager)
        self._slow_masks = SlowMasks(manager, self._engine_index)
        #: Whether the last schedule() made a step: of a pipeline that is not full every other one is empty.
        self._has_scheduled = True
        plan = carrier.plan_forced_tokens(vllm_config)
        self._drafts_forced = plan.is_on
        for name, value in (("active", plan.is_on), ("limit_index", plan.limit_index)):
            observability.set_gauge(f"vllm_ext:structured_forced_tokens_{name}", value, self._engine_index)
        self._is_v2 = bool(vllm_config.use_v2_model_runner)
        self._has_drafter = not carrier.uses_carrier(vllm_config)
        self._grammars: dict[str, _Drafts] = {}
        #: Requests that vLLM's rejection sampler would serve wrongly; while one runs, nothing is drafted.
        self._alone: set[str] = set()
        self._forced: dict[str, ForcedTokens] = {}
        if not self._drafts_forced:
            return
        self.forget_spellings()
        self._states = StateMaker()
        if not self._has_drafter:
            # vLLM pads new rows with drafts of -1 up to the full number, for the sake of CUDA graphs; where a table of
            # draft lengths is in use it does not.
            most = self.num_spec_tokens  # type: ignore[attr-defined]
            self.dynamic_sd_lookup = [most] * (vllm_config.scheduler_config.max_num_seqs + 1)

    def forget_spellings(self) -> None:
        """Start anew with what is learned of how the model spells forced texts (for benchmarks)."""
        self._spellings = Spellings(_make_encoder(self.structured_output_manager.tokenizer))  # type: ignore[attr-defined]

    def add_request(self, request: Any) -> None:
        """As vLLM's."""
        parameters = request.sampling_params
        if self._drafts_forced and parameters is not None and parameters.logprob_token_ids:
            self._alone.add(request.request_id)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with forced tokens as drafts, and without requests that wait for their masks."""
        if self._has_scheduled:
            self._slow_masks.begin_step()
        slow = self._slow_masks.find(self.running)  # type: ignore[attr-defined]
        if slow and has_room(self):
            held = self._slow_masks.hold(slow, len(self.running))  # type: ignore[attr-defined]
            with leave_out(self, held):
                return self._schedule(slow, *args, **kwargs)
        return self._schedule(slow, *args, **kwargs)

    def _schedule(self, slow: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """slow: requests whose grammars are not looked at, by id."""
        if self._drafts_forced:
            self._forced = {}
            self.certain_drafts = {}
            # Grammars may be large. A server schedules once more after its last request.
            for rid in self.finished_req_ids:  # type: ignore[attr-defined]
                self._grammars.pop(rid, None)
            if self._alone:
                self._alone.intersection_update(self.requests)  # type: ignore[attr-defined]
            if not self._alone:
                running = self.running  # type: ignore[attr-defined]
                self._draft([one for one in running if one.request_id not in slow] if slow else running)
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._has_scheduled = output.total_num_scheduled_tokens > 0
        if self._is_v2 and self._forced:
            # Read by patches/structured_v2.py in the workers.
            output.forced_drafts = tuple(self._forced)
        return output

    def _draft(self, running: Sequence[Any]) -> None:
        budget = int(DRAFT_SHARE * self.max_num_scheduled_tokens)  # type: ignore[attr-defined]
        most, grammars, certain = self.num_spec_tokens, self._grammars, {}  # type: ignore[attr-defined]
        for request in running:
            # Only rows that wait for their next token: neither prompts nor requests that were preempted.
            if request.structured_output_request is None or request.num_tokens != request.num_computed_tokens + 1:
                continue
            rid = request.request_id
            drafts = grammars.get(rid)
            if drafts is None or drafts.request is not request:
                if request.is_prefill_chunk or request.num_output_tokens == 0:
                    continue
                drafts = self._start(request)
                if drafts is None:
                    continue
            state, observer = drafts.state, drafts.observer
            # A mask that is being filled (slow_masks.py) has the grammar for itself.
            if state is None or getattr(request.structured_output_request.grammar, "ahead", None) is not None:
                continue
            length = request.num_output_tokens
            observer.read(request.output_token_ids)
            # The last token of a request is never a draft: what is sampled behind the drafts counts too.
            limit = min(most, request.max_tokens - length - 1, budget)
            if limit < 1:
                continue
            # Of this thread alone: a busy machine makes no grammar slow.
            began = time.thread_time()
            forced = find_forced_tokens(state, limit, self._spellings)
            milliseconds = (time.thread_time() - began) * 1e3
            if drafts.charge is not None:
                drafts.charge(milliseconds)
            if milliseconds > LOOK_MS:
                excess_ms = drafts.excess_ms + milliseconds - LOOK_MS
                is_slow = excess_ms > MOST_EXCESS_MS
                grammars[rid] = drafts._replace(excess_ms=excess_ms, state=None if is_slow else state)
            if forced.texts:
                observer.expect(forced, length)
            if not forced.tokens:
                continue
            tokens, num_certain = forced.tokens, forced.num_certain
            if request.spec_token_ids:
                given = [DraftToken(token, place < num_certain) for place, token in enumerate(tokens)]
                tokens, num_certain = merge_drafts(given, request.spec_token_ids, min(most, limit))
            request.spec_token_ids = tokens
            self._forced[rid] = forced
            if num_certain:
                certain[rid] = num_certain
            budget -= len(tokens)
        self.certain_drafts = certain

    def _start(self, request: Any) -> _Drafts | None:
        """Look at a request for the first time; None while it still thinks."""
        manager = self.structured_output_manager  # type: ignore[attr-defined]
        if manager._get_constraint_bounds(request, ()).constraint_start:
            return None
        state = None
        grammar = request.structured_output_request.grammar
        if self._has_drafter or not _changes_probabilities(request.sampling_params):
            state = self._states.make(grammar, request.sampling_params.eos_token_id)
        measure = state.measure if state is not None else len
        observer = SpellingObserver(self._spellings, measure)  # type: ignore[arg-type]
        drafts = _Drafts(request, state, observer, getattr(grammar, "charge", None))
        self._grammars[request.request_id] = drafts
        return drafts

    def get_grammar_bitmask(self, scheduler_output: Any) -> GrammarOutput | None:
        """As vLLM's, with batched masks."""
        if not scheduler_output.has_structured_output_requests:
            return None
        requests, drafts = self.requests, scheduler_output.scheduled_spec_decode_tokens  # type: ignore[attr-defined]
        ids = [
            rid
            for rid in scheduler_output.num_scheduled_tokens
            if (request := requests.get(rid)) is not None
            and request.use_structured_output
            and not request.is_prefill_chunk
        ]
        masks = self._masks.fill(requests, ids, drafts, self.certain_drafts)
        if masks is None:
            return None
        return GrammarOutput(ids, masks, [len(strip_speculative_padding(drafts.get(rid, []))) for rid in ids])

    def shutdown(self) -> None:
        """As vLLM's."""
        self._slow_masks.close()
        super().shutdown()  # type: ignore[misc]

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """As vLLM's; without a drafter there are none but the forced ones."""
        if not self._drafts_forced or self._has_drafter:
            super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's; what became of forced tokens is counted before it drops requests that finish."""
        if self._forced and model_runner_output.sampled_token_ids:
            self._report(scheduler_output.scheduled_spec_decode_tokens, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _report(self, scheduled: Mapping[str, Sequence[int]], model_runner_output: Any) -> None:
        sampled, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        drafted = accepted = certain = 0
        for rid, forced in self._forced.items():
            count = min(len(scheduled.get(rid, ())), len(forced.tokens))
            if count and (tokens := sampled[index[rid]]):
                drafted += count
                accepted += min(len(tokens) - 1, count)
                certain += min(forced.num_certain, count)
        add, engine = observability.add, self._engine_index
        add("vllm_ext:structured_forced_tokens_total", drafted, engine)
        add("vllm_ext:structured_forced_accepted_tokens_total", accepted, engine)
        add("vllm_ext:structured_forced_certain_tokens_total", certain, engine)


def _changes_probabilities(parameters: Any) -> bool:
    """Whether a request uses what vLLM's rejection sampler leaves out: it is served without drafts."""
    return bool(parameters.min_p > 0 or parameters.logit_bias)


def _make_encoder(tokenizer: Any) -> Any:
    """Tokens of a text in the middle of an output."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode
