# SPDX-License-Identifier: Apache-2.0
"""What a grammar forces next, as tokens: drafts that cost no drafter and change no output.

    state = make_state(grammar, end_token)                       one for each request
    find_forced_tokens(state, limit, spellings) -> ForcedTokens  the grammar's state is as before on return
    spellings.learn(...)                                         how the model wrote a forced text, for the next time

A grammar forces text. Which tokens spell it is the model's choice, unless only one token is allowed. So there are two
kinds of drafts: certain ones, where the mask has one token, and guesses: the spelling that was seen for this text last,
or the tokenizer's. A wrong guess costs its verification and nothing else.

No vLLM import.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from vllm_ext.structured.spellings import LONGEST_TEXT, Guess, Spellings


class ForcedTokens(NamedTuple):
    """Drafts after the current state, of which the first `num_certain` cannot be rejected."""

    tokens: list[int]
    num_certain: int
    #: Forced texts, each with the number of drafts before it. The last may have no drafts, where its guesses are bad.
    texts: list[tuple[str, int]]


NOTHING = ForcedTokens([], 0, [])


class GrammarState(Protocol):
    """A request's position in its grammar."""

    #: Tokens with a place in its masks: a tokenizer may know more, which no model writes.
    vocab_size: int

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
            if not 0 <= token < state.vocab_size:
                break
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
        # A forced text may have megabytes, of which a draft needs the first few tokens.
        text, is_cut = text[: LONGEST_TEXT + 1], len(text) > LONGEST_TEXT
        texts.append((text, num_drafts))
        guess = spellings.spell(text)
        return Guess(guess.tokens, guess.is_whole and not is_cut)
    end = state.find_end()
    return Guess([] if end is None else [end], True)
