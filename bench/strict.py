# SPDX-License-Identifier: Apache-2.0
"""Strict reading of a case's mappings. Every function raises CaseError, which names key, value and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class CaseError(ValueError):
    """A case that cannot be run; the message names the file, the key and the fix."""


def check_keys(content: Any, where: str, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
    """`content` as a mapping that has only `known` keys and all `required` ones."""
    known = list(known)
    if not isinstance(content, dict):
        raise CaseError(f"{where} is {content!r}, expected a mapping with the keys {', '.join(known)}")
    for key in content:
        if key not in known:
            raise CaseError(f"unknown key {key!r} in {where}{suggest(str(key), known)}")
    for key in required:
        if key not in content:
            raise CaseError(f"{where} needs the key {key!r}")
    return dict(content)


def read_choice(given: Mapping[str, Any], key: str, choices: Iterable[str], default: str, where: str = "") -> Any:
    """The value of `key`, one of `choices`."""
    value = given.get(key, default)
    if value not in (choices := list(choices)):
        raise CaseError(f"{where}{key} is {value!r}{suggest(str(value), choices)}")
    return value


def read_number(
    given: Mapping[str, Any], key: str, default: float, *, low: float, whole: bool = False, where: str = ""
) -> Any:
    """The value of `key`, a finite number from `low` up; an int where `whole`, else a float."""
    value: Any = given.get(key, default)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # The comparison is false for NaN too.
    if not is_number or not low <= value < float("inf"):
        raise CaseError(f"{where}{key} is {value!r}, expected {'a whole' if whole else 'a'} number from {low} up")
    return value if whole else float(value)


def read_text(given: Mapping[str, Any], key: str, default: str) -> str:
    """The value of `key`, a string."""
    value = given.get(key, default)
    if not isinstance(value, str):
        raise CaseError(f"{key} is {value!r}, expected text")
    return value


def read_list(given: Mapping[str, Any], key: str) -> list[Any]:
    """The value of `key`, a list; absent or null is an empty one."""
    value = given.get(key) or []
    if not isinstance(value, list):
        raise CaseError(f"{key} is {value!r}, expected a list")
    return value


def read_mapping(given: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The value of `key`, a mapping; absent or null is an empty one."""
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise CaseError(f"{where}{key} is {value!r}, expected a mapping")
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    every = list(known)
    near = difflib.get_close_matches(name, every, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(every) or 'none'}"
