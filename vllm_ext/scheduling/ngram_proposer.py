# SPDX-License-Identifier: Apache-2.0
"""vLLM's n-gram drafts with a length for each request, in the V1 model runner.

The same drafts as vLLM's NgramProposer finds. That one reads a Python list through numba's reflection, sets the number
of threads and back, starts a parallel region of one, and looks for every row in that list. Here it is one compiled call
(docs/smartspec.md says how long both take).

numba is imported where a NgramProposer is made, as with trie_proposer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class NgramProposer:
    """Drafts that continue the longest n-gram that a request's text ends with, as its text did before."""

    keeps_texts = False

    def __init__(self, vllm_config: Any) -> None:
        """Compiles what has to be, so that no request waits for it."""
        from vllm_ext.speculation.goodput import load_compiled

        speculative = vllm_config.speculative_config
        rows, self._most = vllm_config.scheduler_config.max_num_seqs, speculative.num_speculative_tokens
        self._limits = (
            speculative.prompt_lookup_min,
            speculative.prompt_lookup_max,
            vllm_config.model_config.max_model_len,
        )
        self._drafts, self._counts = np.zeros((rows, self._most), np.int32), np.zeros(rows, np.int32)
        self._find = load_compiled().find_ngrams
        self._search(np.zeros((1, 8), np.int32), np.ones(1, np.int32), np.ones(1, np.int64))

    def propose(
        self,
        input_batch: Any,
        states: Mapping[str, Any],
        sampled_token_ids: Sequence[Sequence[int]],
        draft_lengths: Mapping[str, int],
        most: int,
    ) -> list[list[int]]:
        """Drafts for each row of a batch.

        input_batch: vLLM's InputBatch after bookkeeping, sampled tokens included. states: not looked at, as nothing is
        kept between steps. sampled_token_ids: rows without a token draft nothing. draft_lengths: by request, `most`
        where it has none.
        """
        most = min(most, self._most)
        ids = input_batch.req_ids
        wanted = [
            min(draft_lengths.get(rid, most), most) if tokens else 0
            for rid, tokens in zip(ids, sampled_token_ids, strict=False)
        ]
        if not any(wanted):
            return [[] for _ in wanted]
        self._search(input_batch.token_ids_cpu, input_batch.num_tokens_no_spec, np.array(wanted, np.int64))
        counts = self._counts[: len(wanted)].tolist()
        return [self._drafts[row, :count].tolist() if count else [] for row, count in enumerate(counts)]

    def _search(self, texts: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> None:
        self._find(texts, lengths, wanted, *self._limits, self._drafts, self._counts)
