# SPDX-License-Identifier: Apache-2.0
"""Which requests may begin, and when: those that come and go, wait, are held back, or take turns."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.request import Request, RequestStatus

from vllm_ext.scheduling.phases.view import Lane, find_phase


class PromptsMixin:
    """The part of `scheduler.LaneMixin` that has to do with requests before they run; it owns what is used here."""

    def _has_prompts(self: Any) -> bool:
        """Whether there is something to prefill, in flight or not."""
        return self._has_waiting() or any(find_phase(request) is Lane.PREFILL for request in self.running)

    def _has_waiting(self: Any) -> bool:
        """Whether requests may be admitted; sessions that wait for input of their client may not."""
        if self._pause_state == PauseState.PAUSED_ALL:
            return False
        has_new = bool(self.waiting) and self._pause_state == PauseState.UNPAUSED
        return has_new or len(self.kv_holding_waiting) > self.num_waiting_for_streaming_input

    def _must_yield(self: Any, now: float) -> bool:
        """Whether prompts wait for decode, which is in flight or will be."""
        if self.policies.priority is None:
            return False
        if not self._has_prompts():
            self.policies.priority.stop_holding()
            return False
        if self._pause_state == PauseState.PAUSED_ALL or not self.lanes.has_room(Lane.PREFILL):
            return False
        return self._decodes() and not self.policies.priority.may_prefill(now)

    def _count_queued(self: Any) -> int:
        """Prompt tokens that wait to be computed, without those that are held back."""
        prefilling = (request for request in self.running if find_phase(request) is Lane.PREFILL)
        return sum(request.num_tokens for request in self.waiting) + sum(
            request.num_tokens - request.num_computed_tokens for request in prefilling
        )

    def _release_late(self: Any, now: float) -> None:
        late = self.policies.late
        if late is not None and len(late) and self._pause_state == PauseState.UNPAUSED:
            for request in late.release(now, self._count_queued(), self.pacer.max_queued_tokens):
                self._queue(request)

    # Requests that come and go

    def add_request(self: Any, request: Request) -> None:
        """As vLLM's. One with the id of another that is not over in every lane waits until it is; a late one waits
        until it delays nobody.
        """
        if request.request_id in self.requests:
            self._stuck.clear()
            super().add_request(request)  # type: ignore[misc]
            return
        now = time.perf_counter()
        self.pacer.note_arrival(request.request_id, now, request.num_tokens)
        self._enter(request, now)

    def _enter(self: Any, request: Request, now: float) -> None:
        rid, limit = request.request_id, self.pacer.max_queued_tokens
        if rid in self.finished_req_ids or not self.lanes.is_settled(rid):
            self._held.append(request)
        # A session of several inputs is known to vLLM by its first one, which has to be there.
        elif self.policies.late is None or limit is None or request.resumable or self._count_queued() <= limit:
            self._queue(request)
        else:
            self.policies.late.hold(request, now)
            self.pacer.note_late(rid)

    def _queue(self: Any, request: Request) -> None:
        self._stuck.clear()
        if self.policies.fair is not None:
            self.policies.fair.enter(request)
        super().add_request(request)  # type: ignore[misc]

    def finish_requests(self: Any, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> Any:
        """As vLLM's, of held requests too."""
        self._stuck.clear()
        ids = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)
        gone = [request for request in self._held if ids is None or request.request_id in ids]
        self._held = [request for request in self._held if request not in gone]
        if self.policies.late is not None:
            gone += self.policies.late.remove(ids)
        finished = super().finish_requests(ids, finished_status)  # type: ignore[misc]
        for request in (*gone, *finished):
            self.pacer.forget(request.request_id)
            if self.policies.fair is not None:
                self.policies.fair.leave(request.request_id)
        return [*gone, *finished]

    def get_request_counts(self: Any) -> tuple[int, int]:
        """As vLLM's; who is held waits too."""
        num_running, num_waiting = super().get_request_counts()  # type: ignore[misc]
        num_late = len(self.policies.late) if self.policies.late is not None else 0
        return num_running, num_waiting + len(self._held) + num_late
