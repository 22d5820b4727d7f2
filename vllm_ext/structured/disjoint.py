# SPDX-License-Identifier: Apache-2.0
"""Whether two JSON schemas share no value, as far as their keywords show it. Sound, not complete: False may mean
"not found out". `oneOf` equals `anyOf` exactly where its schemas are disjoint in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Comparisons of two schemas before the answer is "not found out"; alternatives of alternatives multiply.
MOST_STEPS = 30_000


def are_disjoint(left: Any, right: Any, definitions: Mapping[str, Any], steps: Iterator[int] | None = None) -> bool:
    """Whether no value is valid under both schemas.

    left, right: schemas of `normalize.normalize_schema`'s dialect, before types are inferred. definitions: `$defs`.
    steps: what is left of the comparisons, for callers with many pairs.
    """
    return _compare(left, right, definitions, steps or iter(range(MOST_STEPS)), 0)


def _compare(left: Any, right: Any, definitions: Mapping[str, Any], steps: Iterator[int], depth: int) -> bool:
    """`are_disjoint` while steps last, and no deeper than references sensibly go."""
    if depth > 16 or next(steps, None) is None:
        return False
    if left is False or right is False:
        return True
    if not isinstance(left, dict) or not isinstance(right, dict):
        return False
    for first, second in ((left, right), (right, left)):
        if "$ref" in first:
            target = definitions.get(first["$ref"].removeprefix("#/$defs/"), True)
            if _compare(target, second, definitions, steps, depth + 1):
                return True
        for key in ("anyOf", "oneOf"):
            options = first.get(key)
            if options and all(_compare(option, second, definitions, steps, depth + 1) for option in options):
                return True
        if any(_compare(part, second, definitions, steps, depth + 1) for part in first.get("allOf", ())):
            return True
        if (values := _list_values(first)) is not None and all(_excludes(second, value) for value in values):
            return True
    if not _list_types(left) & _list_types(right):
        return True
    return left.get("type") == right.get("type") == "object" and _objects_differ(left, right, definitions, steps, depth)


def _list_values(node: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema can allow, where it names them."""
    if "const" in node:
        return [node["const"]]
    return node.get("enum")


def _excludes(node: Any, value: Any) -> bool:
    """Whether a value is surely invalid under a schema."""
    if not isinstance(node, dict):
        return node is False
    if (values := _list_values(node)) is not None and not any(_is_equal(value, each) for each in values):
        return True
    if _name_type(value) not in _list_types(node):
        return True
    if isinstance(value, dict):
        properties = node.get("properties", {})
        if any(name not in value for name in node.get("required", ())):
            return True
        return any(name in properties and _excludes(properties[name], each) for name, each in value.items())
    return False


def _is_equal(left: Any, right: Any) -> bool:
    """JSON's equality: 1 equals 1.0, and true does not equal 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_equal(left[name], right[name]) for name in left)
    return bool(left == right)


def _name_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "fraction"
    kinds: tuple[tuple[type, str], ...] = ((str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _list_types(node: Mapping[str, Any]) -> frozenset[str]:
    """Types that a schema may allow; numbers are whole ("integer") or not ("fraction")."""
    every = frozenset(("string", "integer", "fraction", "array", "object", "boolean", "null"))
    if (values := _list_values(node)) is not None:
        return frozenset(map(_name_type, values))
    name = node.get("type")
    if name is None:
        return every
    return frozenset(("integer", "fraction")) if name == "number" else frozenset((name,))


def _objects_differ(
    left: Mapping[str, Any], right: Mapping[str, Any], definitions: Mapping[str, Any], steps: Iterator[int], depth: int
) -> bool:
    """Whether some property that one of two objects must have is impossible, or another one, in the other."""
    for first, second in ((left, right), (right, left)):
        for name in first.get("required", ()):
            mine = first.get("properties", {}).get(name, True)
            if name in second.get("properties", {}):
                theirs = second["properties"][name]
                # Present, as it is required here, it has to be valid there too.
                if _compare(mine, theirs, definitions, steps, depth + 1):
                    return True
            elif second.get("additionalProperties") is False and "patternProperties" not in second:
                return True
    return False
