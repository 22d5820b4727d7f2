# SPDX-License-Identifier: Apache-2.0
"""vllm/engine/arg_utils.py: the one always-on hook, where every engine's configuration passes."""

from __future__ import annotations

import functools
from typing import Any


def wrap_create_engine_config() -> None:
    """Wrap `EngineArgs.create_engine_config` so that `activation.configure_engine` sees the arguments first."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ext import activation

    original = EngineArgs.create_engine_config
    if getattr(original, "_wrapped_by_vllm_ext", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        return activation.configure_engine(original, self, *args, **kwargs)

    create_engine_config._wrapped_by_vllm_ext = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
