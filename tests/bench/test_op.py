# SPDX-License-Identifier: Apache-2.0
"""The comparison of operators: order, cold inputs, records, failures, verdicts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import op
from bench.comparison import compare_arms
from bench.kernels import binding
from bench.op import OpCase, choose_cases, compare_ops, count_input_sets, last_level_cache_bytes
from bench.records import load_records


class Recorder:
    """An arm that notes which input sets it saw and, with `calls` shared, when."""

    def __init__(self, name: str, calls: list[tuple[str, int]], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds

    def __call__(self, inputs: int) -> int:
        self.calls.append((self.name, inputs))
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return inputs


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "WARMUP_SECONDS", 0.0)
    # Asking git takes longer than these cases.
    environment = {"versions": {"torch": "0"}, "device": {"name": "CPU"}, "git_hash": "unknown"}
    monkeypatch.setattr(op, "describe_environment", lambda: environment)


def compare_recorders(repetitions: int = 2, **options: Any) -> tuple[list[Any], list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    arms = {name: Recorder(name, calls) for name in ("a", "b")}
    records = compare_ops("case", arms, int, 10, repetitions, cache_bytes=15, **options)
    # Warm-up calls come first; what is measured is at the end.
    measured = 2 * repetitions * records[0].settings["calls"]
    return records, calls[-measured:]


def test_arms_take_turns_and_the_order_turns() -> None:
    _, calls = compare_recorders(calls=6)
    names = "".join(name for name, _ in calls)
    pairs = [names[place : place + 2] for place in range(0, len(names), 2)]
    assert pairs.count("ab") == pairs.count("ba") == 6
    assert all(first != second for first, second in pairwise(pairs[:6]))
    # The second repetition begins with the other arm.
    assert pairs[0] != pairs[6]


def test_all_arms_see_all_inputs_equally_often_and_never_the_same_at_once() -> None:
    # 4 caches of 15 bytes at 10 bytes a call: 6 input sets, so 7 calls become 12.
    records, calls = compare_recorders(repetitions=1, calls=7)
    assert (records[0].settings["input_sets"], records[0].settings["calls"]) == (6, 12)
    for arm in "ab":
        assert sorted(inputs for name, inputs in calls if name == arm) == sorted([*range(6), *range(6)])
    rounds = [{inputs for _, inputs in calls[place : place + 2]} for place in range(0, len(calls), 2)]
    assert all(len(seen) == 2 for seen in rounds)


@pytest.mark.parametrize(
    ("call_bytes", "cold_bytes", "arms", "expected"),
    [(10, 60, 1, 6), (1000, 60, 3, 3), (60, 60, 1, 1), (1, 1 << 22, 2, op.MAX_INPUT_SETS)],
)
def test_number_of_input_sets(call_bytes: int, cold_bytes: int, arms: int, expected: int) -> None:
    assert count_input_sets(call_bytes, cold_bytes, arms) == expected


def test_a_case_can_ask_for_more_memory_than_the_caches_need() -> None:
    settings = compare_recorders(repetitions=1, cold_bytes=95)[0][0].settings
    assert (settings["input_sets"], settings["cold_bytes"], settings["cold"]) == (10, 95, True)


def test_a_working_set_too_small_to_be_cold_is_said_to_be_warm() -> None:
    settings = compare_ops("case", {"a": lambda _: None}, int, 1, 1, calls=1, cache_bytes=1 << 20)[0].settings
    assert settings["cold"] is False
    assert compare_recorders()[0][0].settings["cold"] is True


def test_memory_comes_back_only_after_several_caches() -> None:
    _, calls = compare_recorders(calls=12)
    for arm in "ab":
        seen = [inputs for name, inputs in calls if name == arm]
        for place, inputs in enumerate(seen):
            later = seen[place + 1 :]
            if inputs in later:
                # 10 bytes a call, both arms: what passes between two uses is four caches of 15 bytes.
                assert (later.index(inputs) + 1) * 10 >= op.COLD_FACTOR * 15


def test_records_carry_everything() -> None:
    records, _ = compare_recorders(repetitions=3, stock="b", settings={"tokens": 4}, features={"isa": "x"})
    assert [(record.arm, record.repetition) for record in records] == [(arm, n) for n in range(3) for arm in "ab"]
    record = records[0]
    assert (record.case, record.status, record.error, record.features) == ("case", "ok", None, {"isa": "x"})
    assert record.settings["tokens"] == 4
    assert record.settings["kind"] == "op"
    assert record.settings["stock_arm"] == "b"
    assert record.settings["working_set_bytes"] == 10
    assert {name: (metric.unit, metric.direction) for name, metric in record.metrics.items()} == {
        "latency": ("us", "lower"),
        "latency_p10": ("us", "none"),
        "latency_p90": ("us", "none"),
        "cpu_time": ("us", "lower"),
        "bandwidth": ("GB/s", "none"),
    }


def test_metrics_are_medians_of_the_calls_in_microseconds() -> None:
    metrics = op._summarize([(1000, 5000), (3000, 5000), (2000, 8000), (90_000, 2000), (2000, 5000)], 8000)
    assert metrics["latency"].value == 2.0
    assert metrics["latency_p10"].value == pytest.approx(1.4)
    assert metrics["latency_p90"].value == pytest.approx(3 + 0.6 * 87)
    assert metrics["cpu_time"].value == 5.0
    assert metrics["bandwidth"].value == 4.0


def test_bandwidth_as_a_part_of_the_ceilings() -> None:
    arms = {"read": Recorder("read", [], 2e-4), "op": Recorder("op", [], 4e-4), "bad": _refuse}
    sizes = {"read": 100, "op": 150, "bad": 1}
    records = compare_ops("case", arms, int, sizes, 2, calls=20, cache_bytes=10, ceiling="read")
    for repetition in range(2):
        by_arm = {record.arm: record.metrics for record in records if record.repetition == repetition}
        assert by_arm["read"]["ceiling_share"].value == 1.0
        ratio = by_arm["op"]["bandwidth"].value / by_arm["read"]["bandwidth"].value
        assert by_arm["op"]["ceiling_share"].value == pytest.approx(ratio)
        assert by_arm["op"]["ceiling_share"].value == pytest.approx(0.75, rel=0.2)
        assert by_arm["bad"] == {}
    assert "ceiling_share" not in compare_recorders()[0][0].metrics


def test_no_share_of_a_ceiling_that_failed() -> None:
    arms = {"read": _refuse, "op": Recorder("op", [])}
    records = compare_ops("case", arms, int, 10, 1, calls=2, cache_bytes=10, ceiling="read")
    assert records[1].metrics["ceiling_share"].value is None


def _refuse(inputs: int) -> None:
    raise RuntimeError("never")


def test_a_slower_arm_loses_and_an_equal_one_does_not() -> None:
    calls: list[tuple[str, int]] = []
    arms = {"a": Recorder("a", calls, 2e-4), "same": Recorder("same", calls, 2e-4), "slow": Recorder("s", calls, 4e-4)}
    records = compare_ops("case", arms, int, 10, 5, calls=20, cache_bytes=10)
    assert compare_arms(records, "latency", "a", "slow").verdict == "loss"
    assert compare_arms(records, "latency", "a", "slow").ratio == pytest.approx(0.5, rel=0.2)
    assert compare_arms(records, "latency", "a", "same").ratio == pytest.approx(1, rel=0.1)


def test_an_arm_that_raises_fails_alone() -> None:
    def refuse(inputs: int) -> None:
        raise RuntimeError("no such shape")

    calls: list[tuple[str, int]] = []
    records = compare_ops("case", {"good": Recorder("good", calls), "bad": refuse}, int, 10, 2, cache_bytes=15)
    bad = [record for record in records if record.arm == "bad"]
    assert [(record.status, record.error) for record in bad] == [("failed", "RuntimeError: no such shape")] * 2
    assert all(not record.metrics for record in bad)
    assert all(record.status == "ok" and record.metrics for record in records if record.arm == "good")


def test_an_arm_that_fails_late_keeps_its_earlier_repetitions() -> None:
    count = 0

    def fail_late(inputs: int) -> None:
        nonlocal count
        count += 1
        if count > op.WARMUP_CALLS + 8:
            raise MemoryError("full")

    records = compare_ops("case", {"late": fail_late}, int, 10, 3, calls=6, cache_bytes=15)
    assert [record.status for record in records] == ["ok", "failed", "failed"]


def test_the_device_is_waited_for_around_every_call() -> None:
    order: list[str] = []
    compare_ops(
        "case",
        {"a": lambda _: order.append("call")},
        int,
        10,
        1,
        calls=2,
        cache_bytes=1,
        synchronize=lambda: order.append("wait"),
    )
    assert order == ["wait", "call", "wait"] * (len(order) // 3)
    assert len(order) == 3 * (op.WARMUP_CALLS + 2)


def test_garbage_collection_is_left_as_it_was() -> None:
    import gc

    states: list[bool] = []
    compare_ops("case", {"a": lambda _: states.append(gc.isenabled())}, int, 10, 1, calls=2, cache_bytes=1)
    assert states[op.WARMUP_CALLS :] == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "has no arms"),
        ({"stock": "c"}, "stock 'c' of case 'case' is not one of its arms: a"),
        ({"repetitions": 0}, "at least 1, got 0 and 30"),
        ({"calls": 0}, "at least 1, got 1 and 0"),
        ({"ceiling": "read"}, "ceiling 'read' of case 'case' is not one of its arms: a"),
        ({"working_set_bytes": {"b": 1}}, "working_set_bytes names b; the arms are a"),
        ({"working_set_bytes": 0}, "of 'a' must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"arms": {"a": lambda _: None}, "make_inputs": int, "working_set_bytes": 1, "repetitions": 1, **change}
    with pytest.raises(ValueError, match=message):
        compare_ops("case", **arguments)


def test_last_level_cache_of_this_machine() -> None:
    size = last_level_cache_bytes()
    assert size >= 1 << 18
    assert size % 1024 == 0


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Callable[[Any], object]]], None]:
    def set_arms(arms: dict[str, Callable[[Any], object]]) -> None:
        case = OpCase("small", arms, int, 10, stock="a", calls=2, cache_bytes=1)
        monkeypatch.setattr(op, "list_cases", lambda: {"small": case})

    return set_arms


def test_command_line_writes_records(cases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases({"a": lambda _: None, "b": lambda _: None})
    assert op.main(["small", "--repetitions", "2", "--out", str(tmp_path)]) == 0
    records = load_records(tmp_path)
    assert [(record.case, record.arm, record.repetition) for record in records] == [
        ("small", arm, number) for arm in "ab" for number in range(2)
    ]
    assert "  a: " in capsys.readouterr().out


def test_command_line_says_that_an_arm_failed(cases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: int) -> None:
        raise RuntimeError("never")

    cases({"a": refuse})
    assert op.main(["--out", str(tmp_path), "--repetitions", "1"]) == 1
    assert "a: failed: RuntimeError: never" in capsys.readouterr().out


def test_command_line_names_unknown_cases(cases: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases({"a": lambda _: None})
    with pytest.raises(SystemExit) as stopped:
        op.main(["large"])
    assert stopped.value.code == 2
    assert "no operator case large; there are: small" in capsys.readouterr().err


def test_cases_are_chosen_by_name_and_pattern() -> None:
    cases = {name: OpCase(name, {}, int, 1, stock="a") for name in ("moe_1", "moe_4", "gemv_1")}
    assert choose_cases([], cases) == ["moe_1", "moe_4", "gemv_1"]
    assert choose_cases(["*_1"], cases) == ["moe_1", "gemv_1"]
    assert choose_cases(["moe_4", "moe_*"], cases) == ["moe_4", "moe_1"]
    with pytest.raises(ValueError, match=r"no operator case moe_\?\?; there are: moe_1, moe_4, gemv_1"):
        choose_cases(["moe_1", "moe_??"], cases)


def test_threads_are_bound_by_starting_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, environment: started.append((words[1:], environment)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1})
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    monkeypatch.delenv("GOMP_CPU_AFFINITY", raising=False)
    binding.restart_bound("bench.op", ["moe_*"])
    (words, environment) = started.pop()
    assert words == ["-m", "bench.op", "moe_*"]
    assert environment["GOMP_CPU_AFFINITY"] == "1 3"
    assert environment["OMP_NUM_THREADS"] == "2"
    runtime, other = environment["LD_PRELOAD"].split(":")
    assert Path(runtime).is_file()
    assert other == "libother.so"
    for name in ("LD_PRELOAD", "GOMP_CPU_AFFINITY"):
        monkeypatch.setenv(name, environment[name])
    binding.restart_bound("bench.op", ["moe_*"])
    assert not started


@pytest.mark.parametrize(("value", "cores"), [("", 7), ("0 1", 2), ("3", 1), ("0-3", 4), ("0-6:2,1 2", 5)])
def test_a_pinned_main_thread_does_not_hide_the_cores(value: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert binding.count_cores({"GOMP_CPU_AFFINITY": value}, default=7) == cores
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0 1")
    assert compare_recorders()[0][0].device["cores"] == 2


def test_records_say_how_threads_are_bound_without_naming_folders() -> None:
    environment = {"LD_PRELOAD": "/a/b/libgomp.so.1:/c/libother.so", "GOMP_CPU_AFFINITY": "0 1", "HOME": "/d"}
    assert binding.describe_binding(environment) == "LD_PRELOAD=libgomp.so.1:libother.so, GOMP_CPU_AFFINITY=0 1"
    assert binding.describe_binding({}) == "none"
    assert "binding" in compare_recorders()[0][0].settings


def test_shipped_cases_are_listed() -> None:
    cases = op.list_cases()
    assert "mixed_moe_1" in cases
    for shape in ("e60", "e128"):
        tokens = [cases[f"cpu_moe_{shape}_{tokens}"].settings["tokens"] for tokens in (1, 4, 16, 64, 256)]
        assert tokens == [1, 4, 16, 64, 256]
