# SPDX-License-Identifier: Apache-2.0
"""The hostile benchmark: its specifications, what it reads from answers, and what makes it fail."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import aiohttp
import pytest

from bench.records import Metric
from bench.serve.usage import read_cpu
from bench.structured import clients, hostile, leftovers
from bench.structured.attacks import list_attacks, write_body
from bench.structured.clients import Answer, Client, is_serving


def test_specifications_are_many_and_others_for_another_number() -> None:
    first, second = list_attacks(0), list_attacks(7)
    assert first.keys() == second.keys()
    assert len(first) >= 35
    assert sum("structural_tag" in specification for specification in first.values()) >= 5
    for name, specification in first.items():
        body = json.loads(write_body("model", specification, 500, stream=True))
        assert body["max_tokens"] == 500
        assert len(body["structured_outputs"]) == 1
        assert json.dumps(specification) != json.dumps(second[name]), name


def chunk(text: str, tokens: int, end: str | None = None) -> str:
    message = {"choices": [{"text": text, "finish_reason": end}], "usage": {"completion_tokens": tokens}}
    return f"data: {json.dumps(message)}\n\n"


ERROR = 'data: {"error": {"code": 400, "message": "no"}}\n\n'
STREAMS = {
    "served": chunk("a", 1) + chunk("b", 2) + chunk("", 3, "length") + "data: [DONE]\n\n",
    "refused": ERROR + "data: [DONE]\n\n",
    "ended": chunk("a", 4) + ERROR.replace("400", "500"),
    "nothing": "data: [DONE]\n\n",
    "List 1:": chunk("a", 1) + chunk("b", 2) + chunk("c", 3, "length") + "data: [DONE]\n\n",
    "List 2:": ERROR + "data: [DONE]\n\n",
}


@pytest.fixture
def url() -> Iterator[str]:
    """A loopback server that answers by the request's prompt."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["prompt"] == "late":
                time.sleep(1)
            status = 400 if asked["prompt"] == "status" else 200
            text = STREAMS.get(asked["prompt"], json.dumps({"choices": [{"text": asked["prompt"]}]}))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_arguments: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url: str, method: str, prompt: str) -> Answer:
    async def run() -> Answer:
        async with aiohttp.ClientSession() as session:
            client = Client(url, session)
            answer: Answer = await getattr(client, method)(json.dumps({"prompt": prompt}).encode())
            return answer

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("served", (200, 3, "length")),
        ("refused", (400, 0, "")),
        ("ended", (200, 4, "error")),
        ("nothing", (None, 0, "")),
        ("status", (400, 0, "")),
    ],
)
def test_a_stream_says_whether_it_was_served(url: str, prompt: str, expected: tuple[int | None, int, str]) -> None:
    answer = ask(url, "send", prompt)
    assert (answer.code, answer.tokens, answer.end) == expected
    assert 0 < answer.answer_ms < 5000


def test_streams_note_their_gaps_and_wait_where_they_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> Client:
        async with aiohttp.ClientSession() as session:
            client = Client(url, session)
            streams = [asyncio.create_task(client.stream(number)) for number in (1, 2)]
            await client.wait_for_streams(1)
            with pytest.raises(TimeoutError, match="1 of 2"):
                await client.wait_for_streams(2)
            client.stopped.set()
            await asyncio.gather(*streams)
            return client

    monkeypatch.setattr(clients, "PATIENCE_SECONDS", 1.0)
    client = asyncio.run(run())
    assert client.streaming == {1}
    assert len(client.gaps) >= 2
    assert all(milliseconds >= 0 for _, milliseconds in client.gaps)
    # Half a second after each.
    assert 1 <= client.errors <= 5


def test_visitors_leave_where_it_takes_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(url, "visit", "x").end == ""
    assert ask(url, "visit", "status").code == 400
    monkeypatch.setattr(clients, "LEAVES_AFTER", 0.2)
    assert ask(url, "visit", "late")[:1] + ask(url, "visit", "late")[3:] == (200, "left")
    assert ask("http://127.0.0.1:9", "visit", "x").code is None


def test_a_server_that_serves_afterwards(url: str) -> None:
    async def run(base: str) -> bool:
        async with aiohttp.ClientSession() as session:
            return await is_serving(session, base)

    # It answers with the prompt, which is no choice.
    assert asyncio.run(run(url)) is False


def make_metrics(**changes: float | None) -> dict[str, Metric]:
    values: dict[str, float | None] = {
        "slowest_refusal": 900.0, "slowest_first_token": 1900.0,
        "other_answers": 0.0, "stream_errors": 0.0, "itl_p99_ratio": 1.1, "leak_other_answers": 0.0,
        "leak_processes": 0.0, "leak_threads": 0.0, "serves_afterwards": 1.0,
        "leak_memory_api": -30.0, "leak_memory_engine": 3.0, "leak_memory_trials": 0.0,
    }  # fmt: skip
    return {name: Metric(value, "x") for name, value in {**values, **changes}.items()}


def test_what_fails() -> None:
    assert hostile.find_failures(make_metrics()) == []
    for changes in (
        {"slowest_refusal": 1001.0},
        {"slowest_first_token": 2001.0},
        {"other_answers": 1.0},
        {"itl_p99_ratio": 1.21},
        {"itl_p99_ratio": None},
        {"leak_processes": 1.0},
        {"leak_threads": 1.0},
        {"leak_memory_engine": 25.0},
        {"serves_afterwards": 0.0},
        {"stream_errors": 2.0},
    ):
        (failure,) = hostile.find_failures(make_metrics(**changes))
        assert next(iter(changes)).split("_")[0][:5] in failure
    assert hostile.find_failures(make_metrics(leak_ended=2.0, leak_over_budget=2.0)) == []
    (failure,) = hostile.find_failures(make_metrics(leak_ended=3.0, leak_over_budget=2.0))
    assert "3 requests of the flood failed" in failure
    short = {name: metric for name, metric in make_metrics().items() if not name.startswith("leak")}
    assert hostile.find_failures(short) == []


def test_threads_and_the_burner_are_counted() -> None:
    burner = subprocess.Popen([sys.executable, "-S", "-c", hostile._BURNER, "0.3"], start_new_session=True)
    try:
        assert leftovers.count_threads(os.getpgid(burner.pid)) == (1, 1)
        # The group's leader is the API process of a server.
        assert leftovers.read_parts(burner.pid)["api"] > 0.5
        before = read_cpu(burner.pid)
        time.sleep(1)
        used: Any = read_cpu(burner.pid).seconds_since(before)
    finally:
        burner.kill()
        burner.wait()
    # A machine with other work may give it less.
    assert 0 < used < 0.5
