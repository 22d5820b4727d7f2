# SPDX-License-Identifier: Apache-2.0
"""The scheduler mixin of semi-PD: one scheduler and one block pool, whose batches belong to two lanes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.request import Request, RequestStatus

from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd import setup
from vllm_ext.scheduling.semipd.step import LaneLaunch, LaneResult, LaneStep


class LaneMixin:
    """Two lanes around vLLM's `Scheduler`.

    schedule              a batch for every idle lane: vLLM's own schedule() on that lane's part of the requests
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
        self._lane: Lane | None = None
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
        for lane in (Lane.DECODE, Lane.PREFILL):
            if self.has_work(lane) and (launch := self.schedule_lane(lane, throttle_prefills)) is not None:
                step.launches.append(launch)
        flights = [batch for lane in Lane for batch in self.lanes.list_in_flight(lane)]
        # The engine sleeps for a millisecond after a turn without tokens.
        step.total_num_scheduled_tokens = sum(sum(batch.tokens.values()) for batch in flights)
        now = time.perf_counter()
        if self.pacer.is_due(now):
            self.pacer.decide(now, sum(request.num_tokens for request in self.waiting))
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
        return outputs

    # One lane

    def has_work(self: Any, lane: Lane) -> bool:
        """Whether a batch of the lane could be scheduled now; it may still turn out to be empty."""
        if not self.lanes.has_room(lane):
            return False
        if self.finished_req_ids or self.lanes.has_finished(lane):
            return True
        if self._pause_state == PauseState.PAUSED_ALL:
            return False
        if lane is Lane.PREFILL and self.waiting and self._pause_state == PauseState.UNPAUSED:
            return True
        return any(self.lanes.may_schedule(lane, request) for request in self.running)

    def schedule_lane(self: Any, lane: Lane, throttle_prefills: bool = False) -> LaneLaunch | None:
        """vLLM's schedule(), which sees the lane's requests alone; None where nothing came of it."""
        view = self.lanes.open_batch(lane, self.running)
        max_active, waiting = self.max_num_active_reqs, self.waiting
        # vLLM replaces what is in the set, not the set.
        self.running, self._lane, self.prev_step_scheduled_req_ids = view.mine, lane, self._previous[lane]
        if lane is Lane.DECODE:
            # Nobody is admitted, and who is preempted comes out by itself.
            self.waiting = create_request_queue(self.policy)
        else:
            self.max_num_active_reqs = view.limit_active(max_active)
        try:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self._lane, self.max_num_active_reqs = None, max_active
            if lane is Lane.DECODE:
                preempted, self.waiting = self.waiting, waiting
                self.waiting.prepend_requests(preempted)
            self.running = view.merge(self.running)
        output.finished_req_ids = self.lanes.take_finished(output.finished_req_ids)
        if not (output.num_scheduled_tokens or output.finished_req_ids or output.kv_cache_block_copies):
            self.lanes.drop_batch()
            return None
        grammar = super().get_grammar_bitmask(output)  # type: ignore[misc]
        if grammar is not None:
            # vLLM's masks lie in one buffer of the engine, which the other lane's next batch overwrites.
            grammar.grammar_bitmask = grammar.grammar_bitmask.copy()
        return LaneLaunch(self.lanes.launch(output.num_scheduled_tokens), output, grammar)

    def update_lane(self: Any, result: LaneResult) -> dict[int, Any]:
        """A lane's batch has run: vLLM's update, with what waited for it released before."""
        batch = result.launch.batch
        self.lanes.complete(batch)
        if self.lanes.delays_hashes(batch.lane):
            for rid in batch.tokens:
                request = self.requests.get(rid)
                if request is not None and request.status == RequestStatus.RUNNING:
                    self.kv_cache_manager.cache_blocks(request, self.lanes.count_written(request))
        outputs: dict[int, Any] = super().update_from_output(result.launch.output, result.made)  # type: ignore[misc]
        now = time.perf_counter()
        if batch.tokens:
            self.pacer.note_batch(batch.lane, result.started, result.finished, sum(batch.tokens.values()), result.share)
        for client in outputs.values():
            for one in client.outputs:
                self.pacer.note_tokens(one.request_id, now, len(one.new_token_ids), one.finished)
        setup.report(self.pacer, self.lanes, self._engine_index)
        held, self._held = self._held, []
        for request in held:
            self.add_request(request)
        return outputs

    # Requests that come and go

    def add_request(self: Any, request: Request) -> None:
        """As vLLM's; one with the id of another that is not over in every lane waits until it is."""
        rid = request.request_id
        if rid not in self.requests and (rid in self.finished_req_ids or not self.lanes.is_settled(rid)):
            self._held.append(request)
            return
        self.pacer.note_arrival(rid, time.perf_counter(), request.num_tokens)
        super().add_request(request)  # type: ignore[misc]

    def finish_requests(self: Any, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> Any:
        """As vLLM's, of held requests too."""
        ids = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)
        gone = [request for request in self._held if ids is None or request.request_id in ids]
        self._held = [request for request in self._held if request not in gone]
        finished = super().finish_requests(ids, finished_status)  # type: ignore[misc]
        for request in (*gone, *finished):
            self.pacer.forget(request.request_id)
        return [*gone, *finished]

    def has_finished_requests(self: Any) -> bool:
        """Also while something is in flight, or a lane has to be told something: the engine must go on."""
        return bool(self._held) or not self.lanes.is_idle() or super().has_finished_requests()  # type: ignore[misc]

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
