# SPDX-License-Identifier: Apache-2.0
"""The keywords of one schema, read and checked kind by kind; normalize.py puts them together. No vllm import.

Each function takes `given`, the known keywords of a schema, and the JSON pointer of that schema, and writes into `out`
what the engines are told. Raises SchemaError with the pointer of a keyword that means nothing or that no engine holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from vllm_ext.structured import capabilities as table
from vllm_ext.structured.errors import SchemaError, quote

#: Rewrites a schema inside another: (schema, pointer).
Rewrite = Callable[[Any, str], Any]

#: Values of an item of which all arrays without repetition are written out: 65 of 4.
MOST_UNIQUE = 4

#: Days that a year has: 29 February only in leap years, which the formats' own patterns do not know.
LEAP_DAY = (
    "^([0-9]{4}-(0[13-9]|1[0-2])|[0-9]{4}-02-([01][0-9]|2[0-8])|"
    "([0-9][0-9](0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)


def read_types(given: Mapping[str, Any], pointer: str) -> list[str] | None:
    """The types that a schema names, each once; None where it names none."""
    if "type" not in given:
        return None
    types = given["type"] if isinstance(given["type"], list) else [given["type"]]
    for name in types:
        if not isinstance(name, str) or (name != "integer" and name not in table.BY_TYPE):
            raise SchemaError(f"{pointer}/type", "type", f"{quote(name)} is no type of JSON")
    if not types:
        raise SchemaError(f"{pointer}/type", "type", "an empty list leaves no value")
    kept = [name for name in dict.fromkeys(types) if name != "integer" or "number" not in types]
    return kept


def drop_unsupported(given: dict[str, Any], pointer: str) -> None:
    """Drop the forms of unsupported keywords that say nothing or have another name; refuse the others."""
    says_nothing = {
        "if": "then" not in given and "else" not in given,
        "uniqueItems": given.get("uniqueItems") is False or given.get("maxItems", 2) in (0, 1),
        "dependentRequired": not given.get("dependentRequired"),
        "dependentSchemas": not given.get("dependentSchemas"),
        "dependencies": not given.get("dependencies"),
        "contains": given.get("minContains") == 0 and "maxContains" not in given,
        "unevaluatedItems": given.get("unevaluatedItems") is True,
        "unevaluatedProperties": given.get("unevaluatedProperties") is True,
    }
    alone = not table.IN_PLACE & set(given) - {"type", "const", "enum"}
    for old, new in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        # With no schema in place beside them, nothing else can have evaluated a property or an item.
        if old in given and alone:
            value = given.pop(old)
            given.setdefault(new, value)
    for key in [key for key in table.REFUSED if key in given]:
        if not says_nothing.get(key, False):
            raise SchemaError(f"{pointer}/{key}", key, table.REFUSED[key])
        del given[key]
    for key in ("then", "else", "minContains", "maxContains"):
        given.pop(key, None)


def rewrite_constants(given: Mapping[str, Any], types: list[str] | None, pointer: str) -> dict[str, Any]:
    """`const` and `enum` as one of them, without values of other types."""
    key = "enum" if "enum" in given else "const"
    values = given[key] if key == "enum" else [given[key]]
    if not isinstance(values, list):
        raise SchemaError(f"{pointer}/enum", "enum", f"an enum is a list, not {describe_type(values)}")
    if key == "enum" and "const" in given:
        values = [value for value in values if _is_same(value, given["const"])]
    kept = [value for value in values if types is None or _has_type(value, types)]
    if not all(map(_is_finite, kept)):
        raise SchemaError(f"{pointer}/{key}", key, "JSON has no Infinity and no NaN")
    if not kept:
        raise SchemaError(f"{pointer}/{key}", key, "no value of it has the type asked for, so nothing is valid")
    return {"const": kept[0]} if len(kept) == 1 else {"enum": kept}


def rewrite_strings(given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
    """`minLength`, `maxLength`, `pattern` and `format`."""
    for key in ("minLength", "maxLength"):
        _copy_count(given, out, key, pointer)
    for key in ("pattern", "format"):
        if key in given:
            if not isinstance(given[key], str):
                raise SchemaError(f"{pointer}/{key}", key, f"it must be a string, not {describe_type(given[key])}")
            out[key] = given[key]
    if out.get("format", "date") not in {**table.FORMATS, **table.PATTERN_FORMATS}:
        known = ", ".join(sorted({**table.FORMATS, **table.PATTERN_FORMATS}))
        reason = f"no engine holds {quote(out['format'])}; drop it, use pattern, or: {known}"
        raise SchemaError(f"{pointer}/format", "format", reason)
    if out.get("minLength") == 0:
        del out["minLength"]


def rewrite_numbers(given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
    """Bounds, and `multipleOf`; whole numbers as integers."""
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        value = given.get(key)
        if value is None:
            continue
        if isinstance(value, bool) and key.startswith("exclusive"):
            # Draft 4: a mark on the bound beside it.
            bound = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}[key]
            if value and bound in out:
                out[key] = out.pop(bound)
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise SchemaError(f"{pointer}/{key}", key, f"it must be a number, not {describe_type(value)}")
        if key == "multipleOf" and value <= 0:
            raise SchemaError(f"{pointer}/{key}", key, f"it must be above 0, not {quote(value)}")
        out[key] = int(value) if isinstance(value, float) and value.is_integer() else value


def rewrite_arrays(rewrite: Rewrite, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
    """Items in the form of 2020-12, and their number."""
    for key in ("minItems", "maxItems"):
        _copy_count(given, out, key, pointer)
    if out.get("minItems") == 0:
        del out["minItems"]
    items = given.get("items", given.get("prefixItems") and True)
    prefix, place = given.get("prefixItems"), "prefixItems"
    if isinstance(items, list):
        # Before 2020-12 a list of items was what prefixItems is, and additionalItems what items is.
        prefix, items, place = items, given.get("additionalItems", True), "items"
    if prefix is not None:
        if not isinstance(prefix, list):
            reason = f"a list of schemas, not {describe_type(prefix)}"
            raise SchemaError(f"{pointer}/prefixItems", "prefixItems", reason)
        out["prefixItems"] = [rewrite(item, f"{pointer}/{place}/{i}") for i, item in enumerate(prefix)]
    if items is not None:
        key = "additionalItems" if place == "items" else "items"
        out["items"] = rewrite(items, f"{pointer}/{key}")


def list_values(node: Any) -> list[Any] | None:
    """All values of a rewritten schema, where it names at most MOST_UNIQUE, each once."""
    if not isinstance(node, dict):
        return None
    if node == {"type": "boolean"}:
        return [False, True]
    given = node["enum"] if "enum" in node else [node["const"]] if "const" in node else None
    if given is None or len(node.keys() - {"$defs"}) > 1:
        return None
    values: list[Any] = []
    for value in given[: 4 * MOST_UNIQUE]:
        if not any(_is_same(value, other) for other in values):
            values.append(value)
    return values if len(values) <= MOST_UNIQUE and len(given) <= 4 * MOST_UNIQUE else None


def write_arrangements(values: list[Any], least: int, most: int, pointer: str) -> dict[str, Any]:
    """The schema of all arrays of `least` to `most` of these values, none of them twice, in any order."""
    options: list[dict[str, Any]] = []
    for size in range(least, min(most, len(values)) + 1):
        for chosen in itertools.permutations(values, size):
            places = [{"const": value} for value in chosen]
            options.append({"type": "array", "prefixItems": places, "items": False, "minItems": size})
            if not size:
                options[-1] = {"type": "array", "maxItems": 0}
    if not options:
        raise SchemaError(f"{pointer}/uniqueItems", "uniqueItems", f"there are {len(values)} values for {least} items")
    return options[0] if len(options) == 1 else {"anyOf": options}


def rewrite_objects(rewrite: Rewrite, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
    """Properties, their names and their number."""
    for key in ("minProperties", "maxProperties"):
        _copy_count(given, out, key, pointer)
    for key in ("properties", "patternProperties"):
        if key in given:
            if not isinstance(given[key], dict):
                raise SchemaError(f"{pointer}/{key}", key, f"an object of schemas, not {describe_type(given[key])}")
            out[key] = {
                name: rewrite(value, f"{pointer}/{key}/{table.escape(name)}") for name, value in given[key].items()
            }
    required = given.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError(f"{pointer}/required", "required", "it must be a list of property names")
    if required:
        out["required"] = list(dict.fromkeys(required))
    if out.get("minProperties", 0) <= len(out.get("required", ())):
        out.pop("minProperties", None)
    if "additionalProperties" in given:
        out["additionalProperties"] = rewrite(given["additionalProperties"], f"{pointer}/additionalProperties")
    if "propertyNames" in given:
        _rewrite_names(rewrite, given["propertyNames"], out, pointer)


def _rewrite_names(rewrite: Rewrite, names: Any, out: dict[str, Any], pointer: str) -> None:
    """`propertyNames` as the `patternProperties` that it equals, where its schema is one of strings' patterns."""
    where = f"{pointer}/propertyNames"
    names = rewrite({"type": "string", **names} if isinstance(names, dict) else names, where)
    keys = set(names) - {"type"} if isinstance(names, dict) else set()
    value = out.get("additionalProperties", True)
    fits = "properties" not in out and "patternProperties" not in out and not out.get("required")
    if names is True or (isinstance(names, dict) and not keys):
        return
    if fits and names is False:
        # No property at all.
        keys = set()
    elif fits and keys == {"pattern"}:
        out["patternProperties"] = {names["pattern"]: value}
    elif fits and keys <= {"minLength", "maxLength"}:
        pattern = f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
        out["patternProperties"] = {pattern: value}
    elif fits and keys <= {"enum", "const"}:
        out["properties"] = dict.fromkeys(names.get("enum") or [names["const"]], value)
    else:
        raise SchemaError(where, "propertyNames", "no engine holds it in this form, or beside properties")
    out["additionalProperties"] = False


def _copy_count(given: Mapping[str, Any], out: dict[str, Any], key: str, pointer: str) -> None:
    value = given.get(key)
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value < 0 or value % 1 != 0:
        raise SchemaError(f"{pointer}/{key}", key, f"it must be a whole number from 0, not {quote(value)}")
    out[key] = int(value)


def _has_type(value: Any, types: list[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and (isinstance(value, int) or value.is_integer()))
    kinds = ((str, "string"), (list, "array"), (dict, "object"))
    name = next((name for kind, name in kinds if isinstance(value, kind)), "null")
    return name in types


def _is_finite(value: Any) -> bool:
    """Whether JSON can write all numbers of a constant."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return True


def _is_same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def describe_type(value: Any) -> str:
    """What a message calls a value that should be another."""
    return type(value).__name__ if value is not None else "null"
