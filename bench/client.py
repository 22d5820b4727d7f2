# SPDX-License-Identifier: Apache-2.0
"""Drive one run of a workload: `vllm bench serve` against a server, or the requests of an offline engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.case import ARRIVAL_FLAGS, CLIENT_DATASETS, Workload
from bench.records import ROOT
from bench.serve.server import (
    VllmServer,
    find_vllm_script,
    list_group,
    read_log_tail,
    release_watchdog,
    start_watchdog,
)
from bench.workloads import Workload as PreparedWorkload
from bench.workloads import prepare_workload
from bench.workloads.requests import OFFLINE_FIELDS, read_lines

PERCENTILES = "50,90,99"
CLIENT_LOG_LINES = 15
#: The client seeds the tokens of a traced chunk by Python's hash of a string: without this, arms see other prompts.
#: Unbuffered, as its lines tell when the load begins and ends.
CLIENT_ENVIRONMENT = {"PYTHONHASHSEED": "0", "VLLM_PLUGINS": "", "PYTHONUNBUFFERED": "1"}
#: Hosts that the client must not reach through a proxy of the environment.
NO_PROXY = ("127.0.0.1", "localhost")
#: What `vllm bench serve` prints right before the first request and right after the last answer.
EDGES = (b"Starting main benchmark run", b"Serving Benchmark Result")

# A proxy from the environment must not see requests to loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RunFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """One run of a workload failed; the message says how, and ends with the client's last lines where it has any."""


@dataclass(frozen=True)
class Load:
    """A workload at one seed: the client's options, or with `requests` those of an offline engine, all at once or at
    most `max_concurrency` at a time."""

    num_requests: int
    args: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    requests: Sequence[Mapping[str, Any]] = ()
    max_concurrency: int | None = None


def prepare_load(workload: Workload, tokenizer: str, seed: int, folder: Path) -> Load:
    """What `vllm bench serve` needs for a run of `workload` at `seed`; the same for both arms.

    Files are written into `folder`. Raises RunFailed for options that the workload refuses.
    """
    environment: Mapping[str, str] = {}
    if workload.name in CLIENT_DATASETS:
        options = dict(workload.options)
        args = ["--dataset-name", workload.name, "--num-prompts", str(workload.num_requests), "--seed", str(seed)]
        if workload.name == "custom":
            # The file's own lengths, in the file's order, to /v1/completions as they are.
            options.setdefault("output_len", -1)
            args += ["--disable-shuffle", "--skip-chat-template"]
        if "path" in options:
            options["path"] = _find_file(options["path"])
            _check_lines(Path(options["path"]), workload.num_requests)
        flags = {**CLIENT_DATASETS[workload.name], **ARRIVAL_FLAGS}
        for name, value in options.items():
            args += [flags[name], str(value)]
        if not workload.extra_body:
            args.append("--ignore-eos")
    else:
        prepared = _prepare_file(workload, tokenizer, seed, folder)
        if offline := sorted(set(OFFLINE_FIELDS) & set().union(*read_lines(prepared.path))):
            raise RunFailed(f"workload {workload.name}: only an offline engine obeys {offline[0]} of single requests")
        args, environment = list(prepared.client_args), prepared.environment
        if workload.extra_body and "--extra-body" in args:
            raise RunFailed(f"workload {workload.name} sends a request body of its own; remove workload.extra_body")
    if workload.extra_body:
        args += ["--extra-body", json.dumps(workload.extra_body)]
    if workload.goodput:
        args += ["--goodput", *(f"{name}:{value:g}" for name, value in workload.goodput.items())]
    return Load(workload.num_requests, [*args, *workload.client_args], environment)


def prepare_requests(workload: Workload, tokenizer: str, seed: int, folder: Path) -> Load:
    """What an offline engine needs for a run of `workload` at `seed`. Raises RunFailed."""
    options = dict(workload.options)
    most = options.pop("max_concurrency", None)
    if workload.name == "random":
        one = {"input_len": int(options.get("input_len", 1024)), "output_tokens": int(options.get("output_len", 128))}
        return Load(workload.num_requests, requests=[one] * workload.num_requests, max_concurrency=most)
    if workload.name == "custom":
        path = Path(_find_file(options["path"]))
    else:
        path = _prepare_file(dataclasses.replace(workload, options=options), tokenizer, seed, folder).path
    asked = int(options.get("output_len", -1)) if workload.name == "custom" else -1
    contents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(contents) < workload.num_requests:
        raise RunFailed(f"{path} has {len(contents)} requests, workload.num_requests is {workload.num_requests}")
    return Load(
        workload.num_requests,
        requests=[
            {
                "prompt": one["prompt"],
                "output_tokens": int(one["output_tokens"]) if asked < 0 else asked,
                # Of our own making: what a user's file has beside prompts is the client's, which does not read it.
                **{name: one[name] for name in OFFLINE_FIELDS if name in one and workload.name != "custom"},
            }
            for one in contents[: workload.num_requests]
        ],
        max_concurrency=most,
    )


def run_client(
    server: VllmServer,
    load: Load,
    model_name: str,
    tokenizer: str,
    folder: Path,
    limit: float,
    on_edge: Callable[[], None],
) -> dict[str, Any]:
    """Send a load with `vllm bench serve` and return its result file. `limit`: seconds.

    `on_edge` is called when the client begins to send requests, and when the last one is answered.
    Raises RunFailed when the client fails, takes too long, or a request fails; no client is left running.
    """
    result_path, log_path = folder / "client.json", folder / "client.log"
    result_path.unlink(missing_ok=True)
    command = [
        *(str(find_vllm_script()), "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"),
        *("--base-url", server.base_url, "--model", model_name, "--tokenizer", tokenizer, "--temperature", "0"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", PERCENTILES, "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", result_path.name),
        # The warm-up has shown that the server answers, and a test request would count as engine steps.
        *("--ready-check-timeout-sec", "0"),
        *load.args,
    ]
    # A group of its own: Ctrl-C reaches only the caller, who then ends the client with all its children. The session is
    # the caller's, as the server's is (`VllmServer`).
    process = subprocess.Popen(
        command,
        env={**os.environ, **leave_proxy_out(os.environ), **CLIENT_ENVIRONMENT, **load.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    # For this process's own violent end; whatever else ends the run comes by `finally`.
    watchdog = start_watchdog(process.pid, grace=1.0)
    timed_out = threading.Event()

    def end_late_client() -> None:
        timed_out.set()
        _end_group(process)

    timer = threading.Timer(limit, end_late_client)
    timer.start()
    edges = 0
    try:
        assert process.stdout is not None
        with process.stdout, log_path.open("wb") as log:
            for line in process.stdout:
                log.write(line)
                if any(sign in line for sign in EDGES):
                    on_edge()
                    edges += 1
        exit_code = process.wait()
    finally:
        timer.cancel()
        try:
            _end_group(process)
        finally:
            release_watchdog(watchdog)
    tail = read_log_tail(log_path, CLIENT_LOG_LINES)
    if timed_out.is_set():
        raise RunFailed(f"the run took longer than its limit of {limit:g} s; the client said:\n{tail}")
    if exit_code != 0 or not result_path.is_file():
        raise RunFailed(f"vllm bench serve ended with exit code {exit_code}:\n{tail}")
    result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    if result.get("failed") or result.get("completed") != load.num_requests:
        completed = f"{result.get('completed')} of {load.num_requests} completed"
        raise RunFailed(f"{result.get('failed')} requests failed, {completed}:\n{tail}")
    if edges != len(EDGES):
        raise RunFailed(f"vllm bench serve did not say when it began and ended to send; it said:\n{tail}")
    return result


def run_offline(server: VllmServer, load: Load, seed: int, limit: float) -> dict[str, Any]:
    """Send a load to an offline engine. Raises RunFailed when it refuses, fails or takes longer than `limit` s."""
    asked = {"requests": list(load.requests), "seed": seed, "max_concurrency": load.max_concurrency}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{server.base_url}/run", data=body, method="POST")
    try:
        with _opener.open(request, timeout=limit) as response:
            result: dict[str, Any] = json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise RunFailed(f"the engine refused the run: {error.read().decode(errors='replace')}") from error
    except TimeoutError:
        raise RunFailed(f"the run took longer than its limit of {limit:g} s") from None
    except OSError as error:
        raise RunFailed(f"the engine does not answer: {error}") from error
    if result["completed"] != len(load.requests):
        raise RunFailed(f"{result['completed']} of {len(load.requests)} requests completed")
    return result


def _prepare_file(workload: Workload, tokenizer: str, seed: int, folder: Path) -> PreparedWorkload:
    options = dict(workload.options)
    if "path" in options:
        options["path"] = _find_file(options["path"])
    try:
        return prepare_workload(
            workload.name, folder, tokenizer, num_requests=workload.num_requests, seed=seed, options=options
        )
    except (ValueError, OSError) as error:
        raise RunFailed(f"workload {workload.name}: {error}") from error


def _check_lines(path: Path, num_requests: int) -> None:
    # The client begins anew at the end of a file, and answers would come from the prefix cache; or it sends fewer.
    lines = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
    if lines < num_requests:
        raise RunFailed(f"{path.name} has {lines} requests, workload.num_requests is {num_requests}")


def leave_proxy_out(environment: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY in both spellings with loopback added: `vllm bench serve` uses a proxy for every host not in it."""
    hosts = [host for name in ("no_proxy", "NO_PROXY") for host in environment.get(name, "").split(",") if host]
    value = ",".join(dict.fromkeys([*hosts, *NO_PROXY]))
    return {"no_proxy": value, "NO_PROXY": value}


def _find_file(path: str) -> str:
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return str(candidate.resolve())
    raise RunFailed(f"workload.options.path: no file {path}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    # A child may outlive the client itself, and would keep its output open. Repeated, because a process may have forked
    # between two looks.
    while list_group(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    process.wait()
