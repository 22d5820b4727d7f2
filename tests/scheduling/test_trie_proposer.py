# SPDX-License-Identifier: Apache-2.0
"""Who has a trie and for how long, where the drafter is refused, and the wrap of vLLM's model runner."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.child import run_child
from vllm_ext import config, observability
from vllm_ext.patches import lookup_drafters, speculation
from vllm_ext.scheduling import trie_proposer
from vllm_ext.scheduling.ngram_proposer import NgramProposer
from vllm_ext.scheduling.trie_proposer import TrieProposer, check_drafter
from vllm_ext.speculation import trie_drafter as drafter_module
from vllm_ext.speculation.trie import CAPACITY, SegmentAllocator
from vllm_ext.speculation.trie_drafter import TrieDrafter

K = 4


def describe_engine(
    method: str = "ngram", uses_v2: bool = False, longest: int = 3, rank: int = 0, **smartspec: Any
) -> Any:
    """What is read of a finished VllmConfig."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method, num_speculative_tokens=K, prompt_lookup_min=1, prompt_lookup_max=longest
        ),
        model_config=SimpleNamespace(max_model_len=40, get_vocab_size=lambda: 1000),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(rank=rank, data_parallel_index=0),
        use_v2_model_runner=uses_v2,
        additional_config={"vllm_ext": {"smartspec": {"drafter": "trie", **smartspec}}},
    )


class State:
    """What is read of the runner's state of a request."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.output_token_ids: list[int] = []


class Runner:
    """The part of GPUModelRunner that the wraps see: persistent batch, requests, drafter."""

    def __init__(self, lookup_proposer: Any = None) -> None:
        self.requests: dict[str, Any] = {}
        self.speculative_config = SimpleNamespace(method="ngram")
        self.lookup_proposer = lookup_proposer
        tokens, lengths = np.zeros((4, 40), np.int32), np.zeros(4, np.int32)
        self.input_batch = SimpleNamespace(req_ids=[], token_ids_cpu=tokens, num_tokens_no_spec=lengths)

    def start(self, rid: str, prompt: list[int]) -> None:
        self.requests[rid] = State(prompt)

    def place(self, *ids: str) -> None:
        """Put requests into the rows of the batch; rows of before stay as they are behind them."""
        self.input_batch.req_ids = list(ids)
        for row, rid in enumerate(ids):
            state = self.requests[rid]
            text = state.prompt + state.output_token_ids
            self.input_batch.token_ids_cpu[row, : len(text)] = text
            self.input_batch.num_tokens_no_spec[row] = len(text)

    def sample(self, proposer: TrieProposer, **tokens: list[int]) -> list[list[int]]:
        """Append these tokens to the requests of the batch, and ask for drafts of all."""
        ids = self.input_batch.req_ids
        for rid in ids:
            self.requests[rid].output_token_ids += tokens.get(rid, [])
        self.place(*ids)
        return proposer.propose(self.input_batch, self.requests, [tokens.get(rid, []) for rid in ids], None, K)


@pytest.fixture(scope="module")
def compiled() -> TrieProposer:
    return TrieProposer(describe_engine())


@pytest.fixture
def proposer(compiled: TrieProposer, monkeypatch: pytest.MonkeyPatch) -> TrieProposer:
    monkeypatch.setattr(TrieDrafter, "compile", lambda self: None)
    return TrieProposer(describe_engine())


def test_requests_come_move_and_leave(proposer: TrieProposer) -> None:
    runner = Runner()
    runner.start("a", [1, 2, 3, 4, 1, 2])
    runner.start("b", [7, 8, 9, 7])
    runner.place("a", "b")
    assert runner.sample(proposer, a=[3], b=[8]) == [[4, 1, 2, 3], [9, 7, 8]]
    # Preempted: the other one takes its row, and it comes back in another row with its text.
    runner.place("b")
    assert runner.sample(proposer, b=[9]) == [[7, 8, 9]]
    runner.place("b", "a")
    assert runner.sample(proposer, b=[5], a=[4]) == [[], [1, 2, 3, 4]]
    assert set(proposer.drafter._slots) == {"a", "b"}
    # Rows without new tokens (a prompt in pieces) have no drafts.
    assert runner.sample(proposer, a=[1]) == [[], [2, 3, 4, 1]]

    # Finished or aborted: gone with its prompt, and its output serves others.
    del runner.requests["a"]
    runner.start("c", [50, 3])
    runner.place("b", "c")
    assert runner.sample(proposer, b=[6], c=[4]) == [[], [1]]
    assert set(proposer.drafter._slots) == {"b", "c"}
    assert set(proposer._states) == {"b", "c"}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_tries_do_is_counted(
    rank: int, proposer: TrieProposer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(observability.DIRECTORY_ENV, str(tmp_path))
    monkeypatch.setattr(observability, "_record", None)
    proposer = TrieProposer(describe_engine(rank=rank))
    runner = Runner()
    runner.start("a", [1, 2, 3, 4, 1, 2])
    runner.start("b", [7, 8, 9])
    runner.place("a", "b")
    assert runner.sample(proposer, a=[3], b=[5]) == [[4, 1, 2, 3], []]
    del runner.requests["a"]
    runner.place("b")
    runner.sample(proposer, b=[6])
    proposer.drafter.shared.prune()
    runner.sample(proposer, b=[4])
    found = {name.rpartition("smartspec_trie_")[2]: value for (_, name), value in read_trie_metrics(tmp_path)}
    if rank:
        assert not any(found.values())
        return
    # 7 tokens of a, 4 of b, then what a put out, and two more of b; the shared text has an end mark.
    assert found == {
        "stored_tokens": 6 + proposer.drafter.shared.num_tokens, "node_count": proposer.drafter.count_nodes(),
        "inserted_tokens_total": 7 + 4 + 1 + 2, "searched_rows_total": 4, "matched_rows_total": 1,
        "drafted_tokens_total": 4, "prunes_total": 1,
    }  # fmt: skip


def read_trie_metrics(directory: Path) -> list[tuple[tuple[int, str], float]]:
    return [item for item in observability.read_records(str(directory)).items() if "_trie_" in item[0][1]]


def test_a_name_that_is_used_again_is_another_request(proposer: TrieProposer) -> None:
    runner = Runner()
    runner.start("a", [1, 2, 3, 1, 2])
    runner.place("a")
    assert runner.sample(proposer, a=[3]) == [[1, 2, 3]]
    runner.start("a", [1, 2, 5, 1, 2])
    runner.place("a")
    assert runner.sample(proposer, a=[5]) == [[1, 2, 5]]
    assert len(proposer.drafter) == 1


def test_a_session_that_goes_on_with_another_prompt(proposer: TrieProposer) -> None:
    runner = Runner()
    runner.start("a", [1, 2, 3, 1, 2])
    runner.place("a")
    runner.sample(proposer, a=[3, 1, 2, 3])
    state = runner.requests["a"]
    state.prompt = [1, 2, 9, 1]
    state.output_token_ids.clear()
    runner.place("a")
    assert runner.sample(proposer, a=[2]) == [[9, 1, 2]]
    # Longer than what was inserted, and different.
    state.prompt = [6, 7, 8, 6, 7, 8, 6]
    state.output_token_ids.clear()
    runner.place("a")
    assert runner.sample(proposer, a=[7]) == [[8, 6, 7]]


def test_nothing_beyond_the_longest_text(proposer: TrieProposer) -> None:
    runner = Runner()
    runner.start("a", [1, 2] * 18)
    runner.place("a")
    assert runner.sample(proposer, a=[1, 2]) == [[1, 2]]
    assert runner.sample(proposer, a=[1]) == [[2]]
    assert runner.sample(proposer, a=[2]) == [[]]


def test_bounded_over_many_requests(proposer: TrieProposer) -> None:
    runner, generator = Runner(), np.random.default_rng(0)
    free = proposer.drafter._segments.count_free()
    for number in range(300):
        ids = [str(number + row) for row in range(3)]
        for rid in ids:
            if rid not in runner.requests:
                runner.start(rid, generator.integers(0, 1000, 30).tolist())
        runner.place(*ids)
        runner.sample(proposer, **{rid: [1, 2] for rid in ids})
        assert len(proposer.drafter) == len(proposer._states) == 3
        del runner.requests[ids[0]]
    runner.requests.clear()
    runner.start("last", [1, 2])
    runner.place("last")
    runner.sample(proposer)
    assert proposer.drafter._segments.count_free() == free


def test_long_prompts_are_inserted_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter_module, "INSERT_AT_MOST", 100)
    drafter = TrieDrafter(K, max_match=3)
    texts = np.tile(np.arange(25, dtype=np.int32), (2, 10))
    lengths, wanted = np.array([250, 30]), np.array([K, K])
    follow = [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert [drafter.propose("ab", texts, lengths, wanted) for _ in range(3)] == [[[], []], [[], []], follow]


def test_a_full_pool_makes_room_for_others() -> None:
    """1024 nodes, two segments at most: one that waits gives way, then a large trie is halved."""
    drafter = TrieDrafter(K, max_match=3, request_nodes=1024, total_nodes=1024)
    period = np.random.default_rng(0).permutation(900)[:100].astype(np.int32)
    texts, first = np.tile(period, (3, 4)), period[:K].tolist()

    def propose(**lengths: int) -> list[list[int]]:
        count = len(lengths)
        return drafter.propose(list(lengths), texts, np.array(list(lengths.values())), np.full(count, K))

    def list_capacities() -> dict[str, int]:
        return {rid: int(drafter._heads[slot, CAPACITY]) for rid, slot in drafter._slots.items()}

    assert propose(waits=300) == [first]
    assert propose(a=300) == [first]
    assert list_capacities() == {"a": 1024}
    assert propose(a=301, b=20)[1] == []
    assert list_capacities() == {"a": 512, "b": 512}
    # No room for a third: it drafts nothing until another leaves.
    assert propose(a=302, b=21, c=120)[2] == []
    assert list_capacities() == {"a": 512, "b": 512}
    drafter.remove("b")
    assert propose(a=303, c=120)[1] == period[20 : 20 + K].tolist()
    assert list_capacities() == {"a": 512, "c": 512}


@pytest.mark.parametrize(
    "wrong",
    [
        {"k_max": 0},
        {"k_max": 4, "min_match": 5, "max_match": 4},
        {"k_max": 60, "max_match": 8},
        {"k_max": 4, "shared_tokens": 64},
        {"k_max": 4, "request_nodes": 1000},
        {"k_max": 4, "request_nodes": 2048, "total_nodes": 1024},
    ],
)
def test_sizes_that_cannot_work(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"got|must be"):
        TrieDrafter(**wrong)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60))
def test_segments_do_not_overlap_and_join_again(steps: list[tuple[int, bool]]) -> None:
    segments, held = SegmentAllocator(256, 8), []
    for order, is_release in steps:
        if is_release and held:
            segments.release(*held.pop(order % len(held)))
            continue
        size = 8 << order
        start = segments.allocate(size)
        if start is not None:
            assert start % size == 0
            assert all(start + size <= other or other + length <= start for other, length in held)
            held.append((start, size))
        assert segments.count_free() == 256 - sum(length for _, length in held)
    for segment in held:
        segments.release(*segment)
    assert segments.allocate(256) == 0


def test_refusals_name_the_fix() -> None:
    settings = config.SmartSpecSettings(drafter="trie")
    check_drafter(describe_engine(), settings)
    check_drafter(describe_engine("eagle", uses_v2=True), config.SmartSpecSettings())
    with pytest.raises(config.ConfigError, match="'eagle': set its method to 'ngram'"):
        check_drafter(describe_engine("eagle"), settings)
    with pytest.raises(config.ConfigError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        check_drafter(describe_engine(uses_v2=True), settings)
    with pytest.raises(config.ConfigError, match="prompt_lookup_max=61 with num_speculative_tokens=4 needs 65"):
        check_drafter(describe_engine(longest=61), settings)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_wraps_of_the_runner_combine(
    order: tuple[int, int], proposer: TrieProposer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft lengths by request hold for the trie in both orders, and the n-gram drafter is asked where no trie is."""
    asked: list[list[list[int]]] = []

    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled_token_ids: Any) -> list[list[int]]:
        asked.append(sampled_token_ids)
        return [[99] * K if tokens else [] for tokens in sampled_token_ids]

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", propose_draft_token_ids)
    monkeypatch.setattr(GPUModelRunner, "__init__", lambda self, vllm_config: None)
    wraps = (speculation.wrap_propose_draft_token_ids, lookup_drafters.wrap_model_runner)
    for number in (*order, *order):
        wraps[number]()
    wrapped = GPUModelRunner.propose_draft_token_ids
    depth = 0
    while (wrapped := getattr(wrapped, "__wrapped__", None)) is not None:  # type: ignore[assignment]
        depth += 1
    assert depth == 2
    assert inspect.unwrap(GPUModelRunner.propose_draft_token_ids) is propose_draft_token_ids

    output = SimpleNamespace(num_spec_tokens_to_schedule=3, draft_lengths={"a": 2, "b": 0})
    runner = Runner(proposer)
    for rid in ("a", "b", "c"):
        runner.start(rid, [1, 2, 3, 4, 1, 2])
    runner.place("a", "b", "c")
    propose: Any = GPUModelRunner.propose_draft_token_ids
    # Request c has no length of its own: the batch's.
    assert propose(runner, output, [[2], [2], [2]]) == [[3, 4], [], [3, 4, 1]]
    assert asked == []
    stock = Runner()
    stock.input_batch = runner.input_batch
    assert propose(stock, output, [[2], [2], [2]]) == [[99] * 2, [], [99] * K]
    assert asked == [[[2], [2], [2]]]


def test_engines_get_the_proposer_that_they_ask_for(compiled: TrieProposer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrieDrafter, "compile", lambda self: None)

    def start(self: Any, vllm_config: Any, device: str) -> None:
        if hasattr(vllm_config, "speculative_config"):
            self.drafter = device

    monkeypatch.setattr(GPUModelRunner, "__init__", start)
    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", GPUModelRunner.propose_draft_token_ids)
    lookup_drafters.wrap_model_runner()

    def make(vllm_config: Any) -> Any:
        runner: Any = GPUModelRunner(vllm_config, "cpu")  # type: ignore[arg-type]
        return runner.lookup_proposer

    assert isinstance(make(describe_engine()), TrieProposer)
    assert make(describe_engine(enabled=False)) is None
    assert isinstance(make(describe_engine(drafter="carrier")), NgramProposer)
    assert make(describe_engine("suffix", drafter="carrier")) is None
    assert make(SimpleNamespace(additional_config={})) is None
    other = describe_engine()
    # A runner without a drafter: an earlier stage of a pipeline.
    del other.speculative_config
    assert make(other) is None


def test_numba_is_left_to_the_worker() -> None:
    """vLLM's CPU worker does not start where numba was imported before it: not by the check, nor by the wraps."""
    code = """
import json, sys
import vllm_ext.patches.lookup_drafters
from vllm_ext import config, observability
from vllm_ext.scheduling import ngram_proposer, trie_proposer
trie_proposer.check_drafter(None, config.SmartSpecSettings())
print(json.dumps("numba" in sys.modules))
"""
    result = run_child(code)
    assert result.value is False, result.stderr


def test_the_check_knows_what_the_tries_can_hold() -> None:
    assert trie_proposer.LONGEST_NGRAM == drafter_module.LONGEST_NGRAM
