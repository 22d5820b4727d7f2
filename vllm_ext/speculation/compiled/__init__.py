# SPDX-License-Identifier: Apache-2.0
"""The loops of smartspec over requests and draft positions, compiled: every step of the engine waits for them.

A step asks for all of them once or twice. Each NumPy call of a step takes several times as long between two forward
passes, when the processor's caches hold something else, as in a loop of its own, and there were dozens of them. The
functions are compiled by numba, which vLLM brings.

Imported where a model of acceptance is made, in the scheduler, and with a model runner that drafts from texts: vLLM's
CPU workers fail at their start where numba is there already (scheduling/trie_proposer.py).

    acceptance.py   chances of drafts, what outcomes teach, and lengths by both at once
    choice.py       the best lengths
    ngram.py        drafts from a text's own past
"""

from vllm_ext.speculation.compiled.acceptance import (
    NUM_HISTORIES,
    advance_histories,
    choose_again,
    detect_change,
    drop_least,
    find_chances,
    learn_steps,
    predict_best,
    predict_mean,
    predict_survival,
)
from vllm_ext.speculation.compiled.choice import choose_lengths, choose_padded, value_drafts
from vllm_ext.speculation.compiled.ngram import find_ngrams

__all__ = [
    "NUM_HISTORIES",
    "advance_histories",
    "choose_again",
    "choose_lengths",
    "choose_padded",
    "detect_change",
    "drop_least",
    "find_chances",
    "find_ngrams",
    "learn_steps",
    "predict_best",
    "predict_mean",
    "predict_survival",
    "value_drafts",
]
