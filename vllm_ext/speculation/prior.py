# SPDX-License-Identifier: Apache-2.0
"""Step times from before an engine serves: fitted to a sweep of forward passes, and kept for the next engine."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from vllm_ext.speculation.step_time import COEFFICIENTS, DEFAULT_PRIOR

#: Milliseconds that the time of a step without drafts reaches at least: less is no measurement of any machine.
LEAST = 1e-6
#: Milliseconds that no coefficient reaches.
MOST = 1e9


def fit_prior(milliseconds: Mapping[int, float], drafter: Mapping[int, float] | None = None) -> dict[str, float]:
    """Coefficients of the step-time model, by name, from the times of forward passes.

    milliseconds: of a pass of the target model, by tokens in it; drafter: of one pass of a drafter that is a model,
    without that of the target.

    The passes show the fixed part and that of a token. Attention, requests, and a drafter that was not measured keep
    their guessed shares of a step, which serving replaces. Raises ValueError for fewer than two sizes, and for times
    that are not positive.
    """
    step, token = _fit_line(milliseconds)
    scale = (step + token) / (DEFAULT_PRIOR["step"] + DEFAULT_PRIOR["tokens"])
    fitted = {name: value * scale for name, value in DEFAULT_PRIOR.items()}
    if drafter is not None:
        each_pass, draft = _fit_line(drafter)
        fitted |= {"passes": each_pass, "drafted": draft}
    return {**fitted, "step": step, "tokens": token}


def _fit_line(milliseconds: Mapping[int, float]) -> tuple[float, float]:
    """(fixed part, part of each token), neither below zero."""
    if len(milliseconds) < 2:
        raise ValueError(f"need two sizes to tell a token's time from a pass's, got {sorted(milliseconds)}")
    if not all(0 < time < math.inf for time in milliseconds.values()):
        raise ValueError(f"times of passes must be positive milliseconds, got {dict(milliseconds)}")
    sizes, times = np.array(list(milliseconds), float), np.array(list(milliseconds.values()))
    # Relative errors, as in the online fit: small steps are what decoding does.
    fixed, each = nnls(np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None], np.ones_like(times))[0]
    return float(fixed), float(each)


def load_prior(path: Path) -> dict[str, float] | None:
    """Coefficients that an earlier engine stored; None where there are none or they cannot be used."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # A cache: what cannot be read is measured again.
        return None
    if not isinstance(values, dict) or set(values) != set(COEFFICIENTS):
        return None
    if not all(type(value) in (int, float) and 0 <= value < MOST for value in values.values()):
        return None
    # The fit divides by the prior's time of a step.
    if values["step"] + values["tokens"] < LEAST:
        return None
    return {name: float(value) for name, value in values.items()}


def store_prior(path: Path, coefficients: Mapping[str, float]) -> None:
    """Keep coefficients for the next engine of the same model and device: the whole file or none, whoever else writes.

    Raises OSError where the disk does.
    """
    _make_private(path.parent)
    # A file of each writer's own: engines may start at the same time.
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(dict(coefficients)) + "\n")
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o700, exist_ok=True)
