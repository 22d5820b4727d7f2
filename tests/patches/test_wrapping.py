# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM are wrapped once by each record, in whatever order."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import MARK, wrap


class Owner:
    def count(self) -> list[str]:
        """Stock."""
        return ["stock"]


def make_adder(word: str) -> Any:
    def make(original: Any) -> Any:
        return lambda self: [*original(self), word]

    return make


def test_once_per_mark() -> None:
    owner = type("Owner", (Owner,), {"count": Owner.count})
    for _ in range(2):
        wrap(owner, "count", make_adder("first"))
        wrap(owner, "count", make_adder("second"), mark="_another")
    assert owner().count() == ["stock", "first", "second"]
    assert getattr(owner.count, MARK)
    assert owner.count.__doc__ == "Stock."
    assert Owner().count() == ["stock"]
