# SPDX-License-Identifier: Apache-2.0
"""Specifications that cost far more than they weigh: long to read, to compile, to look ahead in, or slow in every mask.

    list_attacks(number) -> {name: structured_outputs of a request}

Another `number` gives other specifications of the same kinds, so that no verdict or grammar is known already.
"""

from __future__ import annotations

import json
import string
from typing import Any

Specification = dict[str, Any]

#: A body that is no JSON at all.
INVALID_UTF8 = "invalid UTF-8"


def list_attacks(number: int = 0) -> dict[str, Specification]:
    """All of them by name."""
    return {
        **_list_large(number),
        **_list_slow_to_compile(number),
        **_list_slow_to_read(number),
        **_list_forced(number),
        **_list_slow_masks(number),
        **_list_tags(number),
        **_list_odd(number),
    }


def write_body(model: str, specification: Specification | None, max_tokens: int, stream: bool) -> bytes:
    """A completion request with this specification; None for one without, which puts out all its tokens."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": "x",
        "max_tokens": max_tokens,
        "temperature": 1.0,
        **({"ignore_eos": True} if specification is None else {"structured_outputs": specification}),
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return json.dumps(body).encode()


def write_invalid_utf8() -> bytes:
    """The start of a request whose prompt is no text."""
    return b'{"prompt": "\xff\xfe", "max_tokens": 1}'


def _list_large(number: int) -> dict[str, Specification]:
    words = _list_words(number, 20_000)
    return {
        "enum of 20,000": {"json": {"enum": words}},
        "choice of 20,000": {"choice": words},
        "10 MB": {"json": {"enum": [f"{number}" + "z" * 1000] * 10_000}},
        "regex of 200,000 letters": {"regex": "xy" * 100_000 + str(number)},
        "5,000 levels": {"json": '{"items":' * 5000 + str(number) + "}" * 5000},
        "grammar, 5,000 levels": {"grammar": "root ::= " + "(" * 5000 + f'"a{number}"' + ")" * 5000},
        "name of 500,000 characters": {"json": {"$ref": f"#/$defs/{number}" + "x" * 500_000}},
        "oneOf of two enums of 4,500": {
            "json": {"oneOf": [{"enum": _list_words(number, 4500)}, {"enum": _list_words(number + 10**6, 4500)}]}
        },
    }


def _list_slow_to_compile(number: int) -> dict[str, Specification]:
    bomb = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 4} for i in range(40)}
    optional = {f"p{number}_{i}": {"type": "string"} for i in range(200)}
    alternatives = [
        {"type": "object", "properties": {f"b{i}p{j}_{number}": {"type": "string"} for j in range(20)}}
        for i in range(60)
    ]
    return {
        "nested arrays 300 x 300": {"json": _make_grid(number)},
        "maxLength 1e6": {"json": {"type": "string", "maxLength": 10**6 + number}},
        "200 optional properties": {"json": {"type": "object", "properties": optional}},
        "60 alternatives of 20 optional": {"json": {"anyOf": alternatives}},
        "regex, nested counts": {"regex": f"^(.{{0,{400 + number % 50}}}x.{{0,400}}){{0,20}}$"},
        "regex, nested stars": {"regex": f"((a+)+b){{{10 + number % 100}}}"},
        "regex, count of 1e8": {"regex": f"a{{1,{10**8 + number}}}"},
        "pattern, nested counts": {"json": {"type": "string", "pattern": f"(.{{0,{500 + number % 50}}}y){{0,30}}"}},
        "$ref to itself": {"json": {"$ref": "#", "title": str(number)}},
        "$ref bomb": {"json": {"$ref": "#/$defs/d0", "$defs": {**bomb, "d40": {"minLength": number}}}},
    }


def _list_slow_to_read(number: int) -> dict[str, Specification]:
    """Texts that a careless regular expression of a reader takes quadratic time for, with the GIL held."""
    classes, count = "[" * 100_000 + str(number) + "\\", "{" + "1" * 100_000 + str(number)
    return {
        "regex, classes without an end": {"regex": classes},
        "regex, count without an end": {"regex": count},
        "pattern, classes without an end": {"json": {"type": "string", "pattern": classes}},
        "grammar, classes without an end": {"grammar": f"root ::= {classes}"},
        "tag, classes without an end": _make_tag({"type": "regex", "pattern": classes}),
    }


def _list_forced(number: int) -> dict[str, Specification]:
    """Short texts that force long ones, which looking ahead would write out in every step."""
    letters = string.ascii_lowercase + str(number)
    return {
        "grammar, forces 100 KB": {"grammar": _write_doubling(letters, 4)},
        "grammar, forces 7 MB": {"grammar": _write_doubling(letters, 6)},
        "grammar, forces an endless text": {"grammar": f'root ::= "a{number}" root'},
        "const of 1,900 characters": {"json": {"const": (letters * 80)[:1900]}},
    }


def _list_slow_masks(number: int) -> dict[str, Specification]:
    """A few characters whose moves or masks take longer with every token."""
    return {
        "grammar, ambiguous": {"grammar": f'root ::= root root | "a{number}" | ""'},
        "grammar, cubic": {"grammar": f'root ::= s\ns ::= s s | [a-z ] | "{number}"'},
        "Lark, cubic": {"grammar": f'start: s\ns: s s | /[a-z ]/ | "{number}"'},
    }


def _list_tags(number: int) -> dict[str, Specification]:
    def with_schema(schema: Any) -> Specification:
        return _make_tag({"type": "json_schema", "json_schema": schema})

    return {
        "tag, enum of 20,000": with_schema({"enum": _list_words(number, 20_000)}),
        "tag, nested arrays 300 x 300": with_schema(_make_grid(number)),
        "tag, maxLength 1e6": with_schema({"type": "string", "maxLength": 10**6 + number}),
        "tag, nested counts": _make_tag(
            {"type": "regex", "pattern": f"(.{{0,{400 + number % 50}}}x.{{0,400}}){{0,20}}"}
        ),
        "tag, cubic": _make_tag({"type": "grammar", "grammar": f'root ::= s\ns ::= s s | [a-z ] | "{number}"'}),
    }


def _list_odd(number: int) -> dict[str, Specification]:
    """Values that a reader does not expect."""
    return {
        "half a surrogate pair": {"json": {"const": f"\ud800{number}"}},
        "half a surrogate pair in a name": {"json": {"type": "object", "properties": {f"\ud800{number}": {"not": {}}}}},
        "maxLength Infinity": {"json": {"type": "string", "maxLength": float("inf"), "title": str(number)}},
        "propertyNames false": {"json": {"type": "object", "propertyNames": False, "title": str(number)}},
        "const of a special token": {"json": {"const": f"<|eos|><|bos|><|pad|>{number}"}},
    }


def _list_words(number: int, count: int) -> list[str]:
    return [f"item {number} {place}" for place in range(count)]


def _make_grid(number: int) -> Any:
    return {"type": "array", "maxItems": 300 + number, "items": {"type": "array", "maxItems": 300, "items": {}}}


def _make_tag(content: Any) -> Specification:
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}}
    return {"structural_tag": json.dumps(tag)}


def _write_doubling(text: str, levels: int) -> str:
    """EBNF of a text 8 ** levels times over."""
    rules = [f"r{level} ::= " + " ".join([f"r{level + 1}"] * 8) for level in range(levels)]
    return "\n".join(["root ::= r0", *rules, f'r{levels} ::= "{text}"'])
