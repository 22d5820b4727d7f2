# SPDX-License-Identifier: Apache-2.0
"""Drafts from a text's own past: what followed the longest n-gram that it ends with."""

from __future__ import annotations

import numpy as np

from vllm_ext.speculation.compiled.jit import compile_loop


@compile_loop
def find_ngrams(
    texts: np.ndarray,
    lengths: np.ndarray,
    wanted: np.ndarray,
    min_match: int,
    max_match: int,
    most_tokens: int,
    drafts: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Drafts of each row, at most `wanted` of them.

    texts: int32 [rows, tokens], of which row i has `lengths[i]`. wanted: int64 [n]. The n-gram has min_match to
    max_match tokens and may overlap its end; of several of the same length the first counts. most_tokens: of a text
    with its drafts. Written are drafts, int32 [rows, longest draft], and counts, int32 [rows], how many there are of
    the first n.

    Source: prompt lookup as vLLM's NgramProposer has it (v1/spec_decode/ngram_proposer.py), whose drafts these are;
    Knuth, Morris and Pratt 1977, on the text read backwards. Ours have a number of drafts for each row.
    """
    # Of the text read backwards: how long a beginning of it, shorter than that many tokens plus one, ends there.
    borders = np.zeros(max_match, np.int64)
    for row in range(len(wanted)):
        counts[row] = 0
        last = lengths[row] - 1
        most = min(wanted[row], most_tokens - lengths[row])
        if most <= 0:
            continue
        text = texts[row]
        matched, longest, place = 0, 0, 0
        for back in range(1, lengths[row]):
            token = text[last - back]
            while matched > 0 and text[last - matched] != token:
                matched = borders[matched - 1]
            if text[last - matched] == token:
                matched += 1
            if back < max_match:
                borders[back] = matched
            # The one farthest back among equals.
            if matched > 0 and matched >= longest:
                longest, place = matched, back
            if matched == max_match:
                matched = borders[max_match - 1]
        if longest < max(min_match, 1):
            continue
        begin = last - place + longest
        most = min(most, lengths[row] - begin)
        for column in range(most):
            drafts[row, column] = text[begin + column]
        counts[row] = most
