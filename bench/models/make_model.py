# SPDX-License-Identifier: Apache-2.0
"""Random-weight models of real configuration classes, at real or reduced shapes, for tests and benchmarks.

    python -m bench.models.make_model tiny-qwen3-moe -o DIR
    python -m bench.models.make_model qwen3-30b-a3b -o DIR --layers 2
    python -m bench.models.make_model tiny-llama-gptq -o DIR --group-size 64
    python -m bench.models.make_model tiny-moe-wide -o DIR --moe-intermediate 2048

The result is a normal Hugging Face directory: per-expert tensors under their usual names, and the tokenizer and chat
template of the shipped small MoE, its vocabulary filled up with unused tokens to the model's. `tiny-moe-wide` alone is
not random: it is the shipped MoE with wider experts (`bench.models.wide_moe`).
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

TOKENIZER_DIRECTORY = Path(__file__).parent / "tiny_moe"
#: The shipped MoE with wider experts.
WIDE = "tiny-moe-wide"

#: Standard deviation of the logits. 2 keeps the likeliest token clear of rounding noise and the distribution broad.
LOGITS_STD = 2.0
#: Of the biases, where an architecture has them; zeros would hide a bias that is not applied.
BIAS_STD = 0.1
#: Share of the available memory that a model may take while it is made; saving holds parts of it twice.
MEMORY_SHARE = 0.6

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

#: Names of the overrides, on the command line and in `make_model`: (configuration attribute, help).
OVERRIDES = {
    "layers": ("num_hidden_layers", "number of layers"),
    "hidden": ("hidden_size", "hidden size"),
    "heads": ("num_attention_heads", "attention heads"),
    "kv_heads": ("num_key_value_heads", "key and value heads"),
    "head_dim": ("head_dim", "size of an attention head"),
    "intermediate": ("intermediate_size", "intermediate size of dense layers"),
    "experts": ("num_experts", "routed experts of a layer"),
    "experts_per_token": ("num_experts_per_tok", "experts a token is routed to"),
    "moe_intermediate": ("moe_intermediate_size", "intermediate size of an expert"),
    "shared_intermediate": ("shared_expert_intermediate_size", "intermediate size of the shared expert"),
    "vocab": ("vocab_size", "vocabulary"),
    "context": ("max_position_embeddings", "longest context"),
}


#: What other configuration classes call an attribute of OVERRIDES.
OTHER_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": ("intermediate_size",),
}


@dataclass(frozen=True)
class Preset:
    """A transformers configuration class with its values; `quantization` is None or "gptq"."""

    config_class: str
    model_class: str
    values: Mapping[str, Any]
    quantization: str | None = None


_TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
#: The same without a size of heads of its own: for classes that derive it.
_TINY_DERIVED = {key: value for key, value in _TINY.items() if key != "head_dim"}
_TINY_LLAMA = Preset("LlamaConfig", "LlamaForCausalLM", _TINY)

_TINY_DEEPSEEK = {
    **_TINY_DERIVED,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "routed_scaling_factor": 1.5,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
}

PRESETS: dict[str, Preset] = {
    "tiny-llama": _TINY_LLAMA,
    "tiny-llama-gptq": Preset(_TINY_LLAMA.config_class, _TINY_LLAMA.model_class, _TINY, quantization="gptq"),
    "tiny-qwen3": Preset("Qwen3Config", "Qwen3ForCausalLM", _TINY),
    "tiny-qwen3-moe": Preset(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_TINY, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    # q, k and v have biases here, and heads no norms.
    "tiny-qwen2": Preset("Qwen2Config", "Qwen2ForCausalLM", _TINY_DERIVED),
    # The first layer dense; a shared expert with a gate of its own.
    "tiny-qwen2-moe": Preset(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_TINY_DERIVED,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
        },
    ),
    "tiny-mixtral": Preset(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_TINY_DERIVED, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # Norms over all heads of q and of k together.
    "tiny-olmoe": Preset(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {**_TINY_DERIVED, "intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    # Latent attention at the sizes that kernels are made for, a dense first layer, two shared experts.
    "tiny-deepseek-v2": Preset("DeepseekV2Config", "DeepseekV2ForCausalLM", _TINY_DEEPSEEK),
    # With the low-rank queries and the grouped choice of experts of the large DeepSeek-V2.
    "tiny-deepseek-v2-grouped": Preset(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_TINY_DEEPSEEK, "q_lora_rank": 128, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    # Values of the config.json of Qwen/Qwen3-30B-A3B.
    "qwen3-30b-a3b": Preset(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
    ),
    # Values of the config.json of Qwen/Qwen1.5-MoE-A2.7B: a shared expert and biases on q, k and v.
    "qwen1.5-moe-a2.7b": Preset(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
        },
    ),
}


#: All models that `make_model` makes.
NAMES = (*PRESETS, WIDE)


def make_model(
    name: str,
    output_dir: str | Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    group_size: int = 128,
    **overrides: int,
) -> Path:
    """Write a random model into an empty or new directory, and return the directory.

    name: a key of PRESETS, or WIDE with `moe_intermediate` alone. dtype: a key of DTYPES. overrides: keys of OVERRIDES,
    for example `layers=2`.
    group_size: weights along K that share a scale, for GPTQ presets. One seed gives one model on one version of torch.
    Linear weights have standard deviation 1/sqrt(fan-in), so activations keep their size through the layers, and
    logits have standard deviation LOGITS_STD.
    Raises ValueError, naming value and fix, for an unknown name or override, shapes that do not fit together,
    a directory that holds files, and a model larger than the machine's memory allows.
    """
    if name == WIDE:
        return _make_wide(Path(output_dir), dtype, seed, overrides)
    preset = PRESETS.get(name)
    if preset is None:
        raise ValueError(f"unknown model {name!r}{_nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    values = _apply_overrides(name, preset.values, overrides)
    output = Path(output_dir)
    _check_empty(output)

    tokenizer = extend_tokenizer(values["vocab_size"])

    import torch
    import transformers

    torch_dtype: torch.dtype = getattr(torch, DTYPES[dtype])
    config: PreTrainedConfig = getattr(transformers, preset.config_class)(
        **values, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    if preset.quantization == "gptq":
        _check_gptq_shapes(config, group_size)
    with torch.device("meta"):
        model = getattr(transformers, preset.model_class)(config).to(torch_dtype)
    _check_memory(name, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.to_empty(device="cpu")
    fill_weights(model, seed)

    output.mkdir(parents=True, exist_ok=True)
    (output / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for file_name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER_DIRECTORY / file_name, output / file_name)
    # save_pretrained splits the fused experts of transformers 5 into one tensor per expert and projection.
    model.save_pretrained(output)
    if preset.quantization == "gptq":
        from bench.models.gptq import quantize_directory

        quantize_directory(output, group_size)
    return output


def _make_wide(output: Path, dtype: str, seed: int, overrides: Mapping[str, int]) -> Path:
    if set(overrides) != {"moe_intermediate"} or dtype != "bf16":
        raise ValueError(f"{WIDE} takes moe_intermediate and nothing else, and is bf16")
    _check_empty(output)
    from bench.models.wide_moe import measure_weights, widen_experts

    _check_memory(WIDE, measure_weights(TOKENIZER_DIRECTORY, overrides["moe_intermediate"]))
    return widen_experts(TOKENIZER_DIRECTORY, output, overrides["moe_intermediate"], seed)


def _check_empty(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give a new directory")


def fill_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter: norms are ones, embeddings standard normal, the rest as `make_model` says."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, BIAS_STD, generator=generator)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                scale = LOGITS_STD if "lm_head" in name else 1.0
                # The last dimension is the input's, also of the fused experts [experts, out, in].
                parameter.normal_(0.0, scale / math.sqrt(parameter.shape[-1]), generator=generator)


def extend_tokenizer(vocab_size: int) -> dict[str, Any]:
    """The shipped tokenizer.json, with tokens up to `vocab_size` added that no text becomes.

    With them every id that a random model samples can be turned into text.
    Raises ValueError for a vocabulary smaller than the tokenizer's.
    """
    tokenizer = json.loads((TOKENIZER_DIRECTORY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    if vocab_size < len(vocab):
        raise ValueError(f"vocab {vocab_size} is smaller than the tokenizer's {len(vocab)}; give at least {len(vocab)}")
    # No merge leads to these entries of the byte-pair encoder.
    vocab.update({f"<unused_{index}>": index for index in range(len(vocab), vocab_size)})
    return tokenizer


def _apply_overrides(name: str, values: Mapping[str, Any], overrides: Mapping[str, int]) -> dict[str, Any]:
    result = dict(values)
    for key, value in overrides.items():
        if key not in OVERRIDES:
            raise ValueError(f"unknown override {key!r}{_nearest(key, OVERRIDES)}; known: {', '.join(OVERRIDES)}")
        attribute = _find_attribute(OVERRIDES[key][0], values)
        # head_dim follows from hidden and heads where a preset does not give it.
        if attribute not in values and attribute != "head_dim":
            raise ValueError(f"{name} has no {key} ({attribute}); leave it out")
        if value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
        result[attribute] = value
    heads, kv_heads = result["num_attention_heads"], result["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if "head_dim" not in result and result["hidden_size"] % heads:
        raise ValueError(f"hidden ({result['hidden_size']}) must be a multiple of heads ({heads}), or give head_dim")
    experts = result.get(_find_attribute("num_experts", result), 0)
    chosen = result.get("num_experts_per_tok", 0)
    if chosen > experts:
        raise ValueError(f"experts_per_token ({chosen}) is more than experts ({experts})")
    return result


def _find_attribute(attribute: str, values: Mapping[str, Any]) -> str:
    """What this configuration calls an attribute of OVERRIDES."""
    if attribute in values or "num_experts_per_tok" not in values:
        return attribute
    return next((other for other in OTHER_NAMES.get(attribute, ()) if other in values), attribute)


def _check_gptq_shapes(config: Any, group_size: int) -> None:
    inputs = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    for label, size in inputs.items():
        if group_size < 32 or size % group_size:
            raise ValueError(
                f"group_size {group_size} does not fit {label} = {size}: it must be at least 32 and divide it"
            )


def _check_memory(name: str, num_bytes: int) -> None:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        # Free pages alone leave out the page cache, which gives way.
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    if num_bytes > MEMORY_SHARE * available:
        raise ValueError(
            f"{name} at these shapes has {num_bytes / 2**30:.1f} GiB of weights, too much for the "
            f"{available / 2**30:.1f} GiB of memory available; give fewer layers, for example --layers 2"
        )


def _nearest(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the directory and its size. Exit codes: 0 ok, 1 failed, 2 bad usage."""
    parser = argparse.ArgumentParser(description="Write a model.")
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="new or empty directory")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=128, help="of GPTQ presets")
    for key, (_, help_text) in OVERRIDES.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, metavar="N", help=help_text)
    options = parser.parse_args(argv)
    given = {key: value for key in OVERRIDES if (value := getattr(options, key)) is not None}
    try:
        output = make_model(
            options.name,
            options.output,
            dtype=options.dtype,
            seed=options.seed,
            group_size=options.group_size,
            **given,
        )
    except ValueError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output}: {options.name}, {size / 2**20:.1f} MiB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
