# SPDX-License-Identifier: Apache-2.0
"""Bit plans: the JSON form both ways, its hash, lookups of fused layers and experts, and every refusal by message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError, is_expert
from vllm_ext.quantization.scheme import Scheme, list_schemes

W3, W4 = Scheme.parse("w3a16_g128"), Scheme.parse("w4a16_g128")
EXPERTS = "model.layers.0.mlp.experts"
MIXED = {"gate_up": "w3a16_g128", "down": "w4a16_g128"}

schemes = st.sampled_from(list_schemes())
modules = st.dictionaries(
    st.from_regex(r"model\.layers\.[0-9]\.self_attn\.[qkvo]_proj", fullmatch=True), schemes, max_size=4
)
experts = st.dictionaries(
    st.from_regex(r"model\.layers\.[0-9]\.mlp\.experts\.[0-9]", fullmatch=True),
    st.fixed_dictionaries({"gate_up": schemes, "down": schemes}),
    max_size=4,
)


@given(modules, experts)
def test_json_round_trip(linears: dict[str, Any], routed: dict[str, Any]) -> None:
    plan = Plan.parse({**linears, **routed}, ["lm_head"], {"name": "vllm-ext"})
    assert plan.to_json() == {**linears, **routed}
    assert Plan.from_config(json.loads(json.dumps(plan.to_config()))) == plan


def test_hash_does_not_depend_on_the_order_and_does_on_every_scheme() -> None:
    first, second = "model.layers.0.self_attn.o_proj", f"{EXPERTS}.0"
    plan = Plan.parse({first: "w4a16_g128", second: MIXED})
    assert plan.sha256 == Plan.parse({second: MIXED, first: "w4a16_g128"}).sha256
    assert plan.sha256 != Plan.parse({first: "w4a16_g128", second: {**MIXED, "down": "w4a16_g64"}}).sha256
    # The documented recipe, spelled out once.
    assert Plan.parse({"a": "w16a16"}).sha256 == "45be95fc180908d924475ffa68b35df2f923cf3da29d026759dda50dfe9fd924"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must map module paths to schemes"),
        ({"": "w4a16_g128"}, "keys are module paths, got ''"),
        ({"a.weight": "w4a16_g128"}, r"without the tensor's name, got 'a\.weight'"),
        ({"a": "w4a16g128"}, "a: unknown scheme 'w4a16g128'.*nearest is w4a16_g128"),
        ({"a": "w7a16_g128"}, "a: scheme 'w7a16_g128'.*nearest is"),
        ({"a": 4}, "a: a scheme is a name such as .*, got 4"),
        ({"a": MIXED}, "a: a scheme is a name"),
        ({f"{EXPERTS}.0": "w4a16_g128"}, r"experts\.0 is an expert: give"),
        ({f"{EXPERTS}.0": {"gate_up": "w4a16_g128"}}, r"experts\.0 is an expert: give"),
        ({f"{EXPERTS}.0": {**MIXED, "down": "w9"}}, r"experts\.0 down: unknown scheme 'w9'"),
    ],
)
def test_bad_plan(value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, this vllm-ext reads version 1: install"),
        ({"version": None}, "version None"),
        ({"plan_sha256": "0" * 64}, "plan_sha256 is '0000.*hashes to .*quantize the model again"),
        ({"plan_sha": "x"}, "unknown key 'plan_sha'; did you mean 'plan_sha256'"),
        ({"ignore": "lm_head"}, "ignore must be a list"),
        ({"plan": None}, "must map module paths"),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str) -> None:
    config = {**Plan.parse({"a": "w4a16_g128"}).to_config(), **changes}
    with pytest.raises(PlanError, match=message):
        Plan.from_config(config)


def test_find_linear() -> None:
    names = ("q_proj", "k_proj", "v_proj")
    attention = "model.layers.0.self_attn"
    plan = Plan.parse({f"{attention}.{name}": "w4a16_g128" for name in names})
    assert plan.find_linear(f"{attention}.qkv_proj", names) == W4
    assert plan.find_linear(f"{attention}.o_proj", ("o_proj",)) is None
    assert Plan.parse({"lm_head": "w4a16_g128"}).find_linear("lm_head", ("lm_head",)) == W4


@pytest.mark.parametrize("k_proj", ["w3a16_g128", None])
def test_fused_parts_that_disagree(k_proj: str | None) -> None:
    plan = Plan.parse({"a.q_proj": "w4a16_g128", **({"a.k_proj": k_proj} if k_proj else {})})
    with pytest.raises(PlanError, match=rf"a\.qkv_proj is one fused layer.*k_proj: {k_proj or 'not in the plan'}"):
        plan.find_linear("a.qkv_proj", ("q_proj", "k_proj"))


def test_find_experts() -> None:
    plan = Plan.parse({f"{EXPERTS}.{e}": MIXED for e in range(3)})
    assert plan.find_experts(EXPERTS, 3) == [ExpertSchemes(W3, W4)] * 3
    assert plan.find_experts("model.layers.1.mlp.experts", 3) is None
    with pytest.raises(PlanError, match=r"names 3 of the 4 experts of .* leaves out .*experts\.3; give it a scheme"):
        plan.find_experts(EXPERTS, 4)
    with pytest.raises(PlanError, match=r"names .*experts\.2, but the layer has 2 experts"):
        plan.find_experts(EXPERTS, 2)


def test_is_expert() -> None:
    assert is_expert(f"{EXPERTS}.12")
    assert not is_expert(EXPERTS)
    assert not is_expert(f"{EXPERTS}.12.gate_proj")
    assert not is_expert("model.layers.0.mlp.shared_expert.gate_proj")
