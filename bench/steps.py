# SPDX-License-Identifier: Apache-2.0
"""The steps of a program that starts servers, on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Between two lines about a starting server, where stderr is not a terminal.
WAIT_LINE_SECONDS = 15.0


class StepFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A step failed; the message names it and says why."""


class Progress:
    """Steps on stderr, each with its seconds; while a server starts, one line that renews itself on a terminal."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._current = ""
        self._next_line = WAIT_LINE_SECONDS
        self._shows_wait = False

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step: its name and seconds are printed at the end, an error becomes StepFailed with its name."""
        began = time.monotonic()
        self._current, self._next_line = name, WAIT_LINE_SECONDS
        try:
            yield
        except StepFailed:
            raise
        except Exception as error:
            raise StepFailed(f"{name}: {error or type(error).__name__}") from error
        finally:
            self._clear()
        self._print(f"{name} ({time.monotonic() - began:.1f} s)")

    def show_wait(self, seconds: float, log_line: str) -> None:
        """What the starting server said last: renewed in place, or now and then where stderr is not a terminal."""
        line = f"{self._current}: {seconds:.0f} s: {log_line}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'          {line}'[:width]}", end="", file=sys.stderr, flush=True)
            self._shows_wait = True
        elif seconds >= self._next_line:
            self._next_line += WAIT_LINE_SECONDS
            self._print(line[:200])

    def _print(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._shows_wait:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._shows_wait = False
