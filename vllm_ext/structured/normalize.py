# SPDX-License-Identifier: Apache-2.0
"""A JSON schema rewritten with few keywords, the same meaning, and every reference in `$defs`; or refused by pointer.

Both engines then see one dialect: no annotations, no keyword of another type than the value's, arrays in the form of
2020-12, `oneOf` only as the `anyOf` that it equals, references of the form `#/$defs/dN`. What has a meaning that
neither engine can hold is refused here with the JSON pointer of the keyword. Unknown keywords are annotations (JSON
Schema 2020-12, 4.3.1) and fall away. No vllm import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from vllm_ext.structured import capabilities as table
from vllm_ext.structured.disjoint import choose_one_of
from vllm_ext.structured.errors import SchemaError, quote
from vllm_ext.structured.keywords import (
    LEAP_DAY,
    MOST_UNIQUE,
    describe_type,
    drop_unsupported,
    list_values,
    read_types,
    rewrite_arrays,
    rewrite_constants,
    rewrite_numbers,
    rewrite_objects,
    rewrite_strings,
    write_arrangements,
)

#: Schemas, keywords and values visited; a schema with more is refused before any engine sees it.
MAX_NODES = 100_000


def normalize_schema(schema: Any, places: dict[str, str] | None = None) -> Any:
    """The schema in the dialect above: a bool or a dict, the latter with `$defs` where it refers to itself.

    places: is given the pointers that names in `$defs` stand for. The schema stays as it is. Raises SchemaError.
    """
    normalizer = _Normalizer(schema)
    try:
        node = normalizer.run()
        if places is not None:
            places.update((name, place) for place, name in normalizer.names.items())
        return node
    except RecursionError:
        raise SchemaError("", "$ref", "schemas and references are nested too deeply") from None


class _Normalizer:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.names: dict[str, str] = {}
        self.definitions: dict[str, Any] = {}
        self.visited = 0

    def run(self) -> Any:
        node = self.rewrite(self.root, "")
        if self.definitions and isinstance(node, dict):
            node = {**node, "$defs": self.definitions}
        self._refuse_loops(node)
        return _infer_types(choose_one_of(node, self.definitions))

    def _refuse_loops(self, root: Any) -> None:
        """References that lead back to themselves without a value in between mean nothing."""
        done: set[str] = set()
        self._follow(root, (), done)
        for name, node in self.definitions.items():
            self._follow(node, (f"#/$defs/{name}",), done)

    # A method, not a function inside of the other: such a one refers to itself, and keeps the schema until vLLM's rare
    # full garbage collection.
    def _follow(self, node: Any, path: tuple[str, ...], done: set[str]) -> None:
        """path: references that led here; done: those that need not be followed again, changed in place."""
        if not isinstance(node, dict):
            return
        name = node.get("$ref")
        if name in path:
            pointer = next(place for place, given in self.names.items() if f"#/$defs/{given}" == name)
            raise SchemaError(pointer, "$ref", "it refers to itself without a value in between")
        if name is not None and name not in done:
            self._follow(self.definitions[name.removeprefix("#/$defs/")], (*path, name), done)
            done.add(name)
        for key in ("anyOf", "allOf", "oneOf"):
            for option in node.get(key, ()):
                self._follow(option, path, done)

    def rewrite(self, node: Any, pointer: str) -> Any:
        self.visited += 1
        if self.visited > MAX_NODES:
            raise SchemaError(pointer, "schema", f"more than {MAX_NODES} parts")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise SchemaError(pointer, "schema", f"a schema is an object or a boolean, not {describe_type(node)}")
        given = {key: value for key, value in node.items() if key in table.KNOWN}
        types = read_types(given, pointer)
        relevant = table.IN_PLACE.union(*(table.BY_TYPE["number" if t == "integer" else t] for t in types or _TYPES))
        given = {key: value for key, value in given.items() if key in relevant}
        out: dict[str, Any] = {}
        parts: list[Any] = []
        if given.get("uniqueItems") is True and types == ["array"]:
            parts += self._write_unique(given, pointer)
        drop_unsupported(given, pointer)
        if "$ref" in given:
            parts.append({"$ref": self._refer(given["$ref"], f"{pointer}/$ref")})
        if "const" in given or "enum" in given:
            parts.append(rewrite_constants(given, types, pointer))
            self.visited += len(parts[-1].get("enum", ()))
        for key in ("anyOf", "oneOf", "allOf"):
            if key in given:
                parts.append(self._rewrite_options(key, given[key], pointer))
        rewrite_strings(given, out, pointer)
        rewrite_numbers(given, out, pointer)
        rewrite_arrays(self.rewrite, given, out, pointer)
        rewrite_objects(self.rewrite, given, out, pointer)
        return self._combine(parts, out, types, given)

    def _refer(self, reference: Any, pointer: str) -> str:
        if not isinstance(reference, str):
            raise SchemaError(pointer, "$ref", f"a reference is a string, not {describe_type(reference)}")
        if not reference.startswith("#") or (len(reference) > 1 and reference[1] != "/"):
            reason = f"{quote(reference)} is not inside this schema (only '#' and '#/...' are)"
            raise SchemaError(pointer, "$ref", reason)
        place = unquote(reference[1:])
        if place not in self.names:
            self.names[place] = f"d{len(self.names)}"
            target = self._look_up(place, pointer)
            self.definitions[self.names[place]] = self.rewrite(target, place)
        return f"#/$defs/{self.names[place]}"

    def _look_up(self, place: str, pointer: str) -> Any:
        node = self.root
        for part in place.split("/")[1:]:
            name = table.unescape(part)
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                raise SchemaError(pointer, "$ref", f"nothing is at {quote('#' + place)}")
            if isinstance(node, dict) and isinstance(node.get("$id"), str) and not node["$id"].startswith("#"):
                raise SchemaError(pointer, "$ref", "references into a schema with an $id of its own are not followed")
        return node

    def _rewrite_options(self, key: str, options: Any, pointer: str) -> Any:
        if not isinstance(options, list) or not options:
            raise SchemaError(f"{pointer}/{key}", key, "it must be a list of schemas, with one at least")
        rewritten = [self.rewrite(option, f"{pointer}/{key}/{i}") for i, option in enumerate(options)]
        if key == "allOf":
            rewritten = [option for option in rewritten if option not in (True, {})] or [True]
        else:
            rewritten = [option for option in rewritten if option is not False]
            if not rewritten:
                raise SchemaError(f"{pointer}/{key}", key, "none of its schemas allows a value")
        if key == "anyOf" and any(option in (True, {}) for option in rewritten):
            return True
        if len(rewritten) == 1:
            return rewritten[0]
        # Whether alternatives exclude each other is found out when every reference is known.
        return {key: rewritten, **({"at": f"{pointer}/{key}"} if key == "oneOf" else {})}

    def _write_unique(self, given: dict[str, Any], pointer: str) -> list[Any]:
        """Arrays of different items as all that there are, where an item has few values; takes their keywords.

        Neither engine compares items. Where an item has many values nothing is taken, and `uniqueItems` refused.
        """
        if not isinstance(given.get("items"), dict) or "prefixItems" in given:
            return []
        items = self.rewrite(given["items"], f"{pointer}/items")
        for _ in range(len(self.definitions)):
            items = self.definitions.get(str(items.get("$ref")).removeprefix("#/$defs/"), items)
        values = list_values(items)
        if values is None:
            return []
        counts: dict[str, Any] = {}
        rewrite_arrays(
            self.rewrite, {key: given[key] for key in ("minItems", "maxItems") if key in given}, counts, pointer
        )
        for key in ("uniqueItems", "items", "minItems", "maxItems"):
            given.pop(key, None)
        written = write_arrangements(values, counts.get("minItems", 0), counts.get("maxItems", len(values)), pointer)
        # A short text may ask for many of these.
        self.visited += MOST_UNIQUE * len(written.get("anyOf", ()))
        return [written]

    def _combine(self, parts: list[Any], out: dict[str, Any], types: list[str] | None, given: Mapping[str, Any]) -> Any:
        """One schema of the in-place parts and the keywords by type; constants carry their type already."""
        extra = LEAP_DAY if out.get("format") in ("date", "date-time") else None
        if out.get("format") in table.PATTERN_FORMATS:
            extra = table.PATTERN_FORMATS[out.pop("format")]
        if extra is not None and "pattern" in out:
            parts.append({**({"type": "string"} if types == ["string"] else {}), "pattern": extra})
        elif extra is not None:
            out["pattern"] = extra
        if types is not None and not (out == {} and ("const" in given or "enum" in given)):
            split = [_select(name, out) for name in types]
            # Every alternative says so itself: as a second schema it would send tool calls to the slower engine.
            if len(split) > 1 or out or not any(_implies_type(part, types[0]) for part in parts):
                parts.append(split[0] if len(split) == 1 else {"anyOf": split})
        elif out:
            parts.append(out)
        parts = [part for part in parts if part not in (True, {})]
        if not parts:
            return {}
        return parts[0] if len(parts) == 1 else {"allOf": parts}


_TYPES = tuple(table.BY_TYPE)


def _select(name: str, out: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that apply to one type."""
    keywords = table.BY_TYPE["number" if name == "integer" else name]
    return {"type": name, **{key: value for key, value in out.items() if key in keywords}}


#: Keywords that tell an object or an array where the type is missing.
_MARKS = {"object": {"properties", "additionalProperties"}, "array": {"items", "prefixItems"}}


def _implies_type(node: Any, name: str) -> bool:
    """Whether a rewritten schema, or all alternatives of it, have a type, once types are inferred."""
    if isinstance(node, dict) and node.get("type") == name:
        return True
    options = (node.get("anyOf") or node.get("oneOf") or []) if isinstance(node, dict) else []
    return bool(options) and all(
        isinstance(option, dict)
        and (
            option.get("type") == name
            or bool(option.keys() <= table.BY_TYPE.get(name, set()) and option.keys() & _MARKS.get(name, set()))
        )
        for option in options
    )


def _infer_types(node: Any) -> Any:
    """Give objects and arrays that only miss their type that type, as vLLM's own engine reads them.

    By JSON Schema other types would be valid too; who writes `properties` wants an object. It is narrower, never wider.
    """
    if isinstance(node, list):
        return [_infer_types(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: {name: _infer_types(each) for name, each in value.items()}
        if key in ("properties", "patternProperties", "$defs")
        else value
        if key in ("const", "enum")
        else _infer_types(value)
        for key, value in node.items()
    }
    keys = set(node) - {"$defs"}
    for name, marks in _MARKS.items():
        if keys and keys <= table.BY_TYPE[name] and keys & marks:
            return {"type": name, **node}
    return node


def locate(schema: Any, pointer: str, places: Mapping[str, str]) -> str:
    """The pointer in a schema as it came of a pointer in its normal form, as far as that place was there before.

    places: as `normalize_schema` gives them.
    """
    parts = pointer.split("/")[1:]
    found: list[str] = []
    if parts[:1] == ["$defs"] and len(parts) > 1 and parts[1] in places:
        parts = [*places[parts[1]].split("/")[1:], *parts[2:]]
    node = schema
    while parts:
        key, *rest = parts
        name = table.unescape(key)
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, dict) and (old := _OLD_NAMES.get(key)) in node:
            key, node = str(old), node[old]
        elif key in ("anyOf", "allOf") and rest:
            # Types, or keywords beside others, that were made alternatives or parts.
            parts = rest[1:]
            continue
        else:
            break
        found.append(key)
        parts = rest
    return "".join(f"/{key}" for key in found)


#: What keywords of the normal form may have been before.
_OLD_NAMES = {
    "anyOf": "oneOf",
    "prefixItems": "items",
    "items": "additionalItems",
    "patternProperties": "propertyNames",
}
