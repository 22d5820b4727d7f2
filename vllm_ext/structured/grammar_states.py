# SPDX-License-Identifier: Apache-2.0
"""A request's position in its grammar, of xgrammar and of llguidance (`lookahead.GrammarState`).

No vLLM import; grammars are told by what they hold: xgrammar's matcher, or llguidance's ll_matcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_ext.structured.spellings import LONGEST_TEXT

if TYPE_CHECKING:
    from vllm_ext.structured.lookahead import GrammarState

#: Bytes that a text of this length and one character more may have.
MOST_BYTES = 4 * (LONGEST_TEXT + 1)


class TokenSizes:
    """Bytes of the tokens of a vocabulary, and whether every byte is a token of its own."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._sizes = np.array([len(token) for token in vocabulary], np.uint16)
        self.vocab_size = len(self._sizes)
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
        self.vocab_size: int = sizes.vocab_size
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
        self.vocab_size: int = tokenizer.vocab_size
        self._sizes: dict[int, int] = {}
        self._has_ended = False

    def find_known(self) -> list[int]:
        """See GrammarState."""
        # Inside of a forced text its masks allow the tokenizer's own token alone.
        return [] if self._has_ended else self._matcher.compute_ff_tokens()[:LONGEST_TEXT]

    def find_text(self) -> str:
        """See GrammarState."""
        # A character may be forced in part only: the rest of its bytes is a choice.
        return "" if self._has_ended else self._matcher.compute_ff_bytes()[:MOST_BYTES].decode("utf-8", "ignore")

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

    def rollback(self, count: int) -> None:
        """See GrammarState."""
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
        """None for a grammar of another kind, which forces nothing that is known here, or that may force too much."""
        if not getattr(grammar, "forces_little", True):
            return None
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
