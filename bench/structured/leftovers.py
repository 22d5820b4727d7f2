# SPDX-License-Identifier: Apache-2.0
"""What a server holds: processes, threads and memory, read from /proc once it is at rest."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import NamedTuple

from bench.serve.server import list_group
from bench.serve.usage import count_entries, read_cpu


class State(NamedTuple):
    """parts: MiB of anonymous memory of each part of the server. Of pages of files the system keeps what it likes."""

    processes: int
    threads: int
    parts: dict[str, float]

    @property
    def memory(self) -> float:
        """MiB of all parts."""
        return sum(self.parts.values())


async def read_state(group: int) -> State:
    """What a process group holds when nothing runs in it any more: trials end, aborted requests are dropped."""
    ends = time.perf_counter() + 20
    counted = count_threads(group)
    while time.perf_counter() < ends:
        cpu = read_cpu(group)
        await asyncio.sleep(2)
        used = read_cpu(group).seconds_since(cpu)
        counted, before = count_threads(group), counted
        if counted == before and used < 0.2:
            break
    return State(*counted, read_parts(group))


def read_parts(group: int) -> dict[str, float]:
    """MiB of anonymous memory of the API process, of the engine's processes, and of the trials'."""
    parts = {"api": 0.0, "engine": 0.0, "trials": 0.0}
    for pid in list_group(group):
        try:
            name, status = Path(f"/proc/{pid}/comm").read_text(), Path(f"/proc/{pid}/status").read_text()
        except (ProcessLookupError, FileNotFoundError):
            continue
        part = "api" if pid == group else "engine" if name.startswith("VLLM::") else "trials"
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        parts[part] += int(found[1]) / 1024 if found else 0.0
    return parts


def count_threads(group: int) -> tuple[int, int]:
    """(processes, threads) of a process group."""
    return len(list_group(group)), count_entries(group, "task")
