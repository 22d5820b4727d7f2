# SPDX-License-Identifier: Apache-2.0
"""Hostile specifications against a server that serves others: how fast they are answered, and what the others notice.

    python -m bench.structured.hostile [--arm pack] [--requests 1000] [--results DIR] [--log FILE]

    attack    every specification of attacks.py once, streamed, up to 500 tokens of what is served; two at a time
    burner    about as long, a process of the compile workers' priority that uses as much processor time as the attack
    plain     requests without a specification, of as many tokens as each one of the attack that was served
    flood     the rest of the requests, several at a time; who is served leaves after a while, as clients do

These take turns, and sixteen well-behaved requests stream all the time: the ratio of the p99 of inter-token latency
beside attack and burner is what specifications add to the processor time that anything would take. Beside plain
requests it is what anybody's prompts and tokens take from the batch. With nobody served, processes and threads are
compared after the flood with after its first request of every kind, and memory with after two thirds of it, when caches
are full. Records: `structured_hostile`.

Exit code 1 where a refusal takes more than a second, or a first token more than two (what passes a trial is compiled
again where it is served), where an answer is neither 200 nor 400, where that ratio is above 1.2, where the flood leaves
something behind, or where the server does not serve afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from bench.records import RESULTS, Metric, Record, describe_environment, write_record
from bench.serve.server import VllmServer, read_log_tail
from bench.structured.attacks import INVALID_UTF8, list_attacks, write_body, write_invalid_utf8
from bench.structured.clients import MODEL, Answer, Client, Phase, is_serving
from bench.structured.leftovers import read_state

CASE = "structured_hostile"
OVER_BUDGET = "vllm_ext:structured_over_budget_total"
STREAMS = 16
#: Tokens of a hostile request that is served, and how many of these requests there are at a time.
MOST_TOKENS, AT_ONCE = 500, 2
#: Requests of the flood at a time.
FLOOD_AT_ONCE = 8
#: A block of the burner lasts as long as its block of the attack, within these seconds.
LEAST_SECONDS, MOST_SECONDS = 15.0, 45.0
#: What must hold: milliseconds to a refusal and to a first token, attack over burner, and MiB that the last third of a
#: flood may leave in a part of the server.
MOST_MS, MOST_FIRST_MS, MOST_RATIO, MOST_LEFT_MIB = 1000.0, 2000.0, 1.2, 20.0
ARGS = ("--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager", "--no-enable-prefix-caching")
ARMS: Mapping[str, tuple[str, ...]] = {
    "stock": (),
    "pack": ("--additional-config.vllm_ext.structured.enabled", "true"),
}
#: vLLM's own cache of compiled grammars has 512 MiB, enough for all of a flood: held small, what grows is no cache. Its
#: KV pool would take nearly all of the machine's memory: the system then drops the pages of programs, and reads them
#: from the disk again while everybody waits.
SMALL = {"VLLM_XGRAMMAR_CACHE_MB": "8", "VLLM_CPU_KVCACHE_SPACE": "1"}
ENV: Mapping[str, Mapping[str, str | None]] = {"stock": {"VLLM_PLUGINS": "", **SMALL}, "pack": SMALL}
#: Uses a share of a processor, in slices that are short beside a step of the engine.
_BURNER = """
import sys, time
share = float(sys.argv[1])
while True:
    ends = time.thread_time() + 0.01 * share
    while time.thread_time() < ends:
        pass
    time.sleep(0.01 * (1 - share))
"""


class Visit(NamedTuple):
    """A request of the attack: its answer, and the longest gap of the streams while it was there, in milliseconds."""

    answer: Answer
    worst_gap_ms: float


async def measure(server: VllmServer, requests: int) -> tuple[dict[str, Metric], dict[str, Visit]]:
    """All phases against a running server: (metrics, the attack's requests by specification)."""
    assert server.process_group is not None
    # Written before anything is timed: this process has one loop, and the streams are read by it.
    bodies = {
        name: write_body(str(MODEL), specification, MOST_TOKENS, stream=True)
        for name, specification in list_attacks().items()
    }
    bodies[INVALID_UTF8] = write_invalid_utf8()
    began = time.perf_counter()
    # A connection for each request: the server closes idle ones, at a moment when a client may use them again.
    connector, patience = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:
        client = Client(server.base_url, session)
        streams = [asyncio.create_task(client.stream(number)) for number in range(STREAMS)]
        await client.wait_for_streams(STREAMS)
        await asyncio.sleep(3)
        client.errors = 0
        metrics, visits = await _compare(client, server.process_group, bodies)
        metrics["stream_errors"] = Metric(float(client.errors), "requests", "lower")
        _report("attack and burner", began)
        client.stopped.set()
        await asyncio.gather(*streams, return_exceptions=True)
        if requests > len(bodies):
            ended = server.read_metric(OVER_BUDGET) or 0.0
            metrics |= await _flood(client, server.process_group, requests - len(bodies))
            ended = (server.read_metric(OVER_BUDGET) or 0.0) - ended
            metrics["leak_over_budget"] = Metric(ended, "requests")
            _report("flood", began)
        metrics["serves_afterwards"] = Metric(float(await is_serving(session, server.base_url)), "bool", "higher")
    return metrics, visits


def _report(phase: str, began: float) -> None:
    print(f"{phase} over after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


async def _compare(
    client: Client, group: int, bodies: Mapping[str, bytes]
) -> tuple[dict[str, Metric], dict[str, Visit]]:
    """Attack, burner and plain requests in turns, after a while with none of them."""
    quiet, attack, burned, plain = (Phase(client, group) for _ in range(4))
    quiet.begin()
    await asyncio.sleep(8)
    quiet.end()
    visits: dict[str, Visit] = {}
    names = list(bodies)
    shares: list[float] = []
    for part in (names[::2], names[1::2]):
        seconds, used, chunks = attack.seconds, attack.cpu_seconds, len(attack.gaps)
        attack.begin()
        sent = await _send_all(client, [bodies[name] for name in part])
        attack.end()
        for name, (answer, began, ended) in zip(part, sent, strict=True):
            visits[name] = Visit(answer, attack.find_worst(began, ended))
        seconds = attack.seconds - seconds
        # What the attack took beyond the streams' own share, which a token of theirs costs in quiet.
        own = quiet.cpu_seconds / max(len(quiet.gaps), 1) * (len(attack.gaps) - chunks)
        shares.append(min(1.0, max(0.02, (attack.cpu_seconds - used - own) / seconds)))
        burner = subprocess.Popen(["nice", "-n", "10", sys.executable, "-S", "-c", _BURNER, f"{shares[-1]:.3f}"])
        try:
            await asyncio.sleep(0.5)
            burned.begin()
            await asyncio.sleep(min(MOST_SECONDS, max(LEAST_SECONDS, seconds)))
            burned.end()
        finally:
            burner.kill()
            burner.wait()
        plain.begin()
        await _send_all(client, [_write_plain(answer.tokens) for answer, _, _ in sent if answer.tokens])
        plain.end()
    phases = {"quiet": quiet, "hostile": attack, "burner": burned, "plain": plain}
    p99 = {name: phase.find_p99() for name, phase in phases.items()}
    hostile, beside = p99["hostile"], p99["burner"]
    ratio = None if hostile is None or beside is None else hostile / beside
    answers = [visit.answer for visit in visits.values()]
    codes = [answer.code for answer in answers]
    served = [answer for answer in answers if answer.code == 200]
    return {
        **{f"itl_p99_{name}": Metric(value, "ms", "lower") for name, value in p99.items()},
        "itl_p99_ratio": Metric(ratio, "of burner", "lower"),
        **{f"itl_median_{name}": Metric(phase.find_median(), "ms", "lower") for name, phase in phases.items()},
        "gaps_hostile": Metric(float(len(attack.gaps)), "gaps"),
        "burner_share": Metric(statistics.mean(shares), "of a processor"),
        "attack_seconds": Metric(attack.seconds, "s"),
        "slowest_refusal": Metric(max((a.answer_ms for a in answers if a.code != 200), default=0.0), "ms", "lower"),
        "slowest_first_token": Metric(max((a.answer_ms for a in served), default=0.0), "ms", "lower"),
        "answered_400": Metric(float(codes.count(400)), "requests"),
        "served": Metric(float(len(served)), "requests"),
        "served_tokens": Metric(float(sum(answer.tokens for answer in served)), "tokens"),
        "ended_by_budget": Metric(float(sum(answer.end == "error" for answer in served)), "requests"),
        "other_answers": Metric(float(len(codes) - codes.count(400) - len(served)), "requests", "lower"),
    }, visits


def _write_plain(tokens: int) -> bytes:
    return write_body(str(MODEL), None, tokens, stream=True)


async def _send_all(client: Client, bodies: Sequence[bytes]) -> list[tuple[Answer, float, float]]:
    """(answer, when sent, when over) of these requests, AT_ONCE at a time."""
    free = asyncio.Semaphore(AT_ONCE)

    async def send(body: bytes) -> tuple[Answer, float, float]:
        async with free:
            began = time.perf_counter()
            return await client.send(body), began, time.perf_counter()

    return await asyncio.gather(*map(send, bodies))


async def _flood(client: Client, group: int, requests: int) -> dict[str, Metric]:
    """What so many hostile requests leave behind: after the first of every kind, after two thirds of the rest, after
    all."""
    numbers = itertools.count(1)
    codes: list[int | None] = []
    left = 0
    began = time.perf_counter()
    kinds = len(list_attacks())
    first = min(kinds, requests)
    states = []
    last = (requests - first) // 3
    for count in (first, requests - first - last, last):
        answers = await _visit_all(client, count, numbers)
        codes += [answer.code for answer in answers]
        left += sum(answer.end == "left" for answer in answers)
        states.append(await read_state(group))
    before, middle, after = states
    return {
        "leak_requests": Metric(float(requests), "requests"),
        "leak_seconds": Metric(time.perf_counter() - began, "s"),
        "leak_answered_400": Metric(float(codes.count(400)), "requests"),
        "leak_served": Metric(float(codes.count(200) - left), "requests"),
        "leak_clients_left": Metric(float(left), "requests"),
        # What was served, and over its budget before the client left.
        "leak_ended": Metric(float(codes.count(500)), "requests"),
        "leak_other_answers": Metric(float(sum(code not in (200, 400, 500) for code in codes)), "requests", "lower"),
        "leak_processes": Metric(float(after.processes - before.processes), "processes", "lower"),
        "leak_threads": Metric(float(after.threads - before.threads), "threads", "lower"),
        # Caches fill meanwhile: what grows on after them is what leaks.
        "leak_memory": Metric(after.memory - middle.memory, "MiB", "lower"),
        "leak_memory_filling": Metric(middle.memory - before.memory, "MiB"),
        **{
            f"leak_memory_{part}": Metric(after.parts[part] - middle.parts[part], "MiB", "lower")
            for part in after.parts
        },
    }


async def _visit_all(client: Client, count: int, numbers: Any) -> list[Answer]:
    """So many hostile requests of all kinds, FLOOD_AT_ONCE at a time."""
    answers: list[Answer] = []

    def list_bodies() -> Any:
        while True:
            for specification in list_attacks(next(numbers)).values():
                yield write_body(str(MODEL), specification, MOST_TOKENS, stream=False)

    bodies = itertools.islice(list_bodies(), count)

    async def visit() -> None:
        for body in bodies:
            answers.append(await client.visit(body))

    await asyncio.gather(*(visit() for _ in range(FLOOD_AT_ONCE)))
    return answers


def find_failures(metrics: Mapping[str, Metric]) -> list[str]:
    """What does not hold, in words; empty where all does."""
    limits: dict[str, float] = {
        "slowest_refusal": MOST_MS,
        "slowest_first_token": MOST_FIRST_MS,
        "other_answers": 0,
        "stream_errors": 0,
        "itl_p99_ratio": MOST_RATIO,
        "leak_other_answers": 0,
        "leak_processes": 0,
        "leak_threads": 0,
        # Each by itself: what one gives back is no excuse for another.
        **{f"leak_memory_{part}": MOST_LEFT_MIB for part in ("api", "engine", "trials")},
    }
    failures = []
    for name, most in limits.items():
        if name.startswith("leak") and name not in metrics:
            continue
        value = metrics[name].value
        if value is None or value > most:
            failures.append(f"{name} is {value}, not at most {most:g}")
    ended, over = (metrics.get(name, Metric(0.0, "")).value or 0.0 for name in ("leak_ended", "leak_over_budget"))
    if ended > over:
        failures.append(f"{ended:g} requests of the flood failed, of which {over:g} by their budget")
    if not metrics["serves_afterwards"].value:
        failures.append("the server does not serve afterwards")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--arm", choices=tuple(ARMS), default="pack")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="hostile requests, the flood included")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keeps what the server logs")
    options = parser.parse_args(arguments)
    args = (*ARGS, *ARMS[options.arm])
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "server.log"
        with VllmServer(MODEL, log_path=log, args=args, env=ENV[options.arm]) as server:
            metrics, visits = asyncio.run(measure(server, options.requests))
            is_running = server.is_running()
        failures = find_failures(metrics)
        if not is_running:
            print(f"the server has ended; the last lines of its log:\n{read_log_tail(log)}", file=sys.stderr)
    settings = {
        # Code, milliseconds to it or to the first token, tokens, end, and the streams' longest gap meanwhile.
        "answers": {
            name: [a.code, round(a.answer_ms), a.tokens, a.end, round(gap)] for name, (a, gap) in visits.items()
        },
        "args": list(args),
        "requests": options.requests,
        "max_tokens": MOST_TOKENS,
        "at_once": AT_ONCE,
        "failures": failures,
    }
    record = Record(CASE, options.arm, 0, metrics, **describe_environment(), settings=settings)
    print(json.dumps({**settings, **{name: metric.value for name, metric in metrics.items()}}, indent=1))
    print(write_record(options.results, record), file=sys.stderr)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
