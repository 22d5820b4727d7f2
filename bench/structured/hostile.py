# SPDX-License-Identifier: Apache-2.0
"""Hostile specifications against a server that serves others: how fast they are answered, and what the others notice.

    python -m bench.structured.hostile [--arm pack] [--rounds 1] [--leak 0] [--results DIR]

Sixteen requests stream all the time. Beside them run, one after the other: a process that burns a processor at the
priority of the compile workers (`burner`), then the hostile specifications, one at a time. The ratio of both phases'
p99 of inter-token latency is what specifications add to the processor time that anything would take. `--leak N` sends N
more hostile requests and compares threads, processes and memory before and after. Records: `structured_hostile`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, write_record
from bench.serve.server import VllmServer
from bench.serve.usage import read_resident_bytes

MODEL = ROOT / "bench" / "models" / "tiny_moe"
CASE = "structured_hostile"
STREAMS = 16
#: Nobody waits longer for an answer to a hostile specification; the record then says that there was none.
PATIENCE_SECONDS = 60.0
ARGS = ("--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager", "--no-enable-prefix-caching")
ARMS = {"stock": (), "pack": ("--additional-config.vllm_ext.structured.enabled", "true")}
ENV = {
    "stock": {"VLLM_PLUGINS": ""},
    "pack": {},
}
POLITE = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 60}},
    "required": ["items"],
    "additionalProperties": False,
}


def list_hostile(number: int = 0) -> dict[str, dict[str, Any]]:
    """{name: structured_outputs of a request}; another `number` gives other specifications of the same kinds."""
    deep: Any = {"type": "string"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    words = [f"item {number} {place}" for place in range(20_000)]
    grid = {"type": "array", "maxItems": 300 + number, "items": {"type": "array", "maxItems": 300, "items": {}}}
    bomb = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 4} for i in range(40)}
    return {
        "enum of 20,000": {"json": {"enum": words}},
        "choice of 20,000": {"choice": words},
        "nested arrays 300 x 300": {"json": grid},
        "maxLength 1e6": {"json": {"type": "string", "maxLength": 10**6 + number}},
        "200 optional properties": {
            "json": {"type": "object", "properties": {f"p{number}_{i}": {"type": "string"} for i in range(200)}}
        },
        "60 alternatives of 20 optional": {
            "json": {
                "anyOf": [
                    {"type": "object", "properties": {f"b{i}p{j}_{number}": {"type": "string"} for j in range(20)}}
                    for i in range(60)
                ]
            }
        },
        "regex, nested counts": {"regex": f"^(.{{0,{400 + number % 50}}}x.{{0,400}}){{0,20}}$"},
        "regex, nested stars": {"regex": f"((a+)+b){{{10 + number % 10}}}"},
        "regex, count of 1e8": {"regex": f"a{{1,{10**8 + number}}}"},
        "regex of 200,000 letters": {"regex": "xy" * 100_000 + str(number)},
        "pattern, nested counts": {"json": {"type": "string", "pattern": f"(.{{0,{500 + number % 50}}}y){{0,30}}"}},
        "5,000 levels": {"json": json.dumps(deep) if number < 0 else "[" * 5000},
        "10 MB": {"json": {"enum": [f"{number}" + "z" * 1000] * 10_000}},
        "$ref to itself": {"json": {"$ref": "#", "title": str(number)}},
        "$ref bomb": {"json": {"$ref": "#/$defs/d0", "$defs": {**bomb, "d40": {"minLength": number}}}},
        "grammar, ambiguous": {"grammar": f'root ::= root root | "a{number}" | ""'},
        "grammar, 5,000 levels": {"grammar": "root ::= " + "(" * 5000 + f'"a{number}"' + ")" * 5000},
        "half a surrogate pair": {"json": {"const": f"\ud800{number}"}},
    }


class Client:
    """Requests to one server, and the times between tokens of its streams."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = f"{base_url}/v1/completions", session
        self.gaps: list[float] = []
        self.stopped = asyncio.Event()

    async def stream(self, number: int) -> None:
        """Well-behaved requests, one after the other, until told to stop."""
        body = {
            "model": str(MODEL),
            "prompt": f"List {number}:",
            "max_tokens": 256,
            "temperature": 1.0,
            "stream": True,
            "structured_outputs": {"json": POLITE},
        }
        while not self.stopped.is_set():
            last = None
            async with self.session.post(self.url, json=body) as response:
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append((now - last) * 1e3)
                    last = now
                    if self.stopped.is_set():
                        break

    async def send(self, body: bytes) -> tuple[int | None, float]:
        """(HTTP status, milliseconds to the answer); None where the patience was not enough."""
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
        try:
            async with self.session.post(self.url, data=body, headers=headers, timeout=timeout) as response:
                await response.read()
                return response.status, (time.perf_counter() - began) * 1e3
        except (TimeoutError, aiohttp.ClientError):
            return None, (time.perf_counter() - began) * 1e3


def write_body(structured: dict[str, Any]) -> bytes:
    """A request with this specification, for one token: it is answered when the specification is."""
    body = {"model": str(MODEL), "prompt": "x", "max_tokens": 1, "structured_outputs": structured}
    return json.dumps(body).encode()


def write_attack(rounds: int) -> list[tuple[str, bytes]]:
    """(name, body) of every hostile request, those of another round with other specifications."""
    bodies = []
    for number in range(rounds):
        bodies += [(name, write_body(structured)) for name, structured in list_hostile(number).items()]
        bodies.append(("invalid UTF-8", b'{"prompt": "\xff\xfe", "max_tokens": 1}'))
    return bodies


def read_threads(group: int) -> tuple[int, int]:
    """(processes, threads) of a process group."""
    processes = threads = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if os.getpgid(int(entry.name)) == group:
                threads += len(list((entry / "task").iterdir()))
                processes += 1
        except (ProcessLookupError, FileNotFoundError):
            continue
    return processes, threads


def _percentile(gaps: Sequence[float]) -> float | None:
    return float(np.percentile(gaps, 99)) if gaps else None


async def measure(server: VllmServer, rounds: int, leak: int) -> tuple[dict[str, Metric], dict[str, Any]]:
    """The phases against one running server: (metrics, answers by specification)."""
    answers: dict[str, list[tuple[int | None, float]]] = {}
    metrics: dict[str, Metric] = {}
    # Written before anything is timed: this process has one loop, and the streams are read by it.
    bodies = write_attack(rounds)
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(total=None)) as session:
        client = Client(server.base_url, session)
        streams = [asyncio.create_task(client.stream(number)) for number in range(STREAMS)]
        await asyncio.sleep(8)
        client.gaps.clear()
        began = time.perf_counter()
        for name, body in bodies:
            answers.setdefault(name, []).append(await client.send(body))
        seconds = time.perf_counter() - began
        hostile = list(client.gaps)
        # As long as the attack took, but long enough for a percentile.
        burner = subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", "while True: pass"])
        try:
            await asyncio.sleep(1)
            client.gaps.clear()
            await asyncio.sleep(max(15.0, min(60.0, seconds)))
            burned = list(client.gaps)
        finally:
            burner.kill()
            burner.wait()
        if leak:
            metrics |= await _leak(client, server, leak)
        client.stopped.set()
        await asyncio.gather(*streams, return_exceptions=True)
    slowest = max(milliseconds for each in answers.values() for _, milliseconds in each)
    statuses = [status for each in answers.values() for status, _ in each]
    metrics |= {
        "itl_p99_hostile": Metric(_percentile(hostile), "ms", "lower"),
        "itl_p99_burner": Metric(_percentile(burned), "ms", "lower"),
        "slowest_answer": Metric(slowest, "ms", "lower"),
        "answered_400": Metric(float(statuses.count(400)), "requests"),
        "served": Metric(float(statuses.count(200)), "requests"),
        "other_answers": Metric(float(len(statuses) - statuses.count(400) - statuses.count(200)), "requests", "lower"),
    }
    return metrics, {name: [[status, round(ms)] for status, ms in each] for name, each in answers.items()}


async def _leak(client: Client, server: VllmServer, leak: int) -> dict[str, Metric]:
    """Threads, processes and memory that so many hostile requests leave behind."""
    group = server.process_group
    assert group is not None
    before, memory = read_threads(group), read_resident_bytes(group)
    quick = [name for name in list_hostile() if name not in ("10 MB", "enum of 20,000", "choice of 20,000")]
    sent = number = 0
    while sent < leak:
        number += 1
        specifications = list_hostile(1000 + number)
        for name in quick[: leak - sent]:
            await client.send(write_body(specifications[name]))
            sent += 1
    await asyncio.sleep(2)
    after = read_threads(group)
    return {
        "leak_requests": Metric(float(sent), "requests"),
        "leak_processes": Metric(float(after[0] - before[0]), "processes", "lower"),
        "leak_threads": Metric(float(after[1] - before[1]), "threads", "lower"),
        "leak_memory": Metric((read_resident_bytes(group) - memory) / 2**20, "MiB", "lower"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 where an answer took longer than a second, or was neither 200 nor 400."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--arm", choices=tuple(ARMS), default="pack")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--leak", type=int, default=0, metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        args = (*ARGS, *ARMS[options.arm])
        with VllmServer(MODEL, log_path=Path(folder) / "server.log", args=args, env=ENV[options.arm]) as server:
            metrics, answers = asyncio.run(measure(server, options.rounds, options.leak))
    settings = {"answers": answers, "args": list(args), "rounds": options.rounds}
    record = Record(CASE, options.arm, 0, metrics, **describe_environment(), settings=settings)
    print(json.dumps({"answers": answers, **{name: metric.value for name, metric in metrics.items()}}, indent=1))
    print(write_record(options.results, record), file=sys.stderr)
    slow = (metrics["slowest_answer"].value or 0) > 1000
    return 1 if slow or metrics["other_answers"].value else 0


if __name__ == "__main__":
    sys.exit(main())
