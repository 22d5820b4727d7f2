# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of `--quantization mxmoe`, and what is refused, by layer and value."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, RoutedExperts
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

from vllm_ext.quantization.config import MxMoEConfig
from vllm_ext.quantization.online import MxMoEOnlineMethod

PREFIX = "model.layers.3.mlp.experts"


def make_layer(**changes: Any) -> RoutedExperts:
    """A RoutedExperts with the attributes vLLM has set when it asks for the method, and no weights."""
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    parallel = SimpleNamespace(enable_eplb=changes.pop("enable_eplb", False))
    layer.moe_config = SimpleNamespace(
        has_bias=changes.pop("has_bias", False), moe_parallel_config=parallel, w13_num_shards=2
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


def test_packed_checkpoints_are_refused_for_now() -> None:
    with pytest.raises(ValueError, match=r"not served by this version of vllm-ext yet.*'version': 1"):
        MxMoEConfig.from_config({"quant_method": "mxmoe", "version": 1, "plan": {}})


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
