# SPDX-License-Identifier: Apache-2.0
"""Settings that say which prompts begin when: what they switch on, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext import config, observability
from vllm_ext.scheduling.phases.controller import Objectives, Split
from vllm_ext.scheduling.phases.lanes import LaneCounts
from vllm_ext.scheduling.phases.pacer import Pacer
from vllm_ext.scheduling.semipd.policies import Policies, check_policies, limits_queue, make_policies, report_policies


def parse(**block: Any) -> config.SemiPDSettings:
    settings = config.parse({"semipd": block}).semipd
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("block", "policy", "message"),
    [
        ({"fairness": 0}, "fcfs", "fairness .* must be above 0, for example 2, got 0"),
        ({"fairness": 2}, "priority", "--scheduling-policy priority otherwise: drop one of them"),
        ({"admission": "refuse"}, "fcfs", "add vllm_ext.semipd.slo_ttft_ms"),
        ({"controller": "published"}, "fcfs", "add vllm_ext.semipd.slo_ttft_ms or vllm_ext.semipd.slo_tpot_ms"),
        (
            {"controller": "published", "slo_ttft_ms": 300, "admission": "refuse"},
            "fcfs",
            "set vllm_ext.semipd.controller to models, or drop admission",
        ),
        ({"decode_priority_ms": 0, "slo_tpot_ms": 9}, "fcfs", "decode_priority_ms .* must be above 0, got 0"),
        ({"decode_priority_ms": 50}, "fcfs", "add vllm_ext.semipd.slo_tpot_ms"),
    ],
)
def test_what_is_refused(block: dict[str, Any], policy: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        check_policies(parse(**block), policy)


def test_admission_has_three_ways() -> None:
    with pytest.raises(config.ConfigError, match="admission must be one of 'hold', 'refuse', 'off', not 'drop'"):
        parse(admission="drop")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, (False, False, False)),
        ({"slo_ttft_ms": 300}, (True, False, False)),
        ({"slo_ttft_ms": 300, "admission": "refuse"}, (False, False, False)),
        ({"slo_ttft_ms": 300, "admission": "off"}, (False, False, False)),
        ({"slo_tpot_ms": 50}, (False, False, False)),
        ({"fairness": 2}, (False, True, False)),
        ({"slo_tpot_ms": 50, "decode_priority_ms": 100}, (False, False, True)),
    ],
)
def test_what_is_switched_on(block: dict[str, Any], expected: tuple[bool, bool, bool]) -> None:
    settings = parse(**block)
    check_policies(settings, "fcfs")
    assert tuple(policy is not None for policy in make_policies(settings, "fcfs")) == expected


def test_whose_order_it_is() -> None:
    assert make_policies(parse(slo_ttft_ms=300), "priority").late is None


def test_who_says_what_is_too_late() -> None:
    assert limits_queue(parse(slo_ttft_ms=300))
    assert not limits_queue(parse(slo_ttft_ms=300, controller="published"))
    assert limits_queue(parse(slo_ttft_ms=300, admission="refuse"))
    assert not limits_queue(parse(slo_ttft_ms=300, admission="off"))
    assert not limits_queue(parse(slo_tpot_ms=50))


def test_every_metric_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, float] = {}
    monkeypatch.setattr(observability, "set_gauge", lambda name, value, index: written.update({name: value}))
    pacer = Pacer(None, [Split(0.5, 0.5)], Objectives(1.0, 0.1))
    report_policies(Policies(None, None, None), pacer, LaneCounts(), 0)
    assert written.keys() <= {metric.name for metric in observability.METRICS}
    assert set(written.values()) == {0.0}
    pacer.max_queued_tokens = 0
    settings = parse(slo_ttft_ms=300, slo_tpot_ms=50, fairness=2, decode_priority_ms=100)
    report_policies(make_policies(settings, "fcfs"), pacer, LaneCounts(mixed=3), 0)
    # No token may wait; but who comes while nothing waits is served.
    assert written["vllm_ext:semipd_max_queued_tokens"] == 1.0
    assert written["vllm_ext:semipd_mixed_batches_total"] == 3.0
