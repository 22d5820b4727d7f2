# SPDX-License-Identifier: Apache-2.0
"""The soak: it finds what stays behind, and nothing where nothing does."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bench.records import read_record
from bench.serve import soak, soak_clients
from bench.serve.soak import Sample, grow, list_faults
from bench.serve.soak_clients import Clients, Counts

WORDS = [f"word{number}" for number in range(9000)]
CLEAN = Sample(0.0, 1500.0, 80, 60, 0.0, 0, 0, 0)
MOVED = dict.fromkeys(soak.MOVED, 1.0)


def make_samples(**growth: float) -> list[Sample]:
    """Fifty of them; fields that grow have so much more at the end."""
    values: list[dict[str, Any]] = [
        {name: getattr(CLEAN, name) + round(more * number / 50) for name, more in growth.items()}
        for number in range(50)
    ]
    return [replace(CLEAN, seconds=60.0 * number, blocks=0.5, **one) for number, one in enumerate(values)]


def test_what_stays_is_no_fault() -> None:
    assert list_faults(make_samples(), CLEAN, Counts(), MOVED) == []
    # What is there once all is in use, and goes on shaking a little.
    samples = make_samples()
    samples[:8] = [replace(one, resident=900.0, threads=20, files=9) for one in samples[:8]]
    samples[-3:] = [replace(one, resident=1700.0) for one in samples[-3:]]
    assert list_faults(samples, CLEAN, Counts(), MOVED) == []


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"resident": 120.0}, r"from 1535\.0 to 1607\.0 MiB of memory, more than 48 are a leak"),
        ({"threads": 10}, "threads, more than 2 are a leak"),
        ({"files": 40}, "open files, more than 8 are a leak"),
    ],
)
def test_what_grows_is_found(growth: dict[str, float], message: str) -> None:
    (fault,) = list_faults(make_samples(**growth), CLEAN, Counts(), MOVED)
    assert re.search(message, fault)


def test_what_is_left_behind_is_found() -> None:
    for last, message in (
        (replace(CLEAN, running=1), "1 running and 0 waiting requests"),
        (replace(CLEAN, waiting=2), "0 running and 2 waiting"),
        (replace(CLEAN, blocks=0.0105), r"1\.05% of the blocks"),
    ):
        (fault,) = list_faults(make_samples(), last, Counts(), MOVED)
        assert re.search(message, fault)
    assert list_faults(make_samples(), CLEAN, Counts(), {**MOVED, "overlap_seconds": 0.0}) == [
        "overlap_seconds did not move: the soak shows nothing"
    ]
    counts = Counts()
    for number in range(30):
        counts.note_fault(f"fault {number}")
    assert list_faults(make_samples(), CLEAN, counts, MOVED)[-2:] == ["fault 19", "and 10 more"]


def test_a_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="9 samples are too few"):
        grow(make_samples()[:9], lambda sample: sample.resident)


def test_record_and_plot(tmp_path: Path) -> None:
    samples, counts = make_samples(), Counts()
    counts.ended["whole"] = 7
    record = soak.make_record("always", samples, CLEAN, counts, MOVED, [], clients=3, seed=1)
    assert (record.status, record.error) == ("ok", None)
    assert record.metrics["requests"].value == 7
    assert record.metrics["minutes"].value == pytest.approx(49.0)
    assert record.metrics["overlap_seconds"].unit == "s"
    path = soak.write_record(tmp_path, record)
    assert read_record(path) == record
    assert len(record.settings["samples"]["resident"]) == len(samples)
    soak.draw(samples, path.with_name("soak.svg"))
    assert "blocks in use" in path.with_name("soak.svg").read_text()
    failed = soak.make_record("always", samples, CLEAN, counts, MOVED, ["a leak", "a hang"], clients=3, seed=1)
    assert (failed.status, failed.error) == ("failed", "a leak; a hang")


class FakeServer:
    """The completions of vLLM, as far as clients see them; `flaw` names what is wrong with it."""

    def __init__(self, flaw: str = "") -> None:
        self.flaw = flaw
        self.aborted: dict[str, asyncio.Event] = {}
        self.requests = 0
        self.gone = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = f"cmpl-{request.headers['X-Request-Id']}-0"
        stop = self.aborted[name] = asyncio.Event()
        self.requests += 1
        if self.flaw == "refuses":
            return web.Response(status=500, text="out of blocks")
        response = web.StreamResponse()
        await response.prepare(request)
        finish, tokens, count = "length", 0, body["max_tokens"] - (self.flaw == "loses")
        try:
            for place in range(count):
                await asyncio.sleep(0.002)
                if stop.is_set() and self.flaw != "deaf":
                    finish = "abort"
                    break
                if self.flaw == "hangs" and place == 3:
                    await asyncio.sleep(3600)
                wrong = self.flaw == "errs" and self.requests > 20
                text = f" {place + wrong}"
                tokens += 1
                await self._say(response, {"choices": [{"text": text, "finish_reason": None}]})
            finish = "stop" if self.flaw == "stops" else finish
            await self._say(response, {"choices": [{"text": "", "finish_reason": finish}]})
            await self._say(response, {"choices": [], "usage": {"completion_tokens": tokens}})
        except (ConnectionResetError, asyncio.CancelledError):
            self.gone += 1
            raise
        return response

    async def abort(self, request: web.Request) -> web.Response:
        for name in (await request.json())["request_ids"]:
            self.aborted[name].set()
        return web.json_response({})

    async def _say(self, response: web.StreamResponse, content: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(content)}\n\n".encode())


async def run_clients(server: FakeServer, port: int, is_enough: Callable[[Counts], bool]) -> Counts:
    """Eight clients until it is enough, or for half a minute."""
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/abort_requests", server.abort)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with aiohttp.ClientSession() as session:
            clients = Clients(f"http://127.0.0.1:{port}", "m", session, WORDS)
            if server.flaw != "hangs":
                await clients.learn()
            tasks = [asyncio.create_task(clients.run(number, 0)) for number in range(8)]
            for _ in range(600):
                if is_enough(clients.counts):
                    break
                await asyncio.sleep(0.05)
            clients.stopped.set()
            await asyncio.gather(*tasks)
            return clients.counts
    finally:
        await runner.cleanup()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Long for a busy machine that only has to say something, and short for a test.
    monkeypatch.setattr(soak_clients, "STALL_SECONDS", 2.0)
    monkeypatch.setattr(soak_clients, "MOST_PATIENCE", 0.1)


def test_clients_end_in_all_ways(quick: None, unused_port: int) -> None:
    server = FakeServer()

    def is_enough(counts: Counts) -> bool:
        return min(counts.ended.values()) > 1 and counts.known > 0 and server.gone > 0

    counts = asyncio.run(run_clients(server, unused_port, is_enough))
    assert counts.faults == []
    assert is_enough(counts)
    assert any(event.is_set() for event in server.aborted.values())
    # Who leaves at once may never have been there.
    assert soak_clients.KNOWN_PROMPTS < server.requests <= counts.requests + soak_clients.KNOWN_PROMPTS


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("loses", r"whole request: \d+ of \d+ tokens, finish 'length'"),
        ("stops", "finish 'stop'"),
        ("errs", "is answered by"),
        ("hangs", r"request: nothing for 2 s"),
    ],
)
def test_clients_notice(flaw: str, message: str, quick: None, unused_port: int) -> None:

    def is_noticed(counts: Counts) -> bool:
        return any(re.search(message, fault) for fault in counts.faults)

    counts = asyncio.run(run_clients(FakeServer(flaw), unused_port, is_noticed))
    assert any(re.search(message, fault) for fault in counts.faults), counts.faults


def test_a_server_that_refuses_is_told(quick: None, unused_port: int) -> None:
    with pytest.raises(aiohttp.ClientError, match="status 500: out of blocks"):
        asyncio.run(run_clients(FakeServer("refuses"), unused_port, lambda counts: True))


@pytest.fixture
def unused_port() -> int:
    from bench.serve.server import find_free_port

    return find_free_port()


@pytest.mark.parametrize("arguments", [["--minutes", "0.1"], ["--clients", "0"], ["--minutes", "nan"]])
def test_bad_usage_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        soak.main(arguments)
    assert raised.value.code == 2


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", soak.MODES)
def test_a_minute_against_a_server_with_lanes(mode: str, tmp_path: Path) -> None:
    record = soak.run(1.0, mode, 10, 0, tmp_path, tmp_path / "server.log")
    assert record.error is None
    assert (record.metrics["requests"].value or 0) > 50
    for name in ("whole", "left", "aborted", "known_answers", "before_first_token", "preemptions"):
        assert (record.metrics[name].value or 0) > 0, name
    assert (tmp_path / "semipd_soak" / f"{mode}.svg").is_file()
