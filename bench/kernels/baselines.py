# SPDX-License-Identifier: Apache-2.0
"""Committed speeds of operators, each as its ratio to a reference operator of the same run, per class of machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

BASELINES = Path(__file__).parent / "baselines.json"
#: A suite fails when it is certain (the whole interval of the ratio) that the operator lost this part of its speed.
ALLOWED_LOSS = 0.15
#: Nothing is judged, and no baseline written, while other processes use more than this part of the machine.
BUSY_LIMIT = 0.1
#: Parts into which the rounds of a suite are divided.
BLOCKS = 8
#: Instruction sets that decide which path an operator takes, fastest first.
DECIDING_FLAGS = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


def describe_machine_class(threads: int, cpuinfo: str | None = None) -> str:
    """Machines whose ratios can be compared: vendor, family, model, best instruction set and threads used.

    `cpuinfo` is the text of Linux's /proc/cpuinfo, by default this machine's.
    """
    path = Path("/proc/cpuinfo")
    if cpuinfo is None:
        cpuinfo = path.read_text() if path.exists() else ""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    best = next((flag for flag in DECIDING_FLAGS if flag in flags), "no known vector instructions")
    vendor, family, model = (fields.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    return f"{vendor} family {family} model {model}, {best}, {threads} threads"


def read_baselines(path: Path | None = None) -> dict[str, dict[str, float]]:
    """Machine class -> suite -> speed relative to its reference. Raises ValueError for a file of another form."""
    path = path or BASELINES
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not all(isinstance(suites, dict) for suites in data.values()):
        raise ValueError(f"{path}: expected {{machine class: {{suite: ratio}}}}")
    for suites in data.values():
        for suite, ratio in suites.items():
            if not isinstance(ratio, int | float) or not ratio > 0:
                raise ValueError(f"{path}: the ratio of {suite!r} must be a number above 0, got {ratio!r}")
    return data


def update_baselines(machine: str, ratios: Mapping[str, float], path: Path | None = None) -> None:
    """Replace the ratios of these suites for this machine class; others stay."""
    path = path or BASELINES
    data = read_baselines(path)
    data.setdefault(machine, {}).update({suite: float(f"{ratio:.4g}") for suite, ratio in ratios.items()})
    ordered = {name: dict(sorted(suites.items())) for name, suites in sorted(data.items())}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def take_block_minima(seconds: Sequence[float], blocks: int = BLOCKS) -> list[float]:
    """The quickest call of each of some consecutive blocks: what else runs on the machine only adds time.

    Raises ValueError for fewer calls than blocks.
    """
    if len(seconds) < blocks:
        raise ValueError(f"{len(seconds)} rounds are fewer than {blocks} blocks; take at least {blocks}")
    bounds = [len(seconds) * number // blocks for number in range(blocks + 1)]
    return [min(seconds[first:last]) for first, last in pairwise(bounds)]


class BusyMeter:
    """How much of the machine other processes use, from Linux's /proc/stat (proc(5)), since it was made.

    Ratios do not survive a busy machine: an operator of many short parallel parts waits at each of their ends for the
    thread that was pushed aside, a reference of few long ones does not.
    """

    def __init__(self) -> None:
        self._total, self._busy = self._read()
        self._own = time.process_time()

    def read(self) -> float:
        """The part of all cores' time that others used, 0 to 1; 0 where the system does not tell."""
        total, busy = (now - before for now, before in zip(self._read(), (self._total, self._busy), strict=True))
        if total <= 0:
            return 0.0
        return min(1.0, max(0.0, (busy - (time.process_time() - self._own)) / total))

    def _read(self) -> tuple[float, float]:
        """(seconds of all cores, seconds in which they were not idle)."""
        path = Path("/proc/stat")
        if not path.exists():
            return 0.0, 0.0
        # user nice system idle iowait irq softirq steal; guest times are contained in user and nice.
        ticks = [int(field) for field in path.read_text().splitlines()[0].split()[1:9]]
        seconds = [one / os.sysconf("SC_CLK_TCK") for one in ticks]
        return sum(seconds), sum(seconds) - seconds[3] - seconds[4]


def find_loss(ratio_high: float, baseline: float) -> float | None:
    """The part of its speed that an operator lost, when even the upper end of its ratio is below what is allowed.

    `ratio_high` is the upper end of the interval of (time of the reference / time of the operator).
    """
    loss = 1 - ratio_high / baseline
    return loss if loss > ALLOWED_LOSS else None
