# SPDX-License-Identifier: Apache-2.0
"""A JSON schema rewritten with few keywords, the same meaning, and every reference in `$defs`; or refused by pointer.

Both engines then see one dialect: no annotations, no keyword of another type than the value's, arrays in the form of
2020-12, `oneOf` only as the `anyOf` that it equals, references of the form `#/$defs/dN`. What has a meaning that
neither engine can hold is refused here with the JSON pointer of the keyword. Unknown keywords are annotations (JSON
Schema 2020-12, 4.3.1) and fall away. No vllm import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from vllm_ext.structured import capabilities as table
from vllm_ext.structured.disjoint import choose_one_of
from vllm_ext.structured.errors import SchemaError, quote

#: Schemas, keywords and values visited; a schema with more is refused before any engine sees it.
MAX_NODES = 100_000

#: Days that a year has: 29 February only in leap years, which the formats' own patterns do not know.
LEAP_DAY = (
    "^([0-9]{4}-(0[13-9]|1[0-2])|[0-9]{4}-02-([01][0-9]|2[0-8])|"
    "([0-9][0-9](0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)


def normalize_schema(schema: Any) -> Any:
    """The schema in the dialect above: a bool or a dict, the latter with `$defs` where it refers to itself.

    The argument stays as it is. Raises SchemaError.
    """
    try:
        return _Normalizer(schema).run()
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

        def follow(node: Any, path: tuple[str, ...]) -> None:
            if not isinstance(node, dict):
                return
            name = node.get("$ref")
            if name in path:
                pointer = next(place for place, given in self.names.items() if f"#/$defs/{given}" == name)
                raise SchemaError(pointer, "$ref", "it refers to itself without a value in between")
            if name is not None and name not in done:
                follow(self.definitions[name.removeprefix("#/$defs/")], (*path, name))
                done.add(name)
            for key in ("anyOf", "allOf", "oneOf"):
                for option in node.get(key, ()):
                    follow(option, path)

        follow(root, ())
        for name, node in self.definitions.items():
            follow(node, (f"#/$defs/{name}",))

    def rewrite(self, node: Any, pointer: str) -> Any:
        self.visited += 1
        if self.visited > MAX_NODES:
            raise SchemaError(pointer, "schema", f"more than {MAX_NODES} parts")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise SchemaError(pointer, "schema", f"a schema is an object or a boolean, not {_name(node)}")
        given = {key: value for key, value in node.items() if key in table.KNOWN}
        types = self._read_types(given, pointer)
        relevant = table.IN_PLACE.union(*(table.BY_TYPE["number" if t == "integer" else t] for t in types or _TYPES))
        given = {key: value for key, value in given.items() if key in relevant}
        self._refuse(given, pointer)
        out: dict[str, Any] = {}
        parts: list[Any] = []
        if "$ref" in given:
            parts.append({"$ref": self._refer(given["$ref"], f"{pointer}/$ref")})
        if "const" in given or "enum" in given:
            parts.append(self._rewrite_constants(given, types, pointer))
        for key in ("anyOf", "oneOf", "allOf"):
            if key in given:
                parts.append(self._rewrite_options(key, given[key], pointer))
        self._rewrite_strings(given, out, pointer)
        self._rewrite_numbers(given, out, pointer)
        self._rewrite_arrays(given, out, pointer)
        self._rewrite_objects(given, out, pointer)
        return self._combine(parts, out, types, given)

    def _read_types(self, given: Mapping[str, Any], pointer: str) -> list[str] | None:
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

    def _refuse(self, given: dict[str, Any], pointer: str) -> None:
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

    def _refer(self, reference: Any, pointer: str) -> str:
        if not isinstance(reference, str):
            raise SchemaError(pointer, "$ref", f"a reference is a string, not {_name(reference)}")
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
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                raise SchemaError(pointer, "$ref", f"nothing is at {quote('#' + place)}")
            if isinstance(node, dict) and isinstance(node.get("$id"), str) and not node["$id"].startswith("#"):
                raise SchemaError(pointer, "$ref", "references into a schema with an $id of its own are not followed")
        return node

    def _rewrite_constants(self, given: Mapping[str, Any], types: list[str] | None, pointer: str) -> Any:
        key = "enum" if "enum" in given else "const"
        values = given[key] if key == "enum" else [given[key]]
        if not isinstance(values, list):
            raise SchemaError(f"{pointer}/enum", "enum", f"an enum is a list, not {_name(values)}")
        self.visited += len(values)
        if key == "enum" and "const" in given:
            values = [value for value in values if _is_same(value, given["const"])]
        kept = [value for value in values if types is None or _has_type(value, types)]
        if not kept:
            raise SchemaError(f"{pointer}/{key}", key, "no value of it has the type asked for, so nothing is valid")
        return {"const": kept[0]} if len(kept) == 1 else {"enum": kept}

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

    def _rewrite_strings(self, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
        for key in ("minLength", "maxLength"):
            self._copy_count(given, out, key, pointer)
        for key in ("pattern", "format"):
            if key in given:
                if not isinstance(given[key], str):
                    raise SchemaError(f"{pointer}/{key}", key, f"it must be a string, not {_name(given[key])}")
                out[key] = given[key]
        if out.get("format", "date") not in {**table.FORMATS, **table.PATTERN_FORMATS}:
            known = ", ".join(sorted({**table.FORMATS, **table.PATTERN_FORMATS}))
            reason = f"no engine holds {quote(out['format'])}; drop it, use pattern, or: {known}"
            raise SchemaError(f"{pointer}/format", "format", reason)
        if out.get("minLength") == 0:
            del out["minLength"]

    def _rewrite_numbers(self, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
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
                raise SchemaError(f"{pointer}/{key}", key, f"it must be a number, not {_name(value)}")
            if key == "multipleOf" and value <= 0:
                raise SchemaError(f"{pointer}/{key}", key, f"it must be above 0, not {quote(value)}")
            out[key] = int(value) if isinstance(value, float) and value.is_integer() else value

    def _rewrite_arrays(self, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
        for key in ("minItems", "maxItems"):
            self._copy_count(given, out, key, pointer)
        if out.get("minItems") == 0:
            del out["minItems"]
        items = given.get("items", given.get("prefixItems") and True)
        prefix, place = given.get("prefixItems"), "prefixItems"
        if isinstance(items, list):
            # Before 2020-12 a list of items was what prefixItems is, and additionalItems what items is.
            prefix, items, place = items, given.get("additionalItems", True), "items"
        if prefix is not None:
            if not isinstance(prefix, list):
                raise SchemaError(f"{pointer}/prefixItems", "prefixItems", f"a list of schemas, not {_name(prefix)}")
            out["prefixItems"] = [self.rewrite(item, f"{pointer}/{place}/{i}") for i, item in enumerate(prefix)]
        if items is not None:
            key = "additionalItems" if place == "items" else "items"
            out["items"] = self.rewrite(items, f"{pointer}/{key}")

    def _rewrite_objects(self, given: Mapping[str, Any], out: dict[str, Any], pointer: str) -> None:
        for key in ("minProperties", "maxProperties"):
            self._copy_count(given, out, key, pointer)
        for key in ("properties", "patternProperties"):
            if key in given:
                if not isinstance(given[key], dict):
                    raise SchemaError(f"{pointer}/{key}", key, f"an object of schemas, not {_name(given[key])}")
                out[key] = {
                    name: self.rewrite(value, f"{pointer}/{key}/{table.escape(name)}")
                    for name, value in given[key].items()
                }
        required = given.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaError(f"{pointer}/required", "required", "it must be a list of property names")
        if required:
            out["required"] = list(dict.fromkeys(required))
        if out.get("minProperties", 0) <= len(out.get("required", ())):
            out.pop("minProperties", None)
        if "additionalProperties" in given:
            out["additionalProperties"] = self.rewrite(given["additionalProperties"], f"{pointer}/additionalProperties")
        if "propertyNames" in given:
            self._rewrite_names(given["propertyNames"], out, pointer)

    def _rewrite_names(self, names: Any, out: dict[str, Any], pointer: str) -> None:
        """`propertyNames` as the `patternProperties` that it equals, where its schema is one of strings' patterns."""
        where = f"{pointer}/propertyNames"
        names = self.rewrite({"type": "string", **names} if isinstance(names, dict) else names, where)
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

    def _copy_count(self, given: Mapping[str, Any], out: dict[str, Any], key: str, pointer: str) -> None:
        value = given.get(key)
        if value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value < 0 or value % 1 != 0:
            raise SchemaError(f"{pointer}/{key}", key, f"it must be a whole number from 0, not {quote(value)}")
        out[key] = int(value)

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
    """Whether all alternatives of a rewritten schema have a type, once types are inferred."""
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


def _has_type(value: Any, types: list[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and (isinstance(value, int) or value.is_integer()))
    kinds = ((str, "string"), (list, "array"), (dict, "object"))
    name = next((name for kind, name in kinds if isinstance(value, kind)), "null")
    return name in types


def _is_same(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _name(value: Any) -> str:
    return type(value).__name__ if value is not None else "null"
