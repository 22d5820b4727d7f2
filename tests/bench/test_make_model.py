# SPDX-License-Identifier: Apache-2.0
"""Made models have the names, shapes and sizes of real checkpoints. Serving them is tested with the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from bench.models.gptq import pack_linear, pack_words, unpack_linear, unpack_words
from bench.models.make_model import LOGITS_STD, TOKENIZER_DIRECTORY, WIDE, main, make_model

SMALL: dict[str, Any] = {"layers": 1, "hidden": 64, "heads": 2, "kv_heads": 1}


def read_shapes(directory: Path) -> dict[str, tuple[list[int], str]]:
    shapes = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                part = tensors.get_slice(name)
                shapes[name] = (part.get_shape(), part.get_dtype())
    return shapes


def test_import_is_light() -> None:
    code = (
        "import sys; import bench.models.make_model, bench.models.gptq, bench.models.train_tiny_moe;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'vllm') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_moe_has_per_expert_tensors(tmp_path: Path) -> None:
    make_model("tiny-qwen3-moe", tmp_path, **SMALL, head_dim=32, experts=3, moe_intermediate=48)
    shapes = read_shapes(tmp_path)
    for expert in range(3):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        assert shapes[f"{prefix}.gate_proj.weight"] == ([48, 64], "BF16")
        assert shapes[f"{prefix}.up_proj.weight"] == ([48, 64], "BF16")
        assert shapes[f"{prefix}.down_proj.weight"] == ([64, 48], "BF16")
    assert shapes["model.layers.0.mlp.gate.weight"][0] == [3, 64]
    assert shapes["lm_head.weight"][0] == [4096, 64]
    # 9 per expert and projection, router, 4 of attention, 2 norms of q and k, 2 of the layer; 3 of the model.
    assert len(shapes) == 9 + 1 + 4 + 2 + 2 + 3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_real_shapes_with_fewer_of_them(tmp_path: Path) -> None:
    # One layer of two experts and a small vocabulary; everything else as published.
    make_model("qwen3-30b-a3b", tmp_path / "a", layers=1, experts=2, experts_per_token=2, vocab=4096)
    shapes = read_shapes(tmp_path / "a")
    assert shapes["model.layers.0.mlp.experts.1.gate_proj.weight"][0] == [768, 2048]
    assert shapes["model.layers.0.self_attn.q_proj.weight"][0] == [4096, 2048]
    assert shapes["model.layers.0.self_attn.k_proj.weight"][0] == [512, 2048]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e6

    make_model("qwen1.5-moe-a2.7b", tmp_path / "b", layers=1, experts=4, hidden=256, vocab=4096)
    shapes = read_shapes(tmp_path / "b")
    assert shapes["model.layers.0.mlp.experts.3.down_proj.weight"][0] == [256, 1408]
    assert shapes["model.layers.0.mlp.shared_expert.gate_proj.weight"][0] == [5632, 256]
    assert shapes["model.layers.0.mlp.shared_expert_gate.weight"][0] == [1, 256]
    assert shapes["model.layers.0.self_attn.q_proj.bias"][0] == [256]


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("tiny-mixtral", "block_sparse_moe.experts.2.w2", [64, 48]),
        ("tiny-olmoe", "mlp.experts.2.down_proj", [64, 48]),
        ("tiny-qwen2-moe", "mlp.experts.2.down_proj", [64, 48]),
        ("tiny-deepseek-v2", "mlp.experts.2.down_proj", [64, 48]),
    ],
)
def test_overrides_have_one_name_in_every_family(tmp_path: Path, name: str, tensor: str, shape: list[int]) -> None:
    make_model(name, tmp_path, **{**SMALL, "layers": 2, "kv_heads": 2}, experts=3, moe_intermediate=48)
    shapes = read_shapes(tmp_path)
    assert shapes[f"model.layers.1.{tensor}.weight"][0] == shape
    assert not any(".experts.3." in path for path in shapes)


def test_tokenizer_covers_the_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_model("tiny-qwen3", tmp_path, **SMALL, vocab=5000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 5000
    text = "In the beginning God created <unused_4999> def f(x):\n    return x"
    ids = tokenizer.encode(text)
    assert max(ids) < 4096
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([4096, 4999]) == "<unused_4096><unused_4999>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hail"}], tokenize=False) == "Hail"


def test_logits_are_not_degenerate_and_seeded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = AutoModelForCausalLM.from_pretrained(make_model("tiny-llama", tmp_path / name, seed=seed))
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert logits[0].std().item() == pytest.approx(LOGITS_STD, rel=0.1)
    # Different contexts end in different tokens, and none simply repeats its input.
    best = logits[0].argmax(-1)
    assert best.unique().numel() > 60
    assert (best == ids).float().mean() < 0.1


def test_gptq_checkpoint_is_the_rounded_dense_model(tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    make_model("tiny-llama", dense, layers=1)
    make_model("tiny-llama-gptq", packed, layers=1, group_size=64)
    weights, tensors = load_file(dense / "model.safetensors"), load_file(packed / "model.safetensors")
    for projection, (N, K) in {"self_attn.k_proj": (128, 256), "mlp.down_proj": (256, 512)}.items():
        prefix = f"model.layers.0.{projection}."
        parts = {part: tensors[prefix + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
        shapes = {part: (list(value.shape), value.dtype) for part, value in parts.items()}
        assert shapes == {
            "qweight": ([K // 8, N], torch.int32),
            "qzeros": ([K // 64, N // 8], torch.int32),
            "scales": ([K // 64, N], torch.float16),
            "g_idx": ([K], torch.int32),
        }
        weight = weights[prefix + "weight"].float()
        step = parts["scales"].float().repeat_interleave(64, dim=0).t()
        # Half a step of rounding; the extremes may lose a little more to the rounding of the scale to fp16.
        assert ((unpack_linear(parts) - weight).abs() <= 0.51 * step).all()
        assert prefix + "weight" not in tensors
    assert torch.equal(tensors["lm_head.weight"], weights["lm_head.weight"])
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert quantization == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64,
        "sym": True, "desc_act": False, "lm_head": False,
    }  # fmt: skip


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=50)
def test_words_unpack_to_their_codes(rows: int, columns: int, seed: int, dim: int) -> None:
    shape = (rows * 8, columns) if dim == 0 else (rows, columns * 8)
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = pack_words(codes, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] * 8 == shape[dim]
    assert torch.equal(unpack_words(words, dim), codes)


def test_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.int32)
    assert pack_words(codes, 1).item() & 0xFFFFFFFF == 0xF7654321
    # A weight of zero is code 8; zero points are stored minus one.
    packed = pack_linear(torch.zeros(8, 32), 32)
    assert (packed["qweight"] == 0x88888888 - 2**32).all()
    assert (packed["qzeros"] == 0x77777777).all()
    assert torch.equal(unpack_linear(packed), torch.zeros(8, 32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny-lama", {}, r"unknown model 'tiny-lama' \(did you mean 'tiny-llama'\?\)"),
        ("tiny-llama", {"layer": 1}, r"unknown override 'layer' \(did you mean 'layers'\?\)"),
        ("tiny-llama", {"experts": 4}, "tiny-llama has no experts"),
        ("tiny-llama", {"layers": 0}, "layers must be at least 1, got 0"),
        ("tiny-llama", {"heads": 3}, r"heads \(3\) must be a multiple of kv_heads \(2\)"),
        ("tiny-llama", {"dtype": "int4"}, "unknown dtype 'int4'; known: bf16"),
        ("tiny-llama", {"vocab": 100, **SMALL}, "vocab 100 is smaller than the tokenizer's 4096"),
        ("tiny-llama-gptq", {"group_size": 96}, "group_size 96 does not fit hidden = 256"),
        ("tiny-qwen3-moe", {"experts": 1}, r"experts_per_token \(2\) is more than experts \(1\)"),
        ("qwen1.5-moe-a2.7b", {"hidden": 100}, r"hidden \(100\) must be a multiple of heads \(16\)"),
        ("qwen3-30b-a3b", {"layers": 1, "experts": 1_000_000}, r"GiB of weights.*--layers 2"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(name, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_used_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        make_model("tiny-llama", tmp_path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layers", "1", "--hidden", "64", "--kv-heads", "1", "--dtype", "fp16", "--seed", "3"]
    assert main(["tiny-llama", "-o", str(tmp_path / "m"), *arguments]) == 0
    assert "tiny-llama" in capsys.readouterr().out
    assert read_shapes(tmp_path / "m")["model.layers.0.self_attn.k_proj.weight"] == ([64, 64], "F16")
    assert main(["tiny-llama", "-o", str(tmp_path / "m")]) == 1
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["huge-llama", "-o", str(tmp_path / "n")])


def test_wider_experts_write_the_same_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = make_model(WIDE, tmp_path / "wide", moe_intermediate=320)
    weights = load_file(made / "model.safetensors")
    gate, down = (weights[f"model.layers.0.mlp.experts.3.{name}_proj.weight"] for name in ("gate", "down"))
    assert (tuple(gate.shape), tuple(down.shape)) == ((320, 256), (256, 320))
    # What is new is computed like the rest, and adds nothing.
    assert 0.5 < gate[128:].float().std() * 16 < 2
    assert not down[:, 128:].any()
    ids = torch.arange(3, 67).view(1, -1)
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (TOKENIZER_DIRECTORY, made)
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", [{}, {"moe_intermediate": 64}, {"moe_intermediate": 256, "layers": 2}])
def test_what_a_wide_model_does_not_take(tmp_path: Path, overrides: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="moe_intermediate"):
        make_model(WIDE, tmp_path, **overrides)
