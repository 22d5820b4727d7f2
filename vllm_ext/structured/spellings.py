# SPDX-License-Identifier: Apache-2.0
"""How texts that a grammar forces are spelled in tokens: as the model did it before, else as the tokenizer does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_ext.structured.lookahead import ForcedTokens

#: Texts whose spelling is remembered.
MAX_TEXTS = 16384
#: Longer texts are not worth a place: they hardly come twice.
LONGEST_TEXT = 256
#: A text is not drafted while less than this share of its tokens would have been accepted, on average.
WORTH = 0.1
#: Weight of the newest outcome in a text's record.
NEWEST = 0.25
#: Of spellings by the tokenizer alone, over all texts: accepted and rejected tokens to begin with, and how fast old
#: ones are forgotten. Such a guess is drafted as far as its chance is at least WORTH.
FIRST_ACCEPTED, FIRST_REJECTED, FORGET = 8.0, 1.0, 0.97


class Guess(NamedTuple):
    """Likely tokens; behind them nothing is worth a guess unless they are whole."""

    tokens: list[int]
    is_whole: bool


class _Spelling:
    """Tokens of a forced text, and how well they did."""

    __slots__ = ("accepted", "is_seen", "is_sure", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        #: Whether the model has written it; until then it is spelled by the tokenizer.
        self.is_seen = False
        #: Whether the model wrote it like this the last time: one deviation then does not replace it.
        self.is_sure = False
        #: Share of its tokens that were, or would have been, accepted; a moving average.
        self.accepted = 1.0


class Spellings:
    """Which tokens spell a forced text: as the model did it before, else as the tokenizer does.

    All requests share it: the same keys come in every answer of a schema, and in the same words. What is learned of one
    request shows in the speed of others, never in their tokens.
    """

    def __init__(self, encode: Callable[[str], list[int]], max_texts: int = MAX_TEXTS) -> None:
        """encode: the tokenizer's tokens of a text, without special tokens."""
        self._encode = encode
        self._max_texts = max_texts
        self._known: dict[str, _Spelling] = {}
        self._accepted, self._rejected = FIRST_ACCEPTED, FIRST_REJECTED
        self._reach = _find_reach(FIRST_ACCEPTED, FIRST_REJECTED)

    def __len__(self) -> int:
        return len(self._known)

    def spell(self, text: str) -> Guess:
        """The likely tokens of a text, as far as they are worth their verification."""
        known = self._known.get(text)
        if known is None:
            known = _Spelling(self._encode(text))
            if len(text) <= LONGEST_TEXT:
                self._keep(text, known)
        if not known.is_seen:
            return Guess(known.tokens[: self._reach], len(known.tokens) <= self._reach)
        return Guess(known.tokens, True) if known.accepted >= WORTH else Guess([], False)

    def learn(self, text: str, written: Sequence[int]) -> None:
        """The tokens with which a model wrote a text; the last may go beyond it."""
        known = self._known.get(text)
        if known is None:
            return
        tokens = known.tokens
        pairs = zip(tokens, written, strict=False)
        matched = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(written)))
        known.accepted += NEWEST * (matched / max(len(tokens), 1) - known.accepted)
        if not known.is_seen:
            known.is_seen = True
            self._accepted = FORGET * self._accepted + matched
            self._rejected = FORGET * self._rejected + (matched < len(tokens))
            self._reach = _find_reach(self._accepted, self._rejected)
        if matched >= len(tokens):
            known.is_sure = True
        elif known.is_sure:
            known.is_sure = False
        else:
            known.tokens = list(written)

    def _keep(self, text: str, known: _Spelling) -> None:
        if len(self._known) >= self._max_texts:
            # The oldest: dictionaries keep their order.
            del self._known[next(iter(self._known))]
        self._known[text] = known


def _find_reach(accepted: float, rejected: float) -> int:
    """How many tokens of a guess have a chance of at least WORTH each; at least one, or nothing would be learned of
    how guesses do."""
    chance = accepted / (accepted + rejected + 1e-9)
    return max(1, int(math.log(WORTH) / math.log(min(max(chance, 1e-3), 0.99))))


class _Awaited(NamedTuple):
    """A forced text whose spelling the output has yet to show."""

    text: str
    size: int  # bytes
    #: Output tokens before it, and what those from `begin` on are if it is really forced there.
    start: int
    begin: int
    drafts: list[int]


class SpellingObserver:
    """Reads from a request's output how the model spelled the texts that were forced."""

    __slots__ = ("_awaited", "_measure", "_spellings")

    def __init__(self, spellings: Spellings, measure: Callable[[int], int]) -> None:
        """measure: bytes of a token."""
        self._spellings = spellings
        self._measure = measure
        self._awaited: list[_Awaited] = []

    def expect(self, forced: ForcedTokens, num_output_tokens: int) -> None:
        """What was found behind so many output tokens."""
        for text, before in forced.texts:
            if len(text) <= LONGEST_TEXT:
                start = num_output_tokens + before
                drafts = forced.tokens[:before]
                self._awaited.append(_Awaited(text, len(text.encode()), start, num_output_tokens, drafts))

    def read(self, output_token_ids: Sequence[int]) -> None:
        """Learn the spellings of expected texts that the output now covers."""
        length = len(output_token_ids)
        left = []
        for awaited in self._awaited:
            if length <= awaited.start:
                # Its drafts were not accepted, so the text is another's: what comes now is looked at by itself.
                continue
            if output_token_ids[awaited.begin : awaited.start] != awaited.drafts:
                continue
            size, place = awaited.size, awaited.start
            while size > 0 and place < length:
                size -= self._measure(output_token_ids[place])
                place += 1
            if size <= 0:
                self._spellings.learn(awaited.text, output_token_ids[awaited.start : place])
            else:
                left.append(awaited)
        self._awaited = left
