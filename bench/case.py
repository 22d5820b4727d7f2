# SPDX-License-Identifier: Apache-2.0
"""A benchmark case: which two arms, under which load, and what is measured. Read from strict YAML.

docs/benchmarks.md describes every key. An unknown key is an error that names the nearest known one, because a
misspelt option that is ignored measures something else than its author believes.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bench.measures import MEASURES, Measure
from bench.records import ROOT, Direction, check_name
from bench.strict import CaseError, check_keys, read_choice, read_list, read_mapping, read_number, read_text, suggest

CASES = Path(__file__).parent / "cases"
ARMS = ("stock", "pack")
#: Arms without a case's `metrics`: wall time beside CPU time, which a busy machine disturbs less.
DEFAULT_METRICS = {
    "server": ("ttft", "tpot", "output_throughput", "cpu_per_step", "cpu_per_token"),
    "offline": ("output_throughput", "wall_per_step", "cpu_per_step", "cpu_per_token"),
}
#: Data sets of `vllm bench serve` itself: {our option: its flag}. All others are made by `bench.workloads`.
CLIENT_DATASETS: dict[str, dict[str, str]] = {
    "random": {
        "input_len": "--random-input-len",
        "output_len": "--random-output-len",
        "range_ratio": "--random-range-ratio",
        "prefix_len": "--random-prefix-len",
    },
    "prefix_repetition": {
        "prefix_len": "--prefix-repetition-prefix-len",
        "suffix_len": "--prefix-repetition-suffix-len",
        "num_prefixes": "--prefix-repetition-num-prefixes",
        "output_len": "--prefix-repetition-output-len",
    },
    "custom": {"path": "--dataset-path", "output_len": "--custom-output-len"},
    "timed_trace": {"path": "--dataset-path", "time_scale": "--timed-trace-sec-multiplier"},
}
#: When requests are sent. Traces have times of their own.
ARRIVAL_FLAGS = {
    "request_rate": "--request-rate",
    "burstiness": "--burstiness",
    "max_concurrency": "--max-concurrency",
}

Mode = Literal["server", "offline"]
Servers = Literal["together", "in_turn"]


@dataclass(frozen=True)
class Arm:
    """Options of one side. `quantize` are options of `vllm-ext quantize`, run once to make this arm's model."""

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    quantize: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine; `options` are those of the workload, `client_args` further ones of the client."""

    name: str
    num_requests: int
    options: Mapping[str, Any] = field(default_factory=dict)
    goodput: Mapping[str, float] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    client_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One comparison. `args` and `env` belong to both arms; `tune` lists stock settings, of which the best is the peer.

    make_model     options of `bench.models.make_model`, which makes what both arms serve; its tokenizer is `model`'s
    servers        "together": both stay up and take turns, the other one idle; an engine start is not paid per run.
                   "in_turn": one at a time, started anew for every run, for models that do not fit twice
    passes         times that the arms take turns within one repetition; its record holds the medians. Short passes in
                   quick turns meet the same disturbances; each is one start of the client, or none offline
    restart_every  with "together": pairs after which both are started anew; 0 for never
    warmup         discarded runs of each engine after its start
    run_limit      seconds that one run may take; start_limit: that one start may take
    """

    name: str
    description: str
    model: str
    stock: Arm
    pack: Arm
    workload: Workload
    metrics: Mapping[str, Measure]
    mode: Mode = "server"
    make_model: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    tune: tuple[tuple[str, ...], ...] = ()
    tune_metric: str = ""
    repetitions: int = 6
    seed: int = 0
    passes: int = 1
    servers: Servers = "together"
    restart_every: int = 0
    warmup: int = 1
    run_limit: float = 300.0
    start_limit: float = 300.0

    def arm(self, name: str) -> Arm:
        """The arm called `name`, "stock" or "pack"."""
        return {"stock": self.stock, "pack": self.pack}[name]

    @property
    def digest(self) -> str:
        """Fingerprint of everything that defines a run but the number of repetitions: records of one digest compare."""
        content = asdict(self)
        del content["repetitions"], content["description"]
        if not self.make_model:
            # Younger than records whose digest must stay what it is.
            del content["make_model"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def find_case(text: str) -> Path:
    """The file of a case: a path, or the name of one in bench/cases. Raises CaseError with the nearest name."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise CaseError(f"no case file {text}")
        return path
    known = {one.stem: one for one in sorted(CASES.glob("*.yaml"))}
    if text not in known:
        raise CaseError(f"no case {text!r}{suggest(text, known)}")
    return known[text]


def load_cases(path: Path) -> list[Case]:
    """Read and check a file: one case, or one for each number of its `concurrency`. Raises CaseError."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CaseError(f"{path}: {error}") from error
    try:
        return [parse_case(one, name) for name, one in spread_concurrency(content, path.stem).items()]
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from error


def find_cases(text: str) -> list[Case]:
    """The cases that a command line names: a file, its name in bench/cases, or one case of such a file, `chat_c4`.

    Raises CaseError with the nearest name.
    """
    stem, _, number = text.rpartition("_c")
    if stem and number.isdigit() and (CASES / f"{stem}.yaml").is_file():
        cases = {case.name: case for case in load_cases(find_case(stem))}
        if text not in cases:
            raise CaseError(f"no case {text!r}{suggest(text, cases)}")
        return [cases[text]]
    return load_cases(find_case(text))


def spread_concurrency(content: Any, name: str) -> dict[str, Any]:
    """{name: content} of the cases that a file stands for.

    With `concurrency: {1: 16, 4: 48}` these are `NAME_c1` and `NAME_c4`, with that workload.options.max_concurrency and
    that workload.num_requests. Raises CaseError.
    """
    if not isinstance(content, dict) or "concurrency" not in content:
        return {name: content}
    numbers = content["concurrency"]
    if not isinstance(numbers, dict) or not numbers:
        raise CaseError(f"concurrency is {numbers!r}, expected {{concurrent: requests, ...}}, for example {{8: 64}}")
    workload = read_mapping(content, "workload", "")
    options = read_mapping(workload, "options", "workload.")
    for key, place in (("max_concurrency", options), ("num_requests", workload)):
        if key in place:
            raise CaseError(f"concurrency sets {key}: remove it from the workload")
    rest = {key: value for key, value in content.items() if key != "concurrency"}
    cases = {}
    for number in numbers:
        if type(number) is not int or number < 1:
            raise CaseError(f"concurrency names {number!r} requests, expected a whole number of at least 1")
        cases[f"{name}_c{number}"] = {
            **rest,
            "workload": {
                **workload,
                "num_requests": numbers[number],
                "options": {**options, "max_concurrency": number},
            },
        }
    return cases


def parse_case(content: Any, name: str) -> Case:
    """A case from the content of its file, whose stem is its name. Raises CaseError."""
    keys = (
        "description",
        "model",
        "make_model",
        "mode",
        "args",
        "env",
        "stock",
        "pack",
        "tune",
        "tune_metric",
        "workload",
        "metrics",
    )
    limits = ("repetitions", "seed", "passes", "servers", "restart_every", "warmup", "run_limit", "start_limit")
    given = check_keys(content, "the case", (*keys, *limits), required=("model", "workload"))
    try:
        check_name("case", name)
    except ValueError as error:
        raise CaseError(str(error)) from error
    mode: Mode = read_choice(given, "mode", get_args(Mode), "server")
    workload = _parse_workload(given["workload"], mode)
    metrics = _parse_metrics(given.get("metrics", list(DEFAULT_METRICS[mode])), mode, workload)
    case = Case(
        name=name,
        description=read_text(given, "description", ""),
        model=read_text(given, "model", ""),
        stock=_parse_arm(given.get("stock"), "stock"),
        pack=_parse_arm(given.get("pack"), "pack"),
        workload=workload,
        metrics=metrics,
        mode=mode,
        make_model=_parse_args(given.get("make_model"), "make_model"),
        args=_parse_args(given.get("args"), "args"),
        env=_parse_env(given.get("env"), "env"),
        tune=tuple(_parse_args(one, f"tune[{i}]") for i, one in enumerate(read_list(given, "tune"))),
        tune_metric=_parse_tune_metric(given, metrics),
        repetitions=read_number(given, "repetitions", 6, low=1, whole=True),
        seed=read_number(given, "seed", 0, low=0, whole=True),
        passes=read_number(given, "passes", 1, low=1, whole=True),
        servers=read_choice(given, "servers", get_args(Servers), "together"),
        restart_every=read_number(given, "restart_every", 0, low=0, whole=True),
        warmup=read_number(given, "warmup", 1, low=0, whole=True),
        run_limit=read_number(given, "run_limit", 300.0, low=1),
        start_limit=read_number(given, "start_limit", 300.0, low=1),
    )
    if case.servers == "in_turn" and (case.restart_every or case.passes > 1):
        key = "restart_every" if case.restart_every else "passes"
        raise CaseError(f"{key} has no meaning with servers: in_turn, which starts an engine for every run")
    if case.make_model and (case.stock.model or case.pack.model):
        raise CaseError("make_model makes the model of both arms; remove stock.model and pack.model")
    if case.stock.quantize:
        raise CaseError("stock.quantize: the stock arm serves what stock vLLM reads; give stock.model")
    return case


def resolve_model(model: str) -> str:
    """A model's directory: as given, or relative to the repository; anything else is left to vLLM (a hub name)."""
    for path in (Path(model), ROOT / model):
        if path.is_dir():
            return str(path.resolve())
    return model


def _parse_arm(content: Any, where: str) -> Arm:
    given = check_keys({} if content is None else content, where, ("args", "env", "model", "quantize"))
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise CaseError(f"{where}.model is {model!r}, expected a directory or a hub name")
    return Arm(
        args=_parse_args(given.get("args"), f"{where}.args"),
        env=_parse_env(given.get("env"), f"{where}.env"),
        model=model,
        quantize=_parse_args(given.get("quantize"), f"{where}.quantize"),
    )


def _parse_workload(content: Any, mode: Mode) -> Workload:
    from bench.workloads.prepare import WORKLOADS, list_options

    keys = ("name", "num_requests", "options", "goodput", "extra_body", "client_args")
    given = check_keys(content, "workload", keys, required=("name", "num_requests"))
    name = read_choice(given, "name", (*CLIENT_DATASETS, *WORKLOADS), "", where="workload.")
    own: Iterable[str] = CLIENT_DATASETS.get(name) or list_options(name)
    has_times = name in ("timed_trace", "bursty", "phases", "trace")
    allowed = set(own) | (set() if has_times else set(ARRIVAL_FLAGS))
    needs_path = name in ("custom", "timed_trace")
    options = check_keys(
        given.get("options") or {}, "workload.options", sorted(allowed), required=("path",) if needs_path else ()
    )
    if mode == "offline":
        refused = [key for key in ("goodput", "extra_body", "client_args") if given.get(key)]
        refused += [f"options.{key}" for key in ("request_rate", "burstiness") if key in options]
        if has_times or name in ("prefix_repetition", "tool_calls", "json_schema"):
            # The last two are about the structured body of a request, which an offline run does not have.
            refused = [f"name {name!r}"]
        if name == "random":
            # An offline engine draws prompts of one length: the same name must not mean another load.
            refused += [f"options.{key}" for key in ("range_ratio", "prefix_len") if key in options]
        if refused:
            raise CaseError(f"workload.{refused[0]} needs a server that requests arrive at; remove mode: offline")
    goodput = check_keys(given.get("goodput") or {}, "workload.goodput", ("ttft", "tpot", "e2el"))
    return Workload(
        name=name,
        num_requests=read_number(given, "num_requests", 0, low=1, whole=True, where="workload."),
        options=options,
        goodput={key: read_number(goodput, key, 0.0, low=0, where="workload.goodput.") for key in goodput},
        extra_body=read_mapping(given, "extra_body", "workload."),
        client_args=_parse_args(given.get("client_args"), "workload.client_args"),
    )


def _parse_metrics(content: Any, mode: Mode, workload: Workload) -> dict[str, Measure]:
    if not isinstance(content, list) or not content:
        raise CaseError(f"metrics is {content!r}, expected a list of names")
    metrics: dict[str, Measure] = {}
    for one in content:
        if isinstance(one, dict):
            given = check_keys(one, "metrics[...]", *(("name", "prometheus", "kind", "unit", "direction"),) * 2)
            kind: Literal["gauge", "counter"] = read_choice(
                given, "kind", ("gauge", "counter"), "", where="metrics[...]."
            )
            name = str(given["name"])
            direction: Direction = read_choice(given, "direction", get_args(Direction), "", "metrics[...].")
            measure = Measure(kind, str(given["prometheus"]), str(given["unit"]), direction)
        else:
            name = str(one)
            if name not in MEASURES:
                raise CaseError(f"no metric {name!r}{suggest(name, MEASURES)}")
            measure = MEASURES[name]
        if name in metrics:
            raise CaseError(f"metric {name!r} is listed twice")
        if mode == "offline" and measure.needs_server:
            raise CaseError(f"metric {name!r} is measured at a server; remove it, or mode: offline")
        metrics[name] = measure
    if "goodput" in metrics and not workload.goodput:
        raise CaseError("metric 'goodput' needs workload.goodput, for example {ttft: 300, tpot: 50} in ms")
    return metrics


def _parse_tune_metric(given: Mapping[str, Any], metrics: Mapping[str, Measure]) -> str:
    comparable = [name for name, measure in metrics.items() if measure.direction != "none"]
    if not comparable:
        raise CaseError("metrics: at least one must have a direction, or there is nothing to compare")
    name: str = read_choice(given, "tune_metric", comparable, comparable[0])
    if "tune_metric" in given and not given.get("tune"):
        raise CaseError("tune_metric chooses among tune, which is empty")
    return name


def _parse_args(content: Any, where: str) -> tuple[str, ...]:
    """Options as a command line in one string, or as a list of words and numbers."""
    if content is None:
        return ()
    if isinstance(content, str):
        try:
            return tuple(shlex.split(content))
        except ValueError as error:
            raise CaseError(f"{where} is {content!r}: {error}") from error
    if isinstance(content, list) and all(isinstance(one, str | int | float) for one in content):
        if any(isinstance(one, bool) for one in content):
            raise CaseError(f"{where}: write true and false in quotes, as vLLM spells them")
        return tuple(str(one) for one in content)
    raise CaseError(f"{where} is {content!r}, expected a string or a list of options")


def _parse_env(content: Any, where: str) -> dict[str, str]:
    given = {} if content is None else content
    if not isinstance(given, dict):
        raise CaseError(f"{where} is {given!r}, expected NAME: value")
    if "VLLM_PLUGINS" in given:
        raise CaseError(f"{where}: VLLM_PLUGINS is what tells the arms apart and is set by the runner; remove it")
    return {str(name): str(value) for name, value in given.items()}
