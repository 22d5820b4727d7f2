# SPDX-License-Identifier: Apache-2.0
"""Which draft lengths vLLM's CUDA graphs allow, and declaring those that smartspec wants captured.

Read in vLLM 0.32 and never run: the machines that this was written on have no GPU. Where decoding has graphs of its own
(FULL_AND_PIECEWISE, the default, and FULL_DECODE_ONLY), one graph serves one length of all requests:

  V2  `CudaGraphManager._init_candidates` captures 1 + num_speculative_tokens, or one graph for every length in stock's
      table by batch size; draft models whose steps are fused are captured for these lengths too
      (`SpeculatorCudaGraphManager.capture`). So a table is declared where the user gave none, of the lengths that are
      worth having, one per batch size from 1 on: the batch sizes are of no account, since the scheduler overrides the
      choice in every step. What has no graph of its own runs piecewise: vLLM looks for a graph among those of the next
      captured number of tokens only, and that may be another length's. Where all lengths are one less than powers of
      two their numbers of tokens coincide and nothing is missed, the longest included if it is 3, 7 or 15.
  V1  one length, and stock itself turns to piecewise graphs where lengths change
      (`VllmConfig._maybe_override_dynamic_sd_cudagraph_mode`), which take any. Lookups match for some requests only, so
      that their batches hardly ever had the one length anyway.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from vllm_ext import config
from vllm_ext.scheduling.drafters import Drafter

logger = logging.getLogger("vllm.vllm_ext")


class GraphLimits(NamedTuple):
    """What captured graphs ask of draft lengths."""

    #: Lengths that all requests of a step may have in common; None where each may have its own.
    uniform_lengths: tuple[int, ...] | None
    #: Tokens that forward passes are padded to; empty where they are not, or where the uniform lengths settle it.
    sizes: tuple[int, ...]


def has_decode_graphs(vllm_config: Any) -> bool:
    """Whether steps that only decode run as graphs of one length."""
    from vllm.platforms import current_platform

    mode = vllm_config.compilation_config.cudagraph_mode
    return bool(current_platform.is_cuda_alike() and mode and mode.has_full_cudagraphs() and mode.separate_routine())


def declare_lengths(vllm_config: Any, drafter: Drafter, k_max: int) -> None:
    """Have graphs captured that take several draft lengths: before the engine starts, on the finished configuration.

    Changes stock's table on V2, and the graph mode on V1, both as stock does for a table of the user's own. Raises
    config.ConfigError where no graphs take several lengths.
    """
    from vllm.config import CUDAGraphMode

    if not has_decode_graphs(vllm_config) or not drafter.takes_number:
        return
    speculative, compilation = vllm_config.speculative_config, vllm_config.compilation_config
    if vllm_config.use_v2_model_runner:
        if speculative.num_speculative_tokens_per_batch_size is None:
            table = make_table(k_max, vllm_config.scheduler_config.max_num_seqs)
            speculative.num_speculative_tokens_per_batch_size = table
        return
    if drafter.is_ragged:
        return
    if not compilation.cudagraph_mode.has_piecewise_cudagraphs():
        raise config.ConfigError(
            f"smartspec changes draft lengths, and on the V1 model runner cudagraph_mode "
            f"{compilation.cudagraph_mode.name} captures decoding of one length only: set cudagraph_mode in "
            "--compilation-config to PIECEWISE"
        )
    logger.warning(
        "smartspec: cudagraph_mode %s becomes PIECEWISE, as with stock's table of draft lengths: on the V1 model "
        "runner full graphs are captured for one length only",
        compilation.cudagraph_mode.name,
    )
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def make_table(k_max: int, max_num_seqs: int) -> list[tuple[int, int, int]]:
    """A table of stock's form, (first batch size, last batch size, drafts), whose lengths are those to be captured.

    These are k_max, 0, and of 1, 3, 7 ... those up to about half of k_max: each one more is as many graphs more. An
    engine of few requests has few batch sizes: the longest length comes first, then none, then the short ones.
    """
    short = [2**power - 1 for power in range(1, k_max.bit_length() + 1) if 2 * (2**power - 1) <= k_max + 1]
    lengths = [k_max, 0, *(length for length in short if length < k_max)][:max_num_seqs]
    table = [(place, place, length) for place, length in enumerate(lengths, start=1)]
    first, _, length = table[-1]
    return [*table[:-1], (first, max_num_seqs, length)]


def find_limits(vllm_config: Any, drafter: Drafter, k_max: int) -> GraphLimits:
    """The lengths that the engine's graphs allow. uniform_lengths of 0 alone: nothing up to k_max was captured."""
    from vllm.platforms import current_platform

    compilation, speculative = vllm_config.compilation_config, vllm_config.speculative_config
    mode = compilation.cudagraph_mode
    if not current_platform.is_cuda_alike() or not mode:
        return GraphLimits(None, ())
    sizes = _find_sizes(vllm_config)
    if not has_decode_graphs(vllm_config):
        return GraphLimits(None, sizes)
    if drafter.is_ragged:
        return GraphLimits(None, sizes if mode.has_piecewise_cudagraphs() else ())
    captured = {speculative.num_speculative_tokens}
    if vllm_config.use_v2_model_runner and speculative.num_speculative_tokens_per_batch_size:
        captured = _expand_table(vllm_config)
    return GraphLimits(tuple(sorted({0} | {length for length in captured if length <= k_max})), ())


def _find_sizes(vllm_config: Any) -> tuple[int, ...]:
    """Captured numbers of tokens, as the worker will have them."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    sizes = compilation.cudagraph_capture_sizes or ()
    if vllm_config.use_v2_model_runner or compilation.cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return tuple(sizes)
    # `CompilationConfig.adjust_cudagraph_sizes_for_spec_decode`, in V1's worker: multiples of the one decoding length,
    # piecewise graphs included.
    query, most = vllm_config.speculative_config.num_speculative_tokens + 1, max(sizes, default=0)
    multiples = {rounded for size in sizes if (rounded := -(-size // query) * query) <= most}
    return tuple(sorted(multiples)) or ((query,) if query <= most else ())


def _expand_table(vllm_config: Any) -> set[int]:
    """The lengths of stock's table that some batch of this engine has: those that are captured."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    speculative = vllm_config.speculative_config
    lookup = build_dynamic_sd_schedule_lookup(
        speculative.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=vllm_config.scheduler_config.max_num_seqs,
        vllm_num_speculative_tokens=speculative.num_speculative_tokens,
    )
    return set(lookup[1:])
