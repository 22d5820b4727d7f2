# SPDX-License-Identifier: Apache-2.0
"""Which prompts begin when: those that came too late, fairness between clients, decode before prefill."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_ext import config, observability
from vllm_ext.scheduling.phases.admission import LateQueue
from vllm_ext.scheduling.phases.fairness import DecodePriority
from vllm_ext.scheduling.phases.lanes import LaneCounts
from vllm_ext.scheduling.phases.pacer import Pacer
from vllm_ext.scheduling.semipd.fair_queue import FairQueue

#: A late prompt is held back for so many objectives of the first token: who waits that long is let in, whoever waits.
PATIENCE = 10.0


class Policies(NamedTuple):
    """What is switched on; None for what is not."""

    late: LateQueue[Any] | None
    fair: FairQueue | None
    priority: DecodePriority | None


def limits_queue(settings: config.SemiPDSettings) -> bool:
    """Whether the controller says how many prompt tokens may wait: only the user knows what is too late."""
    return settings.admission != "off" and settings.slo_ttft_ms is not None and settings.controller == "models"


def check_policies(settings: config.SemiPDSettings, policy: str) -> None:
    """Refuse what cannot be honoured; policy: vLLM's --scheduling-policy. Raises config.ConfigError naming the value
    and the fix.
    """
    if settings.fairness is not None and settings.fairness <= 0:
        raise config.ConfigError(
            f"vllm_ext.semipd.fairness is what a token of output costs, in tokens of a prompt: it must be above 0, "
            f"for example 2, got {settings.fairness}"
        )
    if settings.fairness is not None and policy != "fcfs":
        raise config.ConfigError(
            f"vllm_ext.semipd.fairness orders waiting prompts by client, and --scheduling-policy {policy} otherwise: "
            "drop one of them"
        )
    if settings.admission == "refuse" and settings.slo_ttft_ms is None:
        raise config.ConfigError(
            "vllm_ext.semipd.admission is refuse, and nothing says what is too late: add vllm_ext.semipd.slo_ttft_ms"
        )
    if settings.controller == "published" and settings.slo_ttft_ms is None and settings.slo_tpot_ms is None:
        raise config.ConfigError(
            "vllm_ext.semipd.controller is published, and nothing says what it is to reach: add "
            "vllm_ext.semipd.slo_ttft_ms or vllm_ext.semipd.slo_tpot_ms"
        )
    if settings.controller == "published" and settings.admission == "refuse":
        raise config.ConfigError(
            "vllm_ext.semipd.admission is refuse, and the published controller never says that too many prompts wait: "
            "set vllm_ext.semipd.controller to models, or drop admission"
        )
    if settings.decode_priority_ms is not None:
        if settings.decode_priority_ms <= 0:
            raise config.ConfigError(
                "vllm_ext.semipd.decode_priority_ms is how long a prompt may be held back for decode: it must be "
                f"above 0, got {settings.decode_priority_ms}"
            )
        if settings.slo_tpot_ms is None:
            raise config.ConfigError(
                "vllm_ext.semipd.decode_priority_ms holds prompts back while tokens are behind their objective, and "
                "there is none: add vllm_ext.semipd.slo_tpot_ms"
            )


def make_policies(settings: config.SemiPDSettings, policy: str) -> Policies:
    """What the settings ask for. Under --scheduling-policy priority nobody is held back: the user says who is first."""
    late, fair, priority = None, None, None
    if settings.admission == "hold" and settings.slo_ttft_ms is not None and policy == "fcfs":
        late = LateQueue[Any](PATIENCE * settings.slo_ttft_ms / 1e3)
    if settings.fairness is not None:
        fair = FairQueue(settings.fairness)
    if settings.decode_priority_ms is not None and settings.slo_tpot_ms is not None:
        priority = DecodePriority(settings.slo_tpot_ms / 1e3, settings.decode_priority_ms / 1e3)
    return Policies(late, fair, priority)


def report_policies(policies: Policies, pacer: Pacer, counts: LaneCounts, index: int) -> None:
    """Write what was decided into the metrics of this engine."""
    limit = pacer.max_queued_tokens
    values = {
        "mixing_active": pacer.is_mixing,
        "mixed_batches_total": counts.mixed,
        "mixed_busy_seconds_total": pacer.counts.mixed_busy,
        # 0 is for no limit; and where nothing waits, one prompt can always come in.
        "max_queued_tokens": 0 if limit is None else max(limit, 1),
        "held_requests": len(policies.late) if policies.late is not None else 0,
        "held_requests_total": pacer.counts.late,
        "prefill_holds_total": policies.priority.num_holds if policies.priority is not None else 0,
        "fairness_client_count": policies.fair.num_clients if policies.fair is not None else 0,
        "fairness_overtakes_total": policies.fair.num_overtakes if policies.fair is not None else 0,
    }
    for name, value in values.items():
        observability.set_gauge(f"vllm_ext:semipd_{name}", float(value), index)
