# SPDX-License-Identifier: Apache-2.0
"""The part `semipd` of the program for GPUs: what it says of engines that are right, wrong, dead, or not lanes."""

from __future__ import annotations

import copy
import re
import subprocess
import time
from typing import Any

import pytest
import torch

from bench import gpu_all
from bench.kernels import gpu
from bench.kernels.gpu_parts.common import Context
from bench.serve import gpu_semipd, gpu_semipd_engine
from bench.serve.gpu_semipd_engine import AUTO, FULL, LANES, TINY, Stream

COUNTERS = {"prefill_batches_total": 9.0, "decode_batches_total": 90.0, "overlap_seconds_total": 0.5}
ANSWERS: dict[str, Any] = {"tokens": [[1, 2, 3], [4, 5]], "token_logprobs": [[-0.1, -0.2, -0.3], [-1.0, -2.0]]}


def make_load(arm: str) -> dict[str, Any]:
    """Streams with a token every 10 ms; a prompt of 500 ms alone, beside which the lanes lose a fifth."""
    is_ours = arm in (LANES, AUTO)
    return {
        "disturbed": {
            "alone": [0.5, 0.5],
            "beside": [0.6, 0.6],
            "calm_gaps": [0.01] * 50,
            "during_gaps": [0.012] * 40 if is_ours else [0.6, 0.01, 0.01],
            "tokens_during": 50.0 if is_ours else 1.0,
            "still_running": 3,
        },
        "rates": [
            {
                "rate": 4.0,
                "seconds": 2.0,
                "tokens": 40,
                "ttft": [0.1, 0.6, 0.2, 0.3],
                "tpot": [0.01, 0.01, 0.03, 0.02],
                "gaps": [0.01] * 99 + [0.5],
            }
        ],
        "counters": COUNTERS if is_ours else {},
        "sizes": {},
        "batch": 8192,
    }


def start(scenario: str, arm: str, is_dry_run: bool, timeout: float) -> dict[str, Any]:
    if scenario == "load":
        return make_load(arm)
    return {**copy.deepcopy(ANSWERS), "counters": COUNTERS if arm == LANES else {}}


def make_context(seconds: float = 300.0, is_dry_run: bool = False) -> Context:
    return Context(torch.device("cpu"), is_dry_run, time.monotonic() + seconds)


def test_it_is_a_part_like_the_others() -> None:
    assert "semipd" in gpu.PARTS
    assert max(gpu_semipd.STOCK_BATCHES) == FULL.batch
    assert list(gpu_semipd.TINY_BATCHES) == [TINY.batch]
    # What a lent machine gives back: eight files.
    assert 1 + len(set(gpu.PARTS) - set(gpu_all.UNDRAWN)) <= 8


def test_all_arms_have_records_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_semipd, "start_arm", start)
    result = gpu_semipd.run(make_context())
    found = {(record.case, record.arm): record for record in result.records}
    stock = [f"stock_{batch}" for batch in gpu_semipd.STOCK_BATCHES]
    assert {record.status for record in result.records} == {"ok"}
    assert {arm for case, arm in found if case == "gpu_semipd_answers"} == {stock[0], LANES}
    for case in ("gpu_semipd_disturbed", "gpu_semipd_rate_4"):
        assert {arm for name, arm in found if name == case} == {LANES, AUTO, *stock}
    assert found["gpu_semipd_answers", LANES].metrics["agreeing"].value == 1.0
    lanes = {name: one.value for name, one in found["gpu_semipd_disturbed", LANES].metrics.items()}
    assert lanes["passed"] == 50.0
    # 600 ms, where 500 of prompt and 50 steps of 10 ms take 1000 one after the other.
    assert lanes["serial"] == pytest.approx(0.6)
    assert lanes["itl_p99"] == pytest.approx(12.0)
    assert found["gpu_semipd_disturbed", stock[0]].metrics["itl_max"].value == pytest.approx(600.0)
    rate = {name: one.value for name, one in found["gpu_semipd_rate_4", LANES].metrics.items()}
    # Of four requests one is late with its first token and another with the others.
    assert rate["attainment"] == pytest.approx(50.0)
    assert rate["output_throughput"] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[1, 2, 9], [4, 5]]}, r"80\.0% of the tokens are stock's"),
        ({"token_logprobs": [[-0.1, -0.2, -0.9], [-1.0, -2.0]]}, r"0\.120 nats from stock"),
        ({"counters": {}}, "prefill_batches_total is 0: this was not semi-PD"),
        ({"counters": {**COUNTERS, "overlap_seconds_total": 0.0}}, "overlap_seconds_total is 0"),
    ],
)
def test_wrong_answers_and_a_silent_fall_back_fail(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(scenario: str, arm: str, is_dry_run: bool, timeout: float) -> dict[str, Any]:
        said = start(scenario, arm, is_dry_run, timeout)
        return said | change if scenario == "answers" and arm == LANES else said

    monkeypatch.setattr(gpu_semipd, "start_arm", answer)
    result = gpu_semipd.run(make_context(is_dry_run=True))
    failed = [record for record in result.records if record.status == "failed"]
    assert [(record.case, record.arm) for record in failed] == [("gpu_semipd_answers", LANES)]
    assert re.search(message, str(failed[0].error))


@pytest.mark.parametrize(
    ("change", "is_dry_run", "message"),
    [
        ({"tokens_during": 1.0}, False, "1.0 tokens passed a long prompt"),
        ({"tokens_during": 5.0}, False, "do not run beside each other"),
        ({"tokens_during": 5.0}, True, None),
        ({"still_running": 0}, True, "the streams were over before the long prompts"),
    ],
)
def test_lanes_that_take_turns_fail(
    change: dict[str, Any], is_dry_run: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With five steps passed, 600 ms are longer than 500 ms of prompt and the steps one after the other."""

    def answer(scenario: str, arm: str, is_dry_run: bool, timeout: float) -> dict[str, Any]:
        said = start(scenario, arm, is_dry_run, timeout)
        if scenario == "load" and arm == LANES:
            said["disturbed"] |= change
        return said

    monkeypatch.setattr(gpu_semipd, "start_arm", answer)
    result = gpu_semipd.run(make_context(is_dry_run=is_dry_run))
    failed = [record for record in result.records if record.status == "failed"]
    assert len(failed) == (message is not None)
    assert message is None or message in str(failed[0].error)


def test_an_engine_that_dies_or_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(scenario: str, arm: str, is_dry_run: bool, timeout: float) -> dict[str, Any]:
        if arm == LANES and scenario == "answers":
            raise RuntimeError("exit code 1: semipd does not run with CUDA")
        if arm == "stock_8192":
            raise subprocess.TimeoutExpired("engine", timeout)
        return start(scenario, arm, is_dry_run, timeout)

    monkeypatch.setattr(gpu_semipd, "start_arm", answer)
    records = {(record.case, record.arm): record for record in gpu_semipd.run(make_context()).records}
    assert "does not run with CUDA" in str(records["gpu_semipd_answers", LANES].error)
    assert "timed out" in str(records["gpu_semipd_disturbed", "stock_8192"].error)
    assert records["gpu_semipd_rate_4", LANES].status == "ok"


def test_without_time_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_semipd, "start_arm", lambda *_: pytest.fail("began"))
    result = gpu_semipd.run(make_context(gpu_semipd.FEWEST_SECONDS - 1))
    assert result.records == []
    assert result.left_out == [
        "answers stock_2048", "answers semipd", "load semipd", "load stock_2048", "load semipd_auto", "load stock_8192",
        "load stock_512",
    ]  # fmt: skip


def test_an_arm_that_fails_says_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_semipd.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        gpu_semipd.start_arm("load", LANES, True, 30)


def test_gaps_of_a_stream() -> None:
    assert Stream(times=[1.0, 1.5, 1.75]).gaps == [0.5, 0.25]
    assert Stream(times=[1.0]).gaps == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "load", "--arm", "stock", "--out", "x"], "stock_ and a number, for example stock_2048"),
        (["--scenario", "all", "--arm", "semipd", "--out", "x"], "invalid choice: 'all'"),
        (["--scenario", "load", "--arm", "semipd"], "arguments are required: --out"),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu_semipd_engine.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
