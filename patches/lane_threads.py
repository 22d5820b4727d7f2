# SPDX-License-Identifier: Apache-2.0
"""Apply record `lane_threads`: a forward context for each thread, for two lanes that run one model at once."""

from __future__ import annotations

import threading
from typing import Any


def separate_threads() -> None:
    """Keep vLLM's current forward context by thread instead of once per process.

    Everybody has imported these functions by name, so they keep their identity and get other code.
    """
    from vllm import forward_context

    if hasattr(forward_context, "_vllm_ext_context"):
        return
    replaced = [
        (forward_context.get_forward_context, _get_forward_context),
        (forward_context.is_forward_context_available, _is_forward_context_available),
        (forward_context.override_forward_context.__wrapped__, _override_forward_context),
    ]
    # Below this line nothing fails: who finds the attribute relies on all three.
    forward_context._vllm_ext_context = threading.local()
    for theirs, ours in replaced:
        theirs.__code__ = ours.__code__


# The code of these three runs with the globals of vllm.forward_context.


def _get_forward_context() -> Any:
    context = getattr(_vllm_ext_context, "value", None)  # type: ignore[name-defined] # noqa: F821
    assert context is not None, (
        "Forward context is not set. Please use `set_forward_context` to set the forward context."
    )
    return context


def _is_forward_context_available() -> bool:
    return getattr(_vllm_ext_context, "value", None) is not None  # type: ignore[name-defined] # noqa: F821


def _override_forward_context(forward_context: Any) -> Any:
    previous = getattr(_vllm_ext_context, "value", None)  # type: ignore[name-defined] # noqa: F821
    _vllm_ext_context.value = forward_context  # type: ignore[name-defined] # noqa: F821
    try:
        yield
    finally:
        _vllm_ext_context.value = previous  # type: ignore[name-defined] # noqa: F821
