# SPDX-License-Identifier: Apache-2.0
"""The vllm_ext block: strict parsing, and the compatibility table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext import config

STOCK = {
    "model": "some/model",
    "speculative_config": None,
    "pipeline_parallel_size": 1,
    "enable_eplb": False,
    "enable_lora": False,
    "enforce_eager": False,
    "optimization_level": 2,
    "compilation_config": SimpleNamespace(mode=None),
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
    "structured_outputs_config": None,
    "skip_tokenizer_init": False,
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
        ({"structured": {"whitespace": "none"}}, r"whitespace must be one of 'any', 'compact' or int, not 'none'"),
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
    assert config.find_features(config.parse(None), None, is_backend_ours=True) == ("structured",)
    with pytest.raises(config.ConfigError, match=r"backend vllm_ext needs vllm_ext\.structured, which is switched off"):
        config.find_features(config.parse({"structured": {"enabled": False}}), None, is_backend_ours=True)
    assert config.names_our_backend(engine_args(structured_outputs_config=SimpleNamespace(backend="vllm_ext")))
    assert not config.names_our_backend(engine_args(structured_outputs_config={"backend": "xgrammar"}))


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (("mxmoe",), {"enable_eplb": True}, "mxmoe does not run with --enable-eplb: .*drop --enable-eplb"),
        (("mxmoe",), {"enable_lora": True}, "mxmoe does not run with --enable-lora and routed experts: "),
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
        (("nested",), {}, r"vllm_ext\.nested .*is not part of vllm-ext .*nested\.enabled to false"),
        (
            ("structured",),
            {"structured_outputs_config": {"backend": "outlines"}},
            "structured does not run with --structured-outputs-config.backend guidance, outlines or",
        ),
        (("structured",), {"skip_tokenizer_init": True}, "structured does not run with --skip-tokenizer-init"),
    ],
)
def test_refusals_name_both_sides_and_the_fix(features: tuple[str, ...], changes: dict, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.check_compatibility(features, engine_args(**changes))


@pytest.mark.parametrize(
    "eager",
    [{"enforce_eager": True}, {"optimization_level": 0}, {"compilation_config": SimpleNamespace(mode=0)}],
    ids=["flag", "level", "mode"],
)
def test_eager_pipelines_are_refused_on_cpus(eager: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_is_cpu", lambda: True)
    message = r"mxmoe does not run with --pipeline-parallel-size .* on CPUs: .*; drop --enforce-eager, or use --tensor-"
    with pytest.raises(config.ConfigError, match=message):
        config.check_compatibility(("mxmoe",), engine_args(pipeline_parallel_size=2, **eager))
    config.check_compatibility(("mxmoe",), engine_args(pipeline_parallel_size=2))
    config.check_compatibility(("mxmoe",), engine_args(**eager))
    monkeypatch.setattr(config, "_is_cpu", lambda: False)
    config.check_compatibility(("mxmoe",), engine_args(pipeline_parallel_size=2, **eager))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"model_type": "llama"}, False),
        ({"num_experts": 8}, True),
        ({"num_local_experts": 1}, True),
        ({"num_experts": 0}, False),
        ({"text_config": {"n_routed_experts": 64}}, True),
        ({"block_configs": [{}]}, True),
        (None, True),
    ],
)
def test_models_that_declare_experts(declared: dict[str, Any] | None, expected: bool, tmp_path: Path) -> None:
    if declared is not None:
        (tmp_path / "config.json").write_text(json.dumps(declared))
    assert config.may_have_experts(str(tmp_path)) is expected
    if not expected:
        config.check_compatibility(("mxmoe",), engine_args(enable_lora=True, model=str(tmp_path)))


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
