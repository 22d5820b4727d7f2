# SPDX-License-Identifier: Apache-2.0
"""The table of families: what checkpoints call their tensors, and what vLLM does with them.

Everything in which families differ stands here; `adapter.CheckpointFamily` reads it. Sources: names and shapes as in
the published checkpoints and in transformers' classes; fused layers as in `packed_modules_mapping` of vLLM's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_ext.compress.families.structure import Kind

#: Norms of a decoder layer, by what comes after them.
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True)
class Role:
    """What a linear of a decoder layer is.

    norm: the norm whose output it is given; None where it reads something inside of its block. writes: its output is
    added to the residual stream.
    """

    kind: Kind
    norm: str | None = None
    writes: bool = False


@dataclass(frozen=True)
class FamilyLayout:
    """One family. Paths are those of a checkpoint's decoder layer, without the layer's own prefix.

    name: for people. model_types: values of `model_type` in config.json. linears: by path, routers included. fused:
    sibling linears that vLLM fuses into one, which therefore need one scheme. linear_order: last parts of the paths of
    linears outside of the experts, in the order in which data passes them; those that share their input, and that
    vLLM fuses or which have no other scheme, stand together.
    experts: where the routed experts are, None for a dense model. projections: names of gate, up and down of an
    expert. expert_size: key of config.json with their intermediate size. renamed: {beginning of a path in the
    checkpoint: in transformers' decoder layer}, where they differ. kept: {path: why it stays as it is}. unread: keys of
    config.json that vLLM applies where they are true, and transformers' class does not.
    """

    name: str
    model_types: tuple[str, ...]
    linears: Mapping[str, Role]
    fused: tuple[tuple[str, ...], ...]
    linear_order: tuple[tuple[str, ...], ...]
    experts: str | None = None
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_size: str = "moe_intermediate_size"
    renamed: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def _attention() -> dict[str, Role]:
    readers = {f"self_attn.{name}_proj": Role(Kind.ATTENTION, ATTENTION_NORM) for name in "qkv"}
    return {**readers, "self_attn.o_proj": Role(Kind.ATTENTION, writes=True)}


def _mlp(path: str = "mlp") -> dict[str, Role]:
    """A gated MLP that every token passes: of a dense layer, or a shared expert."""
    return {
        f"{path}.gate_proj": Role(Kind.LINEAR, MLP_NORM),
        f"{path}.up_proj": Role(Kind.LINEAR, MLP_NORM),
        f"{path}.down_proj": Role(Kind.LINEAR, writes=True),
    }


def _router(path: str = "mlp.gate") -> dict[str, Role]:
    return {path: Role(Kind.ROUTER, MLP_NORM)}


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_EXPERTS = "mlp.experts"

_LATENT_ATTENTION = {
    # Either q_proj, or q_a_proj and q_b_proj.
    "self_attn.q_proj": Role(Kind.ATTENTION, ATTENTION_NORM),
    "self_attn.q_a_proj": Role(Kind.ATTENTION, ATTENTION_NORM),
    "self_attn.q_b_proj": Role(Kind.ATTENTION),
    "self_attn.kv_a_proj_with_mqa": Role(Kind.ATTENTION, ATTENTION_NORM),
    "self_attn.kv_b_proj": Role(Kind.OTHER),
    "self_attn.o_proj": Role(Kind.ATTENTION, writes=True),
}

LAYOUTS = (
    FamilyLayout(
        name="Qwen3-MoE",
        model_types=("qwen3_moe",),
        linears={**_attention(), **_mlp(), **_router()},
        fused=_FUSED,
        linear_order=_ORDER,
        experts=_EXPERTS,
    ),
    FamilyLayout(
        name="Qwen1.5-MoE, Qwen2-MoE",
        model_types=("qwen2_moe",),
        linears={
            **_attention(),
            **_mlp(),
            **_mlp("mlp.shared_expert"),
            **_router(),
            # Reads the stream like a router, and stays as it is; it decides how much, not where.
            "mlp.shared_expert_gate": Role(Kind.OTHER, MLP_NORM),
        },
        fused=_FUSED,
        linear_order=_ORDER,
        experts=_EXPERTS,
        kept={"mlp.shared_expert_gate": "it is one row that scales a whole expert"},
    ),
    FamilyLayout(
        name="Mixtral",
        model_types=("mixtral",),
        linears={**_attention(), **_router("block_sparse_moe.gate")},
        fused=_FUSED[:1],
        linear_order=_ORDER[:2],
        experts="block_sparse_moe.experts",
        projections=("w1", "w3", "w2"),
        expert_size="intermediate_size",
        renamed={"block_sparse_moe.": "mlp."},
    ),
    FamilyLayout(
        name="OLMoE",
        model_types=("olmoe",),
        linears={**_attention(), **_router()},
        fused=_FUSED[:1],
        linear_order=_ORDER[:2],
        experts=_EXPERTS,
        expert_size="intermediate_size",
    ),
    FamilyLayout(
        name="DeepSeek-V2",
        model_types=("deepseek_v2",),
        linears={**_LATENT_ATTENTION, **_mlp(), **_mlp("mlp.shared_experts"), **_router()},
        fused=(("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")),
        linear_order=(
            ("q_proj",),
            ("q_a_proj", "kv_a_proj_with_mqa"),
            ("q_b_proj",),
            ("o_proj",),
            ("gate_proj", "up_proj"),
            ("down_proj",),
        ),
        experts=_EXPERTS,
        kept={
            "self_attn.kv_b_proj": "vLLM's latent attention keeps a dequantized copy of it, so that quantizing it "
            "would cost accuracy and save no memory"
        },
        # No published DeepSeek-V2 sets it.
        unread=("norm_topk_prob",),
    ),
    FamilyLayout(
        name="Llama, Qwen2 and Qwen3 (dense)",
        model_types=("llama", "qwen2", "qwen3"),
        linears={**_attention(), **_mlp()},
        fused=_FUSED,
        linear_order=_ORDER,
    ),
)

#: {model_type: (family, why its experts cannot be computed)}; said by `quantize`, and by the engine before it loads.
REFUSED = {
    "gpt_oss": (
        "GPT-OSS",
        "its experts have biases and a clamped SwiGLU, which the mixed-precision kernels do not compute",
    ),
    "llama4": (
        "Llama 4",
        "its experts are stored transposed in one tensor, and their routing weights multiply the inputs",
    ),
    "llama4_text": (
        "Llama 4",
        "its experts are stored transposed in one tensor, and their routing weights multiply the inputs",
    ),
}


def find_reason_to_keep(name: str) -> str | None:
    """Why linear layers of this name, the last part of a path, stay unquantized in a family that has them, or None."""
    for layout in LAYOUTS:
        for path, reason in layout.kept.items():
            if path.rpartition(".")[2] == name:
                return reason
    return None


def describe_refusal(model_type: object) -> str | None:
    """The reason, for people, why a model type is refused by name; None where it is not."""
    found = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        return None
    name, reason = found
    return f"mxmoe does not support {name} (model_type {model_type!r}): {reason}; serve it without mxmoe"


def format_table() -> list[str]:
    """Lines of the table of families in docs/mxmoe.md."""
    header = ("family", "`model_type`", "`--bits` is the budget of", "`--plan` also names", "stays as it is")
    lines = ["| " + " | ".join((*header, "`--repair-router`")) + " |", "|---|---|---|---|---|---|"]
    for layout in LAYOUTS:
        roles = {path.rpartition(".")[2]: role.kind for path, role in layout.linears.items()}
        shared = [path.split(".")[1] for path in layout.linears if path.endswith(".gate_proj") and path.count(".") == 2]
        named = ["attention", *(["dense layers"] if "mlp.gate_proj" in layout.linears else []), *shared]
        kept = [name for name, kind in roles.items() if kind in (Kind.ROUTER, Kind.OTHER)]
        cells = (
            layout.name,
            ", ".join(layout.model_types),
            "attention and MLP linears" if layout.experts is None else "routed experts",
            "" if layout.experts is None else ", ".join(named),
            ", ".join(f"`{name}`" for name in kept),
            "no routers" if layout.experts is None else "yes",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
