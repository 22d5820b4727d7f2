# SPDX-License-Identifier: Apache-2.0
"""A scheduler with the seams of vLLM's, and the lanes around it at exactly these seams.

Method names are those of `vllm.v1.core.sched.scheduler.Scheduler`; the scheduler mixin has the lanes around the real
one as LaneScheduler has them around this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.scheduling.phases.fake_pool import BLOCK_SIZE, FakeBlock, FakePool
from vllm_ext.scheduling.phases.lanes import LaneBatch, Lanes
from vllm_ext.scheduling.phases.view import Lane, find_phase


@dataclass(eq=False)
class FakeRequest:
    """A request; `number` tells apart requests that had the same id one after the other."""

    request_id: str
    number: int
    prompt: list[int]
    max_tokens: int
    stop_every: int  # a token that this divides ends the output
    output: list[int] = field(default_factory=list)
    blocks: list[FakeBlock] = field(default_factory=list)
    status: str = "waiting"
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_preemptions: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output)

    def stops(self, token: int) -> bool:
        return len(self.output) >= self.max_tokens or token % self.stop_every == 0


@dataclass(eq=False)
class Step:
    """What a lane's runner is told: vLLM's SchedulerOutput."""

    scheduled: dict[str, tuple[int, int]]  # request id -> (first position, tokens)
    new: dict[str, list[int]]  # tokens of requests that begin, or begin again
    tables: dict[str, list[int]]
    copies: list[tuple[int, int]]
    finished: set[str]

    @property
    def tokens(self) -> dict[str, int]:
        return {rid: count for rid, (_, count) in self.scheduled.items()}

    @property
    def blocks(self) -> set[int]:
        """Blocks that the step reads or writes."""
        return {number for table in self.tables.values() for number in table} | {
            n for pair in self.copies for n in pair
        }


class FakeScheduler:
    """Running requests first, then waiting ones; the youngest is preempted; one stream."""

    def __init__(
        self, pool: FakePool, budget: int, max_active: int, *, whole_prompt_fits: bool, asynchronous: bool
    ) -> None:
        self.pool = pool
        self.max_num_scheduled_tokens = budget
        self.max_num_active_reqs = max_active
        self.whole_prompt_fits, self.asynchronous = whole_prompt_fits, asynchronous
        self.requests: dict[str, FakeRequest] = {}
        self.running: list[FakeRequest] = []
        self.waiting: list[FakeRequest] = []
        self.finished_req_ids: set[str] = set()
        self.delivered: dict[int, list[int]] = {}
        self.num_preemptions = 0
        self._copies: list[tuple[FakeBlock, FakeBlock]] = []

    def add_request(self, request: FakeRequest) -> None:
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self.delivered[request.number] = []
        self.waiting.append(request)

    def schedule(self) -> Step:
        self.pool.published_now.clear()
        budget = self.max_num_scheduled_tokens
        scheduled: dict[str, tuple[int, int]] = {}
        new: dict[str, list[int]] = {}
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = min(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens, budget)
            placeholders = request.num_output_placeholders
            last = (
                placeholders
                and request.num_computed_tokens + 2 - placeholders >= len(request.prompt) + request.max_tokens
            )
            if count == 0 or last:
                index += 1
                continue
            allocated = self.allocate_slots(request, count)
            while not allocated:
                victim = self.running[-1]
                if not self._request_blocks_can_be_freed(victim):
                    break
                self.running.pop()
                self._preempt_request(victim)
                preempted = True
                if victim is request:
                    break
                allocated = self.allocate_slots(request, count)
            if not allocated:
                break
            scheduled[request.request_id] = (request.num_computed_tokens, count)
            budget -= count
            index += 1
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.max_num_active_reqs:
            request = self.waiting[0]
            blocks, hit = self.pool.find(request.tokens)
            count = min(request.num_tokens - hit, budget)
            if not self.allocate_slots(request, count, blocks, hit):
                break
            self.waiting.pop(0)
            self.running.append(request)
            request.status = "running"
            new[request.request_id] = request.tokens
            scheduled[request.request_id] = (hit, count)
            budget -= count
        step = Step(
            scheduled,
            new,
            {rid: [block.number for block in self.requests[rid].blocks] for rid in scheduled},
            [(source.number, copy.number) for source, copy in self._copies],
            self.finished_req_ids,
        )
        if self._copies:
            self._free_cow_retained_blocks([block for pair in self._copies for block in pair])
        self._copies, self.finished_req_ids = [], set()
        self._update_after_schedule(step)
        return step

    def allocate_slots(
        self,
        request: FakeRequest,
        count: int,
        hit_blocks: Sequence[FakeBlock] = (),
        hit: int = 0,
        delay_cache_blocks: bool = False,
    ) -> bool:
        computed = request.num_computed_tokens + hit
        is_partial = hit % BLOCK_SIZE > 0
        held = len(request.blocks) + len(hit_blocks)
        needed = -(-(computed + count) // BLOCK_SIZE) - held + is_partial
        whole = -(-request.num_tokens // BLOCK_SIZE) - held + is_partial
        # Cached blocks of nobody count as free until they are shared.
        free = self.pool.num_free - sum(block.references == 0 for block in hit_blocks)
        is_new = request.status != "running"
        if needed > free or (is_new and self.whole_prompt_fits and whole > free):
            return False
        self.pool.share(hit_blocks)
        request.blocks += hit_blocks
        if is_partial:
            [copy] = self.pool.take(1)
            self._copies.append((request.blocks[-1], copy))
            self.pool.share([copy])
            request.blocks[-1] = copy
            needed -= 1
        request.blocks += self.pool.take(needed) if needed > 0 else []
        if is_new:
            request.num_computed_tokens = hit
        if not delay_cache_blocks:
            self.cache_blocks(request, min(computed + count, request.num_tokens))
        return True

    def cache_blocks(self, request: FakeRequest, count: int) -> None:
        self.pool.publish(request.tokens[:count], request.blocks)

    def _preempt_request(self, request: FakeRequest) -> None:
        self._free_request_blocks(request)
        request.status = "preempted"
        request.num_computed_tokens = request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.insert(0, request)

    def _request_blocks_can_be_freed(self, request: FakeRequest) -> bool:
        return True

    def _free_request_blocks(self, request: FakeRequest) -> None:
        self.pool.give_back(self.pop_blocks_for_free(request)[::-1])

    def pop_blocks_for_free(self, request: FakeRequest) -> list[FakeBlock]:
        blocks, request.blocks = request.blocks, []
        return blocks

    def _free_cow_retained_blocks(self, blocks: Sequence[FakeBlock]) -> None:
        self.pool.give_back(blocks)

    def _update_after_schedule(self, step: Step) -> None:
        for rid, count in step.tokens.items():
            request = self.requests[rid]
            request.num_computed_tokens += count
            # vLLM samples for every request whose tokens are all computed; only asynchronous scheduling foresees it.
            if (
                self.asynchronous
                and request.num_computed_tokens == request.num_tokens + request.num_output_placeholders
            ):
                request.num_output_placeholders += 1

    def update_from_output(self, step: Step, sampled: Mapping[str, int | None]) -> None:
        for rid in step.scheduled:
            request = self.requests.get(rid)
            token = sampled[rid]
            if request is None or token is None:
                continue
            if self.asynchronous:
                request.num_output_placeholders -= 1
            request.output.append(token)
            self.delivered[request.number].append(token)
            if request.stops(token):
                self.finish_requests(request)

    def finish_requests(self, request: FakeRequest) -> None:
        """The request is over: stopped, or aborted by its client."""
        (self.running if request.status == "running" else self.waiting).remove(request)
        request.status = "finished"
        self.finished_req_ids.add(request.request_id)
        self._free_request_blocks(request)
        del self.requests[request.request_id]


class LaneScheduler(FakeScheduler):
    """The lanes around it."""

    def __init__(
        self,
        pool: FakePool,
        budget: int,
        max_active: int,
        depths: tuple[int, int],
        *,
        whole_prompt_fits: bool,
        publishes_last: bool,
    ) -> None:
        """publishes_last: hashes are published after outputs are read, as where drafts are verified."""
        super().__init__(pool, budget, max_active, whole_prompt_fits=whole_prompt_fits, asynchronous=max(depths) > 1)
        self.lanes = Lanes[FakeBlock](pool.give_back, depths)
        self._lane: Lane | None = None
        self.publishes_last = publishes_last
        self._held: list[FakeRequest] = []
        #: Whether prompts go into batches of both phases.
        self.is_mixing = False

    def add_request(self, request: FakeRequest) -> None:
        if self.lanes.is_settled(request.request_id) and request.request_id not in self.finished_req_ids:
            super().add_request(request)
        else:
            self._held.append(request)

    def mixes(self) -> bool:
        has_prompts = self.waiting or any(find_phase(request) is Lane.PREFILL for request in self.running)
        return self.is_mixing and self.lanes.may_mix() and bool(has_prompts)

    def lane_has_work(self, lane: Lane) -> bool:
        if not self.lanes.has_room(lane):
            return False
        if self.lanes.has_finished(lane):
            return True
        if lane is Lane.PREFILL and self.is_mixing:
            return False
        if self.finished_req_ids:
            return True
        if (lane is Lane.PREFILL and self.waiting) or (lane is Lane.DECODE and self.mixes()):
            return True
        return any(self.lanes.may_schedule(lane, request) for request in self.running)

    def is_over(self) -> bool:
        return not (self.requests or self._held or self.finished_req_ids) and self.lanes.is_idle()

    def schedule_lane(self, lane: Lane) -> tuple[LaneBatch[FakeBlock], Step] | None:
        is_mixed, only_tells = lane is Lane.DECODE and self.mixes(), lane is Lane.PREFILL and self.is_mixing
        decoding = {request.request_id for request in self.running if find_phase(request) is Lane.DECODE}
        view = self.lanes.open_mixed(self.running) if is_mixed else self.lanes.open_batch(lane, self.running)
        max_active, waiting = self.max_num_active_reqs, self.waiting
        self.running, self._lane = [] if only_tells else view.mine, lane
        admits = is_mixed or (lane is Lane.PREFILL and not only_tells)
        if admits:
            self.max_num_active_reqs = view.limit_active(max_active)
        else:
            self.waiting = []
        step = self.schedule()
        self._lane, self.max_num_active_reqs = None, max_active
        if not admits:
            self.waiting = self.waiting + waiting
        self.running = view.running if only_tells else view.merge(self.running)
        assert len(self.running) <= max_active, "more requests run than the engine has rows for"
        step.finished = self.lanes.take_finished(step.finished)
        if not (step.scheduled or step.finished or step.copies):
            self.lanes.drop_batch()
            return None
        return self.lanes.launch(step.tokens, len(decoding & step.tokens.keys())), step

    def update_lane(self, batch: LaneBatch[FakeBlock], step: Step, sampled: Mapping[str, int | None]) -> None:
        self.lanes.complete(batch)
        if not self.publishes_last:
            self._publish(batch)
        self.update_from_output(step, sampled)
        if self.publishes_last:
            self._publish(batch)
        held, self._held = self._held, []
        for request in held:
            self.add_request(request)

    def _publish(self, batch: LaneBatch[FakeBlock]) -> None:
        if self.lanes.delays_hashes(batch.lane):
            for rid in batch.tokens:
                request = self.requests.get(rid)
                if request is not None and request.status == "running":
                    self.cache_blocks(request, self.lanes.count_written(request))

    def allocate_slots(
        self,
        request: FakeRequest,
        count: int,
        hit_blocks: Sequence[FakeBlock] = (),
        hit: int = 0,
        delay_cache_blocks: bool = False,
    ) -> bool:
        assert self._lane is not None
        return super().allocate_slots(request, count, hit_blocks, hit, self.lanes.delays_hashes(self._lane))

    def _request_blocks_can_be_freed(self, request: FakeRequest) -> bool:
        return self.lanes.may_preempt(request.request_id) and not self.lanes.expects_blocks()

    def _free_request_blocks(self, request: FakeRequest) -> None:
        if self.lanes.holds_blocks(request.request_id):
            self.lanes.defer_free(request.request_id, self.pop_blocks_for_free(request)[::-1])
        else:
            super()._free_request_blocks(request)

    def _free_cow_retained_blocks(self, blocks: Sequence[FakeBlock]) -> None:
        self.lanes.retain_copies(blocks)
