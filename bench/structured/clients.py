# SPDX-License-Identifier: Apache-2.0
"""Clients of a server under attack: well-behaved streams, whose gaps between tokens are noted, and hostile visitors."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from bench.records import ROOT
from bench.serve.usage import CpuReading, read_cpu

MODEL = ROOT / "bench" / "models" / "tiny_moe"
#: Nobody waits longer for an answer to a hostile specification; the record then says that there was none.
PATIENCE_SECONDS = 60.0
#: Seconds after which a visitor leaves.
LEAVES_AFTER = 1.0
POLITE = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 60}},
    "required": ["items"],
    "additionalProperties": False,
}


class Answer(NamedTuple):
    """What became of a hostile request.

    code: 200 where it was served, an HTTP status or the code of an error before the first token where not, None where
    no answer came. answer_ms: until that, or the first token. tokens: of its output. end: finish_reason, "error" where
    the request was ended after its first token, "left" where the client was the one to leave.
    """

    code: int | None
    answer_ms: float
    tokens: int = 0
    end: str = ""


class Client:
    """Requests to one server, and the times between tokens of its streams."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = f"{base_url}/v1/completions", session
        #: (when, milliseconds) between two tokens of a stream.
        self.gaps: list[tuple[float, float]] = []
        self.stopped = asyncio.Event()
        #: Streams that have had two tokens, and requests of streams that the server refused or ended.
        self.streaming: set[int] = set()
        self.errors = 0

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
                    if line.startswith((b'data: {"error"', b'{"error"')):
                        # While the server's first trial starts, it says: try again.
                        self.errors += 1
                        await asyncio.sleep(0.5)
                        break
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append((now, (now - last) * 1e3))
                        self.streaming.add(number)
                    last = now
                    if self.stopped.is_set():
                        break

    async def wait_for_streams(self, count: int) -> None:
        """Until so many streams have tokens. Raises TimeoutError after PATIENCE_SECONDS."""
        ends = time.perf_counter() + PATIENCE_SECONDS
        while len(self.streaming) < count:
            if time.perf_counter() > ends:
                raise TimeoutError(f"{len(self.streaming)} of {count} well-behaved streams have tokens; see --log")
            await asyncio.sleep(0.2)

    async def send(self, body: bytes) -> Answer:
        """A hostile request whose answer is streamed, to its end."""
        began = time.perf_counter()
        try:
            async with self._post(body, PATIENCE_SECONDS) as response:
                if response.status != 200:
                    await response.read()
                    return Answer(response.status, _since(began))
                return await _read_stream(response, began)
        except (TimeoutError, aiohttp.ClientError):
            return Answer(None, _since(began))

    async def visit(self, body: bytes) -> Answer:
        """A hostile request whose answer comes as a whole; the client leaves where that takes long."""
        began = time.perf_counter()
        try:
            async with self._post(body, LEAVES_AFTER) as response:
                await response.read()
                return Answer(response.status, _since(began))
        except TimeoutError:
            return Answer(200, _since(began), end="left")
        except aiohttp.ClientError:
            return Answer(None, _since(began))

    def _post(self, body: bytes, seconds: float) -> Any:
        headers = {"Content-Type": "application/json"}
        return self.session.post(self.url, data=body, headers=headers, timeout=aiohttp.ClientTimeout(total=seconds))


async def _read_stream(response: aiohttp.ClientResponse, began: float) -> Answer:
    first: float | None = None
    tokens, end = 0, ""
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        message = json.loads(line.removeprefix(b"data: "))
        if "error" in message:
            if first is None:
                return Answer(int(message["error"]["code"]), _since(began))
            end = "error"
            continue
        first = _since(began) if first is None else first
        tokens = max(tokens, (message.get("usage") or {}).get("completion_tokens", 0))
        for choice in message.get("choices", ()):
            end = choice.get("finish_reason") or end
    return Answer(200 if first is not None else None, _since(began) if first is None else first, tokens, end)


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


class Phase:
    """The gaps of a kind of blocks, pooled; the processor time and seconds of its blocks."""

    def __init__(self, client: Client, group: int) -> None:
        self._client, self._group = client, group
        self.gaps: list[tuple[float, float]] = []
        self.cpu_seconds = self.seconds = 0.0

    def begin(self) -> None:
        """Forget the gaps before the block."""
        self._cpu: CpuReading = read_cpu(self._group)
        self._client.gaps.clear()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Take the gaps of the block."""
        self.seconds += time.perf_counter() - self._began
        self.cpu_seconds += read_cpu(self._group).seconds_since(self._cpu)
        self.gaps += self._client.gaps

    def find_p99(self) -> float | None:
        """Milliseconds."""
        return float(np.percentile([gap for _, gap in self.gaps], 99)) if self.gaps else None

    def find_median(self) -> float | None:
        """Milliseconds."""
        return statistics.median(gap for _, gap in self.gaps) if self.gaps else None

    def find_worst(self, began: float, ended: float) -> float:
        """Milliseconds of the longest gap that ended between two moments."""
        return max((gap for when, gap in self.gaps if began <= when <= ended), default=0.0)


async def is_serving(session: aiohttp.ClientSession, base_url: str) -> bool:
    """Whether a well-behaved request gets what it asks for."""
    body = {
        "model": str(MODEL),
        "prompt": "x",
        "max_tokens": 8,
        "temperature": 0,
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    try:
        async with session.post(f"{base_url}/v1/completions", json=body) as response:
            answer = await response.json()
    except aiohttp.ClientError:
        return False
    return response.status == 200 and answer["choices"][0]["text"] in ("yes", "no")
