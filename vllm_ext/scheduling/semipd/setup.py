# SPDX-License-Identifier: Apache-2.0
"""What semi-PD needs of an engine: checks at start-up, the splits of the device, the controller, metrics."""

from __future__ import annotations

import os
from typing import Any

from vllm_ext import config, observability
from vllm_ext.scheduling.phases.controller import INTERVALS, Objectives, PhaseController, SplitController
from vllm_ext.scheduling.phases.lanes import Lanes
from vllm_ext.scheduling.phases.pacer import Pacer
from vllm_ext.scheduling.phases.published import NearestPublishedController
from vllm_ext.scheduling.phases.view import Lane
from vllm_ext.scheduling.semipd import door, policies
from vllm_ext.scheduling.semipd.cores import SHARES, CoreSplit, find_cores, plan_splits

#: Objectives where the user names none, in milliseconds: nothing to steer by, and a scale for the counters.
TTFT_MS, TPOT_MS, PERCENTILE = 1000.0, 100.0, 90.0

#: Variables by which OpenMP's runtimes tie their threads to cores, whoever starts them.
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

EXECUTOR = "vllm_ext.scheduling.semipd.executor.LaneExecutor"
WORKER = "vllm_ext.scheduling.semipd.worker.LaneCPUWorker"


def read_settings(vllm_config: Any) -> config.SemiPDSettings:
    """The block of a finished configuration."""
    settings = config.read_settings(vllm_config).semipd
    assert settings is not None
    return settings


def check_engine(vllm_config: Any) -> None:
    """Refuse what only the finished configuration shows. Raises config.ConfigError naming the value and the fix."""
    settings, model = read_settings(vllm_config), vllm_config.model_config
    if settings.mode == "off":
        raise config.ConfigError("vllm_ext.semipd.mode is off and the block on: set vllm_ext.semipd.enabled to false")
    if settings.window is not None:
        raise config.ConfigError("vllm_ext.semipd.window is not part of this release: drop it")
    policies.check_policies(settings, vllm_config.scheduler_config.policy)
    for name in ("slo_ttft_ms", "slo_tpot_ms"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise config.ConfigError(f"vllm_ext.semipd.{name} must be above 0, got {value}")
    if settings.percentile is not None and not 0 < settings.percentile < 100:
        raise config.ConfigError(f"vllm_ext.semipd.percentile must be between 0 and 100, got {settings.percentile}")
    shares = settings.splits
    if shares is not None and not (
        shares and all(isinstance(share, int | float) and 0 < share < 1 for share in shares)
    ):
        raise config.ConfigError(
            f"vllm_ext.semipd.splits must be shares of the prefill lane between 0 and 1, for example [0.25, 0.5], "
            f"got {shares}"
        )
    for name, is_refused, why in (
        ("hybrid models", model.is_hybrid, "their state is not paged"),
        ("encoder-decoder models", model.is_encoder_decoder, "cross attention has a cache of its own"),
        ("multimodal models", model.is_multimodal_model, "encoder outputs are freed by either lane"),
        ("pooling models", model.runner_type == "pooling", "they only prefill"),
        ("models with multi-head latent attention", model.use_mla, "its operators have not been tried by two threads"),
        (
            "models with chunked local attention",
            model.attention_chunk_size is not None,
            "blocks behind the chunk are recycled while the other lane may read them",
        ),
        (
            "models with a sliding window",
            model.get_sliding_window() is not None,
            "blocks behind the window are recycled while the other lane may read them",
        ),
    ):
        if is_refused:
            raise config.ConfigError(f"semipd does not run with {name} ({model.model}): {why}; switch semipd off")
    check_threads(vllm_config)


def check_threads(vllm_config: Any) -> None:
    """Refuse where threads cannot be kept on cores. Raises config.ConfigError naming the value and the fix."""
    if not hasattr(os, "sched_setaffinity"):
        raise config.ConfigError("semipd needs Linux, which keeps threads on cores: switch semipd off")
    for name in BINDING:
        if os.environ.get(name, "false").lower() not in ("false", "none", "disabled"):
            raise config.ConfigError(
                f"{name}={os.environ[name]!r} ties OpenMP's threads to cores, which semipd does by lane: unset it, and "
                f"name cores in VLLM_CPU_OMP_THREADS_BIND"
            )
    try:
        plan_device(vllm_config)
    except ValueError as error:
        raise config.ConfigError(f"semipd: {error}") from error


def take_seats(vllm_config: Any) -> None:
    """Name executor and worker; the scheduler comes from the factory."""
    vllm_config.parallel_config.distributed_executor_backend = EXECUTOR
    vllm_config.parallel_config.worker_cls = WORKER
    if read_settings(vllm_config).admission == "refuse":
        door.follow_limit(vllm_config)


def plan_device(vllm_config: Any) -> list[CoreSplit]:
    """Splits of the cores for lanes, least prefill first. Raises ValueError as `cores.find_cores`."""
    return plan_splits(find_cores(), read_settings(vllm_config).splits or SHARES)


def make_pacer(vllm_config: Any) -> Pacer:
    """With a controller where an objective is named. The paper's never mixes batches and bounds no queue."""
    settings = read_settings(vllm_config)
    num_cores = len(find_cores())
    splits = [split.measure_shares(num_cores) for split in plan_device(vllm_config)]
    objectives = Objectives(
        (settings.slo_ttft_ms or TTFT_MS) / 1e3,
        (settings.slo_tpot_ms or TPOT_MS) / 1e3,
        (settings.percentile or PERCENTILE) / 100,
    )
    may_wait = settings.mode == "auto" and settings.slo_tpot_ms is not None
    controller: PhaseController | None = None
    if settings.controller == "published":
        controller = NearestPublishedController(splits, objectives)
    elif settings.slo_ttft_ms is not None or settings.slo_tpot_ms is not None:
        controller = SplitController(
            splits,
            objectives,
            full_when_alone=settings.mode != "always",
            refuses=policies.limits_queue(settings),
            mix_budget=vllm_config.scheduler_config.max_num_batched_tokens if settings.mode == "auto" else None,
            # What nobody said is too slow is not slowed down.
            intervals=[part * objectives.tpot for part in INTERVALS] if may_wait else (),
        )
    return Pacer(controller, splits, objectives)


def report(pacer: Pacer, lanes: Lanes[Any], index: int) -> None:
    """Write the state of the lanes into the metrics of this engine."""
    counts = pacer.counts
    values = {
        "prefill_batches_total": lanes.counts.batches[Lane.PREFILL],
        "decode_batches_total": lanes.counts.batches[Lane.DECODE],
        "prefill_busy_seconds_total": counts.busy[Lane.PREFILL],
        "decode_busy_seconds_total": counts.busy[Lane.DECODE],
        "overlap_seconds_total": counts.overlap,
        "deferred_frees_total": lanes.counts.deferred_frees,
        "split_index": pacer.index,
        "switches_total": counts.switches,
        "decode_interval_seconds": pacer.decode_interval,
        "first_tokens_total": counts.first_tokens,
        "first_tokens_in_time_total": counts.first_tokens_in_time,
        "finished_total": counts.finished,
        "finished_in_time_total": counts.finished_in_time,
    }
    for name, value in values.items():
        observability.set_gauge(f"vllm_ext:semipd_{name}", float(value), index)
