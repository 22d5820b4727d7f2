# SPDX-License-Identifier: Apache-2.0
"""The masks of a step, filled for many requests at a time, draft position by draft position.

    row layout, as vLLM's:  request 0: draft 0, draft 1, ..., bonus;  request 1: draft 0, ...

Position p of all requests is one call of xgrammar's BatchGrammarMatcher or llguidance's executor; then their grammars
take draft p, and go back in the end. vLLM fills one row after the other, and more than one at a time only for more than
128 requests without speculation (vllm/v1/structured_output/__init__.py:366, 0.32).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
import torch
import xgrammar as xgr
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar
from vllm.v1.structured_output.utils import strip_speculative_padding

#: Of the machine's threads: the rest is left to the model, which runs at the same time on a GPU, and to the server.
THREAD_SHARE, MOST_THREADS = 4, 8
#: Share of forbidden tokens above which a row of logits is masked as a whole.
DENSE = 0.1


class _Row:
    """A request on its way through its drafts."""

    __slots__ = (
        "advanced",
        "base",
        "certain",
        "failed",
        "grammar",
        "grammar_start",
        "is_padded",
        "rid",
        "start",
        "tokens",
    )

    def __init__(self, rid: str, grammar: Any, base: int, tokens: Sequence[int], bounds: Any, certain: int) -> None:
        self.rid, self.grammar, self.base, self.tokens = rid, grammar, base, tokens
        self.grammar_start, self.start = bounds
        self.certain = certain
        self.advanced = 0
        #: Row that was filled before a draft that the grammar did not take: it serves for those behind it.
        self.failed: int | None = None
        self.is_padded = False


class MaskFiller:
    """Fills masks of all structured requests of a step; gives what vLLM's `grammar_bitmask` gives."""

    def __init__(self, manager: Any, num_threads: int | None = None) -> None:
        """manager: vLLM's StructuredOutputManager, with the backend that allocates masks. num_threads: of both
        engines' pools; None for a share of the machine's."""
        self._manager = manager
        self._is_diffusion = bool(getattr(manager.vllm_config.model_config, "is_diffusion", False))
        threads = num_threads or (os.cpu_count() or 1) // THREAD_SHARE
        self._num_threads = max(1, min(threads, MOST_THREADS))
        self._batch = xgr.BatchGrammarMatcher(max_threads=self._num_threads)
        self._executor: llguidance.LLExecutor | None = None
        self._masks: torch.Tensor | None = None
        self._words: np.ndarray = np.zeros((0, 0), np.int32)

    def fill(
        self,
        requests: Mapping[str, Any],
        request_ids: Sequence[str],
        drafts: Mapping[str, list[int]],
        certain: Mapping[str, int],
    ) -> np.ndarray | None:
        """Masks of these requests in this order, int32 [rows, words]; good until the next call.

        drafts: scheduled drafts by request; -1 pads, and nothing is masked behind it. certain: how many of a
        request's drafts are the only tokens that their masks allow.
        """
        if not request_ids:
            return None
        if self._is_diffusion:
            return self._manager.grammar_bitmask(requests, request_ids, drafts)
        rows: list[_Row] = []
        total = longest = 0
        for rid in request_ids:
            request = requests[rid]
            tokens = drafts.get(rid, ())
            bounds = self._manager._get_constraint_bounds(request, strip_speculative_padding(tokens) if tokens else ())
            num_certain = certain.get(rid, 0) if certain and bounds[1] == 0 else 0
            rows.append(_Row(rid, request.structured_output_request.grammar, total, tokens, bounds, num_certain))
            total += 1 + len(tokens)
            longest = max(longest, len(tokens))
        self._reserve(total)
        active = rows
        for place in range(longest + 1):
            if place:
                active = [row for row in active if len(row.tokens) >= place]
            self._fill_position(active, place)
            if place < longest:
                _advance(active, place)
        for row in rows:
            if row.advanced:
                row.grammar.rollback(row.advanced)
        return self._words[:total]

    def _reserve(self, rows: int) -> None:
        if self._masks is None or len(self._masks) < rows:
            size = max(rows, 64, 0 if self._masks is None else 2 * len(self._masks))
            self._masks = self._manager.backend.allocate_token_bitmask(size)
            self._words = self._masks.numpy()

    def _fill_position(self, rows: Sequence[_Row], place: int) -> None:
        words = self._words
        matchers: list[Any] = []
        places: list[int] = []
        guided: list[tuple[Any, int]] = []
        for row in rows:
            index = row.base + place
            grammar = row.grammar
            if row.failed is not None:
                words[index] = words[row.failed]
            elif row.is_padded or place < row.start or grammar.is_terminated():
                words[index] = -1
            elif place < row.certain and place < len(row.tokens) and row.tokens[place] >= 0:
                token = row.tokens[place]
                words[index] = 0
                # Bit 31 makes the word negative.
                words[index, token >> 5] = np.uint32(1 << (token & 31)).view(np.int32)
            elif _fills_like(grammar, XgrammarGrammar):
                matchers.append(grammar.matcher)
                places.append(index)
            elif self._num_threads > 1 and _fills_like(grammar, GuidanceGrammar):
                guided.append((grammar, index))
            else:
                grammar.fill_bitmask(self._masks, index)
        if len(matchers) == 1:
            matchers[0].fill_next_token_bitmask(words, places[0])
        elif matchers:
            self._batch.batch_fill_next_token_bitmask(matchers, words, places)
        if guided:
            self._fill_guided(guided)

    def _fill_guided(self, guided: Sequence[tuple[Any, int]]) -> None:
        if self._executor is None:
            self._executor = llguidance.LLExecutor(self._num_threads)
        matchers = [(grammar.ll_matcher, index) for grammar, index in guided]
        llguidance.numpy.fill_next_token_bitmask_par(self._executor, matchers, self._words)
        for grammar, _ in guided:
            grammar.check_error()


def _fills_like(grammar: Any, stock: type[StructuredOutputGrammar]) -> bool:
    """Whether a grammar fills its mask as vLLM's class does, so that a batch may do it in its place."""
    return isinstance(grammar, stock) and type(grammar).fill_bitmask is stock.fill_bitmask


def _advance(rows: Sequence[_Row], place: int) -> None:
    """Let the grammars take their drafts at a position."""
    for row in rows:
        if place >= len(row.tokens) or row.failed is not None or row.is_padded:
            continue
        token = row.tokens[place]
        if token == -1:
            row.is_padded = True
        elif place >= row.grammar_start:
            if not row.grammar.is_terminated() and row.grammar.accept_tokens(row.rid, [token]):
                row.advanced += 1
            else:
                row.failed = row.base + place


def apply_mask_on_cpu(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: torch.Tensor) -> None:
    """Set the logits of forbidden tokens to -inf, in the dtype that they have.

    logits: float32, bfloat16 or float16 [rows, vocabulary] on the CPU, changed in place. Source: vLLM's
    `apply_grammar_bitmask` (vllm/v1/structured_output/utils.py), which writes a mask for rows without a grammar too and
    goes through float32; the logits are the same bits.
    """
    drafts = scheduler_output.scheduled_spec_decode_tokens
    starts: dict[str, int] = {}
    offset = 0
    for rid in input_batch.req_ids:
        starts[rid] = offset
        offset += 1 + (len(drafts[rid]) if rid in drafts else 0)
    masks = grammar_output.grammar_bitmask
    targets: list[int] = []
    sources: list[int] = []
    position = 0
    for rid in grammar_output.structured_output_request_ids:
        count = 1 + (len(drafts[rid]) if rid in drafts else 0)
        if rid in starts:
            targets.extend(range(starts[rid], starts[rid] + count))
            sources.extend(range(position, position + count))
        position += count
    if not targets:
        return
    _mask_rows(logits, np.array(targets), masks if len(sources) == len(masks) else masks[sources])


def _mask_rows(logits: torch.Tensor, rows: np.ndarray, masks: np.ndarray) -> None:
    """Mask these rows of logits with as many masks, int32 [rows, words].

    xgrammar's kernel visits forbidden tokens one by one, which is best where they are few; elsewhere a whole row is
    filled at once.
    """
    size = min(logits.shape[1], 32 * masks.shape[1])
    words = np.ascontiguousarray(masks)
    forbidden = 32 * words.shape[1] - np.bitwise_count(words.view(np.uint32)).sum(axis=1, dtype=np.int64)
    is_dense = forbidden > DENSE * size
    dense = np.flatnonzero(is_dense)
    if len(dense):
        bits = np.unpackbits(~words[dense].view(np.uint8), axis=1, bitorder="little")[:, :size]
        places = torch.from_numpy(rows[dense])
        is_whole = len(dense) == logits.shape[0] and bool((rows[dense] == np.arange(len(dense))).all())
        chosen = logits if is_whole else logits[places]
        chosen[:, :size].masked_fill_(torch.from_numpy(bits.view(np.bool_)), float("-inf"))
        if not is_whole:
            logits[places] = chosen
    for place in np.flatnonzero(~is_dense & (forbidden > 0)).tolist():
        row = int(rows[place])
        xgr.apply_token_bitmask_inplace(logits[row : row + 1], torch.from_numpy(words[place : place + 1]))
