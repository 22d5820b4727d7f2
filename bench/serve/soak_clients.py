# SPDX-License-Identifier: Apache-2.0
"""Clients of a soak: they read answers to the end, go away, or have their requests aborted, and check what they get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

#: Nothing said for so long is a hang.
STALL_SECONDS = 60.0
#: Parts of the requests that end by themselves, whose client goes away, and that are aborted by name.
ENDINGS = {"whole": 0.6, "left": 0.25, "aborted": 0.15}
#: Prompts whose answers are known, and the part of the whole requests that ask them.
KNOWN_PROMPTS, KNOWN_SHARE, KNOWN_TOKENS = 6, 0.3, 40
#: Words of a prompt: most are short; long ones take many chunks. A third begins like another.
SHORT_WORDS, LONG_WORDS, LONG_SHARE = (3, 60), (250, 700), 0.2
COMMON_SHARE, COMMON_WORDS = 0.33, 120
MOST_TOKENS = 80
#: Seconds after which those leave, or are aborted, who do not wait for their tokens.
MOST_PATIENCE = 2.0
#: Faults that are kept word for word.
MOST_FAULTS = 20


@dataclass
class Answer:
    """What came of a request so far."""

    text: str = ""
    pieces: int = 0
    finish: str | None = None
    tokens: int | None = None


@dataclass
class Counts:
    """What all clients saw."""

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    before_first_token: int = 0
    known: int = 0
    wrong: int = 0
    stalled: int = 0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All that are over."""
        return sum(self.ended.values())

    def note_fault(self, what: str) -> None:
        """Count what must not happen."""
        self.num_faults += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(what)


class Clients:
    """All clients of one server. Everything that is drawn comes from a generator of the client's own."""

    def __init__(self, base_url: str, model: str, session: aiohttp.ClientSession, words: Sequence[str]) -> None:
        """words: of the text that prompts are cut from."""
        self.counts = Counts()
        self.stopped = asyncio.Event()
        self._url, self._model, self._session, self._words = base_url, model, session, words
        self._known: list[tuple[str, str]] = []

    async def learn(self) -> None:
        """Ask the known prompts, one after the other, of a server that serves nobody else."""
        for number in range(KNOWN_PROMPTS):
            prompt = " ".join(self._words[number * 1000 :][: 5 + 60 * number])
            answer = Answer()
            await self._read(f"learn-{number}", prompt, KNOWN_TOKENS, answer)
            self._check_whole(answer, KNOWN_TOKENS)
            self._known.append((prompt, answer.text))

    async def check_known(self) -> None:
        """Ask them again."""
        for number, (prompt, expected) in enumerate(self._known):
            answer = Answer()
            await self._read(f"again-{number}", prompt, KNOWN_TOKENS, answer)
            self._check_known(prompt, expected, answer)

    async def run(self, number: int, seed: int) -> None:
        """One client: a request after the other until told to stop."""
        generator = np.random.default_rng([seed, number])
        for count in range(1 << 40):
            if self.stopped.is_set():
                return
            ending = str(generator.choice(list(ENDINGS), p=list(ENDINGS.values())))
            try:
                await self._ask(f"soak-{number}-{count}", ending, generator)
            except (TimeoutError, aiohttp.ClientError) as error:
                stalled = isinstance(error, TimeoutError)
                self.counts.stalled += stalled
                silent = f"nothing for {STALL_SECONDS:.0f} s" if stalled else f"{type(error).__name__}: {error}"
                self.counts.note_fault(f"{ending} request: {silent}")
            self.counts.ended[ending] += 1
            await asyncio.sleep(float(generator.exponential(0.05)))

    async def _ask(self, name: str, ending: str, generator: np.random.Generator) -> None:
        known = ending == "whole" and self._known and generator.random() < KNOWN_SHARE
        if known:
            prompt, expected = self._known[int(generator.integers(len(self._known)))]
            tokens = KNOWN_TOKENS
        else:
            prompt, expected, tokens = self._draw_prompt(generator), "", int(generator.integers(1, MOST_TOKENS + 1))
        patience = float(generator.uniform(0, MOST_PATIENCE))
        # Half of those who go early do so by the clock, the others after a number of tokens.
        pieces = int(generator.integers(1, tokens + 1)) if generator.random() < 0.5 else None
        answer = Answer()
        if ending == "whole":
            await self._read(name, prompt, tokens, answer)
            if known:
                self._check_known(prompt, expected, answer)
            else:
                self._check_whole(answer, tokens)
            return
        reading = asyncio.create_task(self._read(name, prompt, tokens, answer))
        try:
            await self._wait_for(reading, answer, pieces, patience)
            self.counts.before_first_token += not answer.pieces
            if ending == "aborted":
                await self._abort(name)
                await reading
                # A request may have ended by itself just before; of one that has no token yet vLLM's stream ends
                # without a word.
                if answer.finish not in ("abort", "length") and answer.pieces:
                    self.counts.note_fault(f"aborted request: finish_reason {answer.finish!r}")
        finally:
            # The connection goes with the task.
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _wait_for(self, reading: asyncio.Task[None], answer: Answer, pieces: int | None, patience: float) -> None:
        """Until so many pieces are there, or so many seconds are over, or the answer is whole."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (patience if pieces is None else STALL_SECONDS)
        while not reading.done() and loop.time() < end and (pieces is None or answer.pieces < pieces):
            await asyncio.sleep(0.005)
        if reading.done():
            # What went wrong is raised here.
            await reading

    async def _read(self, name: str, prompt: str, tokens: int, answer: Answer) -> None:
        """Stream a greedy answer of so many tokens into `answer`. Raises TimeoutError where nothing comes for long."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        limit = aiohttp.ClientTimeout(total=None, sock_read=STALL_SECONDS)
        headers = {"X-Request-Id": name}
        url = f"{self._url}/v1/completions"
        async with self._session.post(url, json=body, headers=headers, timeout=limit) as response:
            if response.status != 200:
                raise aiohttp.ClientPayloadError(f"status {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                content: dict[str, Any] = json.loads(line[len(b"data: ") :])
                if "error" in content:
                    raise aiohttp.ClientPayloadError(f"error within a stream: {content['error']}")
                for choice in content["choices"]:
                    answer.pieces += 1
                    answer.text += choice["text"]
                    answer.finish = choice["finish_reason"] or answer.finish
                if content.get("usage"):
                    answer.tokens = content["usage"]["completion_tokens"]

    async def _abort(self, name: str) -> None:
        # The first and only prompt of the request: vLLM's name for it.
        body = {"request_ids": [f"cmpl-{name}-0"]}
        limit = aiohttp.ClientTimeout(total=STALL_SECONDS)
        async with self._session.post(f"{self._url}/abort_requests", json=body, timeout=limit) as response:
            if response.status != 200:
                raise aiohttp.ClientPayloadError(f"abort: status {response.status}: {(await response.text())[:200]}")

    def _draw_prompt(self, generator: np.random.Generator) -> str:
        low, high = LONG_WORDS if generator.random() < LONG_SHARE else SHORT_WORDS
        start = int(generator.integers(len(self._words) - high))
        words = list(self._words[start : start + int(generator.integers(low, high))])
        if generator.random() < COMMON_SHARE:
            words = [*self._words[:COMMON_WORDS], *words]
        return " ".join(words)

    def _check_whole(self, answer: Answer, tokens: int) -> None:
        if answer.finish != "length" or answer.tokens != tokens:
            self.counts.wrong += 1
            self.counts.note_fault(f"whole request: {answer.tokens} of {tokens} tokens, finish {answer.finish!r}")

    def _check_known(self, prompt: str, expected: str, answer: Answer) -> None:
        self.counts.known += 1
        if answer.text != expected:
            self.counts.wrong += 1
            said = f"{answer.text[:60]!r}, not {expected[:60]!r}"
            self.counts.note_fault(f"{prompt[:30]!r} is answered by {said}")
