# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities and numbers near the greatest float in a prefill step: no query before them may notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.native.conftest import isa, ops  # noqa: F401  (fixtures)
from vllm_ext.kernels.kv_decode import attend
from vllm_ext.kernels.kv_store import store_completed_groups, store_kv
from vllm_ext.kernels.kv_store.codec import CodecTensors
from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, plan_cells

PLAIN = CodecTensors()
TOKENS, DAMAGED = 200, 100
LAYOUTS = {
    "skvq_k2v2": plan_cells(Codec(2, 128), Codec(2, 128), 128, 128),
    "groups of 32": plan_cells(Codec(2, 32), Codec(2, 32), 128, 128),
    "kivi_k2v2": plan_cells(Codec(2, 32, per_channel=True), Codec(2, 32), 128, 128),
}


def prefill(layout: CellLayout, window: int, dtype: torch.dtype, bad: float | None = None, side: str = "") -> Any:
    """Outputs of one prefill step, [TOKENS, heads, D]; `side` of token DAMAGED is `bad`."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(TOKENS, heads, 128, generator=generator).to(dtype) for heads in (8, 2, 2))
    if bad is not None:
        (key if side == "key" else value)[DAMAGED] = bad
    cache = torch.zeros(3, 2, 128, layout.cell_bytes, dtype=torch.uint8)
    store_kv(key, value, cache, torch.arange(TOKENS) + 128, layout, PLAIN, PLAIN, (1.0,))
    step = [torch.tensor([[1, 2]]), torch.tensor([0, TOKENS]), torch.tensor([TOKENS])]
    recent = [torch.zeros(1, 2, 1, 256, dtype=dtype), torch.zeros(1, 0, dtype=torch.int32)]
    if layout.key.per_channel:
        store_completed_groups(torch.cat([key, value], -1), cache, *step, *recent, layout, PLAIN, (1.0,))
    return attend(query, key, value, cache, *step, *recent, layout, PLAIN, PLAIN, 0.09, window, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("side", ["key", "value"])
def test_earlier_queries_do_not_notice(
    isa: str,  # noqa: F811
    dtype: torch.dtype,
    window: int,
    name: str,
    bad: float,
    side: str,
) -> None:
    expected, actual = (prefill(LAYOUTS[name], window, dtype, *damage) for damage in ((), (bad, side)))
    assert torch.equal(actual[:DAMAGED], expected[:DAMAGED])
    if bad != bad:
        # It stays visible to those who read it.
        assert bool(actual[DAMAGED:].isnan().any(-1).all())


def call(isa: str, **changes: torch.Tensor) -> torch.Tensor:  # noqa: F811
    given = {
        "recent": torch.zeros(1, 2, 1, 256, dtype=torch.bfloat16),
        "recent_table": torch.zeros(1, 0, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2]),
        **changes,
    }
    rows = torch.ones(2, 2, 128, dtype=torch.bfloat16)
    layout = LAYOUTS["skvq_k2v2"]
    return attend(
        rows, rows, rows, torch.zeros(3, 2, 128, layout.cell_bytes, dtype=torch.uint8), torch.tensor([[1, 2]]),
        given["query_start_loc"], torch.tensor([200]), given["recent"], given["recent_table"], layout, PLAIN, PLAIN,
        0.09, 16, 2,
    )  # fmt: skip


def test_pages_without_tokens_are_refused(isa: str) -> None:  # noqa: F811
    """Also where no request has one: a page's tokens are divided by before its table is looked at."""
    assert call(isa).isfinite().all()
    with pytest.raises(ValueError, match="at least 1 token"):
        call(isa, recent=torch.zeros(0, 2, 0, 256, dtype=torch.bfloat16))


def test_rows_before_the_first_request_are_refused(isa: str) -> None:  # noqa: F811
    """No request would write them."""
    with pytest.raises(ValueError, match="query_start_loc begins at 1"):
        call(isa, query_start_loc=torch.tensor([1, 2]))
