# SPDX-License-Identifier: Apache-2.0
"""The scheduler mixin of semi-PD: one scheduler and one block pool, whose batches belong to two lanes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import Request, RequestStatus

from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.view import Lane, find_phase
from vllm_ext.scheduling.semipd import policies, setup
from vllm_ext.scheduling.semipd.prompts import PromptsMixin
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneResult, LaneStep


class LaneMixin(PromptsMixin):
    """Two lanes around vLLM's `Scheduler`.

    schedule              a batch for every idle lane: vLLM's own schedule() on that lane's part of the requests; or,
                          where the controller says that mixing is better, on all of them, in the decode lane
    update_from_output    vLLM's own, of the lane that has run

    What two lanes make unsafe is fenced as `phases.lanes` says; this class puts the fences where vLLM frees, publishes,
    preempts and tells runners what is over. Everything happens in the engine's thread.
    """

    #: Batches in flight by lane.
    depths = (1, 1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        self.lanes = Lanes[Any](manager.block_pool.free_blocks, self.depths)
        vllm_config: Any = self.vllm_config  # type: ignore[attr-defined]
        self.pacer = setup.make_pacer(vllm_config)
        self._engine_index = vllm_config.parallel_config.data_parallel_index
        settings, policy = setup.read_settings(vllm_config), vllm_config.scheduler_config.policy
        self.policies = policies.make_policies(settings, policy)
        self._lane: Lane | None = None
        #: Lanes of whose work nothing came, until a batch is complete or a request comes or goes.
        self._stuck: set[Lane] = set()
        #: Whether prompts wait in this turn until decode has caught up.
        self._yields = False
        #: When the latest step of requests that still decode was over, and when that of the decode lane began.
        self._stepped: float | None = None
        self._decode_began = float("-inf")
        #: Requests whose id belongs to one that lanes have not all forgotten yet.
        self._held: list[Request] = []
        #: Ids of each lane's latest batch: vLLM sends all tokens of a request that the batch before did not have.
        self._previous: tuple[set[str], ...] = tuple(set() for _ in Lane)
        allocate = manager.allocate_slots

        def allocate_slots(*args: Any, **kwargs: Any) -> Any:
            if self._lane is not None and self.lanes.delays_hashes(self._lane):
                kwargs["delay_cache_blocks"] = True
            return allocate(*args, **kwargs)

        manager.allocate_slots = allocate_slots

    # A turn of the engine

    def schedule(self: Any, throttle_prefills: bool = False) -> LaneStep:
        """Batches for the lanes that are idle and have work; decode first, whose requests wait for milliseconds."""
        step: LaneStep = LaneStep.make_empty()
        now = time.perf_counter()
        if self.pacer.is_due(now):
            self.pacer.decide(now, self._count_queued())
        self._release_late(now)
        self._yields = self._must_yield(now)
        step.wake = self._find_decode_start(now)
        # A prompt that begins now is what decode waits for.
        for lane in (Lane.DECODE, Lane.PREFILL) if step.wake is None else (Lane.PREFILL, Lane.DECODE):
            if lane is Lane.DECODE and step.wake is not None and not self.lanes.may_mix():
                continue
            if not self.has_work(lane) or (lane in self._stuck and not self.lanes.has_finished(lane)):
                continue
            launch = self.schedule_lane(lane, throttle_prefills)
            if launch is not None:
                step.launches.append(launch)
                if lane is Lane.DECODE and launch.batch.tokens:
                    self._decode_began = now
            elif not self.deferred_waiting and any(self.lanes.list_in_flight(other) for other in Lane):
                # While decode runs alone there are many turns, in which nothing changes.
                self._stuck.add(lane)
        flights = [batch for lane in Lane for batch in self.lanes.list_in_flight(lane)]
        # The engine sleeps for a millisecond after a turn without tokens.
        step.total_num_scheduled_tokens = sum(sum(batch.tokens.values()) for batch in flights)
        step.split = self.pacer.index
        return step

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """Each launch has its masks already."""
        if isinstance(scheduler_output, LaneStep):
            return None
        return super().get_grammar_bitmask(scheduler_output)  # type: ignore[misc]

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Outputs of the lane that has run; none where no lane has."""
        outputs: dict[int, Any] = {}
        for result in model_runner_output:
            outputs = self.update_lane(result)
        if not model_runner_output and self.grammar_compile_error_reqs:
            # Nothing runs that could bring the clients' errors along.
            outputs = super().update_from_output(  # type: ignore[misc]
                SchedulerOutput.make_empty(), EMPTY_MODEL_RUNNER_OUTPUT
            )
        return outputs

    # One lane

    def has_work(self: Any, lane: Lane) -> bool:
        """Whether a batch of the lane could be scheduled now; it may still turn out to be empty."""
        if not self.lanes.has_room(lane):
            return False
        if self.lanes.has_finished(lane):
            return True
        if lane is Lane.PREFILL and self._only_tells(lane):
            return False
        if self.finished_req_ids:
            return True
        if self._pause_state == PauseState.PAUSED_ALL:
            return False
        if (lane is Lane.PREFILL and self._has_waiting()) or (lane is Lane.DECODE and self._mixes()):
            return True
        return any(self.lanes.may_schedule(lane, request) for request in self.running)

    def schedule_lane(self: Any, lane: Lane, throttle_prefills: bool = False) -> LaneLaunch | None:
        """vLLM's schedule(), which sees the lane's requests alone, or all of them in a batch of both phases; None where
        nothing came of it.
        """
        is_mixed, only_tells = lane is Lane.DECODE and self._mixes(), self._only_tells(lane)
        decoding = {one.request_id for one in self.running if find_phase(one) is Lane.DECODE} if is_mixed else set()
        view = self.lanes.open_mixed(self.running) if is_mixed else self.lanes.open_batch(lane, self.running)
        max_active, waiting, sessions = self.max_num_active_reqs, self.waiting, self.kv_holding_waiting
        # vLLM replaces what is in the set, not the set.
        self.running, self._lane, self.prev_step_scheduled_req_ids = view.mine, lane, self._previous[lane]
        admits = is_mixed or (lane is Lane.PREFILL and not only_tells)
        if admits:
            self.max_num_active_reqs = view.limit_active(max_active)
            if self.policies.fair is not None:
                self.policies.fair.arrange(waiting, max_active - len(view.running))
        else:
            # Nobody is admitted, and who is preempted comes out by itself.
            self.waiting, self.kv_holding_waiting = (create_request_queue(self.policy) for _ in range(2))
        if only_tells:
            self.running = []
        try:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self._lane, self.max_num_active_reqs = None, max_active
            if not admits:
                preempted, self.waiting, self.kv_holding_waiting = self.waiting, waiting, sessions
                # From the front of one queue to that of the other: taken one by one, they would change their order.
                self.waiting.prepend_requests(reversed(list(preempted)))
            self.running = view.running if only_tells else view.merge(self.running)
        output.finished_req_ids = self.lanes.take_finished(output.finished_req_ids)
        if not (output.num_scheduled_tokens or output.finished_req_ids or output.kv_cache_block_copies):
            self.lanes.drop_batch()
            return None
        # What the other lane knows of these requests is old from here on: vLLM sends it all of their tokens.
        self._previous[1 - lane].difference_update(output.num_scheduled_tokens)
        if self.policies.fair is not None:
            self.policies.fair.note_scheduled(
                (rid, self.requests[rid].num_prompt_tokens) for rid in output.num_scheduled_tokens
            )
        grammar = super().get_grammar_bitmask(output)  # type: ignore[misc]
        if grammar is not None:
            # vLLM's masks lie in one buffer of the engine, which the other lane's next batch overwrites.
            grammar.grammar_bitmask = grammar.grammar_bitmask.copy()
        num_decoding = len(decoding & output.num_scheduled_tokens.keys())
        has_all = lane is Lane.PREFILL and self.pacer.decode_interval > 0
        return LaneLaunch(self.lanes.launch(output.num_scheduled_tokens, num_decoding), output, grammar, has_all)

    def update_lane(self: Any, result: LaneResult) -> dict[int, Any]:
        """A lane's batch has run: vLLM's update, with what waited for it released before."""
        batch = result.launch.batch
        self.lanes.complete(batch)
        self._stuck.clear()
        if self.lanes.delays_hashes(batch.lane):
            for rid in batch.tokens:
                request = self.requests.get(rid)
                if request is not None and request.status == RequestStatus.RUNNING:
                    self.kv_cache_manager.cache_blocks(request, self.lanes.count_written(request))
        outputs: dict[int, Any] = super().update_from_output(result.launch.output, result.made)  # type: ignore[misc]
        now = time.perf_counter()
        if batch.tokens:
            self._note_ran(result)
        for client in outputs.values():
            for one in client.outputs:
                self.pacer.note_tokens(one.request_id, now, len(one.new_token_ids), one.finished)
                if self.policies.fair is not None:
                    self.policies.fair.note_tokens(one.request_id, len(one.new_token_ids))
                    if one.finished:
                        self.policies.fair.leave(one.request_id)
        setup.report(self.pacer, self.lanes, self._engine_index)
        policies.report_policies(self.policies, self.pacer, self.lanes.counts, self._engine_index)
        held, self._held = self._held, []
        for request in held:
            self._enter(request, now)
        return outputs

    def _note_ran(self: Any, result: LaneResult) -> None:
        batch, started, finished, share = result.launch.batch, result.started, result.finished, result.share
        tokens = sum(batch.tokens.values())
        if batch.is_mixed:
            self.pacer.note_mixed(started, finished, tokens - batch.num_decoding, batch.num_decoding, share)
        else:
            if result.launch.has_all:
                is_beside = any(one.tokens for one in self.lanes.list_in_flight(Lane.DECODE))
                share = self.pacer.measure_share(started, finished, self._decode_began if is_beside else None)
            self.pacer.note_batch(batch.lane, started, finished, tokens, share)
        if self.policies.priority is not None and batch.lane is Lane.DECODE:
            if self._stepped is not None:
                self.policies.priority.observe_gap(finished - self._stepped)
            self._stepped = finished if self._decodes() else None

    # What a turn is made of

    def _decodes(self: Any) -> bool:
        """Whether there are requests that decode, in flight or not."""
        return any(find_phase(request) is Lane.DECODE for request in self.running)

    def _find_decode_start(self: Any, now: float) -> float | None:
        """When the decode lane's next step may begin, where it waits for prompts that are there; None for at once."""
        due: float = self._decode_began + self.pacer.decode_interval
        if due <= now or self.pacer.is_mixing or self._yields:
            return None
        # Who is over is told in a batch without tokens: nobody waits for that.
        computes = not self.lanes.may_mix() or (self._has_prompts() and self.has_work(Lane.PREFILL))
        return due if computes else None

    def _mixes(self: Any) -> bool:
        """Whether the decode lane's next batch is one of both phases."""
        is_wanted = self.pacer.is_mixing and not self._yields and self._pause_state != PauseState.PAUSED_ALL
        return is_wanted and self.lanes.may_mix() and self._has_prompts()

    def _only_tells(self, lane: Lane) -> bool:
        """Whether a lane's next batch has no tokens: prompts belong to batches of both phases, or wait."""
        return lane is Lane.PREFILL and (self.pacer.is_mixing or self._yields)

    def has_finished_requests(self: Any) -> bool:
        """Also while something is in flight, or a lane has to be told something: the engine must go on."""
        return not self.lanes.is_idle() or super().has_finished_requests()  # type: ignore[misc]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's; refused while batches are in flight, whose blocks it would take away."""
        if reset_running_requests and any(self.lanes.list_in_flight(lane) for lane in Lane):
            return False
        return super().reset_prefix_cache(reset_running_requests, reset_connector)  # type: ignore[misc]

    # Fences where vLLM gives blocks back

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        # Asked before a request is preempted for its blocks.
        return self.lanes.may_preempt(request.request_id) and not self.lanes.expects_blocks()

    def _free_request_blocks(self: Any, request: Request) -> None:
        if self.lanes.holds_blocks(request.request_id):
            blocks = self.kv_cache_manager.pop_blocks_for_free(request)
            self.lanes.defer_free(request.request_id, blocks[::-1])
        else:
            self.kv_cache_manager.free(request)

    def _free_cow_retained_blocks(self, blocks: Sequence[Any], fence_seq: int) -> None:
        self.lanes.retain_copies(blocks)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        for previous in self._previous:
            # vLLM expects of a resumed request that the batch before did not have it.
            previous.discard(request.request_id)
