# SPDX-License-Identifier: Apache-2.0
"""How the loops of smartspec are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit  # type: ignore[import-untyped]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compile_loop(function: _Function) -> _Function:
    """Compiled at the first call, which takes seconds, and kept beside its file or in the user's cache folder."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        # Neither folder can be written to.
        return njit(function)
