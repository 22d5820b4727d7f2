# SPDX-License-Identifier: Apache-2.0
"""The value types of a patch: what it touches and everything a maintainer asks about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Where a record is applied: "every" vLLM process at registration, the "api" process from the configuration
#: hook, or the "engine" processes (EngineCore and workers) named by VLLM_EXT_ACTIVE.
Process = Literal["every", "api", "engine"]


@dataclass(frozen=True)
class Symbol:
    """One vLLM function a patch depends on: `package.module:Qualified.name` and its signature digest."""

    target: str
    digest: str


@dataclass(frozen=True)
class PatchRecord:
    """One reason to change vLLM.

    `feature` is a name of config.FEATURES, or "core" for what serves all of them; `also` names further features that
    need it. `apply` names the function
    that makes the change, as `module:function`, imported only when the record is applied; it must be idempotent.
    `without` completes the sentence "left out, so ...".
    """

    name: str
    feature: str
    process: Process
    symbols: tuple[Symbol, ...]
    reason: str
    change: str
    without: str
    removal: str
    apply: str
    also: tuple[str, ...] = ()
