# SPDX-License-Identifier: Apache-2.0
"""The settings of a feature block with their defaults, and what they do not allow. No vllm import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext import config

#: Wall time of one trial of a costly grammar. The answer to a hostile one takes as long.
MAX_COMPILE_MS = 700.0
#: Memory that one grammar may take, beside the vocabulary.
MAX_COMPILE_MIB = 256.0


@dataclass(frozen=True)
class Options:
    """Resolved settings: limits of a trial, whitespace of JSON ("any", "compact" or a count), files or None."""

    max_compile_ms: float = MAX_COMPILE_MS
    max_compile_mib: float = MAX_COMPILE_MIB
    whitespace: str | int = "any"
    prewarm: Path | None = None
    store_dir: Path | None = None


def read_options(vllm_config: Any) -> Options:
    """The options of an engine. Raises config.ConfigError naming the setting and the fix."""
    settings = config.read_settings(vllm_config).structured
    settings = settings or config.StructuredSettings()
    for name in ("max_compile_ms", "max_compile_mib"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise config.ConfigError(f"vllm_ext.structured.{name} must be above 0, not {value!r}")
    whitespace = settings.whitespace
    if isinstance(whitespace, int) and whitespace < 0:
        raise config.ConfigError(f"vllm_ext.structured.whitespace must be any, compact or a count, not {whitespace}")
    if whitespace is None:
        whitespace = "compact" if vllm_config.structured_outputs_config.disable_any_whitespace else "any"
    prewarm = Path(settings.prewarm).expanduser() if settings.prewarm else None
    if prewarm is not None and not prewarm.is_file():
        raise config.ConfigError(f"vllm_ext.structured.prewarm: no file {prewarm}")
    return Options(
        max_compile_ms=settings.max_compile_ms or MAX_COMPILE_MS,
        max_compile_mib=settings.max_compile_mib or MAX_COMPILE_MIB,
        whitespace="compact" if whitespace == 0 else whitespace,
        prewarm=prewarm,
        store_dir=Path(settings.store_dir).expanduser() if settings.store_dir else None,
    )
