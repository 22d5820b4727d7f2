# SPDX-License-Identifier: Apache-2.0
"""The vllm_ext block: strict parsing, and the compatibility table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext import config

STOCK = {
    "speculative_config": None,
    "pipeline_parallel_size": 1,
    "enable_eplb": False,
    "enable_lora": False,
    "enforce_eager": False,
    "data_parallel_size": 1,
    "scheduler_cls": None,
    "worker_cls": "auto",
    "distributed_executor_backend": "mp",
    "kv_cache_dtype": "auto",
    "disable_hybrid_kv_cache_manager": None,
    "kv_transfer_config": None,
    "kv_offloading_size": None,
    "kv_cache_dtype_skip_layers": [],
    "kv_sharing_fast_prefill": False,
    "decode_context_parallel_size": 1,
    "prefill_context_parallel_size": 1,
}


#: A drafter, which smartspec needs.
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}


def engine_args(**changes: Any) -> SimpleNamespace:
    """The fields of vLLM's EngineArgs that the table reads, at vLLM's defaults."""
    return SimpleNamespace(**{**STOCK, **changes})


def test_defaults_and_blocks() -> None:
    settings = config.parse({"smartspec": {"k_max": 6}, "semipd": {"slo_ttft_ms": 300}, "cache_dir": "/x"})
    assert settings.smartspec == config.SmartSpecSettings(k_max=6)
    assert settings.semipd is not None
    assert settings.semipd.slo_ttft_ms == 300.0
    assert settings.kv_cache is None
    assert settings.cache_path == Path("/x")
    assert config.parse(None) == config.parse({}) == config.Settings()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"smartspek": {}}, r"unknown setting vllm_ext\.smartspek; did you mean vllm_ext\.smartspec\?"),
        ({"smartspec": {"kmax": 3}}, r"unknown setting vllm_ext\.smartspec\.kmax; did you mean .*k_max\?"),
        ({"zzz": 1}, r"unknown setting vllm_ext\.zzz; known keys: smartspec, structured"),
        ({"smartspec": {"k_max": "four"}}, r"vllm_ext\.smartspec\.k_max must be int, not 'four'"),
        ({"smartspec": {"k_max": True}}, r"k_max must be int, not True"),
        ({"smartspec": {"drafter": "tree"}}, r"drafter must be one of 'carrier', 'trie', not 'tree'"),
        ({"smartspec": 3}, r"vllm_ext\.smartspec must be a mapping of settings, not 3"),
        ("smartspec", r"vllm_ext must be a mapping of settings, not 'smartspec'"),
        ({"semipd": {"slo_ttft_ms": 10**400}}, r"slo_ttft_ms must be float, not 1000"),
        ({"semipd": {"slo_ttft_ms": float("nan")}}, r"slo_ttft_ms must be float, not nan"),
        ({"semipd": {"slo_ttft_ms": None, "mode": []}}, r"semipd\.mode must be one of"),
    ],
)
def test_bad_blocks_name_the_key_and_the_fix(block: Any, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.parse(block)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["smartspec", "structured", "semipd", "kv_cache", "nested", "cache_dir", "enabled", "k_max", "x"]
)


@given(st.dictionaries(keys, json_values | st.dictionaries(keys, json_values, max_size=3), max_size=4))
def test_any_json_parses_or_is_refused_by_name(block: dict[str, Any]) -> None:
    try:
        outcome: object = config.parse(block)
    except config.ConfigError as error:
        outcome = str(error)
    assert isinstance(outcome, config.Settings) or "vllm_ext" in str(outcome)


def test_features_in_use() -> None:
    assert config.find_features(config.parse(None), None) == ()
    assert config.find_features(config.parse(None), "MxMoE") == ("mxmoe",)
    assert config.find_features(config.parse({"semipd": {}, "smartspec": {}}), "fp8") == ("smartspec", "semipd")
    assert config.find_features(config.parse({"semipd": {"enabled": False}}), None) == ()
    assert config.find_features(config.parse(None), "mxmoe", "kv4") == ("mxmoe", "kv_cache")
    assert config.find_features(config.parse(None), None, "fp8") == ()


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (("mxmoe",), {"enable_eplb": True}, "mxmoe does not run with --enable-eplb: .*drop --enable-eplb"),
        (("mxmoe",), {"enable_lora": True}, "mxmoe does not run with --enable-lora: "),
        (("mxmoe",), {"data_parallel_size": 2}, "mxmoe does not run with --data-parallel-size above 1: "),
        (("smartspec",), {"scheduler_cls": "my.Scheduler"}, "smartspec does not run with --scheduler-cls CLASS: "),
        (("structured",), {"scheduler_cls": int}, "structured does not run with --scheduler-cls CLASS: "),
        (("semipd",), {"worker_cls": "my.Worker"}, "semipd does not run with --worker-cls CLASS: "),
        (("semipd",), {"distributed_executor_backend": int}, "semipd does not run with --distributed-executor-backend"),
        (("smartspec",), {}, "smartspec does not run with a missing --speculative-config: .*add --speculative-config"),
        (("smartspec",), {**NGRAM, "data_parallel_size": 2}, "smartspec does not run with --data-parallel-size above"),
        (
            ("smartspec",),
            {**NGRAM, "pipeline_parallel_size": 2},
            "smartspec does not run with --pipeline-parallel-size",
        ),
        (("smartspec",), {**NGRAM, "enable_lora": True}, "smartspec does not run with --enable-lora: "),
        (("structured",), {}, r"vllm_ext\.structured .*is not part of vllm-ext .*structured\.enabled to false"),
    ],
)
def test_refusals_name_both_sides_and_the_fix(features: tuple[str, ...], changes: dict, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.check_compatibility(features, engine_args(**changes))


def test_cuda_graphs_are_refused_where_only_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_is_cuda", lambda: True)
    with pytest.raises(config.ConfigError, match=r"mxmoe does not run with CUDA graphs: .*add --enforce-eager"):
        config.check_compatibility(("mxmoe",), engine_args())
    config.check_compatibility(("mxmoe",), engine_args(enforce_eager=True))


def test_another_spelling_of_the_block_is_an_error() -> None:
    assert config.find_block({"other": 1, "vllm_ext": {"a": 1}}) == {"a": 1}
    assert config.find_block({}) is None
    assert config.find_block(object()) is None
    with pytest.raises(config.ConfigError, match="has a block 'vllm-ext'; the pack's block is 'vllm_ext'"):
        config.find_block({"vllm-ext": {}})


def test_what_is_not_refused_passes() -> None:
    config.check_compatibility(("mxmoe",), engine_args(scheduler_cls="my.Scheduler", worker_cls="my.Worker"))
    config.check_compatibility((), engine_args(enable_eplb=True, enable_lora=True, scheduler_cls="my.Scheduler"))
    config.check_compatibility(("mxmoe",), engine_args(distributed_executor_backend="ray"))


def test_table_in_the_docs_is_generated(repository: Path) -> None:
    assert config.render_compatibility_table() in (repository / "docs" / "activation.md").read_text()
