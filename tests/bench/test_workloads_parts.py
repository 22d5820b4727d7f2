# SPDX-License-Identifier: Apache-2.0
"""The parts of workloads: lengths, corpora, prompts, tool boxes and local files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workloads import local_files, prompts, tool_calls
from bench.workloads.corpus import Corpus, fit_tokens, load_corpus
from bench.workloads.lengths import CHAT_OUTPUT, CHAT_PROMPT, MIXTURES, LengthMixture, draw_lengths
from bench.workloads.requests import Request, read_lines, write_requests


class Words:
    """A tokenizer whose tokens are words with the space before them; ids are given as words are seen."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.ids: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        ids = []
        for word in text.replace("\n", " \n").split(" "):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self.ids[word])
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[index] for index in token_ids).replace(" \n", "\n")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_mean_lengths_of_chat_are_those_of_the_paper() -> None:
    assert CHAT_PROMPT.mean == pytest.approx(161, rel=0.02)
    assert CHAT_OUTPUT.mean == pytest.approx(338, rel=0.02)
    drawn = CHAT_PROMPT.draw(generator(), 100_000, 1, 10**6)
    assert np.mean(drawn) == pytest.approx(161, rel=0.03)


@given(
    name=st.sampled_from(sorted(MIXTURES)),
    max_model_len=st.integers(16, 5000),
    output=st.none() | st.integers(1, 12),
    scale=st.floats(0.05, 4),
)
def test_lengths_fit_the_context(name: str, max_model_len: int, output: int | None, scale: float) -> None:
    drawn = draw_lengths(generator(), MIXTURES[name], 50, max_model_len, output, scale)
    assert len(drawn) == 50
    assert all(prompt >= 1 and second >= 1 and prompt + second <= max_model_len for prompt, second in drawn)
    assert output is None or {second for _, second in drawn} == {output}


def test_bad_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="do not sum to 1"):
        LengthMixture(((0.5, 10, 1),))
    with pytest.raises(ValueError, match="output_tokens 13 does not fit max_model_len 16"):
        draw_lengths(generator(), MIXTURES["chat"], 5, 16, 13)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        draw_lengths(generator(), MIXTURES["chat"], 5, 16, scale=0)
    with pytest.raises(ValueError, match="larger max_model_len"):
        MIXTURES["chat"][0].draw(generator(), 5, 4, 2)


def test_a_slice_goes_round_the_end_and_fits() -> None:
    corpus = Corpus("one two three four", Words())
    for seed in range(20):
        text = corpus.slice(generator(seed), 7)
        assert corpus.count(text) == 7
        assert set(text.split()) <= {"one", "two", "three", "four"}


def test_a_cut_that_cannot_be_made_is_an_error() -> None:
    class Growing(Words):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [0] * 100

        def decode(self, token_ids: Sequence[int]) -> str:
            return "x"

    with pytest.raises(ValueError, match="at most 3 tokens"):
        fit_tokens("text", Growing(), 3)
    with pytest.raises(ValueError, match="no text 'greek'; there are: kjv, py"):
        load_corpus("greek", Words())


def test_long_prompts_stand_anywhere_among_chat() -> None:
    tokenizer = Words()
    options: dict[str, Any] = {"output_tokens": 40, "scale": 0.2, "long_tokens": 800, "long_output_tokens": 7}
    places = set()
    for seed in range(4):
        made = prompts.make_mixed(generator(seed), tokenizer, 20, long_share=0.3, **options)
        long = [place for place, request in enumerate(made) if request.output_tokens == 7]
        assert len(long) == 6
        lengths = [len(tokenizer.encode(made[place].prompt, add_special_tokens=False)) for place in long]
        assert all(600 <= length <= 1000 for length in lengths)
        assert len(set(lengths)) > 1
        assert {made[place].output_tokens for place in set(range(20)) - set(long)} == {40}
        places.add(tuple(long))
    assert len(places) == 4
    assert {one.output_tokens for one in prompts.make_mixed(generator(), tokenizer, 3, long_share=1.0)} == {16}
    with pytest.raises(ValueError, match=r"long_share must be between 0 and 1, got 1\.5"):
        prompts.make_mixed(generator(), tokenizer, 4, long_share=1.5)
    with pytest.raises(ValueError, match="a prompt of 1280 and an output of 16 tokens"):
        prompts.make_mixed(generator(), tokenizer, 4, max_model_len=1200, long_tokens=1024)


def test_rag_prompts_share_passages_and_end_with_the_question() -> None:
    made = prompts.make_rag(generator(), Words(), 8, max_model_len=4096, num_passages=2)
    assert all(request.prompt.startswith(prompts.RAG_INSTRUCTION) for request in made)
    assert all("Question:" in request.prompt[-200:] for request in made)
    first = {request.prompt.split("[1] ")[1][:40] for request in made}
    assert len(first) <= 2


def test_repetitive_prompts_repeat() -> None:
    (request,) = prompts.make_repetitive(generator(), Words(), 1, prompt_tokens=100, period=10)
    lines = [line.partition(". ")[2] for line in request.prompt.splitlines()]
    assert len(lines) > 5
    assert len(set(lines[:-1])) == 1
    with pytest.raises(ValueError, match="period must be 1 to prompt_tokens"):
        prompts.make_repetitive(generator(), Words(), 1, prompt_tokens=8, period=9)
    with pytest.raises(ValueError, match="do not fit max_model_len 64"):
        prompts.make_repetitive(generator(), Words(), 1, max_model_len=64)


def test_code_begins_with_a_line() -> None:
    tokenizer = Words()
    source = load_corpus("py", tokenizer).tokenizer.decode(load_corpus("py", tokenizer).token_ids)
    for request in prompts.make_code(generator(), tokenizer, 5):
        assert "\n" + request.prompt.splitlines()[0] in source


def test_the_pass_key_is_in_the_text_once_and_asked_for() -> None:
    made = prompts.make_long_context(generator(), Words(), 10, max_model_len=600)
    depths = set()
    for request in made:
        key, depth = request.extra["answer"], request.extra["depth"]
        assert request.prompt.count(key) == 1
        assert request.prompt.endswith(" is")
        place = request.prompt.index(key) / len(request.prompt)
        assert place == pytest.approx(depth, abs=0.15)
        depths.add(depth)
    assert len(depths) == 10
    with pytest.raises(ValueError, match="leave no text around the pass key"):
        prompts.make_long_context(generator(), Words(), 1, max_model_len=600, prompt_tokens=12)


def test_toolboxes_are_valid_schemas_of_other_tools() -> None:
    toolbox = tool_calls.make_toolbox(generator(), 20)
    assert len({tool["name"] for tool in toolbox}) == 20
    text = json.dumps(tool_calls.make_call_schema(toolbox))
    for kind in ("string", "integer", "boolean", "array", "enum", "object"):
        assert f'"{kind}"' in text
    for tool in toolbox:
        parameters = tool["parameters"]
        assert parameters["required"] == list(parameters["properties"])
    with pytest.raises(ValueError, match="num_tools must be 1 to 64, got 0"):
        tool_calls.make_toolbox(generator(), 0)
    with pytest.raises(ValueError, match="take fewer tools"):
        tool_calls.make_tool_calls(generator(), Words(), 1, max_model_len=100)


def test_sharegpt_file(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "how are you today"}, {"from": "gpt", "value": "I am well and you today"}]
    unfit = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": unfit}, {"conversations": turns[:1]}]))
    (request,) = local_files.read_sharegpt(generator(), Words(), 1, path=str(path))
    assert request == Request("how are you today", 6)
    with pytest.raises(ValueError, match="has 1 conversations within 4096 tokens; 2 were asked for"):
        local_files.read_sharegpt(generator(), Words(), 2, path=str(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON list of conversations, got dict"):
        local_files.read_sharegpt(generator(), Words(), 1, path=str(path))


def test_longbench_file_is_cut_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    context = "begin " + "word " * 500 + "end"
    path.write_text(json.dumps({"context": context, "input": "who?", "answers": ["me"]}))
    (request,) = local_files.read_longbench(generator(), Words(), 1, path=str(path), max_model_len=200)
    assert request.prompt.startswith("begin word")
    assert "end\n\nQuestion: who?\nAnswer:" in request.prompt
    assert len(Words().encode(request.prompt, add_special_tokens=False)) <= 200 - 64
    assert request.extra == {"answers": ["me"]}
    path.write_text(json.dumps({"context": context, "input": "who?"}))
    with pytest.raises(ValueError, match="entry 1: no field 'answers'"):
        local_files.read_longbench(generator(), Words(), 1, path=str(path))


def test_schemas_from_a_folder_and_from_lines(tmp_path: Path) -> None:
    folder = tmp_path / "schemas" / "easy"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text('{"type": "integer"}')
    lines = tmp_path / "schemas.jsonl"
    lines.write_text(json.dumps({"unique_id": "b", "json_schema": '{"type": "string"}'}))
    assert local_files.read_schemas(tmp_path / "schemas") == {"easy/a.json": {"type": "integer"}}
    assert local_files.read_schemas(lines) == {"b": {"type": "string"}}
    made, body = local_files.read_json_schema(generator(), Words(), 3, path=str(lines))
    assert body == {"structured_outputs": {"json": {"type": "string"}}}
    assert len({request.prompt for request in made}) == 3
    assert all(request.extra == {"schema": "b"} for request in made)
    with pytest.raises(ValueError, match="no schema 'c'; the first of 1 is 'b'"):
        local_files.read_json_schema(generator(), Words(), 3, path=str(lines), schema="c")
    lines.write_text("")
    with pytest.raises(ValueError, match="holds no JSON schema"):
        local_files.read_schemas(lines)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no requests"),
        ([Request("", 4)], "request 0 has an empty prompt"),
        ([Request("a", 1), Request("a", 0)], "request 1 asks for 0 output tokens"),
        ([Request("a", 1, {"prompt": "b"})], "extra field 'prompt' is taken"),
    ],
)
def test_bad_requests_are_not_written(requests: list[Request], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_requests(tmp_path / "file", requests)
    assert not (tmp_path / "file").exists()


@given(text=st.text(max_size=40))
def test_lines_are_objects_or_an_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text(text, encoding="utf-8")
    try:
        entries: list[Any] = read_lines(path)
    except ValueError as error:
        entries = []
        message = str(error)
    else:
        message = "lines.jsonl, line"
    assert "lines.jsonl, line" in message
    assert all(isinstance(entry, dict) for entry in entries)
