# SPDX-License-Identifier: Apache-2.0
"""CPU time, memory, threads and files of a process group, read from Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.serve.server import list_group

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuReading:
    """CPU time of a process group at one moment: seconds of each live thread, and clock ticks of each process.

    Threads are read to the nanosecond (/proc/PID/task/TID/schedstat), but one that ends takes its time along. Ticks of
    10 ms (proc(5), /proc/PID/stat, fields 14 to 17) keep the time of ended threads, and of awaited children.
    """

    threads: dict[int, float]
    ticks: dict[int, int]

    def seconds_since(self, earlier: CpuReading) -> float:
        """CPU seconds of the group from `earlier` to this reading."""
        fine = sum(seconds - earlier.threads.get(thread, 0.0) for thread, seconds in self.threads.items())
        coarse = sum(ticks - earlier.ticks.get(process, 0) for process, ticks in self.ticks.items())
        # User and system time are each rounded down, at both readings. What is beyond that was used by what has ended.
        rounding = 2 * len(self.ticks)
        return max(fine, (coarse - rounding) * TICK_SECONDS)


def read_cpu(group: int) -> CpuReading:
    """The CPU time that a process group has used until now."""
    threads, ticks = {}, {}
    for pid in list_group(group):
        for stat in _read(Path(f"/proc/{pid}/stat")):
            # After the command name, which may hold spaces and parentheses, comes field 3.
            ticks[pid] = sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])
        for task in Path(f"/proc/{pid}/task").glob("*"):
            for line in _read(task / "schedstat"):
                threads[int(task.name)] = int(line.split()[0]) / 1e9
    return CpuReading(threads, ticks)


def read_resident_bytes(group: int) -> int:
    """Resident bytes of a process group; pages that several of its processes share count once.

    The proportional set size would not do: it halves what the group shares with another engine, of the other arm. Pages
    of a file or of shared memory count as in the process of the group that has most of them, anonymous pages that a
    fork left shared likewise, and private pages of every process. Read from /proc/PID/smaps, see proc(5).
    """
    private = 0
    shared: dict[tuple[str, ...], int] = {}
    for pid in list_group(group):
        for text in _read(Path(f"/proc/{pid}/smaps")):
            for place, own, common in _split_mappings(text):
                private += own
                shared[place] = max(shared.get(place, 0), common)
    return 1024 * (private + sum(shared.values()))


def _split_mappings(smaps: str) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """(what is mapped, KiB of this process alone, KiB that others may share) of every mapping."""
    for header, fields in _list_mappings(smaps):
        addresses, _permissions, offset, device, inode = header
        if inode == "0":
            # Only relatives by fork share anonymous pages, at the same address.
            common = fields["Shared_Clean"] + fields["Shared_Dirty"]
            yield ("anonymous", addresses.partition("-")[0]), fields["Rss"] - common, common
        else:
            # Whether others have a page of the file too must not matter; pages copied on writing are anonymous.
            yield (device, inode, offset), fields["Anonymous"], fields["Rss"] - fields["Anonymous"]


def _list_mappings(smaps: str) -> Iterator[tuple[list[str], dict[str, int]]]:
    header: list[str] = []
    fields: dict[str, int] = {}
    for line in smaps.splitlines():
        words = line.split(maxsplit=5)
        if words[0].endswith(":"):
            if words[-1] == "kB":
                fields[words[0][:-1]] = int(words[1])
        else:
            if header:
                yield header, fields
            header, fields = words[:5], {}
    if header:
        yield header, fields


def count_entries(group: int, name: str) -> int:
    """How many threads (`task`) or open files (`fd`) the live processes of a group have together."""
    total = 0
    for pid in list_group(group):
        try:
            total += len(os.listdir(f"/proc/{pid}/{name}"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return total


def _read(path: Path) -> Iterator[str]:
    """The file's text, or nothing where the process has ended meanwhile."""
    try:
        yield path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return
