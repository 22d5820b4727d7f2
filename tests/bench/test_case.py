# SPDX-License-Identifier: Apache-2.0
"""Cases: the shipped ones are valid, and a mistake is named together with its mend."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.case import ARMS, CASES, Case, find_case, find_cases, load_cases, parse_case, resolve_model
from bench.models.make_model import NAMES
from bench.records import RESULTS, read_record, record_path
from bench.strict import CaseError

MINIMAL: dict[str, Any] = {"model": "bench/models/tiny_moe", "workload": {"name": "random", "num_requests": 4}}


def parse(**changes: Any) -> Case:
    return parse_case({**copy.deepcopy(MINIMAL), **changes}, "trial")


def parse_workload(**changes: Any) -> Case:
    mode = changes.pop("mode", "server")
    return parse(mode=mode, workload={**MINIMAL["workload"], **changes})


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cases_are_valid(path: Path) -> None:
    for case in load_cases(path):
        assert case.name.startswith(path.stem)
        assert find_cases(case.name) == [case]
        assert case.description
        assert case.repetitions >= 5
        assert Path(resolve_model(case.model), "config.json").is_file()
        # Where a model is made, that directory gives its tokenizer.
        assert not case.make_model or case.make_model[0] in NAMES
        # CPU time stands beside wall time.
        assert "cpu_per_step" in case.metrics


def test_a_made_model_is_part_of_what_records_compare_by() -> None:
    made = parse(make_model="tiny-llama --layers 3")
    assert made.make_model == ("tiny-llama", "--layers", "3")
    assert len({parse().digest, made.digest, parse(make_model="tiny-llama").digest}) == 3
    # Records of cases from before there were such models still belong to their case.
    stored = read_record(record_path(RESULTS, "idle", "stock", 0)).settings["case_digest"]
    assert find_cases("idle")[0].digest == stored


def test_a_file_may_stand_for_several_numbers_of_concurrent_requests(tmp_path: Path) -> None:
    content = {"model": "x", "workload": {"name": "random"}, "concurrency": {1: 16, 8: 64}}
    path = tmp_path / "load.yaml"
    path.write_text(yaml.safe_dump(content))
    cases = load_cases(path)
    assert [case.name for case in cases] == ["load_c1", "load_c8"]
    assert [case.workload.num_requests for case in cases] == [16, 64]
    assert [case.workload.options["max_concurrency"] for case in cases] == [1, 8]
    assert cases[0].digest != cases[1].digest
    with pytest.raises(CaseError, match="no case 'smartspec_chat_c3'; did you mean 'smartspec_chat_c"):
        find_cases("smartspec_chat_c3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": [1, 8]}, r"concurrency is \[1, 8\], expected \{concurrent: requests, ...\}"),
        ({"concurrency": {0: 8}}, "concurrency names 0 requests"),
        ({"concurrency": {4: 0}}, "num_requests is 0"),
        ({"concurrency": {4: 8}, "workload": {"name": "random", "num_requests": 8}}, "concurrency sets num_requests"),
    ],
)
def test_concurrency_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(yaml.safe_dump({"model": "x", "workload": {"name": "random"}, **changes}))
    with pytest.raises(CaseError, match=message):
        load_cases(path)


def test_shipped_cases_are_there() -> None:
    names = {path.stem for path in CASES.glob("*.yaml")}
    assert {"idle", "mxmoe_online", "mxmoe_packed"} <= names
    (idle,) = find_cases("idle")
    assert idle.stock == idle.pack


def test_defaults() -> None:
    case = parse()
    assert (case.mode, case.repetitions, case.servers, case.warmup) == ("server", 6, "together", 1)
    assert list(case.metrics) == ["ttft", "tpot", "output_throughput", "cpu_per_step", "cpu_per_token"]
    assert case.tune_metric == "ttft"


def test_options_may_be_a_line_or_a_list() -> None:
    case = parse(args="--a 1 --b '{\"x\": 2}'", pack={"args": ["--c", 3, 0.5]}, tune=["--d 4", ["--e", 5]])
    assert case.args == ("--a", "1", "--b", '{"x": 2}')
    assert case.pack.args == ("--c", "3", "0.5")
    assert case.tune == (("--d", "4"), ("--e", "5"))


def test_metric_of_the_server_has_a_unit_and_a_direction() -> None:
    metric = {"name": "bytes", "prometheus": "vllm_ext:x", "kind": "gauge", "unit": "bytes", "direction": "lower"}
    measure = parse(metrics=["tpot", metric]).metrics["bytes"]
    assert (measure.source, measure.key, measure.unit, measure.direction) == ("gauge", "vllm_ext:x", "bytes", "lower")
    assert parse(metrics=["tpot"]).metrics["tpot"].unit == "ms"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle' in the case; did you mean 'mode'?"),
        ({"pack": {"arg": "x"}}, "unknown key 'arg' in pack; did you mean 'args'?"),
        ({"pack": ["x"]}, r"pack is \['x'\], expected a mapping"),
        ({"mode": "serve"}, "mode is 'serve'; did you mean 'server'?"),
        ({"servers": "both"}, "servers is 'both'; there are: together, in_turn"),
        ({"metrics": ["tpott"]}, "no metric 'tpott'; did you mean 'tpot'?"),
        ({"metrics": ["tpot", "tpot"]}, "'tpot' is listed twice"),
        ({"metrics": ["steps"]}, "at least one must have a direction"),
        ({"metrics": ["goodput"]}, "'goodput' needs workload.goodput"),
        ({"metrics": [{"name": "x", "prometheus": "y", "kind": "gauge"}]}, "needs the key 'unit'"),
        ({"metrics": "tpot"}, "expected a list of names"),
        ({"repetitions": 0}, "repetitions is 0, expected a whole number from 1 up"),
        ({"repetitions": True}, "repetitions is True"),
        ({"run_limit": float("nan")}, "run_limit is nan"),
        ({"run_limit": "5 s"}, "run_limit is '5 s'"),
        ({"args": [True]}, "write true and false in quotes"),
        ({"env": {"VLLM_PLUGINS": "x"}}, "VLLM_PLUGINS is what tells the arms apart"),
        ({"tune_metric": "tpot"}, "tune_metric chooses among tune, which is empty"),
        ({"tune_metric": "e2el", "tune": ["--x"]}, "tune_metric is 'e2el'"),
        ({"stock": {"quantize": "--bits 3"}}, "give stock.model"),
        ({"make_model": "tiny-llama", "pack": {"model": "x"}}, "remove stock.model and pack.model"),
        ({"servers": "in_turn", "restart_every": 1}, "restart_every has no meaning"),
        ({"model": 5}, "model is 5, expected text"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError, match=message.replace("?", r"\?")):
        parse(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "randm"}, "workload.name is 'randm'; did you mean 'random'?"),
        ({"num_requests": 0}, "workload.num_requests is 0"),
        ({"options": {"input_length": 1}}, "unknown key 'input_length' in workload.options; did you mean 'input_len'?"),
        ({"name": "timed_trace", "options": {"path": "x", "request_rate": 1}}, "unknown key 'request_rate'"),
        ({"name": "custom"}, "workload.options needs the key 'path'"),
        ({"goodput": {"ttfs": 1}}, "unknown key 'ttfs' in workload.goodput; did you mean 'ttft'?"),
        ({"mode": "offline", "goodput": {"ttft": 1}}, "workload.goodput needs a server"),
        ({"mode": "offline", "options": {"request_rate": 1}}, "workload.options.request_rate needs a server"),
        ({"mode": "offline", "options": {"range_ratio": 0.5}}, "workload.options.range_ratio needs a server"),
        ({"mode": "offline", "name": "tool_calls"}, "workload.name 'tool_calls' needs a server"),
        ({"mode": "offline", "name": "bursty"}, "workload.name 'bursty' needs a server"),
    ],
)
def test_mistakes_of_the_workload_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError, match=message.replace("?", r"\?")):
        parse_workload(**change)


def test_latency_needs_a_server() -> None:
    with pytest.raises(CaseError, match="'ttft' is measured at a server"):
        parse(mode="offline", metrics=["ttft"])


def test_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    with pytest.raises(CaseError, match=r"broken\.yaml"):
        load_cases(path)
    path.write_text("just text")
    with pytest.raises(CaseError, match=r"broken\.yaml: the case is 'just text', expected a mapping"):
        load_cases(path)
    path.write_text("model: x")
    with pytest.raises(CaseError, match=r"broken\.yaml: the case needs the key 'workload'"):
        load_cases(path)
    with pytest.raises(CaseError, match="no case file"):
        find_case(str(tmp_path / "absent.yaml"))
    with pytest.raises(CaseError, match="no case 'idel'; did you mean 'idle'"):
        find_case("idel")


def test_digest_tells_cases_apart_but_not_their_length() -> None:
    case = parse()
    assert case.digest == parse(repetitions=9, description="other words").digest
    others = [parse(seed=1), parse(pack={"args": "--x"}), parse_workload(num_requests=5), parse(env={"A": "1"})]
    assert len({case.digest, *(other.digest for other in others)}) == 5


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_anything_else_is_a_case_error(content: Any) -> None:
    for key in ("model", "mode", "args", "pack", "workload", "metrics", "tune", "seed", "run_limit", "env"):
        try:
            case = parse(**{key: content})
        except CaseError:
            continue
        assert set(ARMS) == {"stock", "pack"}
        assert case.digest


def test_case_is_plain_yaml() -> None:
    text = yaml.safe_dump(MINIMAL)
    assert parse_case(yaml.safe_load(text), "trial") == parse()
