# SPDX-License-Identifier: Apache-2.0
"""Attention over quantized pages: equal to plain softmax on what the cache holds, however prompts are cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kv_decode.paged import Case, Outcome, attend_plainly, make_case, run
from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_decode.reference import attend_part, is_full_precision, merge_parts
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells
from vllm_ext.kernels.tolerances import relative_error

FP16 = torch.float16
HEAD_DIM, BLOCK_SIZE = 16, 16
LAYOUTS: dict[str, CellLayout] = {
    name: plan_cells(key, value, HEAD_DIM, BLOCK_SIZE)
    for name, (key, value) in {
        "k2v2": (Codec(2, 16), Codec(2, 8)),
        "k2v15": (Codec(2, 8), Codec(1.5, 16)),
        "k4v4 fp16": (Codec(4, 16, scale_dtype=FP16), Codec(4, 16, scale_dtype=FP16)),
        "k3v3 outliers": (Codec(3, 16, outliers=2), Codec(3, 16, outliers=2)),
        "k8v8": (Codec(8, 16, scale_dtype=FP16), Codec(8, 16, scale_dtype=FP16)),
        "channels": (Codec(2, 8, per_channel=True), Codec(2, 8)),
        "channels k15": (Codec(1.5, 8, per_channel=True), Codec(4, 16)),
    }.items()
}
#: The order of float32 sums is all that differs.
SAME = 1e-5


def make_tensors(layout: CellLayout, seed: int, heads: int = 2) -> dict[str, CodecTensors]:
    generator = torch.Generator().manual_seed(seed)

    def draw(codec: Codec) -> CodecTensors:
        groups = HEAD_DIM if codec.per_channel else HEAD_DIM // codec.group_size
        levels = torch.arange(codec.num_levels).float()
        return CodecTensors(
            order=torch.rand(heads, HEAD_DIM, generator=generator).argsort(-1),
            smooth=torch.rand(heads, HEAD_DIM, generator=generator) + 0.5,
            shift=torch.randn(heads, HEAD_DIM, generator=generator),
            clip=torch.rand(heads, groups, generator=generator) * 0.3 + 0.7,
            levels=levels + 0.2 * torch.sin(levels),
        )

    return {"key_tensors": draw(layout.key), "value_tensors": draw(layout.value)}


def make_rotation(positions: int, rotary: int) -> torch.Tensor:
    angle = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(rotary // 2) / (rotary // 2))
    return torch.cat([angle.cos(), angle.sin()], -1)


def one_step(case: Case) -> Outcome:
    return run(case, [[len(keys)] for keys in case.keys])


def cut(length: int, data: st.DataObject) -> list[int]:
    """Lengths of steps that make up a request."""
    points = data.draw(st.lists(st.integers(1, length - 1), unique=True, max_size=4)) if length > 1 else []
    ends = [0, *sorted(points), length]
    return [end - start for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_attention_is_softmax_over_what_the_cache_holds(name: str, calibrated: bool) -> None:
    layout = LAYOUTS[name]
    tensors = make_tensors(layout, 3) if calibrated else {}
    case = make_case(layout, [37, 1, 20], window=6, sinks=3, **tensors)
    outcome = one_step(case)
    for request in range(3):
        assert relative_error(outcome.outputs[request], attend_plainly(case, outcome, request)) < SAME


@pytest.mark.parametrize("name", ["k3v3 outliers", "channels"])
def test_keys_before_rope_are_rotated_when_read(name: str) -> None:
    layout = LAYOUTS[name]
    case = make_case(layout, [37, 20], window=6, sinks=1, cos_sin=make_rotation(37, 8), **make_tensors(layout, 1))
    outcome = one_step(case)
    for request in range(2):
        assert relative_error(outcome.outputs[request], attend_plainly(case, outcome, request)) < SAME


@settings(max_examples=40)
@given(st.data())
def test_a_prompt_may_be_cut_anywhere(data: st.DataObject) -> None:
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    case = make_case(
        layout,
        lengths,
        seed=data.draw(st.integers(0, 99)),
        window=data.draw(st.sampled_from([0, 1, 5, 16, 50])),
        sinks=data.draw(st.sampled_from([0, 1, 5])),
        **data.draw(st.sampled_from([{}, make_tensors(layout, 7)])),
    )
    whole, parts = one_step(case), run(case, [cut(length, data) for length in lengths])
    assert torch.equal(whole.cache, parts.cache)
    for expected, actual in zip(whole.outputs, parts.outputs, strict=True):
        assert relative_error(actual, expected) < SAME


def test_token_by_token_equals_one_prefill() -> None:
    for layout in (LAYOUTS["k2v15"], LAYOUTS["channels"]):
        case = make_case(layout, [30], window=4, sinks=2)
        assert relative_error(run(case, [[1] * 30]).outputs[0], one_step(case).outputs[0]) < SAME


def test_everything_in_the_window_is_full_precision() -> None:
    case = make_case(LAYOUTS["k2v2"], [25], window=25)
    exact = attend_plainly(case, one_step(case), 0)
    assert relative_error(one_step(case).outputs[0], exact) < SAME
    only_quantized = one_step(case._replace(window=0)).outputs[0]
    assert relative_error(only_quantized, exact) > 0.1
    # A query that sees itself alone reads exactly what the rule says: nothing in full precision.
    assert float((only_quantized[0] - exact[0]).abs().max()) > 1e-3


def test_eight_bits_are_close_to_full_precision() -> None:
    case = make_case(LAYOUTS["k8v8"], [40])
    exact = attend_plainly(case._replace(window=40), one_step(case), 0)
    assert relative_error(one_step(case).outputs[0], exact) < 1e-2


def test_a_page_that_is_gone_is_read_quantized() -> None:
    case = make_case(LAYOUTS["k2v2"], [12], window=8, sinks=2)
    outcome = one_step(case)
    starts, lens = torch.tensor([0, 1]), torch.tensor([12])
    arguments = [side[0][-1:] for side in (case.queries, case.keys, case.values)]
    recent, empty = torch.full((2, 2, 4, 2 * HEAD_DIM), torch.nan), torch.zeros(1, 3, dtype=torch.int32)
    out = attend(
        *arguments, outcome.cache, outcome.block_table, starts, lens, recent, empty, case.layout, CodecTensors(),
        CodecTensors(), HEAD_DIM**-0.5, 8, 2,
    )  # fmt: skip
    expected = attend_plainly(case._replace(window=1, sinks=0), outcome, 0)[-1:]
    assert relative_error(out, expected) < SAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_that_left_the_window_may_hold_anything(dtype: torch.dtype) -> None:
    case = make_case(LAYOUTS["k2v2"], [40, 23], window=8, sinks=2)
    sides = {name: [x.to(dtype) for x in getattr(case, name)] for name in ("queries", "keys", "values")}
    chunks = [[17, 1, 22], [9, 9, 5]]
    clean, stale = (run(case._replace(**sides), chunks, is_stale=is_stale) for is_stale in (False, True))
    for expected, out in zip(clean.outputs, stale.outputs, strict=True):
        assert torch.equal(out, expected)


def test_a_key_that_nothing_holds_is_an_error() -> None:
    case = make_case(LAYOUTS["channels"], [12], window=8)
    outcome = one_step(case)
    step = [side[0][-1:] for side in (case.queries, case.keys, case.values)]
    with pytest.raises(ValueError, match="keep 7 tokens beyond the window"):
        attend(
            *step, outcome.cache, outcome.block_table, torch.tensor([0, 1]), torch.tensor([12]),
            torch.zeros(1, 2, 4, 2 * HEAD_DIM), torch.zeros(1, 3, dtype=torch.int32), case.layout, CodecTensors(),
            CodecTensors(), 1.0, 8, 0,
        )  # fmt: skip


@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 6), st.sampled_from([1, 4, 32]))
def test_the_rule_reads_whole_groups_and_never_an_incomplete_one(
    query: int, window: int, sinks: int, group_tokens: int
) -> None:
    keys = torch.arange(query + 1)
    full = is_full_precision(torch.tensor([query]), keys, window, sinks, group_tokens)[0]
    assert bool(full[keys > query - window].all())
    assert bool(full[:sinks].all())
    coded = (~full).nonzero().flatten()
    if coded.numel():
        end = int(coded.max()) + 1
        assert end % group_tokens == 0
        assert end <= query + 1
        assert bool((~full[sinks:end]).all())


@given(st.integers(0, 2**16), st.integers(0, 12))
def test_parts_merge_into_the_whole(seed: int, split: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 3, 2, 2, 8, generator=generator) * 3
    key, value = torch.randn(2, 1, 12, 2, 8, generator=generator).unbind(0)
    whole = torch.ones(1, 3, 12, dtype=torch.bool)
    first = whole.clone()
    first[..., split:] = False
    expected, _ = attend_part(query, key, value, whole, 0.5)
    merged = merge_parts(
        attend_part(query, key, value, first, 0.5), attend_part(query, key, value, whole & ~first, 0.5)
    )
    assert torch.allclose(merged, expected, atol=1e-5)


def test_bad_arguments_are_refused_by_name() -> None:
    case = make_case(LAYOUTS["k2v2"], [5])
    with pytest.raises(ValueError, match=r"cache must be uint8 \[blocks, kv heads, 16, 14\]"):
        attend(
            case.queries[0], case.keys[0], case.values[0], torch.zeros(1, 2, 16, 13, dtype=torch.uint8),
            torch.zeros(1, 1), torch.tensor([0, 5]), torch.tensor([5]), torch.zeros(1, 2, 4, 32), torch.zeros(1, 1),
            case.layout, CodecTensors(), CodecTensors(), 1.0, 0, 0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="does not fit 2 kv heads of head_dim=16"):
        one_step(case._replace(queries=[torch.zeros(5, 3, HEAD_DIM)]))
    with pytest.raises(ValueError, match=r"value must be float \[tokens, 2, 16\]"):
        one_step(case._replace(values=[torch.zeros(5, 2, 8)]))
