# SPDX-License-Identifier: Apache-2.0
"""The runner against stand-ins that start, answer, fail, hang and die; real engines are in test_run_engine.py."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import arms, run, runner
from bench.arms import EngineArm
from bench.case import ARMS, Case, parse_case
from bench.records import Metric, Record, load_records, record_path
from bench.runner import CaseRunner
from bench.serve import server as server_module
from bench.serve.server import list_group
from bench.tuning import CaseFailed, choose_setting

#: An engine that answers as bench.serve.offline does. STAND_IN is JSON: {"folder", and per arm {"cost": seconds,
#: "dies": "start", or number of its run, "hangs": number of its run}}; it notes what happens in folder/events.
STAND_IN = """
import http.server, json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = options["--served-model-name"]
arm = name.split("-")[0]
settings = json.loads(os.environ["STAND_IN"])
mine = {**settings.get(arm, {}), **json.loads(options.get("--setting", "{}"))}
runs = 0

def note(*words):
    with open(os.path.join(settings["folder"], "events"), "a") as events:
        print(arm, *words, file=events)

note("start", os.environ["VLLM_PLUGINS"] or "none", os.getpid())
if mine.get("dies") == "start":
    print("the engine has no memory", flush=True)
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/v1/models": mine.get("models", json.dumps({"data": [{"id": mine.get("name", name)}]})),
            "/metrics": f"vllm:iteration_tokens_total_count {10 * runs}\\n"
            f"vllm:iteration_tokens_total_sum {40 * runs}\\n" + ("vllm_ext:layers 4.0\\n" if arm == "pack" else ""),
        }
        self.answer(answers.get(self.path, "{}"))

    def do_POST(self):
        global runs
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        runs += 1
        note("run", asked["seed"])
        if mine.get("dies") == runs:
            print("segmentation fault", flush=True)
            os._exit(139)
        if mine.get("hangs") == runs:
            time.sleep(600)
        duration = mine.get("cost", 1.0) * (1 + asked["seed"] % 100 / 100)
        tokens = sum(request["output_tokens"] for request in asked["requests"])
        answer = {
            "completed": len(asked["requests"]) - mine.get("lost", 0), "failed": 0, "duration": duration,
            "output_throughput": tokens / duration,
        }
        answer.pop(mine.get("without"), None)
        self.answer(json.dumps(answer))

    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words):
        pass

http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""

CONTENT: dict[str, Any] = {
    "model": "none",
    "mode": "offline",
    "workload": {"name": "random", "num_requests": 2, "options": {"input_len": 4, "output_len": 8}},
    "metrics": ["output_throughput", "wall_per_step", "computed_tokens"],
    "start_limit": 30,
    "run_limit": 30,
}


class Bench:
    """A case on stand-ins, in folders of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, folder / "results"
        self._monkeypatch = monkeypatch
        self.script = folder / "stand_in.py"
        self.script.write_text(STAND_IN)
        self.lines: list[str] = []
        self.set()

    def set(self, **arms: dict[str, Any]) -> None:
        self._monkeypatch.setenv("STAND_IN", json.dumps({"folder": str(self.folder), **arms}))

    def make(self, repetitions: int = 2, resume: bool = False, **changes: Any) -> CaseRunner:
        return CaseRunner(
            self.case(**changes),
            self.out,
            self.folder,
            repetitions,
            resume,
            make_arm=partial(EngineArm, command=[sys.executable, str(self.script)]),
            say=self.lines.append,
        )

    def case(self, **changes: Any) -> Case:
        return parse_case({**CONTENT, **changes}, "trial")

    def events(self, kind: str) -> list[str]:
        """Words after `kind` of each noted event, behind the arm's name."""
        path = self.folder / "events"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [" ".join([words[0], *words[2:]]) for words in lines if words[1] == kind]

    def assert_nothing_runs(self) -> None:
        groups = [int(line.split()[-1]) for line in self.events("start")]
        assert groups, "no stand-in was started: the check would prove nothing"
        assert [group for group in groups if list_group(group)] == []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # Stand-ins are ready in a tenth of the time between two looks at an engine.
    monkeypatch.setattr(server_module, "POLL_SECONDS", 0.02)
    return Bench(tmp_path, monkeypatch)


def states(records: list[Record]) -> dict[str, str]:
    return {f"{record.arm}-{record.repetition}": record.status for record in records}


def test_pairs_alternate_and_are_recorded(bench: Bench) -> None:
    bench.set(pack={"cost": 2.0})
    records = bench.make(repetitions=3).run()
    warm = [f"{arm} {arms.WARMUP_SEED}" for arm in ("stock", "pack")]
    assert bench.events("run") == [*warm, "stock 0", "pack 0", "pack 1", "stock 1", "stock 2", "pack 2"]
    assert [line.split()[:2] for line in bench.events("start")] == [["stock", "none"], ["pack", "vllm_ext"]]
    assert states(records) == {f"{arm}-{n}": "ok" for arm in ("pack", "stock") for n in range(3)}
    pack = next(record for record in records if (record.arm, record.repetition) == ("pack", 1))
    # The seed is 1: the stand-in takes 2.0 * 1.01 s for 2 requests of 8 tokens and 10 steps.
    assert pack.metrics["output_throughput"].value == pytest.approx(16 / 2.02)
    assert pack.metrics["wall_per_step"].value == pytest.approx(202)
    assert pack.metrics["computed_tokens"].value == 40
    assert pack.features == {"vllm_ext:layers": 4.0}
    assert pack.settings["stock_arm"] == "stock"
    assert (pack.settings["position"], pack.seed) == (0, 1)
    comparison = run.compare_case(records)["output_throughput"]
    assert (comparison.ratio, comparison.verdict, comparison.pairs) == (pytest.approx(0.5), "loss", 3)
    bench.assert_nothing_runs()


def test_passes_take_turns_and_their_median_counts(bench: Bench) -> None:
    records = bench.make(repetitions=2, passes=3, warmup=0).run()
    assert bench.events("run") == [
        *("stock 0", "pack 0", "pack 1", "stock 1", "stock 2", "pack 2"),
        *("pack 3", "stock 3", "stock 4", "pack 4", "pack 5", "stock 5"),
    ]
    last = next(record for record in records if (record.arm, record.repetition) == ("stock", 1))
    assert last.metrics["wall_per_step"].value == pytest.approx(104)


def test_in_turn_and_restarts_start_engines_anew(bench: Bench) -> None:
    bench.make(repetitions=2, servers="in_turn", warmup=0).run()
    assert [line.split()[0] for line in bench.events("start")] == ["stock", "pack", "pack", "stock"]
    (bench.folder / "events").unlink()
    bench.make(repetitions=4, restart_every=2, warmup=0).run()
    assert [line.split()[0] for line in bench.events("start")] == ["stock", "pack"] * 2
    bench.assert_nothing_runs()


def test_failed_start_is_a_row_with_the_end_of_the_log(bench: Bench) -> None:
    bench.set(pack={"dies": "start"})
    with pytest.raises(CaseFailed, match=r"pack did not start 2 times in a row(?s:.)*the engine has no memory"):
        bench.make(repetitions=5).run()
    records = load_records(bench.out)
    # Two failures say as much as five, and the stock runs beside them are kept.
    assert states(records) == {"pack-0": "failed", "pack-1": "failed", "stock-0": "ok", "stock-1": "ok"}
    assert "exit code 3" in str(records[0].error)
    assert "the engine has no memory" in str(records[0].error)
    assert "repetition 1, failed: the server ended" in run.list_failures(records)[0]
    bench.assert_nothing_runs()


def test_death_in_a_run_is_a_row_and_the_next_pair_has_a_fresh_engine(bench: Bench) -> None:
    bench.set(stock={"dies": 3})
    records = bench.make(repetitions=3).run()
    assert states(records) == {
        **{f"pack-{n}": "ok" for n in range(3)},
        **{"stock-0": "ok", "stock-1": "failed", "stock-2": "ok"},
    }
    error = next(record.error for record in records if record.status == "failed")
    assert error is not None
    assert "has ended" in error
    assert "segmentation fault" in error
    assert run.compare_case(records)["output_throughput"].pairs == 2
    bench.assert_nothing_runs()


def test_hang_ends_at_the_limit(bench: Bench) -> None:
    bench.set(pack={"hangs": 3})
    began = time.monotonic()
    records = bench.make(repetitions=3, run_limit=1).run()
    assert time.monotonic() - began < 25
    assert {name for name, status in states(records).items() if status == "failed"} == {"pack-1"}
    assert "longer than its limit of 1 s" in str(records[1].error)
    bench.assert_nothing_runs()


def test_lost_request_fails_the_run(bench: Bench) -> None:
    bench.set(pack={"lost": 1})
    with pytest.raises(CaseFailed, match="1 of 2 requests completed"):
        bench.make(repetitions=2).run()


def test_taken_port_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((server_module.LOOPBACK, 0))
        ports = [taken.getsockname()[1]]
        monkeypatch.setattr(server_module, "find_free_port", lambda: ports.pop() if ports else find_free_port())
        find_free_port = partial(_find_free_port)
        records = bench.make(repetitions=1).run()
    assert set(states(records).values()) == {"ok"}
    # The first stand-in could not bind its port.
    assert [line.split()[0] for line in bench.events("start")] == ["stock", "stock", "pack"]


def test_strangers_server_is_never_measured(bench: Bench) -> None:
    bench.set(stock={"name": "somebody-else"})
    with pytest.raises(CaseFailed, match="another server answers on our port: somebody-else"):
        bench.make(repetitions=2).run()
    assert not any(line.startswith("stock") for line in bench.events("run"))
    assert len([line for line in bench.events("start") if line.startswith("stock")]) == 2 * arms.PORT_TRIES
    bench.assert_nothing_runs()


@pytest.mark.parametrize("said", ["not JSON", "[]", '{"detail": "no such page"}'])
def test_stranger_that_is_no_server_of_models(bench: Bench, said: str) -> None:
    bench.set(stock={"models": said})
    with pytest.raises(CaseFailed, match=r"another server answers on our port: [A-Za-z]*Error"):
        bench.make(repetitions=2).run()
    bench.assert_nothing_runs()


def test_resume_knows_changed_input_and_environment(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.make(repetitions=2).run()
    (bench.folder / "events").unlink()
    bench.make(repetitions=1, resume=True).run()
    assert bench.events("run") == []
    assert len(load_records(bench.out)) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    records = bench.make(repetitions=1, resume=True).run()
    assert len(records) == 2
    assert "4 records of another state of code, machine or case, or unfinished are removed" in "\n".join(bench.lines)
    assert records[0].settings["ambient"]["OMP_NUM_THREADS"] == "7"
    assert "secret" not in str(records)


def test_records_of_an_earlier_run_outlive_an_interrupted_start(bench: Bench) -> None:
    bench.make(repetitions=1).run()
    again = bench.make(repetitions=1)

    def interrupt(line: str) -> None:
        if "started and warm" in line:
            raise KeyboardInterrupt

    again.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert states(load_records(bench.out)) == {"pack-0": "ok", "stock-0": "ok"}


def test_best_setting_becomes_the_peer_and_is_recorded(bench: Bench) -> None:
    settings = [["--setting", json.dumps(one)] for one in ({"cost": 0.5}, {"cost": 0.7}, {"dies": "start"})]
    records = bench.make(repetitions=1, tune=settings).run()
    tuning = next(record for record in records if record.arm == "stock").settings["tuning"]
    assert tuning["args"] == ["--setting", '{"cost": 0.5}']
    assert tuning["metric"] == "output_throughput"
    assert [trial["value"] is None for trial in tuning["trials"]] == [False, False, False, True]
    assert "the engine has no memory" in tuning["trials"][3]["error"]
    # The other metrics too, of every run of a setting.
    assert tuning["trials"][1]["metrics"]["output_throughput"] == tuning["trials"][1]["values"]
    assert set(tuning["trials"][1]["metrics"]) == {"output_throughput", "wall_per_step", "computed_tokens"}
    stock = next(record for record in records if record.arm == "stock")
    assert '{"cost": 0.5}' in stock.settings["args"]
    assert run.compare_case(records)["output_throughput"].ratio == pytest.approx(0.5)
    bench.assert_nothing_runs()


def test_close_settings_run_again_in_turns(bench: Bench) -> None:
    settings = [["--setting", json.dumps({"cost": cost})] for cost in (0.5, 0.51, 0.9)]
    records = bench.make(repetitions=1, tune=settings, warmup=0).run()
    trials = records[0].settings["tuning"]["trials"]
    assert [len(trial["values"]) for trial in trials] == [3, 6, 6, 3]
    assert records[0].settings["tuning"]["args"] == settings[0]
    # Four settings alone, then the two that are close, both up at once, then the arms.
    assert len(bench.events("start")) == 4 + 2 + 2
    assert {f"tune-{number}" for number in range(4)} <= {path.name for path in bench.folder.iterdir()}
    bench.assert_nothing_runs()


def test_a_broken_answer_costs_one_run(bench: Bench) -> None:
    bench.set(pack={"cost": float("nan")})
    with pytest.raises(CaseFailed, match="ValueError"):
        bench.make(repetitions=2).run()
    bench.set(stock={"without": "completed"})
    with pytest.raises(CaseFailed, match="KeyError: 'completed'"):
        bench.make(repetitions=2).run()
    bench.assert_nothing_runs()


def test_a_missing_command_is_a_failed_run(bench: Bench) -> None:
    command = bench.make(repetitions=2)
    command.make_arm = partial(EngineArm, command=[str(bench.folder / "absent")])
    with pytest.raises(CaseFailed, match="FileNotFoundError"):
        command.run()
    assert set(states(load_records(bench.out)).values()) == {"failed"}


def test_failed_runs_do_not_replace_good_records(bench: Bench) -> None:
    bench.make(repetitions=1).run()
    bench.set(stock={"dies": 2}, pack={"dies": 2})
    with pytest.raises(CaseFailed, match=r"no run succeeded, older records stay:(?s:.)*segmentation fault"):
        bench.make(repetitions=1).run()
    assert states(load_records(bench.out)) == {"pack-0": "ok", "stock-0": "ok"}
    bench.set(pack={"dies": 2})
    assert states(bench.make(repetitions=1).run()) == {"pack-0": "failed", "stock-0": "ok"}


def test_record_has_every_pass_and_the_whole_workload(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(Path.home() / "cache"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 3}\n' * 2)
    workload = {"name": "custom", "num_requests": 2, "options": {"path": str(path)}}
    stock = bench.make(repetitions=1, passes=3, workload=workload).run()[1]
    values = stock.settings["by_pass"]["output_throughput"]
    assert values == pytest.approx([6 / 1.0, 6 / 1.01, 6 / 1.02])
    assert stock.metrics["output_throughput"].value == values[1]
    assert stock.settings["workload"]["path"] == "prompts.jsonl"
    assert stock.settings["workload"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stock.settings["ambient"]["VLLM_CACHE_ROOT"] == "~/cache"
    # Hidden folders are no reason to run again, another content is.
    (bench.folder / "events").unlink()
    bench.make(repetitions=1, passes=3, workload=workload, resume=True).run()
    assert bench.events("run") == []
    path.write_text('{"prompt": "b", "output_tokens": 3}\n' * 2)
    bench.make(repetitions=1, passes=3, workload=workload, resume=True).run()
    assert len(bench.events("run")) == 2 * (3 + 1)


def test_a_long_request_body_is_recorded_by_its_digest(bench: Bench) -> None:
    workload = {"name": "random", "num_requests": 2, "client_args": "--x 1"}
    for text, recorded in (("a", {"text": "a"}), ("a" * 5000, None)):
        case = bench.case(mode="server", workload={**workload, "extra_body": {"text": text}})
        described = runner.describe_workload(case)
        assert described["client_args"] == ["--x", "1"]
        assert described["extra_body"] == recorded or len(described["extra_body"]["sha256"]) == 64


def test_rates_of_zero_have_a_verdict_without_a_ratio() -> None:
    def make_records(pairs: int) -> list[Record]:
        values = {"stock": 0.0, "pack": 2.0}
        return [
            Record("c", arm, number, {"goodput": Metric(value, "requests/s", "higher")}, {}, {}, "0")
            for arm, value in values.items()
            for number in range(pairs)
        ]

    assert run.compare_case(make_records(6)) == {}
    described = run.describe_results({"c": make_records(6)})["cases"]["c"]["comparisons"]
    assert described == {"goodput": {"ratio": None, "verdict": "win"}}
    assert run.judge_case(make_records(5)) == {"goodput": "no difference"}


def test_choice_follows_the_direction_and_needs_a_value() -> None:
    trials = [{"args": [str(n)], "value": value, "error": None} for n, value in enumerate([2.0, None, 1.0, 1.0])]
    assert choose_setting(trials, "lower") == ["2"]
    assert choose_setting(trials, "higher") == ["0"]
    with pytest.raises(CaseFailed, match="no stock setting works: out of memory"):
        choose_setting([{"args": [], "value": None, "error": "out of memory"}], "lower")


def test_interrupt_keeps_what_ran_and_resume_goes_on(bench: Bench) -> None:
    first = bench.make(repetitions=3)

    def interrupt(line: str) -> None:
        if "2/3" in line:
            raise KeyboardInterrupt

    first.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        first.run()
    bench.assert_nothing_runs()
    assert states(load_records(bench.out)) == {"pack-0": "ok", "stock-0": "ok"}
    (bench.folder / "events").unlink()
    records = bench.make(repetitions=3, resume=True).run()
    assert len(records) == 6
    assert [line for line in bench.events("run") if len(line.split()[1]) < 3] == [
        *("pack 1", "stock 1", "stock 2", "pack 2")
    ]
    (bench.folder / "events").unlink()
    # Everything is there: no engine is started.
    assert len(bench.make(repetitions=3, resume=True).run()) == 6
    assert bench.events("start") == []


def test_resume_repeats_what_is_half_failed_or_of_another_case(bench: Bench) -> None:
    bench.make(repetitions=3).run()
    record_path(bench.out, "trial", "pack", 0).unlink()
    bench.set(stock={"dies": 2})
    (bench.folder / "events").unlink()
    bench.make(repetitions=3, resume=True, warmup=0).run()
    # Another warm-up is another case: all pairs are run again.
    assert len({line.split()[1] for line in bench.events("run")}) == 3
    (bench.folder / "events").unlink()
    bench.set()
    records = bench.make(repetitions=3, resume=True, warmup=0).run()
    # Only the pair whose stock died is run again, both its halves.
    assert sorted(bench.events("run")) == ["pack 1", "stock 1"]
    assert set(states(records).values()) == {"ok"}


def test_new_run_removes_pairs_of_a_longer_old_one(bench: Bench) -> None:
    bench.make(repetitions=3).run()
    other = record_path(bench.out, "other", "stock", 0)
    other.parent.mkdir()
    record = replace(load_records(bench.out)[0], case="other", arm="stock", repetition=0)
    other.write_text(json.dumps(runner_record(record)))
    assert len(bench.make(repetitions=1).run()) == 2
    assert other.is_file()


def runner_record(record: Record) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(record)


def test_failed_quantize_ends_the_case(bench: Bench) -> None:
    with pytest.raises(CaseFailed, match="vllm-ext quantize ended with exit code"):
        bench.make(pack={"quantize": "--no-such-option"}).run()


def test_both_arms_have_the_model_that_the_case_makes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def make(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        Path(command[command.index("-o") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(arms.subprocess, "run", make)
    case = bench.case(make_model="tiny-llama --layers 1", pack={"quantize": "--bits 4"})
    stock, pack = (arms.find_model(case, name, bench.folder) for name in ARMS)
    made = str(bench.folder / "made-model")
    assert (stock, pack) == (made, str(bench.folder / "pack-model"))
    # Once for both, and quantized for one.
    assert commands == [
        ["bench.models.make_model", "tiny-llama", "--layers", "1", "-o", made],
        ["vllm_ext.cli", "quantize", made, "--bits", "4", "-o", pack],
    ]


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind((server_module.LOOPBACK, 0))
        return int(probe.getsockname()[1])


COMMAND_LINE = """
import sys
from functools import partial
from bench import run, runner
from bench.arms import EngineArm
run.CaseRunner = partial(runner.CaseRunner, make_arm=partial(EngineArm, command=[sys.executable, sys.argv[1]]))
sys.exit(run.main(sys.argv[2:]))
"""


def start_command_line(bench: Bench, repository: Path, *options: str, **changes: Any) -> subprocess.Popen[str]:
    path = bench.folder / "trial.yaml"
    path.write_text(json.dumps({**CONTENT, **changes}))  # JSON is YAML
    command = [sys.executable, "-c", COMMAND_LINE, str(bench.script), str(path), "--out", str(bench.out), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=repository, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def test_command_line_prints_a_table_and_json(bench: Bench, repository: Path) -> None:
    bench.set(pack={"cost": 0.5})
    process = start_command_line(bench, repository, "--reps", "3", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "trial: 3 pairs" in stdout
    assert "[p10, p90]" in stdout
    assert "2.000 [2.000, 2.000]" in stdout
    result = json.loads(stdout.splitlines()[-1])["cases"]["trial"]
    assert result["comparisons"]["output_throughput"]["verdict"] == "win"
    assert result["failed"] == []
    assert result["records"] == 6


def test_command_line_reports_failure(bench: Bench, repository: Path) -> None:
    bench.set(pack={"dies": "start"})
    process = start_command_line(bench, repository)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "trial pack, repetition 1, failed: the server ended" in stderr
    assert "the engine has no memory" in stderr
    assert "output_throughput" in stdout


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signal_ends_everything_and_keeps_records(
    bench: Bench, repository: Path, number: signal.Signals, exit_code: int
) -> None:
    bench.set(pack={"hangs": 3})
    process = start_command_line(bench, repository, "--reps", "5")
    deadline = time.monotonic() + 60
    while "pack 1" not in bench.events("run"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code, stderr
    assert states(load_records(bench.out)) == {"pack-0": "ok", "stock-0": "ok"}
    bench.assert_nothing_runs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one case"),
        (["idel"], "did you mean 'idle'"),
        (["idle", "--reps", "0"], "--reps must be at least 1, got 0"),
        (["idle", "idle"], "two cases have one name"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as failure:
        run.main(arguments)
    assert failure.value.code == 2
    assert message in capsys.readouterr().err
