# SPDX-License-Identifier: Apache-2.0
"""Progress bars of the offline tools: on stderr, so that stdout carries results alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int, enabled: bool) -> Iterator[T]:
    """The items, with a bar that advances by one for each; nothing is shown unless enabled."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        yield from progress.track(items, total=total, description=description)
