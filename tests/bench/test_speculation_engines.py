# SPDX-License-Identifier: Apache-2.0
"""Every setting of stock and the pack's on whole engines: names of arms, shared engines, and one real round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.records import Metric, Record, describe_environment, load_records
from bench.speculation.engines import (
    FILES,
    OFF,
    OURS,
    compare_draws,
    compare_held_out,
    describe_case,
    main,
    make_engines,
    name_setting,
    read_cases,
)


def test_arms_are_named_by_their_lengths(tmp_path: Path) -> None:
    cases = read_cases(FILES, None)
    assert {case.workload.options["max_concurrency"] for case in cases} == {1, 4, 16, 32}
    names = list(make_engines(cases[0], tmp_path))
    assert names == [OFF, "k1", "k3", "k5", "k8", "table8_3_1", "table5_1_0", OURS]


@pytest.mark.parametrize("arguments", [["--max-num-seqs", "4"], ["--speculative-config"], ["a", "b", "c"]])
def test_settings_that_are_none_of_speculation(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="one --speculative-config, got"):
        name_setting(arguments)


def test_a_given_model_is_none_to_be_made() -> None:
    [made] = read_cases(["smartspec_larger_chat_c4"], None)
    assert describe_case(made)["make_model"][0] == "tiny-llama"
    [given] = read_cases(["smartspec_larger_chat_c4"], "x")
    assert (given.model, given.make_model) == ("x", ())
    assert "make_model" not in describe_case(given)


def test_cases_that_do_not_share_engines() -> None:
    with pytest.raises(ValueError, match="share their engines, and args differs"):
        read_cases(["smartspec_chat", "idle_offline"], None)


def make_record(arm: str, repetition: int, value: float) -> Record:
    metrics = {"output_throughput": Metric(value, "tokens/s", "higher")}
    settings = {"started_for_repetition": repetition // 2 * 2}
    return Record("engine_a", arm, repetition, metrics, **describe_environment(), settings=settings)


def test_a_draw_counts_once() -> None:
    """Two pairs of one draw that agree are one witness, not two."""
    ratios = (1.0, 1.0, 2.0, 2.0)
    records = [make_record("k3", number, 100.0) for number in range(4)]
    # Whatever ours did beside other settings is no part of it.
    records += [make_record(OURS, number, 100.0 * ratio) for number, ratio in enumerate((*ratios, 9.0, 9.0))]
    found = compare_draws(records, "k3")
    assert found.ratio == pytest.approx(2**0.5)
    assert (found.stock, found.ours) == (100.0, 150.0)
    # Student's t of two values, far wider than that of four.
    assert found.low < 0.2
    assert found.high > 10


def test_the_best_by_other_draws() -> None:
    """Two settings that are equal but for luck: each draw is compared with the one that was better in the others."""
    by_draw = {"k1": (100.0, 110.0, 130.0), "k3": (120.0, 100.0, 100.0)}
    records = [make_record(OURS, 2 * draw, 100.0) for draw in range(3)]
    records += [
        make_record(arm, 2 * draw, value) for arm, values in by_draw.items() for draw, value in enumerate(values)
    ]
    # By the same runs k1, which is ahead by luck; by the other draws k1, k1 and k3.
    assert min(compare_draws(records, arm).ratio for arm in by_draw) == pytest.approx((1 / 1.1 / 1.3) ** (1 / 3))
    held_out = compare_held_out(records)
    assert held_out is not None
    ratio, low, high = held_out
    assert ratio == pytest.approx((1 / 1.0 / 1.1 / 1.0) ** (1 / 3))
    assert low < ratio < high
    assert compare_held_out([record for record in records if record.repetition == 0]) is None
    # An interrupted run: of the second draw there is nothing to compare yet.
    assert compare_held_out([one for one in records if one.repetition == 0 or one.arm == OURS]) is None


def test_settings_of_one_name_are_refused(tmp_path: Path) -> None:
    [case] = read_cases(["smartspec_chat_c4"], None)
    with pytest.raises(ValueError, match="two settings of stock would be the arm k1"):
        make_engines(replace(case, tune=(*case.tune, case.tune[0])), tmp_path)


@pytest.mark.parametrize("arguments", [["--draws", "0"], ["no_such_case"], ["smartspec_chat", "idle"]])
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


@pytest.mark.engine
@pytest.mark.slow
def test_a_round_of_all_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["smartspec_chat_c4", "--draws", "1", "--repetitions", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    records = load_records(tmp_path)
    assert {record.case for record in records} == {"engine_smartspec_chat_c4"}
    assert len(records) == 8
    for record in records:
        assert record.status == "ok"
        assert (record.metrics["output_throughput"].value or 0) > 0
        # The pack is active on its side, and not even loaded on the others.
        assert ("vllm_ext:smartspec_planned_tokens_total" in str(record.features)) == (record.arm == OURS)
    assert "best of stock" in capsys.readouterr().out
    # What is there is not measured again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert main([*arguments, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before
