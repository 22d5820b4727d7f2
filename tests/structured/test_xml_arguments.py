# SPDX-License-Identifier: Apache-2.0
"""Arguments in XML: what llguidance accepts is valid once vLLM's own parser has read it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.parser.qwen3 import _qwen3_arg_converter

from bench.structured.acceptance import accepts_guidance, make_tokenizer
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.lark import Lark
from vllm_ext.structured.normalize import normalize_schema
from vllm_ext.structured.xml_arguments import write_arguments

ROOT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "when": {"type": "string", "format": "date"},
        "free": {"type": "string"},
        "long": {"type": "string", "minLength": 2, "maxLength": 6},
        "code": {"type": "string", "pattern": "b\\d"},
        "word": {"type": "string", "pattern": "^[a-z]+$"},
        "kind": {"enum": ["a", "b c", 3]},
        "some": {"type": ["string", "null"], "maxLength": 2},
        "count": {"type": "integer", "minimum": 3},
        "nested": {"$ref": "#/$defs/n"},
        "any": {},
    },
    "required": ["long"],
    "$defs": {"n": {"type": "object", "properties": {"q": {"type": "string", "maxLength": 2}}}},
}


def compile_arguments(schema: Any, style: str = "qwen_xml") -> Any:
    lark = Lark()
    body = write_arguments(lark, normalize_schema(schema), style, {}, {}, "/x")
    matcher = llguidance.LLMatcher(make_tokenizer(), llguidance.grammar_from("grammar", lark.finish(body)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


MATCHER = compile_arguments(ROOT)
PIECES = ["ab", "b1", "\n", "</parameter", ">", "<parameter=", "3", "12", "null", "a", "b c", "</function>", " ", '"',
          '{"q": "x"}', "2024-02-29", "2023-02-29", "x" * 6]  # fmt: skip


def read_call(text: str) -> dict[str, Any]:
    """The arguments as vLLM reads and converts them: strings by the schema, other values as JSON."""
    found = json.loads(_qwen3_arg_converter(text, False))
    for name, value in found.items():
        node = ROOT["properties"].get(name, {})
        if node.get("type") != "string" and not (name == "some" and value != "null"):
            try:
                found[name] = json.loads(value)
            except ValueError:
                continue
    return found


@given(
    st.lists(
        st.tuples(st.sampled_from(list(ROOT["properties"])), st.lists(st.sampled_from(PIECES), max_size=3)), max_size=3
    )
)
def test_what_is_accepted_is_valid(given_parts: list[tuple[str, list[str]]]) -> None:
    order = list(ROOT["properties"])
    parts = sorted(given_parts, key=lambda part: order.index(part[0]))
    for closing in ("", "<parameter=long>\nabc\n</parameter>"):
        text = closing + "\n".join(f"<parameter={name}>{''.join(pieces)}</parameter>" for name, pieces in parts)
        if accepts_guidance(MATCHER, text):
            validator = jsonschema.Draft202012Validator(ROOT, format_checker=jsonschema.FormatChecker())
            assert list(validator.iter_errors(read_call(text))) == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("when", "2024-02-29", True), ("when", "\n2024-02-29\n", True), ("when", "2023-02-29", False),
        ("when", '"2024-02-29"', False), ("free", "", True), ("free", 'say "hi"\n</b> \\', True),
        ("free", "a</parameter>b", False), ("free", "a</function>b", False), ("free", "a< / parameter>", False),
        ("long", "ab", True), ("long", "\nab\n", True), ("long", "\na\n", False), ("long", "abcdefg", False),
        ("long", "\n\na", False), ("code", "xb2x", True), ("code", "xb", False), ("word", "ab", True),
        ("word", "aB", False), ("kind", "b c", True), ("kind", "3", True), ("kind", "c", False), ("some", "", True),
        ("some", "null", True), ("some", "abc", False), ("count", "3", True), ("count", "2", False),
        ("count", "\n12\n", True), ("nested", '{"q": "ab"}', True), ("nested", '{"q": "abc"}', False),
        ("any", "whatever", True),
    ],
)  # fmt: skip
def test_values(name: str, value: str, expected: bool) -> None:
    order = list(ROOT["properties"])
    long = "<parameter=long>abc</parameter>" if name != "long" else ""
    call = f"<parameter={name}>{value}</parameter>"
    parts = [long, call] if order.index(name) > order.index("long") else [call, long]
    assert accepts_guidance(MATCHER, "\n".join(filter(None, parts))) == expected


@pytest.mark.parametrize("style", ["qwen_xml", "minimax_xml"])
def test_others_have_no_declared_name(style: str) -> None:
    begin, close = ('<parameter name="', '">') if style == "minimax_xml" else ("<parameter=", ">")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    matcher = compile_arguments(schema, style)

    def write(**values: Any) -> str:
        return "".join(f"{begin}{name}{close}{value}</parameter>" for name, value in values.items())

    assert accepts_guidance(matcher, write(a="x", b=1, ab=2))
    assert accepts_guidance(matcher, "")
    for text in (write(b="x"), write(b=1, a=1), write(a="x") + write(a=1)):
        assert not accepts_guidance(matcher, text)
    for anything in (True, {"type": "object"}):
        assert accepts_guidance(compile_arguments(anything, style), write(x="anything"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array"}, "/x: arguments in XML are an object"),
        ({"type": "object", "minProperties": 1, "properties": {"a": {}}}, "not given 'minProperties'"),
        ({"properties": {"a b": {}}}, "/x/properties/a b: .* such a name"),
        ({"properties": {"a": {"type": "string", "format": "ipv6"}}}, "/x/properties/a/format: .*'ipv6'"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "/x/properties/a/pattern: "),
        ({"properties": {"a": {"type": ["string", "array"], "maxLength": 3}}}, "cannot tell a raw string from JSON"),
        ({"properties": {"a": {"const": "x</parameter>"}}}, "holds what ends it"),
        ({"properties": {"a": {"allOf": [{"minLength": 1}, {"maxLength": 2}]}}}, "whether it is a string"),
    ],
)
def test_what_has_no_form_is_refused_by_pointer(schema: Any, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        write_arguments(Lark(), normalize_schema(schema), "qwen_xml", {}, {}, "/x")


def test_marks_that_are_tokens_are_refused() -> None:
    with pytest.raises(RefusedError, match="tokens of their own"):
        write_arguments(Lark(), {"type": "object"}, "qwen_xml", {}, {"</parameter>": 5}, "/x")
