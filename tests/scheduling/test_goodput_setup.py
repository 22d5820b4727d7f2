# SPDX-License-Identifier: Apache-2.0
"""What smartspec refuses once the model is known, and which of its decisions it makes for which engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.sampling_params import SamplingParams

from tests.scheduling.configurations import K, describe_engine, pretend_cuda
from vllm_ext import config
from vllm_ext.scheduling.goodput_setup import check_engine, describe_plan, find_group, plan_control
from vllm_ext.speculation.pace import HOLD_STEPS

SPLIT = CUDAGraphMode.FULL_AND_PIECEWISE


def check_plan(engine: Any, plan: tuple[Any, ...], line: str) -> None:
    """Where drafts are planned, a plan may stand for several steps, and nowhere else."""
    found = plan_control(engine)
    assert found == (*plan, HOLD_STEPS if found.plans_drafts else 1)
    assert line in describe_plan(engine, found)


def test_greedy_and_sampled_requests_are_apart() -> None:
    chosen = {"greedy": 0.0, "seeded": 0.7, "sampled": 1.0}
    requests = {rid: SimpleNamespace(sampling_params=SamplingParams(temperature=t)) for rid, t in chosen.items()}
    requests["seeded"].sampling_params.seed = 1
    requests["pooled"] = SimpleNamespace(sampling_params=None)
    assert [find_group(requests, rid) for rid in (*requests, "gone")] == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("policy", ["equal", "priority", "deadline", "priority+deadline"])
def test_what_is_accepted(policy: str) -> None:
    check_engine(describe_engine(policy=policy, k_max=K, probe_every=1))
    check_engine(describe_engine("eagle", uses_v2=True))
    check_engine(describe_engine(drafter="trie"))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (describe_engine(k_max=7), "k_max must be 1 to num_speculative_tokens=6, got 7: raise"),
        (describe_engine(k_max=0), "k_max must be 1 to num_speculative_tokens=6, got 0"),
        (describe_engine(probe_every=0), "probe_every must be at least 1 step, got 0"),
        (describe_engine(hold_steps=0), "hold_steps must be at least 1 step, got 0"),
        (describe_engine(drafter="trie", uses_v2=True), "needs the V1 model runner, and this engine uses V2"),
        (describe_engine("extract_hidden_states", uses_v2=True), "'extract_hidden_states', which makes no drafts"),
    ],
)
def test_bad_settings_are_named(engine: Any, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        check_engine(engine)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("is_hybrid", r"hybrid models \(some/model\): .* switch smartspec off"),
        ("is_diffusion", r"diffusion models \(some/model\): .* the canvas .* switch smartspec off"),
    ],
)
def test_models_whose_drafts_are_something_else(kind: str, message: str) -> None:
    engine = describe_engine()
    setattr(engine.model_config, kind, True)
    with pytest.raises(config.ConfigError, match=message):
        check_engine(engine)


def test_a_missing_drafter_is_named() -> None:
    engine = describe_engine()
    engine.speculative_config = None
    with pytest.raises(config.ConfigError, match="add --speculative-config, or drop the block"):
        check_engine(engine)


@pytest.mark.parametrize(
    ("engine", "plan", "line"),
    [
        (
            describe_engine(),
            (K, True, True, None, (), (0,) * 7),
            "method ngram, V1 model runner, cudagraph_mode NONE: 0 to 6 drafts by request, verification trimmed by req",
        ),
        (
            describe_engine("draft_model", k_max=3),
            (3, True, True, None, (), (1, 1, 2, 3, 4, 5, 6)),
            "method draft_model, V1 model runner, cudagraph_mode NONE: 0 to 3 drafts by request, ",
        ),
        # Insisting on a number, or not told one.
        (
            describe_engine("suffix"),
            (K, False, True, None, (), (0,) * 7),
            "suffix, V1 model runner, cudagraph_mode NONE: the drafter's own number of drafts, verification trimmed",
        ),
        (
            describe_engine("eagle", uses_v2=True, is_adaptive=True),
            (K, True, False, None, (), (1, 1, 2, 3, 4, 5, 6)),
            "0 to 6 drafts by request, verification left to enable_adaptive_verification",
        ),
    ],
)
def test_what_is_controlled_without_graphs(engine: Any, plan: tuple[Any, ...], line: str) -> None:
    check_plan(engine, plan, line)


@pytest.mark.parametrize(
    ("engine", "plan", "line"),
    [
        # One graph for one length of all: the lengths that were declared.
        (
            describe_engine("eagle", uses_v2=True, mode=SPLIT),
            (K, True, False, (0, 1, 3, K), (), (1, 1, 2, 3, 4, 5, 6)),
            "V2 model runner, cudagraph_mode FULL_AND_PIECEWISE: 0, 1, 3, 6 drafts for all requests of a step, nothing",
        ),
        # A table of the user's own stays, as far as some batch uses it.
        (
            describe_engine("eagle", uses_v2=True, mode=SPLIT, table=[(1, 4, 5), (5, 64, 2), (65, 99, 4)], k_max=5),
            (5, True, False, (0, 2, 5), (), (1, 1, 2, 3, 4, 5, 6)),
            "0, 2, 5 drafts for all",
        ),
        # V1 has one length, so that piecewise graphs take over, as with stock's table.
        (
            describe_engine("eagle", mode=SPLIT),
            (K, True, True, None, (1, 2, 4, 8, 16), (1, 1, 2, 3, 4, 5, 6)),
            "cudagraph_mode PIECEWISE: 0 to 6 drafts by request, verification trimmed by request",
        ),
        (
            describe_engine(mode=SPLIT, k_max=4),
            (4, True, True, None, (7, 14), (0,) * 7),
            "cudagraph_mode FULL_AND_PIECEWISE: 0 to 4 drafts by request, verification trimmed",
        ),
        (
            describe_engine("suffix", mode=SPLIT),
            (K, False, True, None, (7, 14), (0,) * 7),
            "the drafter's own number of drafts, verification trimmed",
        ),
        (
            describe_engine("suffix", mode=CUDAGraphMode.FULL_DECODE_ONLY),
            (K, False, True, None, (), (0,) * 7),
            "verification trimmed",
        ),
        # Graphs that take any lengths.
        (
            describe_engine("medusa", mode=CUDAGraphMode.PIECEWISE),
            (K, False, True, None, (1, 2, 4, 8, 16), (1,) * 7),
            "the drafter's own number of drafts, verification trimmed",
        ),
        (
            describe_engine("mtp", uses_v2=True, mode=CUDAGraphMode.FULL),
            (K, True, True, None, (1, 2, 4, 8, 16), (1, 1, 2, 3, 4, 5, 6)),
            "0 to 6 drafts by request",
        ),
    ],
)
def test_what_is_controlled_with_graphs(
    engine: Any, plan: tuple[Any, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, which is not at hand: only what is captured may be used."""
    pretend_cuda(monkeypatch)
    check_engine(engine)
    check_plan(engine, plan, line)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            describe_engine("eagle", uses_v2=True, mode=SPLIT, k_max=3, table=[[1, 64, 5]]),
            r"k_max=3 is below every .* with num_speculative_tokens_per_batch_size=\[\[1, 64, 5\]\]: raise k_max",
        ),
        (
            describe_engine("medusa", mode=SPLIT),
            r"'medusa' always makes num_speculative_tokens=6 drafts, .* set cudagraph_mode .* to PIECEWISE",
        ),
        (
            describe_engine("eagle3", mode=SPLIT, is_parallel=True),
            r"'eagle3' always makes num_speculative_tokens=6 drafts",
        ),
        (
            describe_engine("eagle", mode=CUDAGraphMode.FULL_DECODE_ONLY),
            r"FULL_DECODE_ONLY captures decoding of one length only: set cudagraph_mode .* to PIECEWISE",
        ),
    ],
)
def test_engines_with_nothing_to_choose(engine: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    with pytest.raises(config.ConfigError, match=message):
        check_engine(engine)
