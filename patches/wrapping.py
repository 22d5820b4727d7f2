# SPDX-License-Identifier: Apache-2.0
"""How a record replaces a function of vLLM's: once, however often it is applied, and recognizable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Attribute of our wrappers.
MARK = "_wrapped_by_vllm_ext"


def wrap(owner: Any, name: str, make_wrapper: Callable[[Any], Any], mark: str = MARK) -> None:
    """Put `make_wrapper(original)` in the place of `owner.name`, unless one with this mark is there already.

    mark: of a record's own where another record wraps the same function.
    """
    original = getattr(owner, name)
    if getattr(original, mark, False):
        return
    # Takes the original's marks along, so that wrappers are recognized in any order.
    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, mark, True)
    setattr(owner, name, wrapper)
