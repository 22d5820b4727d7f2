# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of `--quantization mxmoe`, and what is refused, by layer and value."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    MoEActivation,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.plugins import load_general_plugins

from vllm_ext.quantization.config import MxMoEConfig
from vllm_ext.quantization.linear import MxMoELinearMethod, MxMoEOnlineLinearMethod
from vllm_ext.quantization.online import MxMoEOnlineMethod
from vllm_ext.quantization.packed import MxMoEPackedMethod
from vllm_ext.quantization.plan import Plan, PlanError

PREFIX = "model.layers.3.mlp.experts"
ATTENTION = "model.layers.3.self_attn"
PAIR = {"gate_up": "w4a16_g128", "down": "w3a16_g128"}
PRODUCER = {"name": "vllm-ext", "version": "test"}


def make_layer(**changes: Any) -> RoutedExperts:
    """A RoutedExperts with the attributes vLLM has set when it asks for the method, and no weights."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    parallel = SimpleNamespace(enable_eplb=changes.pop("enable_eplb", False), use_ep=changes.pop("use_ep", False))
    layer.moe_config = SimpleNamespace(
        has_bias=changes.pop("has_bias", False),
        moe_parallel_config=parallel,
        w13_num_shards=2,
        num_logical_experts=changes.pop("num_experts", 2),
    )
    layer.activation = MoEActivation.SILU
    layer.swiglu_limit = layer.swiglu_alpha = layer.swiglu_beta = None
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def test_vllm_constructs_it_without_arguments() -> None:
    load_general_plugins()
    config = get_quantization_config("mxmoe")()
    assert isinstance(config, MxMoEConfig)
    assert config.get_name() == "mxmoe"
    assert config.get_config_filenames() == []
    assert config.get_min_capability() == 80
    assert set(config.get_supported_act_dtypes()) == {torch.bfloat16, torch.half, torch.float32}
    assert "default plan" in repr(config)


def test_only_experts_are_quantized() -> None:
    config = MxMoEConfig()
    method = config.get_quant_method(make_layer(), PREFIX)
    assert isinstance(method, MxMoEOnlineMethod)
    assert isinstance(method, FusedMoEMethodBase)
    assert method.layer_name == PREFIX
    assert not method.supports_eplb
    assert not method.is_monolithic
    assert method.get_fused_moe_quant_config(make_layer()) is not None
    linear = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(linear)
    assert type(config.get_quant_method(linear, "model.layers.3.mlp.gate")) is UnquantizedLinearMethod
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"activation": MoEActivation.GELU}, "activation 'gelu' (supported: 'silu')"),
        ({"activation": MoEActivation.SILU_NO_MUL}, "activation 'silu_no_mul'"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation 'swigluoai'"),
        ({"has_bias": True}, "experts with bias (has_bias=True)"),
        ({"enable_eplb": True}, "expert load balancing (enable_eplb=True)"),
        ({"swiglu_limit": 7.0}, "a modified SwiGLU (swiglu_limit=7.0)"),
        ({"swiglu_alpha": 1.702}, "a modified SwiGLU (swiglu_alpha=1.702)"),
        ({"swiglu_beta": 0.0}, "a modified SwiGLU (swiglu_beta=0.0)"),
    ],
)
def test_layers_it_cannot_compute_are_refused(changes: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match="does not support") as caught:
        MxMoEConfig().get_quant_method(make_layer(**changes), PREFIX)
    assert str(caught.value).startswith(f"{PREFIX}: ")
    assert value in str(caught.value)


def make_linear(kind: type[LinearBase] = ReplicatedLinear) -> LinearBase:
    linear = kind.__new__(kind)
    torch.nn.Module.__init__(linear)
    return linear


def make_config(modules: dict[str, Any], is_packed: bool = False) -> MxMoEConfig:
    config = Plan.parse(modules, producer=PRODUCER if is_packed else None).to_config()
    made = MxMoEConfig.from_config(config)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


@pytest.fixture
def vllm_config() -> Any:
    """OnlineLinearBase asks for the model's dtype."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    with set_current_vllm_config(config):
        yield config


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_producer_makes_a_checkpoint_packed(is_packed: bool, vllm_config: Any) -> None:
    config = make_config(
        {
            f"{PREFIX}.0": PAIR,
            f"{PREFIX}.1": PAIR,
            **{f"{ATTENTION}.{name}_proj": "w4a8_g64" for name in "qkv"},
            f"{ATTENTION}.o_proj": "w16a16",
            "model.layers.4.mlp.experts.0": {"gate_up": "w16a16", "down": "w16a16"},
        },
        is_packed,
    )
    assert config.is_packed is is_packed
    assert ("packed" in repr(config)) is is_packed
    experts = config.get_quant_method(make_layer(), PREFIX)
    assert type(experts) is (MxMoEPackedMethod if is_packed else MxMoEOnlineMethod)
    assert [[str(scheme) for scheme in pair] for pair in experts.global_schemes] == [["w4a16_g128", "w3a16_g128"]] * 2
    fused = config.get_quant_method(make_linear(), f"{ATTENTION}.qkv_proj")
    assert type(fused) is (MxMoELinearMethod if is_packed else MxMoEOnlineLinearMethod)
    assert str(fused.scheme) == "w4a8_g64"
    assert fused.part_names == [f"{ATTENTION}.{name}_proj" for name in "qkv"]
    # w16a16, and what the plan does not name, stay with stock vLLM.
    assert type(config.get_quant_method(make_linear(), f"{ATTENTION}.o_proj")) is UnquantizedLinearMethod
    assert type(config.get_quant_method(make_linear(), "model.layers.9.mlp.up_proj")) is UnquantizedLinearMethod
    assert type(config.get_quant_method(make_linear(GateLinear), "model.layers.3.mlp.gate")) is UnquantizedLinearMethod
    assert config.get_quant_method(make_linear(ParallelLMHead), "lm_head") is None
    unquantized = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnquantizedFusedMoEMethod, "__init__", lambda self, moe: unquantized.append(moe))
        for layer, num_experts in ((4, 1), (5, 2)):
            method = config.get_quant_method(make_layer(num_experts=num_experts), f"model.layers.{layer}.mlp.experts")
            assert type(method) is UnquantizedFusedMoEMethod
    assert len(unquantized) == 2
    config.check_plan()
    assert config.get_checkpoint_weight_mapper() is not None


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({f"{PREFIX}.0": PAIR}, rf"leaves out {PREFIX}.1; give it a scheme"),
        ({f"{PREFIX}.{e}": PAIR for e in range(3)}, rf"the plan names {PREFIX}.2, but the layer has 2 experts"),
    ],
)
def test_a_plan_must_fit_the_experts(modules: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_config(modules).get_quant_method(make_layer(), PREFIX)


def test_a_plan_must_agree_on_fused_parts() -> None:
    config = make_config({f"{ATTENTION}.q_proj": "w4a8_g64", f"{ATTENTION}.k_proj": "w4a8_g64"})
    with pytest.raises(PlanError, match=r"qkv_proj is one fused layer .* v_proj: not in the plan"):
        config.get_quant_method(make_linear(), f"{ATTENTION}.qkv_proj")


@pytest.mark.parametrize(
    ("kind", "prefix", "message"),
    [
        (GateLinear, "model.layers.3.mlp.gate", "names model.layers.3.mlp.gate, a router"),
        (ReplicatedLinear, "model.layers.3.mlp.shared_expert_gate", "shared_expert_gate, a router"),
        (ParallelLMHead, "lm_head", "the plan names lm_head, a ParallelLMHead"),
        (LinearBase, "model.layers.3.self_attn.kv_b_proj", "kv_b_proj, which mxmoe leaves as it is, because vLLM's"),
    ],
)
def test_what_is_never_quantized_is_refused(kind: type, prefix: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_config({prefix: "w8a16_g128"}).get_quant_method(make_linear(kind), prefix)


def test_modules_without_a_layer_are_an_error_before_loading(vllm_config: Any) -> None:
    config = make_config({f"{ATTENTION}.o_proj": "w4a16_g128", "model.layers.7.self_attn.o_proj": "w4a16_g128"})
    config.get_quant_method(make_linear(), f"{ATTENTION}.o_proj")
    message = (
        r"names model.layers.7.self_attn.o_proj, which is no .* layer of this model; nearest is .*3.self_attn.o_proj"
    )
    with pytest.raises(PlanError, match=message):
        config.get_checkpoint_weight_mapper()
    # Models with their own load_weights do not ask for the mapper; the first layer to be processed asks instead.
    method = MxMoEConfig.get_quant_method(config, make_linear(), f"{ATTENTION}.o_proj")
    with pytest.raises(PlanError, match=message):
        method.check_plan()


@pytest.mark.parametrize(("model_type", "name"), [("gpt_oss", "GPT-OSS"), ("llama4_text", "Llama 4")])
@pytest.mark.parametrize("plan", [None, Plan.parse({"model.layers.0.self_attn.o_proj": "w4a16_g64"})])
def test_families_that_are_refused_are_named(model_type: str, name: str, plan: Plan | None) -> None:
    """With a plan and without, the model itself or the text model inside of another."""
    text = SimpleNamespace(model_type=model_type, num_local_experts=4)
    text.get_text_config = lambda: text
    outer = SimpleNamespace(model_type="some_vision_model", get_text_config=lambda: text)
    for config in (text, outer):
        with pytest.raises(ValueError, match=rf"does not support {name} .*; serve it without mxmoe"):
            MxMoEConfig(plan).maybe_update_config("model", hf_config=config)


def test_a_plan_follows_the_models_names_once() -> None:
    config = make_config({f"{PREFIX}.0": PAIR, "visual.proj": "w8a16_g-1"})
    mapper = WeightsMapper(
        orig_to_new_substr={"model.": "language_model.model."},
        orig_to_new_suffix={".bias": None},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )
    for _ in range(2):
        config.apply_vllm_mapper(mapper.get_rename_mapper())
    assert config.plan is not None
    assert set(config.plan.modules) == {f"language_model.{PREFIX}.0", "visual.proj"}
    MxMoEConfig().apply_vllm_mapper(mapper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": {}}, "the plan names no module"),
        ({"plan": {"a.b": "w7a16_g128"}}, "a.b: .*unknown scheme|weight_bits=7"),
        ({"version": 2}, "has version 2, this vllm-ext reads version 1"),
        ({"plan_sha256": "0" * 64}, "the plan in config.json was changed"),
        ({"bits": 4}, "unknown key 'bits'"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = Plan.parse({"a.b": "w4a16_g128"}).to_config()
    if "plan" in change:
        del config["plan_sha256"]
    with pytest.raises(PlanError, match=message):
        MxMoEConfig.from_config(config | change)


def test_it_claims_no_other_checkpoint() -> None:
    for quant_method in ("gptq", "awq", "mxmoe"):
        found = MxMoEConfig.override_quantization_method({"quant_method": quant_method}, "mxmoe", hf_config=None)
        assert found is None


def test_a_model_without_experts_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext"):
        MxMoEConfig().maybe_update_config("some/moe", Qwen3MoeConfig(num_experts=8))
        assert not caplog.records
        MxMoEConfig().maybe_update_config("some/llama", LlamaConfig())
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "some/llama (model type 'llama') declares none: it is served unquantized" in message


def test_a_rank_of_a_pipeline_checks_the_layers_it_builds(monkeypatch: pytest.MonkeyPatch, vllm_config: Any) -> None:
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(world_size=2))
    plan = {f"{ATTENTION}.o_proj": "w4a16_g128", "model.layers.7.self_attn.o_proj": "w4a16_g128"}
    for misspelt, message in ((f"{ATTENTION}.oproj", rf"names {ATTENTION}.oproj, .*nearest is {ATTENTION}.o_proj"), (
        "model.layers.7.self_attn.oproj", None)):  # fmt: skip
        config = MxMoEConfig(Plan.parse({**plan, misspelt: "w4a16_g128"}))
        linear = ReplicatedLinear.__new__(ReplicatedLinear)
        torch.nn.Module.__init__(linear)
        config.get_quant_method(linear, f"{ATTENTION}.o_proj")
        if message is None:
            config.check_plan()
        else:
            with pytest.raises(PlanError, match=message):
                config.check_plan()
