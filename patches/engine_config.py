# SPDX-License-Identifier: Apache-2.0
"""vllm/engine/arg_utils.py: the one always-on hook, where every engine's configuration passes."""

from __future__ import annotations

from typing import Any

from vllm_ext.patches.wrapping import wrap


def wrap_create_engine_config() -> None:
    """Wrap `EngineArgs.create_engine_config` so that `activation.configure_engine` sees the arguments first."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_engine_config", _configure_first)


def _configure_first(original: Any) -> Any:
    from vllm_ext import activation

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        return activation.configure_engine(original, self, *args, **kwargs)

    return create_engine_config
