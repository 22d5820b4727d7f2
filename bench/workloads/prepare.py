# SPDX-License-Identifier: Apache-2.0
"""From the name of a workload to a file and the options that make `vllm bench serve` send it."""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.perplexity import load_tokenizer
from bench.workloads import local_files, prompts, stretches, tool_calls, traces
from bench.workloads.corpus import Tokenizer
from bench.workloads.requests import Request, write_requests, write_trace


@dataclass(frozen=True)
class Workload:
    """A file of requests, and how `vllm bench serve` is told to send them.

    `client_args` say everything about data set, number of requests, seed, arrivals and request body; server address,
    model, tokenizer and metrics are the caller's. `environment` must be set for the client.
    """

    name: str
    path: Path
    num_requests: int
    client_args: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


#: Prompts as text: fn(numpy generator, tokenizer, num_requests, **options) -> requests, or (requests, request body).
TEXT_WORKLOADS: dict[str, Callable[..., Any]] = {
    "chat": prompts.make_chat,
    "rag": prompts.make_rag,
    "repetitive": prompts.make_repetitive,
    "code": prompts.make_code,
    "changing": stretches.make_changing,
    "mixed": prompts.make_mixed,
    "long_context": prompts.make_long_context,
    "tool_calls": tool_calls.make_tool_calls,
    "sharegpt": local_files.read_sharegpt,
    "longbench": local_files.read_longbench,
    "json_schema": local_files.read_json_schema,
}


def _read_trace(generator: np.random.Generator, num_requests: int, **options: Any) -> Any:
    return traces.read_trace(Path(options.pop("path")), num_requests, **options)


#: Lengths and times: fn(numpy generator, num_requests, **options) -> traced requests.
TRACE_WORKLOADS: dict[str, Callable[..., Any]] = {
    "bursty": traces.make_bursty,
    "phases": traces.make_phases,
    "trace": _read_trace,
}
WORKLOADS = (*TEXT_WORKLOADS, *TRACE_WORKLOADS)

#: Options of every text workload, which the client itself carries out.
ARRIVAL_OPTIONS = {"request_rate", "burstiness", "max_concurrency"}
TRACE_FILE_OPTIONS = {"path", "max_model_len", "speed", "skip"}


def prepare_workload(
    name: str,
    folder: Path,
    tokenizer_path: str | Path,
    *,
    num_requests: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Workload:
    """Write the requests of workload `name` into `folder` and return what sends them.

    The same name, seed, number, options and tokenizer give the same file, byte for byte. `tokenizer_path` is a model
    directory; `tokenizer` replaces what would be loaded from it. Text workloads take `request_rate` (requests per
    second; default: all at once), `burstiness` and `max_concurrency` beside their own options; traces have times of
    their own. Raises ValueError for an unknown name or option, and whatever the workload refuses.
    """
    settings = dict(options or {})
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; there are: {', '.join(WORKLOADS)}")
    if num_requests < 1:
        raise ValueError(f"num_requests must be at least 1, got {num_requests}")
    allowed = list_options(name)
    if unknown := sorted(settings.keys() - allowed):
        raise ValueError(f"workload {name!r} has no option {unknown[0]!r}; it has: {', '.join(sorted(allowed))}")
    if missing := sorted(option for option, required in allowed.items() if required and option not in settings):
        raise ValueError(f"workload {name!r} needs the option {missing[0]!r}")
    # The name goes into the seed, so that two workloads of one seed do not draw alike.
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    common = ["--num-prompts", str(num_requests), "--seed", str(seed)]
    path = folder / f"{name}-{seed}.jsonl"
    if name in TRACE_WORKLOADS:
        write_trace(path, TRACE_WORKLOADS[name](generator, num_requests, **settings))
        # The client draws the tokens of a chunk by Python's hash of a string.
        return Workload(
            name,
            path,
            num_requests,
            ["--dataset-name", "timed_trace", "--dataset-path", str(path), *common],
            {"PYTHONHASHSEED": "0"},
        )
    arrivals = {option: settings.pop(option) for option in sorted(ARRIVAL_OPTIONS & settings.keys())}
    made = TEXT_WORKLOADS[name](generator, tokenizer or load_tokenizer(tokenizer_path), num_requests, **settings)
    requests, body = made if isinstance(made, tuple) else (made, None)
    _check_requests(name, requests, num_requests)
    write_requests(path, requests)
    client_args = ["--dataset-name", "custom", "--dataset-path", str(path), *common]
    # The file's own lengths, in the file's order, to /v1/completions as they are.
    client_args += ["--custom-output-len", "-1", "--disable-shuffle", "--skip-chat-template"]
    for option, value in arrivals.items():
        client_args += [f"--{option.replace('_', '-')}", str(value)]
    if body is not None:
        client_args += ["--extra-body", json.dumps(body)]
    else:
        client_args.append("--ignore-eos")
    return Workload(name, path, num_requests, client_args)


def list_options(name: str) -> dict[str, bool]:
    """Options of a workload, and whether each must be given."""
    if name == "trace":
        return {option: option in ("path", "max_model_len") for option in TRACE_FILE_OPTIONS}
    maker = TEXT_WORKLOADS.get(name) or TRACE_WORKLOADS[name]
    parameters = inspect.signature(maker).parameters.values()
    own = {one.name: one.default is one.empty for one in parameters if one.kind is one.KEYWORD_ONLY}
    return own if name in TRACE_WORKLOADS else {**own, **dict.fromkeys(ARRIVAL_OPTIONS, False)}


def _check_requests(name: str, requests: list[Request], num_requests: int) -> None:
    # The client repeats requests when the file has too few, and then says nothing of it.
    if len(requests) != num_requests:
        raise ValueError(f"workload {name!r} made {len(requests)} requests where {num_requests} were asked for")
