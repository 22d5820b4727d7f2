# SPDX-License-Identifier: Apache-2.0
"""Measured step times of an engine: where they are kept, and under which name, so that no other engine's are taken."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ext import __version__, config
from vllm_ext.speculation.prior import load_prior, store_prior

logger = logging.getLogger("vllm.vllm_ext")

#: What the sweep measured in this process, by file: the scheduler is made in the same one, and a disk may be full.
_measured: dict[Path, dict[str, float]] = {}


def find_step_times(vllm_config: Any) -> dict[str, float] | None:
    """Coefficients measured by this engine's sweep, or stored by an earlier engine like it; None without any."""
    path = find_prior_path(vllm_config)
    return _measured.get(path) or load_prior(path)


def keep_step_times(vllm_config: Any, coefficients: Mapping[str, float]) -> None:
    """Hand coefficients to this process's scheduler, and store them for the next engine where the disk allows."""
    path = find_prior_path(vllm_config)
    _measured[path] = dict(coefficients)
    try:
        store_prior(path, coefficients)
    except OSError as error:
        logger.warning("smartspec cannot keep its step times in %s, and measures them anew next time: %s", path, error)


def find_prior_path(vllm_config: Any) -> Path:
    """File of the step times of this model on this device: <cache_dir>/smartspec/<hash of describe_engine>.json."""
    text = json.dumps(describe_engine(vllm_config), skipkeys=True, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return config.read_settings(vllm_config).cache_path / "smartspec" / f"{name}.json"


def describe_engine(vllm_config: Any) -> dict[str, Any]:
    """Everything known before serving that step times depend on."""
    import vllm

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative, compilation = vllm_config.speculative_config, vllm_config.compilation_config
    block = config.find_block(vllm_config.additional_config) or {}
    return {
        "versions": [__version__, vllm.__version__],
        "model": [_name_model(model.model), model.revision, str(model.dtype), model.quantization],
        "overrides": [model.hf_overrides, getattr(model.hf_config, "quantization_config", None)],
        # Bit plans and cache layouts of the pack; where files are kept and how lengths are chosen takes no time.
        "pack": {name: value for name, value in block.items() if name not in ("smartspec", "cache_dir")},
        "cache": vllm_config.cache_config.cache_dtype,
        "device": _describe_device(),
        "parallel": [parallel.tensor_parallel_size, parallel.enable_expert_parallel],
        "drafter": [speculative.method, _name_model(speculative.model), speculative.num_speculative_tokens],
        "runner": vllm_config.use_v2_model_runner,
        "attention": vllm_config.attention_config.backend,
        "graphs": [compilation.mode, compilation.cudagraph_mode, compilation.cudagraph_capture_sizes],
        "most_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
    }


def _name_model(name: str | None) -> str | None:
    """A local folder by its full path: the same relative name is another model elsewhere."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


@functools.cache
def _describe_device() -> list[Any]:
    """Of this process, read once: its threads are bound to cores in the course of an engine's start."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return [current_platform.device_name, current_platform.get_device_name()]
    # vLLM calls every CPU by the same name.
    threads = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")]
    return [current_platform.device_name, _name_cpu(), _count_cores(), threads]


def _count_cores() -> int:
    """Cores that some thread of this process may use."""
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        # Threads end while they are listed.
        with contextlib.suppress(ProcessLookupError):
            cores |= os.sched_getaffinity(int(thread))
    return len(cores)


def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part")))
    return next(names, platform.processor())
