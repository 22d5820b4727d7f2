# SPDX-License-Identifier: Apache-2.0
"""What keeps a specification from being served. All are ValueErrors: the request is at fault, or too much is asked."""

from __future__ import annotations

#: Characters that a message quotes of what a client sent.
MOST_QUOTED = 120
#: Characters of a whole message, which is kept with its verdict and sent back.
MOST_MESSAGE = 600


class SchemaError(ValueError):
    """A schema that is not served; `pointer` is the JSON pointer of the keyword at fault, `keyword` its name."""

    def __init__(self, pointer: str, keyword: str, reason: str) -> None:
        super().__init__(shorten(f"JSON schema keyword {keyword!r} at #{shorten(pointer, MOST_QUOTED)}: {reason}"))
        self.pointer = pointer
        self.keyword = keyword


class RefusedError(ValueError):
    """A specification that is not served; the message names the keyword or the limit."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


class GrammarError(ValueError):
    """An engine does not take a specification; the message is the engine's."""


def shorten(value: object, length: int = MOST_MESSAGE) -> str:
    """A text of at most so many characters, cut in the middle, in which half surrogate pairs are replaced."""
    text = str(value)
    if len(text) > length:
        head = length * 2 // 3
        text = f"{text[:head]}...{text[len(text) - (length - head - 3) :]}"
    return text.encode("utf-8", "replace").decode()


def quote(value: object) -> str:
    """`repr` of a client's value, short. A long text is cut before it is quoted."""
    return shorten(repr(value[: 2 * MOST_QUOTED] if isinstance(value, str) else value), MOST_QUOTED)
