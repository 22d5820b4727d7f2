# SPDX-License-Identifier: Apache-2.0
"""`smartspec.drafter: trie`: drafts from tries in the V1 model runner, in the place of its n-gram drafter.

numba is imported where a TrieProposer is made, in the worker. vLLM's CPU workers look into every module when they start
(vllm/triton_utils/dispatcher.py, 0.32) and fail where numba's llvmlite is among them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_ext import config, observability

if TYPE_CHECKING:
    from vllm_ext.speculation.trie_drafter import TrieCounts, TrieDrafter

logger = logging.getLogger("vllm.vllm_ext")

#: The speculative method that carries the trie: its drafts are lists of tokens, made after the sampler.
CARRIER = "ngram"
#: Tokens of an n-gram that the tries can hold: those that match and those that are drafted behind them.
LONGEST_NGRAM = 64


def check_drafter(vllm_config: Any, settings: config.SmartSpecSettings) -> None:
    """Refuse a trie drafter where it would not run. Raises config.ConfigError naming the value and the fix."""
    if settings.drafter != "trie":
        return
    speculative = vllm_config.speculative_config
    method = speculative.method
    if method != CARRIER:
        raise config.ConfigError(
            f"vllm_ext.smartspec.drafter 'trie' replaces vLLM's n-gram drafter, and --speculative-config has the "
            f"method {method!r}: set its method to {CARRIER!r}, or drop vllm_ext.smartspec.drafter"
        )
    if vllm_config.use_v2_model_runner:
        raise config.ConfigError(
            "vllm_ext.smartspec.drafter 'trie' needs the V1 model runner, and this engine uses V2, whose n-gram drafts "
            "stay on the GPU: set VLLM_USE_V2_MODEL_RUNNER=0 in the environment, or drop vllm_ext.smartspec.drafter"
        )
    if speculative.prompt_lookup_max + speculative.num_speculative_tokens > LONGEST_NGRAM:
        raise config.ConfigError(
            f"vllm_ext.smartspec.drafter 'trie' keeps n-grams of up to {LONGEST_NGRAM} tokens, and prompt_lookup_max="
            f"{speculative.prompt_lookup_max} with num_speculative_tokens={speculative.num_speculative_tokens} needs "
            f"{speculative.prompt_lookup_max + speculative.num_speculative_tokens}: lower one of them"
        )


class TrieProposer:
    """Keeps a TrieDrafter in step with a V1 model runner: who runs, what was sampled, who has left."""

    #: It has to see every step.
    keeps_texts = True

    def __init__(self, vllm_config: Any) -> None:
        from vllm_ext.speculation.trie_drafter import TrieCounts, TrieDrafter

        speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
        self._engine_index = parallel.data_parallel_index
        #: Ranks of a tensor-parallel group hold the same tries: one of them counts.
        self._reports = parallel.rank == 0
        self._reported = TrieCounts()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._drafter = TrieDrafter(
            speculative.num_speculative_tokens,
            min_match=speculative.prompt_lookup_min,
            max_match=speculative.prompt_lookup_max,
            vocab_size=vllm_config.model_config.get_vocab_size(),
        )
        #: Of every request seen: the runner's state, which tells it from another of the same name, and its output. The
        #: state itself is not kept alive, since it may hold images.
        self._states: dict[str, tuple[weakref.ref[Any], list[int]]] = {}
        self._drafter.compile()
        logger.info(
            "smartspec drafts from tries: matches of %d to %d tokens, up to %d drafts",
            speculative.prompt_lookup_min,
            speculative.prompt_lookup_max,
            speculative.num_speculative_tokens,
        )

    @property
    def drafter(self) -> TrieDrafter:
        """The tries, for tests and metrics."""
        return self._drafter

    def propose(
        self,
        input_batch: Any,
        states: Mapping[str, Any],
        sampled_token_ids: Sequence[Sequence[int]],
        draft_lengths: Mapping[str, int] | None,
        most: int,
    ) -> list[list[int]]:
        """Drafts for each row of a batch.

        input_batch: vLLM's InputBatch after bookkeeping, sampled tokens included. states: the runner's requests, those
        preempted included; who is missing has finished or was aborted. sampled_token_ids: rows without a token draft
        nothing. draft_lengths: by request, `most` where it has none.
        """
        self._forget(states)
        count = len(sampled_token_ids)
        ids = input_batch.req_ids[:count]
        for rid in ids:
            if rid not in self._states:
                self._states[rid] = (weakref.ref(states[rid]), states[rid].output_token_ids)
        lengths = input_batch.num_tokens_no_spec[:count].astype(np.int64)
        wanted = np.array(
            [
                (most if draft_lengths is None else draft_lengths.get(rid, most)) if tokens else 0
                for rid, tokens in zip(ids, sampled_token_ids, strict=True)
            ],
            np.int64,
        )
        # Rows that are full are not continued; the others may not go beyond the end either.
        wanted = np.clip(np.minimum(wanted, self._max_model_len - lengths), 0, most)
        drafts = self._drafter.propose(ids, input_batch.token_ids_cpu, lengths, wanted)
        if self._reports:
            self._report(self._drafter.counts)
        return drafts

    def _report(self, counts: TrieCounts) -> None:
        before, self._reported = self._reported, counts
        for name, amount in (
            ("vllm_ext:smartspec_trie_inserted_tokens_total", counts.inserted - before.inserted),
            ("vllm_ext:smartspec_trie_searched_rows_total", counts.searched - before.searched),
            ("vllm_ext:smartspec_trie_matched_rows_total", counts.matched - before.matched),
            ("vllm_ext:smartspec_trie_drafted_tokens_total", counts.drafted - before.drafted),
            ("vllm_ext:smartspec_trie_prunes_total", counts.prunes - before.prunes),
        ):
            if amount:
                observability.add(name, amount, self._engine_index)
        set_gauge, drafter = observability.set_gauge, self._drafter
        set_gauge("vllm_ext:smartspec_trie_stored_tokens", drafter.count_tokens(), self._engine_index)
        set_gauge("vllm_ext:smartspec_trie_node_count", drafter.count_nodes(), self._engine_index)

    def _forget(self, states: Mapping[str, Any]) -> None:
        """Let go of requests that left the runner, and learn from what they put out."""
        gone = [rid for rid, (state, _) in self._states.items() if rid not in states or states[rid] is not state()]
        for rid in gone:
            self._drafter.finish(rid, self._states.pop(rid)[1])
