# SPDX-License-Identifier: Apache-2.0
"""Draft lengths and CUDA graphs: vLLM's own choice of what to capture, asked on a machine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.scheduling.configurations import describe_engine, pretend_cuda
from vllm_ext.scheduling.drafters import describe_drafter
from vllm_ext.scheduling.graphs import _find_sizes, declare_lengths, make_table

SIZES = [1, 2, 4, *range(8, 513, 8)]


@given(st.integers(1, 40), st.integers(1, 600))
def test_tables_that_vllm_takes(k: int, num_seqs: int) -> None:
    table = make_table(k, num_seqs)
    lengths = set(build_dynamic_sd_schedule_lookup(table, num_seqs, k)[1:])
    assert lengths == {length for *_, length in table}
    assert k in lengths
    assert 0 in lengths or num_seqs == 1
    assert len(table) <= 2 + k.bit_length()


def make_manager(k: int, num_seqs: int, table: Any) -> CudaGraphManager:
    """V2's manager of the graphs of a target model, as if all had been captured: what it takes no GPU to know."""
    manager = CudaGraphManager.__new__(CudaGraphManager)
    speculative = SimpleNamespace(
        num_speculative_tokens_per_batch_size=table, uses_dynamic_speculative_decoding=lambda: table is not None
    )
    cache = SimpleNamespace(use_kda_recoverssm=False)
    manager.vllm_config = SimpleNamespace(  # type: ignore[assignment]
        speculative_config=speculative, num_speculative_tokens=k, cache_config=cache
    )
    manager.compilation_config = SimpleNamespace(  # type: ignore[assignment]
        cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
    )
    manager.cudagraph_mode, manager.varlen_decode, manager.ubatch_runner = CUDAGraphMode.FULL_AND_PIECEWISE, False, None
    manager.decode_query_len, manager.max_num_reqs = k + 1, num_seqs
    manager.lora_capture_cases, manager._lora_dispatch_map, manager._max_lora_case = [0], {}, 0
    manager._candidates, manager._capture_descs, manager._graphs_captured = {}, {}, True
    manager._init_candidates()
    return manager


def count_full(manager: CudaGraphManager, length: int) -> float:
    """Share of batch sizes at which this draft length runs as one graph, where its tokens are few enough for graphs."""
    query = length + 1
    sizes = [size for size in range(1, manager.max_num_reqs + 1) if size * query <= SIZES[-1]]
    modes = [manager.dispatch(size, size * query, query, 0, query).cg_mode for size in sizes]
    return sum(mode == CUDAGraphMode.FULL for mode in modes) / len(sizes)


@pytest.mark.parametrize("num_seqs", [16, 64, 256])
@pytest.mark.parametrize("k", [1, 3, 7, 15])
def test_declared_lengths_have_graphs_at_every_batch_size(k: int, num_seqs: int) -> None:
    without, declared = make_manager(k, num_seqs, None), make_manager(k, num_seqs, make_table(k, num_seqs))
    for *_, length in make_table(k, num_seqs):
        assert count_full(without, length) == (length == k)
        assert count_full(declared, length) == 1


@pytest.mark.parametrize("k", [2, 4, 5, 6, 8, 12])
def test_other_longest_lengths_leave_holes(k: int) -> None:
    """vLLM looks for a graph among those of the next captured number of tokens: it may be another length's."""
    without, declared = make_manager(k, 64, None), make_manager(k, 64, make_table(k, 64))
    shares = {length: count_full(declared, length) for *_, length in make_table(k, 64)}
    assert 0.4 < min(shares.values()) < 1
    assert all(share > count_full(without, length) for length, share in shares.items() if length < k)


@given(st.sets(st.integers(1, 600), min_size=1, max_size=40), st.integers(1, 12))
def test_sizes_are_those_of_v1s_worker(sizes: set[int], k: int) -> None:
    compilation = CompilationConfig(cudagraph_capture_sizes=sorted(sizes), max_cudagraph_capture_size=max(sizes))
    engine = describe_engine(k=k, mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    engine.compilation_config.cudagraph_capture_sizes = sorted(sizes)
    found = list(_find_sizes(engine))
    try:
        compilation.adjust_cudagraph_sizes_for_spec_decode(k + 1)
    except ValueError:
        # vLLM refuses the engine.
        assert found == []
        return
    assert found == compilation.cudagraph_capture_sizes
    # In the worker's own process they were adjusted already.
    engine.compilation_config.cudagraph_capture_sizes = found
    assert list(_find_sizes(engine)) == found
    engine.use_v2_model_runner = True
    engine.compilation_config.cudagraph_capture_sizes = sorted(sizes)
    assert list(_find_sizes(engine)) == sorted(sizes)


def test_where_lengths_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    split, decode = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY

    def declare(*arguments: Any, **keywords: Any) -> tuple[Any, CUDAGraphMode]:
        engine = describe_engine(*arguments, **keywords)
        declare_lengths(engine, describe_drafter(engine), 6)
        table = engine.speculative_config.num_speculative_tokens_per_batch_size
        return table, engine.compilation_config.cudagraph_mode

    assert declare("eagle", uses_v2=True, mode=split) == (None, split)
    pretend_cuda(monkeypatch)
    table = [(1, 1, 6), (2, 2, 0), (3, 3, 1), (4, 64, 3)]
    for mode in (split, decode):
        assert declare("eagle", uses_v2=True, mode=mode) == (table, mode)
        assert declare("ngram", uses_v2=True, mode=mode) == (table, mode)
    assert declare("eagle", uses_v2=True, mode=split, table=[(1, 9, 2)]) == ([(1, 9, 2)], split)
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
        assert declare("eagle", uses_v2=True, mode=mode) == (None, mode)
        assert declare("eagle", mode=mode) == (None, mode)
    assert declare("eagle", mode=split) == (None, CUDAGraphMode.PIECEWISE)
    # Batches of lookups have all lengths anyway, and what makes a fixed number of drafts needs no other graph.
    for method in ("ngram", "suffix", "medusa"):
        assert declare(method, mode=split) == (None, split)
