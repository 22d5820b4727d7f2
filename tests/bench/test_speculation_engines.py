# SPDX-License-Identifier: Apache-2.0
"""Every setting of stock and the pack's on whole engines: names of arms, shared engines, and one real round."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.records import load_records
from bench.speculation.engines import FILES, OFF, OURS, main, make_engines, name_setting, read_cases


def test_arms_are_named_by_their_lengths(tmp_path: Path) -> None:
    cases = read_cases(FILES, None)
    assert {case.workload.options["max_concurrency"] for case in cases} == {1, 4, 16, 32}
    names = list(make_engines(cases[0], tmp_path))
    assert names == [OFF, "k1", "k3", "k5", "k8", "table8_3_1", "table5_1_0", OURS]


@pytest.mark.parametrize("arguments", [["--max-num-seqs", "4"], ["--speculative-config"], ["a", "b", "c"]])
def test_settings_that_are_none_of_speculation(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="one --speculative-config, got"):
        name_setting(arguments)


def test_cases_that_do_not_share_engines() -> None:
    with pytest.raises(ValueError, match="share their engines, and args differs"):
        read_cases(["smartspec_chat", "idle_offline"], None)


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
