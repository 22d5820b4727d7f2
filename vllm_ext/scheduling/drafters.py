# SPDX-License-Identifier: Apache-2.0
"""What vLLM's drafters do with a number of drafts that is smaller than the configured one, by method and runner.

Read in vLLM 0.32 (v1/spec_decode for the V1 model runner, v1/worker/gpu/spec_decode for V2). A test looks for the
assertions by which drafters insist on their number, so that a new one is noticed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

#: Makes no drafts: it writes hidden states through the path of drafts, and asserts their number.
REFUSED_METHOD = "extract_hidden_states"
#: V1 drafters that find or keep texts: no model, and drafts of any number for each request.
LOOKUPS_V1 = ("ngram", "ngram_gpu", "suffix", "custom_class")
#: Of these, the only one that may be asked for fewer: the others assert the full number, or are not told one.
ASKED_LOOKUPS_V1 = ("ngram",)
#: V2's n-gram search on the GPU: always the full number, and the runner drops what was not asked for.
LOOKUPS_V2 = ("ngram", "ngram_gpu")
#: One forward pass makes all drafts.
ONE_PASS = ("dflash", "dspark", "medusa")


class Drafter(NamedTuple):
    """How a drafter answers to the number of drafts that a step asks for."""

    #: Forward passes of its model by the longest draft that is asked for, 0 to num_speculative_tokens.
    passes: tuple[int, ...]
    #: Whether it may be asked for fewer than num_speculative_tokens.
    takes_number: bool
    #: Whether requests of one batch get different numbers of drafts whatever is asked for.
    is_ragged: bool


def describe_drafter(vllm_config: Any) -> Drafter:
    """The drafter of a finished configuration. A method that is not known here is not asked for fewer."""
    speculative = vllm_config.speculative_config
    most, method = speculative.num_speculative_tokens, speculative.method
    # Also where nothing is wanted, a model runs once: its KV cache keeps up with the text.
    growing = tuple(max(1, length) for length in range(most + 1))
    none, one, all_passes = ((count,) * (most + 1) for count in (0, 1, most))
    if vllm_config.use_v2_model_runner:
        if method in LOOKUPS_V2:
            return Drafter(none, takes_number=True, is_ragged=False)
        if method in ONE_PASS:
            return Drafter(one, takes_number=True, is_ragged=False)
        # These two loop over the full number; the runner drops what was not asked for.
        if method == "draft_model" or speculative.use_multi_module_mtp():
            return Drafter(all_passes, takes_number=True, is_ragged=False)
        return Drafter(growing, takes_number=method in ("eagle", "eagle3", "mtp"), is_ragged=False)
    if method in LOOKUPS_V1:
        return Drafter(none, takes_number=method in ASKED_LOOKUPS_V1, is_ragged=True)
    if method == "medusa":
        return Drafter(one, takes_number=False, is_ragged=False)
    if method == "dflash":
        return Drafter(one, takes_number=True, is_ragged=False)
    if speculative.parallel_drafting:
        # Samples at as many positions as configured, and reshapes them by the number asked for: of other rows.
        return Drafter(one, takes_number=False, is_ragged=False)
    if speculative.use_step3p5_mtp():
        # Makes one draft where none is asked for.
        return Drafter(all_passes, takes_number=False, is_ragged=False)
    known = method in ("eagle", "eagle3", "mtp", "draft_model")
    return Drafter(growing if known else all_passes, takes_number=known, is_ragged=False)
