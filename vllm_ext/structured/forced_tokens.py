# SPDX-License-Identifier: Apache-2.0
"""What a grammar forces next, as tokens: drafts that cost no drafter and change no output.

    state = make_state(grammar, end_token)                       one for each request
    find_forced_tokens(state, limit, spellings) -> ForcedTokens  the grammar's state is as before on return
    spellings.learn(...)                                         how the model wrote a forced text, for the next time

A grammar forces text. Which tokens spell it is the model's choice, unless only one token is allowed. So there are two
kinds of drafts: certain ones, where the mask has one token, and guesses: the spelling that was seen for this text last,
or the tokenizer's. A wrong guess costs its verification and nothing else.

No vLLM import; grammars are told by what they hold: xgrammar's matcher, or llguidance's ll_matcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

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


class ForcedTokens(NamedTuple):
    """Drafts after the current state, of which the first `num_certain` cannot be rejected."""

    tokens: list[int]
    num_certain: int
    #: Forced texts, each with the number of drafts before it. The last may have no drafts, where its guesses are bad.
    texts: list[tuple[str, int]]


NOTHING = ForcedTokens([], 0, [])


class GrammarState(Protocol):
    """A request's position in its grammar."""

    def find_known(self) -> list[int]:
        """Tokens that must come next, where the engine knows them without a mask; may be empty where some must."""
        ...

    def find_text(self) -> str:
        """Text that must come next; empty where there is a choice, where the grammar ends, and where it ended."""
        ...

    def find_end(self) -> int | None:
        """The token that ends the output, where nothing else may come; None elsewhere."""
        ...

    def is_only(self, token: int) -> bool:
        """Whether the mask has this token alone."""
        ...

    def accept(self, token: int) -> bool:
        """Move on; False, and no move, where the grammar forbids the token."""
        ...

    def rollback(self, count: int) -> None:
        """Move back by so many tokens."""
        ...

    def is_terminated(self) -> bool:
        """Whether the end token was accepted."""
        ...

    def measure(self, token: int) -> int:
        """Bytes that a token spells."""
        ...


def find_forced_tokens(state: GrammarState, limit: int, spellings: Spellings) -> ForcedTokens:
    """At most `limit` tokens that follow the current state by the grammar alone.

    Where several tokens may begin a forced text, its spelling comes from `spellings`; each token is checked against the
    grammar, and what follows one that it forbids is left out.

    Source: jump-forward decoding (xgrammar's find_jump_forward_string, llguidance's compute_ff_bytes), which appends
    text and so changes tokens and probabilities; drafts do neither.
    """
    tokens: list[int] = []
    texts: list[tuple[str, int]] = []
    num_certain = num_known = 0
    guesses: list[int] = []
    is_whole = True
    try:
        while len(tokens) < limit and not state.is_terminated():
            if not guesses:
                known = state.find_known()
                num_known = len(known)
                if not known and not is_whole:
                    break
                guess, is_whole = (known, True) if known else _guess(state, spellings, texts, len(tokens))
                guesses = guess[::-1]
                if not guesses:
                    break
            token = guesses.pop()
            is_certain = num_certain == len(tokens) and (num_known > 0 or state.is_only(token))
            num_known -= 1
            if not state.accept(token):
                break
            num_certain += is_certain
            tokens.append(token)
    finally:
        if tokens:
            state.rollback(len(tokens))
    return ForcedTokens(tokens, num_certain, texts) if texts or tokens else NOTHING


def _guess(state: GrammarState, spellings: Spellings, texts: list[tuple[str, int]], num_drafts: int) -> Guess:
    """Likely tokens of the text that must come next, which is noted in `texts`, or the end."""
    text = state.find_text()
    if text:
        texts.append((text, num_drafts))
        return spellings.spell(text)
    end = state.find_end()
    return Guess([] if end is None else [end], True)


# --- how texts are spelled ---------------------------------------------------------------------------------


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


# --- xgrammar and llguidance -------------------------------------------------------------------------------


class TokenSizes:
    """Bytes of the tokens of a vocabulary, and whether every byte is a token of its own."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._sizes = np.array([len(token) for token in vocabulary], np.uint16)
        self.has_all_bytes = len({token for token in vocabulary if len(token) == 1}) == 256

    def measure(self, token: int) -> int:
        """Bytes of a token; 0 for ids beyond the vocabulary."""
        return int(self._sizes[token]) if token < len(self._sizes) else 0


def count_allowed(row: np.ndarray) -> int:
    """Allowed tokens in a row of a mask, int32 [words], 32 tokens a word."""
    return int(np.bitwise_count(row.view(np.uint32)).sum())


class XgrammarState:
    """xgrammar's matcher of a request."""

    def __init__(self, matcher: Any, sizes: TokenSizes, row: Any, end_token: int | None) -> None:
        """row: int32 tensor [1, words] to fill masks into; may be shared. end_token: preferred where several end."""
        self._matcher, self._row, self._sizes = matcher, row, sizes
        self._words = row[0].numpy()
        self._ends = frozenset(matcher.stop_token_ids)
        self._end_token = end_token
        # Bound once: they are called for every request in every step.
        self._find_text: Callable[[], str] = matcher.find_jump_forward_string
        self.accept: Callable[[int], bool] = matcher.accept_token
        self.rollback: Callable[[int], None] = matcher.rollback
        self.is_terminated: Callable[[], bool] = matcher.is_terminated
        self.measure: Callable[[int], int] = sizes.measure

    def find_known(self) -> list[int]:
        """See GrammarState."""
        return []

    def find_text(self) -> str:
        """See GrammarState."""
        try:
            return self._find_text()
        except UnicodeDecodeError:
            # xgrammar 0.2.8 forces bytes, and its binding fails where they begin or end inside a character.
            return ""

    def find_end(self) -> int | None:
        """See GrammarState."""
        matcher = self._matcher
        if not matcher.is_completed() or matcher.is_terminated():
            return None
        matcher.fill_next_token_bitmask(self._row, 0)
        allowed = [end for end in self._ends if self._allows(end)]
        if not allowed or len(allowed) != count_allowed(self._words):
            return None
        return self._end_token if self._end_token in allowed else min(allowed)

    def is_only(self, token: int) -> bool:
        """See GrammarState."""
        # Beside a longer token its first byte is allowed too.
        if self._sizes.has_all_bytes and self._sizes.measure(token) > 1 and token not in self._ends:
            return False
        self._matcher.fill_next_token_bitmask(self._row, 0)
        return self._allows(token) and count_allowed(self._words) == 1

    def _allows(self, token: int) -> bool:
        return bool(int(self._words[token >> 5]) >> (token & 31) & 1)


class GuidanceState:
    """llguidance's matcher of a request."""

    def __init__(self, matcher: Any, tokenizer: Any, row: Any) -> None:
        """tokenizer: an LLTokenizer. row: int32 numpy array [1, words] to fill masks into; may be shared."""
        self._matcher, self._tokenizer, self._row = matcher, tokenizer, row
        self._sizes: dict[int, int] = {}
        self._has_ended = False
        self.rollback: Callable[[int], Any] = self._rollback

    def find_known(self) -> list[int]:
        """See GrammarState."""
        # Inside of a forced text its masks allow the tokenizer's own token alone.
        return [] if self._has_ended else self._matcher.compute_ff_tokens()

    def find_text(self) -> str:
        """See GrammarState."""
        # A character may be forced in part only: the rest of its bytes is a choice.
        return "" if self._has_ended else self._matcher.compute_ff_bytes().decode("utf-8", "ignore")

    def find_end(self) -> int | None:
        """See GrammarState."""
        if self._has_ended or not self._matcher.is_stopped() or self._matcher.is_error():
            return None
        return int(self._tokenizer.eos_token)

    def is_only(self, token: int) -> bool:
        """See GrammarState."""
        if self._matcher.is_stopped():
            return token == self._tokenizer.eos_token
        self._matcher.unsafe_compute_mask_ptr(self._row.ctypes.data, self._row.nbytes)
        words = self._row[0]
        return bool(int(words[token >> 5]) >> (token & 31) & 1) and count_allowed(words) == 1

    def accept(self, token: int) -> bool:
        """See GrammarState."""
        if self._matcher.is_stopped():
            # A stopped matcher takes its end token without a move (as in vLLM's GuidanceGrammar.accept_tokens).
            self._has_ended = token == self._tokenizer.eos_token
            return self._has_ended
        return self._matcher.try_consume_tokens([token]) == 1

    def _rollback(self, count: int) -> None:
        count -= self._has_ended
        self._has_ended = False
        if count:
            self._matcher.rollback(count)

    def is_terminated(self) -> bool:
        """See GrammarState."""
        return self._has_ended

    def measure(self, token: int) -> int:
        """See GrammarState."""
        size = self._sizes.get(token)
        if size is None:
            size = self._sizes[token] = len(self._tokenizer.decode_bytes([token]))
        return size


class StateMaker:
    """Makes the GrammarState of a vLLM grammar, and holds what all of them share."""

    def __init__(self) -> None:
        self._sizes: tuple[Any, TokenSizes] | None = None
        self._rows: dict[int, Any] = {}

    def make(self, grammar: Any, end_token: int | None) -> GrammarState | None:
        """None for a grammar of another kind, which forces nothing that is known here."""
        matcher = getattr(grammar, "matcher", None)
        if matcher is not None and hasattr(matcher, "find_jump_forward_string"):
            return XgrammarState(matcher, self._measure(grammar.ctx), self._find_row(grammar.vocab_size), end_token)
        matcher = getattr(grammar, "ll_matcher", None)
        if matcher is not None:
            row = self._find_row(grammar.ll_tokenizer.vocab_size)
            return GuidanceState(matcher, grammar.ll_tokenizer, row.numpy())
        return None

    def _measure(self, compiled: Any) -> TokenSizes:
        info = compiled.tokenizer_info
        key = (info.vocab_size, info.vocab_type, info.add_prefix_space)
        if self._sizes is None or self._sizes[0] != key:
            self._sizes = (key, TokenSizes(info.decoded_vocab))
        return self._sizes[1]

    def _find_row(self, vocab_size: int) -> Any:
        import torch

        row = self._rows.get(vocab_size)
        if row is None:
            row = self._rows[vocab_size] = torch.zeros((1, (vocab_size + 31) // 32), dtype=torch.int32)
        return row
