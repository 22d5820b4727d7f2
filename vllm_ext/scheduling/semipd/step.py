# SPDX-License-Identifier: Apache-2.0
"""What one turn of vLLM's engine loop carries where two lanes run: batches to launch, and one that has run.

vLLM's `EngineCore.step` schedules, executes, waits and updates, once per turn. Here a turn launches a batch in every
lane that is idle, waits until the first of those in flight has run, and reads that one's output. So decode steps pass a
prompt that takes many of them, and the engine's loop is vLLM's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_ext.scheduling.phases.lanes import LaneBatch


class LaneLaunch(NamedTuple):
    """A batch for a lane's runner. `grammar`: masks of its structured requests, made when it is scheduled. `has_all`:
    whether it runs on the whole device though the other lane may run too: prompts whose decode has a pace."""

    batch: LaneBatch[Any]
    output: SchedulerOutput
    grammar: GrammarOutput | None
    has_all: bool = False


class LaneResult(NamedTuple):
    """A batch that has run: what its runner made, when (seconds of time.perf_counter), and on which share."""

    launch: LaneLaunch
    made: ModelRunnerOutput
    started: float
    finished: float
    share: float


@dataclass
class LaneStep(SchedulerOutput):
    """The scheduler output of a turn: itself without requests. `split`: number of the split of the device that is in
    force. `wake`: when the next turn is due at the latest, in seconds of time.perf_counter; None for when a batch has
    run."""

    launches: list[LaneLaunch] = field(default_factory=list)
    split: int = 0
    wake: float | None = None
