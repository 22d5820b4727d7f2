# SPDX-License-Identifier: Apache-2.0
"""Compiled attention over packed pages against exact attention on what the pages hold, on every instruction set."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.kv_decode.paged import Case, attend_plainly, make_case, run
from tests.kernels.native.conftest import isa, ops  # noqa: F401  (fixtures)
from tests.kernels.native.sanitizers import run_sanitized
from vllm_ext.kernels.kv_decode import attend, cpu, reference
from vllm_ext.kernels.kv_store import cpu as store_cpu
from vllm_ext.kernels.kv_store import store_key_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells, view_section
from vllm_ext.kernels.native import recipe
from vllm_ext.kernels.tolerances import relative_error

PLAIN = CodecTensors()
FP16 = torch.float16

LAYOUTS: dict[str, CellLayout] = {
    "skvq_k2v2": plan_cells(Codec(2, 128), Codec(2, 128), 128, 128),
    "skvq_k2v2 64": plan_cells(Codec(2, 64), Codec(2, 64), 64, 16),
    "skvq_k2v15": plan_cells(Codec(2, 128), Codec(1.5, 128), 128, 128),
    "skvq_k2v15 64": plan_cells(Codec(2, 64), Codec(1.5, 64), 64, 48),
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 128, 64),
    "kivi_k4v4 64": plan_cells(Codec(4, 32, per_channel=True), Codec(4, 32), 64, 128),
    "kv4": plan_cells(Codec(4, 128, scale_dtype=FP16), Codec(4, 128, scale_dtype=FP16), 128, 32),
    "k8v8 80": plan_cells(Codec(8, 80, scale_dtype=FP16), Codec(8, 40, scale_dtype=FP16), 80, 16),
    "k15v15 groups": plan_cells(Codec(1.5, 20), Codec(1.5, 20), 80, 16),
    "k3v3": plan_cells(Codec(3, 128), Codec(3, 32), 128, 128),
    "k3v2 80": plan_cells(Codec(3, 16), Codec(2, 80), 80, 48),
    "k3v3 channels": plan_cells(Codec(3, 32, per_channel=True), Codec(3, 16), 16, 32),
    "small": plan_cells(Codec(2, 8), Codec(2, 16), 16, 16),
}

#: Relative error against exact attention in float64 on the same cells. Query and weights are rounded to 16 bits of a
#: group's largest; the fp16 output, to 11 bits, is the rest.
LIMIT = 1e-3
#: A bf16 output is rounded to 8 bits: 2**-9 at most, and 0.0017 of a result in the mean.
BF16_LIMIT = 3e-3


def make_tensors(layout: CellLayout, heads: int, seed: int) -> dict[str, CodecTensors]:
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, layout.head_dim)

    def draw() -> CodecTensors:
        return CodecTensors(
            order=torch.rand(shape, generator=generator).argsort(-1),
            smooth=torch.rand(shape, generator=generator) + 0.5,
            shift=torch.randn(shape, generator=generator),
        )

    return {"key_tensors": draw(), "value_tensors": draw()}


def make_half_case(layout: CellLayout, lengths: list[int], **options: Any) -> Case:
    case = make_case(layout, lengths, **options)
    sides = {name: [x.half() for x in getattr(case, name)] for name in ("queries", "keys", "values")}
    return case._replace(**sides)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_layout(isa: str, name: str, calibrated: bool) -> None:  # noqa: F811
    layout = LAYOUTS[name]
    assert store_cpu.knows(layout)
    tensors = make_tensors(layout, 2, 3) if calibrated else {}
    # Prefill in two steps, then decoding; one request is shorter than a tile, one only a token.
    case = make_half_case(layout, [171, 1, 40], window=20, sinks=5, **tensors)
    outcome = run(case, [[100, 69, 1, 1], [1], [39, 1]])
    for request in range(3):
        error = relative_error(outcome.outputs[request], attend_plainly(case, outcome, request))
        assert error <= LIMIT, request


@pytest.mark.parametrize("groups", [1, 3, 8, 33])
def test_heads_that_share_keys(isa: str, groups: int) -> None:  # noqa: F811
    case = make_half_case(LAYOUTS["skvq_k2v2 64"], [150, 9], kv_heads=3, groups=groups, window=5, sinks=1)
    outcome = run(case, [[148, 1, 1], [9]])
    for request in range(2):
        error = relative_error(outcome.outputs[request], attend_plainly(case, outcome, request))
        assert error <= LIMIT


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_steps_windows_and_sinks_of_any_length(ops: Any, data: st.DataObject) -> None:  # noqa: F811
    layout = LAYOUTS[data.draw(st.sampled_from(["small", "kivi_k4v4 64", "skvq_k2v15 64"]))]
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    case = make_half_case(
        layout,
        lengths,
        groups=data.draw(st.sampled_from([1, 4])),
        seed=data.draw(st.integers(0, 99)),
        window=data.draw(st.sampled_from([0, 1, 16, 50, 300])),
        sinks=data.draw(st.sampled_from([0, 1, 5, 140])),
    )
    cuts = [sorted([*data.draw(st.lists(st.integers(1, n), max_size=3, unique=True)), 0, n]) for n in lengths]
    chunks = [[end - start for start, end in itertools.pairwise(cut) if end > start] for cut in cuts]
    outcome = run(case, chunks)
    for request in range(len(lengths)):
        assert relative_error(outcome.outputs[request], attend_plainly(case, outcome, request)) <= LIMIT


class Step(NamedTuple):
    """One step over a filled cache: the arguments of `attend`, in its order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    recent: torch.Tensor
    recent_table: torch.Tensor
    layout: CellLayout
    key_tensors: CodecTensors
    value_tensors: CodecTensors
    scale: float
    window: int
    sinks: int


def make_step(
    layout: CellLayout,
    contexts: list[int],
    queries: int = 1,
    kv_heads: int = 2,
    groups: int = 4,
    window: int = 0,
    sinks: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """Decoding after contexts of these lengths; keys with a few large channels, and queries that look at some keys."""
    generator = torch.Generator().manual_seed(sum(contexts))
    D, size, requests = layout.head_dim, layout.block_size, len(contexts)
    width = max(contexts) // size + 1
    table = torch.randperm(requests * width, generator=generator).view(requests, width).int()
    # Planes of two layers side by side: strides of a block-outermost cache.
    whole = torch.full((requests * width, 2, kv_heads, size, layout.cell_bytes), 0xFF, dtype=torch.uint8)
    cache = whole[:, 1]
    pages = -(-max(contexts) // 16)
    recent = torch.full((1 + requests * pages, kv_heads, 16, 2 * D), torch.nan, dtype=dtype)
    recent_table = torch.zeros(requests, pages, dtype=torch.int32)
    spread = torch.ones(D).masked_fill(torch.rand(D, generator=generator) < 0.05, 6.0)
    query, keys, values = [], [], []
    for request, context in enumerate(contexts):
        key = (torch.randn(context, kv_heads, D, generator=generator) * spread).to(dtype)
        value = torch.randn(context, kv_heads, D, generator=generator).to(dtype)
        position = torch.arange(context)
        slots = table[request, position // size] * size + position % size
        store_kv(key, value, cache, slots, layout, PLAIN, PLAIN)
        if layout.key.per_channel:
            count = context // layout.key.group_size
            whole_groups = key[: count * layout.key.group_size].unflatten(0, (count, -1))
            first = slots[: count * layout.key.group_size : layout.key.group_size]
            store_key_groups(whole_groups, cache, first, layout, PLAIN, (1.0,))
        for page in range(-(-context // 16)):
            if page * 16 < sinks or (page + 1) * 16 > context - queries - window - 31:
                recent_table[request, page] = 1 + request * pages + page
                rows = torch.cat([key, value], -1)[page * 16 : page * 16 + 16].transpose(0, 1)
                recent[1 + request * pages + page, :, : rows.shape[1]] = rows
        query.append(torch.randn(queries, kv_heads * groups, D, generator=generator).to(dtype))
        keys.append(key[-queries:])
        values.append(value[-queries:])
    starts = torch.arange(requests + 1, dtype=torch.int32) * queries
    return Step(
        torch.cat(query), torch.cat(keys), torch.cat(values), cache, table, starts,
        torch.tensor(contexts, dtype=torch.int32), recent, recent_table, layout, PLAIN, PLAIN, D**-0.5, window, sinks,
    )  # fmt: skip


def run_reference(step: Step) -> torch.Tensor:
    return reference.attend(*step._replace(query=step.query.float()), cos_sin=None)


@pytest.mark.parametrize("name", ["skvq_k2v2", "skvq_k2v15", "kivi_k2v2", "kv4"])
def test_long_contexts_are_split_and_merged(isa: str, name: str) -> None:  # noqa: F811
    for window, sinks, queries in ((0, 0, 1), (128, 5, 1), (64, 3, 4)):
        step = make_step(LAYOUTS[name], [3000, 129], queries, window=window, sinks=sinks)
        actual, expected = attend(*step), run_reference(step)
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) <= BF16_LIMIT, (window, queries)


def test_presets_left_to_the_reference_run_all_the_same() -> None:
    outliers = plan_cells(Codec(3, 32, outliers=2), Codec(2, 32), 32, 16)
    for layout in (outliers, plan_cells(Codec(2, 24), Codec(2, 24), 24, 16)):
        step = make_step(layout, [50], window=4)
        assert torch.equal(attend(*step), reference.attend(*step, cos_sin=None))
    step = make_step(LAYOUTS["small"], [50], dtype=torch.float32)
    assert torch.equal(attend(*step), run_reference(step))


def test_two_threads_at_once_and_again(isa: str) -> None:  # noqa: F811
    steps = [make_step(LAYOUTS["skvq_k2v2 64"], [context, 40], window=8) for context in (700, 1300)]
    expected = [attend(*step) for step in steps]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for actual, once in zip(pool.map(lambda step: attend(*step), steps), expected, strict=True):
                assert torch.equal(actual, once)


def test_padding_empty_steps_and_any_integer_type(isa: str) -> None:  # noqa: F811
    step = make_step(LAYOUTS["skvq_k2v2"], [200, 30], window=16, sinks=2)
    expected = attend(*step)
    # A row that belongs to no request, and a request without queries, whose table may hold anything.
    pad = [torch.cat([x, x[:1]]) for x in step[:3]]
    padded = step._replace(
        query=pad[0],
        key=pad[1],
        value=pad[2],
        query_start_loc=torch.tensor([0, 1, 2, 2]),
        seq_lens=torch.tensor([200, 30, 0]),
        block_table=torch.cat([step.block_table.long(), torch.full_like(step.block_table[:1].long(), -7)]),
        recent_table=torch.cat([step.recent_table, step.recent_table[:1]]).long(),
    )
    actual = attend(*padded)
    assert torch.equal(actual[:2], expected)
    assert not bool(actual[2:].any())
    empty = step._replace(query=pad[0][:0], key=pad[1][:0], value=pad[2][:0], query_start_loc=torch.zeros(3).int())
    assert attend(*empty).shape == (0, 8, 128)
    nobody = empty._replace(query_start_loc=torch.zeros(1).int(), seq_lens=torch.zeros(0).int())
    assert attend(*nobody).shape == (0, 8, 128)


def test_slices_of_a_fused_projection_are_read_as_they_lie(isa: str) -> None:  # noqa: F811
    step = make_step(LAYOUTS["skvq_k2v2 64"], [100], queries=3, window=16)
    fused = torch.cat([step.query, step.key, step.value], 1)
    query, key, value = fused.split([8, 2, 2], 1)
    assert not key.is_contiguous()
    assert torch.equal(attend(*step._replace(query=query, key=key, value=value)), attend(*step))


def test_damage_stays_visible_where_it_is(isa: str) -> None:  # noqa: F811
    step = make_step(LAYOUTS["skvq_k2v2"], [300, 300], window=16)
    expected = attend(*step)
    section = step.layout.value_sections.scales
    view_section(step.cache, section)[step.block_table[1, 0], 1, 7] = 0x7F
    actual = attend(*step)
    assert bool(actual[1, 4:].isnan().all())
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1, :4], expected[1, :4])
    # In the window, the cell is not read.
    near = make_step(LAYOUTS["skvq_k2v2"], [300], window=16)
    view_section(near.cache, near.layout.key_sections.scales)[near.block_table[0, 2], :, 40] = 0x7F
    assert not bool(attend(*near).isnan().any())


def test_a_page_that_is_gone_is_read_quantized(isa: str) -> None:  # noqa: F811
    step = make_step(LAYOUTS["kv4"], [200], window=32, sinks=4)
    gone = step._replace(recent_table=torch.zeros_like(step.recent_table))
    assert relative_error(attend(*gone), run_reference(gone)) <= BF16_LIMIT
    assert relative_error(attend(*gone), attend(*step)) > 1e-3


def test_what_does_not_fit_is_refused_by_name(isa: str) -> None:  # noqa: F811
    step = make_step(LAYOUTS["kivi_k2v2"], [100], window=8)
    with pytest.raises(ValueError, match="keep 31 tokens beyond the window"):
        attend(*step._replace(recent_table=torch.zeros_like(step.recent_table)))
    with pytest.raises(ValueError, match="block_table holds 99 for request 0, but there are 2 blocks"):
        attend(*step._replace(block_table=torch.full_like(step.block_table, 99)))
    with pytest.raises(ValueError, match="request 0 has 300 tokens, but block_table has 2 blocks of 64"):
        attend(*step._replace(seq_lens=torch.tensor([300])))
    with pytest.raises(ValueError, match="recent_table holds 50"):
        attend(*step._replace(recent_table=torch.full_like(step.recent_table, 50)))
    with pytest.raises(ValueError, match="does not fit 2 kv heads of head_dim=128"):
        attend(*step._replace(query=step.query[:, :7]))
    with pytest.raises(ValueError, match="query_start_loc has request 0 at 0 to 5 of 1 tokens"):
        attend(*step._replace(query_start_loc=torch.tensor([0, 5])))


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_kernels_are_what_runs(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    step = make_step(LAYOUTS[name], [64])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "attend", fail)
    assert cpu.reference is reference
    assert attend(*step).isfinite().all()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_attention_under_the_sanitizers(tmp_path: Path) -> None:
    """The torch-free headers in a program of their own, on buffers of exactly the size that they may touch."""
    run_sanitized(recipe.NATIVE.parent / "kv_decode" / "standalone_test.cpp", tmp_path)
