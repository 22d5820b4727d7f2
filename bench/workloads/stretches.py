# SPDX-License-Identifier: Apache-2.0
"""A stream of prompts that changes its kind, and if asked its load, from one stretch to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.workloads.corpus import Tokenizer
from bench.workloads.prompts import make_chat, make_code, make_repetitive
from bench.workloads.requests import OFFLINE_FIELDS, Request

MAKERS: dict[str, Callable[..., list[Request]]] = {
    "chat": make_chat,
    "code": make_code,
    "repetitive": make_repetitive,
}


def make_changing(
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    num_requests: int,
    *,
    max_model_len: int = 2048,
    output_tokens: int = 128,
    scale: float = 1.0,
    stretches: Sequence[str | Mapping[str, Any]] = ("chat", "repetitive", "code", "repetitive"),
) -> list[Request]:
    """Requests that change their kind: stretches of `chat`, `repetitive` and `code`, one after the other.

    What suits one stretch does not suit the next: settings that are fixed are right for a part of it only. `scale`
    multiplies the median prompts of chat and code. A stretch is a kind, or {kind, share, max_concurrency, temperature}:
    `share` is how many of the requests it has beside the others (1: as many), and the last two go with its requests,
    for an offline engine (`bench.serve.offline`). Raises ValueError for a stretch that is none of these.
    """
    if isinstance(stretches, str) or not stretches:
        raise ValueError(f"stretches is {stretches!r}, expected a list of {', '.join(sorted(MAKERS))}")
    read = [_read_stretch(one) for one in stretches]
    ends = np.cumsum([share for _, share, _ in read])
    requests: list[Request] = []
    for (kind, _, extra), end in zip(read, ends, strict=True):
        count = int(num_requests * end / ends[-1] + 1e-9) - len(requests)
        scaled = {} if kind == "repetitive" else {"scale": scale}
        made = MAKERS[kind](
            generator, tokenizer, count, max_model_len=max_model_len, output_tokens=output_tokens, **scaled
        )
        requests += [dataclasses.replace(one, extra={**one.extra, **extra}) for one in made]
    return requests


def _read_stretch(stretch: Any) -> tuple[str, float, dict[str, Any]]:
    """Kind, share and what goes with each request."""
    given = dict(stretch) if isinstance(stretch, Mapping) else {"kind": stretch}
    kind, share = given.pop("kind", None), given.pop("share", 1)
    if not isinstance(kind, str) or kind not in MAKERS:
        raise ValueError(f"a stretch is of {kind!r}, expected one of {', '.join(sorted(MAKERS))}")
    if not _is_number(share) or share == 0:
        raise ValueError(f"the share of a stretch of {kind} is {share!r}, expected a number above 0")
    if unknown := sorted(given.keys() - set(OFFLINE_FIELDS)):
        known = ", ".join(("kind", "share", *OFFLINE_FIELDS))
        raise ValueError(f"a stretch of {kind} has no {unknown[0]!r}; it has: {known}")
    concurrency, temperature = given.get("max_concurrency", 1), given.get("temperature", 0)
    if type(concurrency) is not int or concurrency < 1:
        raise ValueError(f"max_concurrency of a stretch of {kind} is {concurrency!r}, expected at least 1")
    if not _is_number(temperature):
        raise ValueError(f"temperature of a stretch of {kind} is {temperature!r}, expected at least 0")
    return kind, float(share), given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
