# SPDX-License-Identifier: Apache-2.0
"""The one place of perplexity's arithmetic: windows of tokens and the mean over them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.compress.windows import check_scoring, compute_perplexity, split_windows


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    context=st.integers(2, 9),
    windows=st.none() | st.integers(1, 12),
    prefix=st.lists(st.integers(10, 19), max_size=1),
)
def test_windows_are_full_consecutive_and_begin_with_the_prefix(
    ids: list[int], context: int, windows: int | None, prefix: list[int]
) -> None:
    step = context - len(prefix)
    available = len(ids) // step
    if available == 0:
        with pytest.raises(ValueError, match=rf"a\.txt has {len(ids)} tokens, less than one window of {context}: give"):
            split_windows(ids, context, windows=windows, prefix=prefix, name="a.txt")
        return
    cut = split_windows(ids, context, windows=windows, prefix=prefix)
    assert cut.dtype == np.int64
    assert cut.shape == (min(available, windows or available), context)
    assert (cut[:, : len(prefix)] == prefix).all()
    assert cut[:, len(prefix) :].reshape(-1).tolist() == ids[: len(cut) * step]


def test_perplexity_is_the_inverse_of_the_geometric_mean() -> None:
    probabilities = [0.5, 0.1, 0.25, 1.0]
    perplexity, tokens = compute_perplexity(math.log(p) for p in probabilities)
    assert tokens == 4
    assert perplexity == pytest.approx((0.5 * 0.1 * 0.25) ** (-1 / 4), rel=1e-12)
    assert compute_perplexity([math.log(1 / 7)] * 1000) == (pytest.approx(7, rel=1e-9), 1000)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"the log probabilities of 3 tokens add up to (nan|-inf): .*damaged"):
        compute_perplexity([-1.0, bad, -1.0])
    with pytest.raises(ValueError, match="at least one scored token"):
        compute_perplexity([])


@pytest.mark.parametrize(
    ("context", "windows", "message"), [(1, None, "at least 2 tokens.*got 1"), (2, 0, "windows must be .*got 0")]
)
def test_nothing_to_score(context: int, windows: int | None, message: str) -> None:
    check_scoring(2, 1)
    with pytest.raises(ValueError, match=message):
        check_scoring(context, windows)


def test_it_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from vllm_ext.compress import windows; print([n for n in ('vllm', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
