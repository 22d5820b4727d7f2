# SPDX-License-Identifier: Apache-2.0
"""One engine that is the pack's and stock's in turn: what each setting asks for, the switch, and one real round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.records import Metric, Record, describe_environment, load_records, write_record
from bench.speculation.engines import OFF, OURS, read_cases
from bench.speculation.switched import PREFIX, Switch, find_finalists, list_arms, main, read_lengths, shorten
from tests.scheduling.real_scheduler import add_request, build_scheduler, hand_drafts, run_model

TABLE = (
    '{"method": "ngram", "num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": [[1, 2, 5], [3, 4, 1]]}'
)


def test_lengths_by_running_requests() -> None:
    fixed = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']
    assert read_lengths([], 8, 4) == [0, 0, 0, 0, 0]
    assert read_lengths(fixed, 8, 4)[1:] == [3, 3, 3, 3]
    assert read_lengths(["--speculative-config", TABLE], 8, 6)[1:] == [5, 5, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="asks for 3 drafts, and the engine's drafter makes 2"):
        read_lengths(fixed, 2, 4)


def test_a_setting_counts_once() -> None:
    """A table that has one length up to a case's concurrency is that length."""
    few, many = (shorten(case) for case in read_cases(["smartspec_chat_c1", "smartspec_chat_c16"], None))
    assert list(list_arms(few, 8, 32)) == [OURS, OFF, "k1", "k3", "k5", "k8"]
    assert list(list_arms(many, 8, 32)) == [OURS, OFF, "k1", "k3", "k5", "k8", "table8_3_1", "table5_1_0"]
    assert (few.workload.num_requests, many.workload.num_requests) == (4, 48)


def test_who_may_be_the_best_goes_on(tmp_path: Path) -> None:
    """By the repetitions of all, not by those that only some have."""
    [case] = read_cases(["smartspec_chat_c4"], None)
    environment = describe_environment()
    for arm, values in {OURS: [100, 100, 100], OFF: [50, 50], "k3": [96, 98], "k8": [110, 100, 1]}.items():
        for repetition, value in enumerate(values):
            metrics = {"output_throughput": Metric(float(value), "tokens/s", "higher")}
            settings = {"model": case.model, "started_for_repetition": repetition}
            write_record(
                tmp_path, Record(f"{PREFIX}_{case.name}", arm, repetition, metrics, settings=settings, **environment)
            )
    assert find_finalists(case, 2, tmp_path, environment["git_hash"]) == ["k3", "k8"]


def run_step(scheduler: Any, drafts: int) -> Any:
    output = scheduler.schedule()
    scheduler.update_from_output(output, run_model(output, lambda rid, tokens: [*tokens[:1], 9]))
    hand_drafts(scheduler, {rid: [7] * drafts for rid in scheduler.requests})
    return output


def test_stock_runs_until_the_pack_is_asked_for(tmp_path: Path) -> None:
    scheduler = build_scheduler(4, tmp_path)
    taught: list[Any] = []
    observe = scheduler._controller.observe
    scheduler._controller.observe = lambda *arguments: (taught.append(arguments), observe(*arguments))
    switch = Switch(scheduler)
    switch.use_stock([0, 2, 3, *[0] * 6])
    add_request(scheduler, "a")
    assert run_step(scheduler, 2).num_spec_tokens_to_schedule == 2
    add_request(scheduler, "b")
    output = run_step(scheduler, 3)
    assert output.num_spec_tokens_to_schedule == 3
    # Nothing is cut, chosen or learned.
    assert len(output.scheduled_spec_decode_tokens["a"]) == 2
    assert not hasattr(output, "draft_lengths")
    assert not taught
    switch.use_pack()
    output = run_step(scheduler, 4)
    assert set(output.draft_lengths) == {"a", "b"}
    assert len(taught) == 1


@pytest.mark.parametrize(
    "arguments", [["--repetitions", "0"], ["--finals", "-1"], ["no_such_case"], ["smartspec_chat", "idle"]]
)
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


@pytest.mark.engine
@pytest.mark.slow
def test_a_round_of_all_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["smartspec_chat_c4", "--repetitions", "1", "--finals", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    finals = {record.arm for record in load_records(tmp_path) if record.repetition == 1}
    assert OURS in finals
    assert OFF not in finals
    records = {record.arm: record for record in load_records(tmp_path) if record.repetition == 0}
    assert set(records) == {OURS, OFF, "k1", "k3", "k5", "k8"}
    assert all(record.status == "ok" and record.case == "switched_smartspec_chat_c4" for record in records.values())
    # The switch does something: more drafts, fewer steps.
    steps = {arm: record.metrics["steps"].value or 0 for arm, record in records.items()}
    assert steps[OFF] > 1.2 * steps["k1"] > 1.2 * steps["k8"]
    assert steps[OFF] > 1.5 * steps[OURS]
    assert "best of stock" in capsys.readouterr().out
    # What is there is not measured again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert main([*arguments, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before
