# SPDX-License-Identifier: Apache-2.0
"""Structural tags: engines, pointers, and strict tool calls in the forms of vLLM's parsers, held against jsonschema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from vllm.tool_parsers.structural_tag_registry import SUPPORTED_STRUCTURAL_TAG_MODELS

from bench.structured.acceptance import accepts_guidance, accepts_xgrammar, find_plan
from bench.structured.tool_calls import TOOLS, write_call, write_tag
from vllm_ext.structured.errors import RefusedError
from vllm_ext.structured.routing import plan_spec
from vllm_ext.structured.tags import read_tag

FORMS = [(model, choice) for model in ("hermes", "llama", "kimi", "qwen_3_coder") for choice in ("auto", "required")]
#: Models whose arguments have a style that llguidance is not given, and those whose tags hold no schema.
OTHER_STYLES = {"deepseek_v3_2", "deepseek_v4", "deepseek_v4_1", "glm_4_7"}
NO_SCHEMAS = {"hy_v4"}


def accepts(plan: Any, grammar: Any, text: str) -> bool:
    return (accepts_guidance if plan.engine == "guidance" else accepts_xgrammar)(grammar, text)


def write_object(name: str, schema: Any, **keywords: Any) -> Any:
    return {"type": "object", "properties": {name: schema}, "required": [name], **keywords}


@pytest.mark.parametrize("row", TOOLS, ids=lambda row: row[0])
@pytest.mark.parametrize(("model", "choice"), FORMS)
def test_strict_tool_calls_are_honoured(model: str, choice: Any, row: Any) -> None:
    _, schema, valid, invalid = row
    plan, grammar = find_plan("structural_tag", write_tag(model, choice, schema))
    for text in (*valid, *invalid):
        arguments = json.loads(text)
        is_valid = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).is_valid(
            arguments
        )
        assert is_valid == (text in valid)
        call = write_call(model, arguments)
        assert accepts(plan, grammar, call) == is_valid, call
    call = write_call(model, json.loads(valid[0]))
    # Free text is around calls where one is not asked for; hermes' calls may follow each other in any case.
    assert accepts(plan, grammar, f"I look. {call}") == (choice == "auto")
    assert accepts(plan, grammar, "no call") == (choice == "auto")
    assert not accepts(plan, grammar, call[:-3])


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (write_object("t", {"type": "string", "format": "date-time"}), '{"t": "2024-01-31T10:00:00Z"}', '{"t": "1"}'),
        (write_object("t", {"type": "integer", "multipleOf": 7}), '{"t": 14}', '{"t": 8}'),
        (write_object("t", {"allOf": [{"type": "integer"}, {"maximum": 3}]}), '{"t": 3}', '{"t": 4}'),
        (write_object("t", {"type": "string", "pattern": "^[a-z]+$", "maxLength": 2}), '{"t": "ab"}', '{"t": "abc"}'),
        (
            {"type": "object", "anyOf": [write_object("a", {"type": "integer"}), write_object("b", {"type": "null"})]},
            '{"b": null}',
            '{"b": 1}',
        ),
        (
            {**write_object("t", {"$ref": "#/$defs/c", "minLength": 2}), "$defs": {"c": {"type": "string"}}},
            '{"t": "ab"}',
            '{"t": "a"}',
        ),
    ],
)
@pytest.mark.parametrize("model", ["hermes", "llama", "kimi"])
def test_what_xgrammar_does_not_honour_is_llguidances(model: str, schema: Any, valid: str, invalid: str) -> None:
    plan, grammar = find_plan("structural_tag", write_tag(model, "auto", schema))
    assert accepts(plan, grammar, write_call(model, json.loads(valid)))
    assert not accepts(plan, grammar, write_call(model, json.loads(invalid)))


@pytest.mark.parametrize("model", sorted(SUPPORTED_STRUCTURAL_TAG_MODELS))
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_every_model_of_vllms_registry_is_planned(model: str, choice: Any) -> None:
    """Easy schemas by xgrammar; hard ones by llguidance, or refused by the pointer where a model has another style."""
    easy = write_tag(model, choice, {"type": "object", "properties": {"a": {"type": "integer"}}})
    assert plan_spec("structural_tag", easy).engine == "xgrammar"
    hard = write_tag(model, choice, write_object("a", {"type": "integer", "multipleOf": 7}))
    if model in OTHER_STYLES:
        with pytest.raises(RefusedError, match="no engine honours keyword 'multipleOf' at #/"):
            find_plan("structural_tag", hard)
    elif model in NO_SCHEMAS:
        assert find_plan("structural_tag", hard)[0].engine == "xgrammar"
    else:
        assert find_plan("structural_tag", hard)[0].engine == "guidance"


def test_the_older_form_has_both_engines() -> None:
    def write(schema: Any) -> str:
        structure = {"begin": "<f=a>", "schema": schema, "end": "</f>"}
        return json.dumps({"type": "structural_tag", "structures": [structure], "triggers": ["<f="]})

    for schema, engine in (({"type": "integer"}, "xgrammar"), ({"type": "integer", "multipleOf": 7}, "guidance")):
        plan, grammar = find_plan("structural_tag", write(schema))
        assert plan.engine == engine
        for text, expected in (("a <f=a>7</f> b", True), ("", True), ("<f=a>x</f>", False), ("<f=b>7</f>", False)):
            assert accepts(plan, grammar, text) == expected, (engine, text)


def write_content(content: Any, end: Any = "</a>") -> str:
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "content": content, "end": end}}
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"x": {"not": {}}}}, "keyword 'not' at #/properties/x/not"),
        ({"type": "array", "items": {"type": "string", "format": "uri-template", "maxLength": 3}}, "at #/items/format"),
        (
            {"definitions": {"n/1": {"minProperties": 3, "type": "object"}}, "items": {"$ref": "#/definitions/n~11"}},
            "at #/definitions/n~11/minProperties",
        ),
    ],
)
def test_refusals_name_the_schema_and_the_keyword(schema: Any, message: str) -> None:
    text = write_content({"type": "json_schema", "json_schema": schema})
    with pytest.raises(RefusedError, match="structural tag at /format/content/json_schema: ") as error:
        plan_spec("structural_tag", text)
    assert message in str(error.value)


def test_what_is_only_narrow_has_xgrammar_behind_llguidance() -> None:
    text = write_content({"type": "json_schema", "json_schema": {"type": "string", "minLength": 2}})
    plan = plan_spec("structural_tag", text)
    assert (plan.engine, plan.fallback.engine) == ("guidance", "xgrammar")
    assert plan_spec("structural_tag", text, has_guidance=False).engine == "xgrammar"
    content = {
        "type": "sequence",
        "elements": [{"type": "grammar", "grammar": 'root ::= "a"'}, json.loads(text)["format"]],
    }
    assert plan_spec("structural_tag", write_content(content)).engine == "xgrammar"
    hard = {"type": "json_schema", "json_schema": {"type": "integer", "multipleOf": 2}}
    with pytest.raises(RefusedError, match="llguidance does not know this tokenizer"):
        plan_spec("structural_tag", write_content(hard), has_guidance=False)
    with pytest.raises(RefusedError, match="llguidance is not given 'grammar'"):
        plan_spec("structural_tag", write_content({"type": "sequence", "elements": [content["elements"][0], hard]}))


def test_what_is_no_tag_is_refused() -> None:
    for text, message in (("{", "not JSON"), ("[]", "is an object"), ('{"a":' * 90 + "1" + "}" * 90, "levels deep")):
        with pytest.raises(RefusedError, match=message):
            read_tag(text)
    hard = {"json_schema": {"multipleOf": 2, "type": "integer"}}
    for broken in ({"format": {"type": "tag", "content": hard}}, {"format": {**hard}}, {**hard, "format": 3}):
        with pytest.raises(RefusedError):
            read_tag(json.dumps(broken))
