# SPDX-License-Identifier: Apache-2.0
"""Whether two JSON schemas share no value, as far as their keywords show it. Sound, not complete: False may mean
"not found out". `oneOf` equals `anyOf` exactly where its schemas are disjoint in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from vllm_ext.structured.errors import SchemaError
from vllm_ext.structured.patterns import read_beginning

#: Values read before the answer is "not found out", and what a comparison of two schemas counts for: alternatives of
#: alternatives multiply.
MOST_STEPS, COMPARISON = 240_000, 8


def choose_one_of(node: Any, definitions: Mapping[str, Any], steps: Iterator[int] | None = None) -> Any:
    """A normalized schema with `oneOf` as `anyOf` where its schemas exclude each other. definitions: its `$defs`.

    steps: what is left of the comparisons. Raises SchemaError where it cannot be shown that they do.
    """
    steps = steps or iter(range(MOST_STEPS))
    if isinstance(node, list):
        return [choose_one_of(each, definitions, steps) for each in node]
    if not isinstance(node, dict):
        return node
    if "oneOf" in node and isinstance(node.get("at"), str):
        options = node["oneOf"]
        for i, left in enumerate(options):
            for j, right in enumerate(options[:i]):
                if not are_disjoint(left, right, definitions, steps):
                    reason = f"schemas {j} and {i} of it may both allow a value, and no engine can count"
                    raise SchemaError(node["at"], "oneOf", reason)
        node = {"anyOf": options, **({"$defs": node["$defs"]} if "$defs" in node else {})}
    return {
        key: {name: choose_one_of(each, definitions, steps) for name, each in value.items()}
        if key in ("properties", "patternProperties", "$defs")
        else value
        if key in ("const", "enum")
        else choose_one_of(value, definitions, steps)
        for key, value in node.items()
    }


def are_disjoint(left: Any, right: Any, definitions: Mapping[str, Any], steps: Iterator[int] | None = None) -> bool:
    """Whether no value is valid under both schemas.

    left, right: schemas of `normalize.normalize_schema`'s dialect, before types are inferred. definitions: `$defs`.
    steps: what is left of the comparisons, for callers with many pairs.
    """
    return _compare(left, right, definitions, steps or iter(range(MOST_STEPS)), 0)


def _compare(left: Any, right: Any, definitions: Mapping[str, Any], steps: Iterator[int], depth: int) -> bool:
    """`are_disjoint` while steps last, and no deeper than references sensibly go."""
    if depth > 16 or sum(1 for _ in islice(steps, COMPARISON)) < COMPARISON:
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
        if (values := _list_values(first)) is not None and _excludes_all(second, values, steps):
            return True
    if not _list_types(left) & _list_types(right):
        return True
    kinds = {left.get("type"), right.get("type")}
    if kinds <= {"integer", "number"}:
        return _is_below(left, right) or _is_below(right, left)
    if kinds == {"string"}:
        return _counts_differ(left, right, "Length") or _beginnings_differ(left, right)
    if kinds == {"array"}:
        return _counts_differ(left, right, "Items") or _first_items_differ(left, right, definitions, steps, depth)
    return kinds == {"object"} and _objects_differ(left, right, definitions, steps, depth)


def _is_below(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether every number of one schema is below every number of the other."""
    highest = [(left[key], key == "maximum") for key in ("maximum", "exclusiveMaximum") if key in left]
    lowest = [(right[key], key == "minimum") for key in ("minimum", "exclusiveMinimum") if key in right]
    return any(
        high < low or (high == low and not (has_high and has_low))
        for high, has_high in highest
        for low, has_low in lowest
    )


def _counts_differ(left: Mapping[str, Any], right: Mapping[str, Any], what: str) -> bool:
    """Whether one schema asks for more characters or items than the other allows."""
    return any(
        first.get(f"min{what}", 0) > second[f"max{what}"]
        for first, second in ((left, right), (right, left))
        if f"max{what}" in second
    )


def _beginnings_differ(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether patterns that hold for the start of a string ask for other characters there."""
    first, second = (read_beginning(node.get("pattern", "")) for node in (left, right))
    return any(a != b for a, b in zip(first, second, strict=False))


def _first_items_differ(
    left: Mapping[str, Any], right: Mapping[str, Any], definitions: Mapping[str, Any], steps: Iterator[int], depth: int
) -> bool:
    """Whether no item can be the first one of both arrays, of which one needs an item."""
    if not (left.get("minItems") or right.get("minItems")):
        return False
    first, second = (node.get("prefixItems", [node.get("items", True)]) for node in (left, right))
    return bool(first and second) and _compare(first[0], second[0], definitions, steps, depth + 1)


def _excludes_all(node: Any, values: Sequence[Any], steps: Iterator[int]) -> bool:
    """Whether no value of a list is valid under a schema; False where too many steps would show it."""
    others = _list_values(node) if isinstance(node, dict) else None
    try:
        allowed = None if others is None else {_freeze(other, steps) for other in others}
        return all(
            (allowed is not None and _freeze(value, steps) not in allowed) or _excludes(node, value, steps)
            for value in values
        )
    except _NoStepsError:
        return False


class _NoStepsError(Exception):
    """The comparisons are used up."""


def _freeze(value: Any, steps: Iterator[int]) -> Any:
    """A key that two values share where they are equal in JSON: 1 equals 1.0, and true does not equal 1."""
    if next(steps, None) is None:
        raise _NoStepsError
    if isinstance(value, list):
        return ("list", *(_freeze(each, steps) for each in value))
    if isinstance(value, dict):
        return ("object", frozenset((name, _freeze(each, steps)) for name, each in value.items()))
    return ("boolean", value) if isinstance(value, bool) else value


def _list_values(node: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema can allow, where it names them."""
    if "const" in node:
        return [node["const"]]
    return node.get("enum")


def _excludes(node: Any, value: Any, steps: Iterator[int]) -> bool:
    """Whether a value is surely invalid under a schema, its list of values aside. Raises _NoStepsError."""
    if next(steps, None) is None:
        raise _NoStepsError
    if not isinstance(node, dict):
        return node is False
    if _name_type(value) not in _list_types(node):
        return True
    if isinstance(value, dict):
        properties = node.get("properties", {})
        if any(name not in value for name in node.get("required", ())):
            return True
        return any(
            name in properties and _excludes_all(properties[name], [each], steps) for name, each in value.items()
        )
    return False


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
