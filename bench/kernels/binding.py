# SPDX-License-Identifier: Apache-2.0
"""The OpenMP runtime and the pinning of threads that vLLM's CPU workers have, for a process that measures operators.

vLLM's platform preloads torch's libgomp (vllm/platforms/cpu.py) and pins its threads by GOMP_CPU_AFFINITY
(vllm/utils/ompmultiprocessing.py). Both are read when a process starts, so it must be started anew. Unlike vLLM, no
core is kept back for the scheduler: nothing else runs here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Read by OpenMP runtimes at their start; what a record says about its threads.
VARIABLES = ("LD_PRELOAD", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES", "OMP_NUM_THREADS")


def find_runtime() -> Path:
    """torch's libgomp, found without importing torch. Raises FileNotFoundError where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("torch is not installed, so its OpenMP runtime cannot be preloaded")
    folder = Path(spec.submodule_search_locations[0])
    for place in (folder.parent / "torch.libs", folder / "lib"):
        for path in sorted(place.glob("libgomp*.so*")):
            return path
    raise FileNotFoundError(f"no libgomp beside torch; run without --bind-threads, or set {VARIABLES[0]} yourself")


def choose_environment(runtime: Path, cpus: Sequence[int], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the runtime preloaded before what is there, and one thread pinned to each CPU."""
    preloaded = environment.get("LD_PRELOAD", "")
    return {
        **environment,
        "LD_PRELOAD": f"{runtime}:{preloaded}" if preloaded else str(runtime),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cpus)),
        "OMP_NUM_THREADS": str(len(cpus)),
    }


def restart_bound(module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module` in place of this process with threads bound; returns where they are already."""
    if "libgomp" in os.environ.get("LD_PRELOAD", "") and "GOMP_CPU_AFFINITY" in os.environ:
        return
    environment = choose_environment(find_runtime(), sorted(os.sched_getaffinity(0)), os.environ)
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def count_cores(environment: Mapping[str, str], default: int) -> int:
    """Cores that the process uses: the main thread alone may be pinned to one, which is all that the system tells."""
    bound: set[int] = set()
    for word in environment.get("GOMP_CPU_AFFINITY", "").replace(",", " ").split():
        interval, _, step = word.partition(":")
        first, _, last = interval.partition("-")
        bound.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return len(bound) or default


def describe_binding(environment: Mapping[str, str]) -> str:
    """What decides where threads run, for records: names of files without their folders."""
    words = []
    for name in VARIABLES:
        if value := environment.get(name):
            files = (Path(part).name for part in value.split(":")) if name == "LD_PRELOAD" else (value,)
            words.append(f"{name}={':'.join(files)}")
    return ", ".join(words) or "none"
