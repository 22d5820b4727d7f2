# SPDX-License-Identifier: Apache-2.0
"""How the shipped small MoE is made: `prepare` turns texts into tokens, `train` trains on them. CPU or GPU.

    apt-get install bible-kjv
    echo "gen1:1-rev22:21" | bible -f > kjv.txt          # lines such as "Ge1:1 In the beginning ..."
    python -m bench.models.train_tiny_moe prepare --kjv kjv.txt -o data
    python -m bench.models.train_tiny_moe train --data data -o model

`prepare` splits each domain by document (a chapter, a source file), trains the tokenizer on the training part, and
writes `{kjv,py}_{train,val}.npy` (token ids), `{kjv,py}_{train,val}.txt` (calibration and held-out text) and the
tokenizer. On the library of Python 3.11.7 it gives the shipped texts and tokenizer byte for byte, but for the path in
one `#!` line. `train` writes a Hugging Face model directory. Interrupted or stopped by `--minutes`, it goes on from its
checkpoint when it is run again. 1,631 steps take about 70 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Qwen3MoeForCausalLM

DOMAINS = ("kjv", "py")
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD_ID, BOS_ID, EOS_ID = range(3)
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"

VALIDATION_SHARE = 0.06
#: Characters of training text kept for calibration.
CALIBRATION_CHARACTERS = 700_000

#: Parts of the library that are tables, tests or generated text rather than ordinary source.
SKIPPED_SOURCES = ("/site-packages/", "/test", "/idlelib/", "lib2to3", "/encodings/", "pydoc_data", "turtledemo")
SOURCE_BYTES = range(2_001, 200_000)

ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
BATCH_SIZE = 24
SEQUENCE_LENGTH = 256
#: Share of the sequences that are Python; the rest is English.
PYTHON_SHARE = 0.55
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE_SHARE = 0.05
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
VALIDATION_SEQUENCES = 96


def read_bible(path: Path) -> list[str]:
    """Chapters, in order, from lines "Ge1:1 In the beginning ...". Raises ValueError when there are none."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if re.match(r"^[0-9A-Z][A-Za-z0-9]*\d+:\d+ ", line):
            reference, verse = line.split(" ", 1)
            chapters.setdefault(reference.split(":")[0], []).append(verse)
    if not chapters:
        raise ValueError(f'{path} has no line such as "Ge1:1 In the beginning ..."; see the top of this script')
    return [" ".join(verses) for verses in chapters.values()]


def read_sources(root: Path) -> list[str]:
    """Python files under `root` in sorted order. Raises ValueError when none fits."""
    sources = []
    for path in sorted(root.rglob("*.py"), key=str):
        relative = f"/{path.relative_to(root)}"
        if not any(part in relative for part in SKIPPED_SOURCES) and path.stat().st_size in SOURCE_BYTES:
            sources.append(path.read_text(encoding="utf-8", errors="ignore"))
    if not sources:
        raise ValueError(f"{root} holds no Python file of {SOURCE_BYTES.start} to {SOURCE_BYTES.stop - 1} bytes")
    return sources


def split_documents(documents: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Training and validation documents. Raises ValueError when there are too few to hold one out."""
    held_out = int(len(documents) * VALIDATION_SHARE)
    if held_out == 0:
        raise ValueError(f"{len(documents)} documents are too few to hold {VALIDATION_SHARE:.0%} of them out")
    order = list(range(len(documents)))
    rng.shuffle(order)
    return [documents[i] for i in order[held_out:]], [documents[i] for i in order[:held_out]]


def prepare(kjv: Path, python_root: Path, output: Path, vocab_size: int, seed: int) -> None:
    """Write tokens, texts and tokenizer into `output`. Raises ValueError for texts that cannot be used."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    parts: dict[str, list[str]] = {}
    for domain, documents in zip(DOMAINS, (read_bible(kjv), read_sources(python_root)), strict=True):
        parts[f"{domain}_train"], parts[f"{domain}_val"] = split_documents(documents, rng)
    report(f"prepare: {', '.join(f'{name} {len(docs)} documents' for name, docs in parts.items())}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts["kjv_train"] + parts["py_train"], trainer)
    output.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD_ID],
        bos_token=SPECIAL_TOKENS[BOS_ID],
        eos_token=SPECIAL_TOKENS[EOS_ID],
        model_max_length=2048,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(output)

    for name, documents in parts.items():
        ids = [token for document in documents for token in (BOS_ID, *tokenizer.encode(document).ids, EOS_ID)]
        np.save(output / f"{name}.npy", np.array(ids, dtype=np.uint16))
        text = "\n\n".join(documents)
        (output / f"{name}.txt").write_text(
            text[:CALIBRATION_CHARACTERS] if name.endswith("train") else text, encoding="utf-8"
        )
        report(f"prepare: {name} {len(ids)} tokens of {len(text) / len(ids):.2f} characters")


def build_model(vocab_size: int) -> Qwen3MoeForCausalLM:
    """The architecture of the shipped model, with transformers' own initial weights, in float32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **ARCHITECTURE,
        vocab_size=vocab_size,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        # The auxiliary loss spreads tokens over experts; small, so that each domain keeps favourites.
        router_aux_loss_coef=0.002,
        output_router_logits=True,
    )
    model = Qwen3MoeForCausalLM(config)
    # On a CPU a loop over experts is the fastest of transformers' implementations at these sizes.
    model.set_experts_implementation("eager")
    return model


def sample_batch(tokens: dict[str, np.ndarray], step: int, seed: int) -> torch.Tensor:
    """Random slices, int64 [BATCH_SIZE, SEQUENCE_LENGTH]; a function of seed and step alone, so runs can resume."""
    import numpy as np
    import torch

    rng = np.random.default_rng((seed, step))
    rows = []
    for _ in range(BATCH_SIZE):
        source = tokens[DOMAINS[int(rng.random() < PYTHON_SHARE)]]
        start = rng.integers(0, len(source) - SEQUENCE_LENGTH)
        rows.append(source[start : start + SEQUENCE_LENGTH].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to FINAL_LEARNING_RATE_SHARE of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    decay = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def validate(model: Qwen3MoeForCausalLM, tokens: dict[str, np.ndarray], device: str) -> dict[str, float]:
    """Perplexity of each domain over the first slices of its validation tokens."""
    import numpy as np
    import torch

    model.eval()
    result = {}
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for domain, ids in tokens.items():
            count = min(len(ids) // SEQUENCE_LENGTH, VALIDATION_SEQUENCES)
            slices = torch.from_numpy(ids[: count * SEQUENCE_LENGTH].astype(np.int64)).view(count, -1).to(device)
            losses = [
                model(input_ids=batch, labels=batch, output_router_logits=False).loss.item() * len(batch)
                for batch in slices.split(BATCH_SIZE)
            ]
            result[domain] = math.exp(sum(losses) / count)
    model.train()
    return result


def save_checkpoint(
    directory: Path, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, step: int, settings: dict[str, int]
) -> None:
    """Weights and optimizer state, replaced in one move, so that a kill leaves the old or the new one."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}::{key}"] = value
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    temporary = directory / "checkpoint.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    temporary.replace(directory / "checkpoint.safetensors")


def load_checkpoint(
    directory: Path, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, settings: dict[str, int]
) -> int:
    """Restore what `save_checkpoint` wrote, and return its step; 0 where there is none.

    Raises ValueError when the checkpoint was made with other settings.
    """
    import torch
    from safetensors import safe_open

    path = directory / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as stored, torch.no_grad():
        metadata = stored.metadata()
        if json.loads(metadata["settings"]) != settings:
            raise ValueError(
                f"{path} was made with {metadata['settings']}, this run has {json.dumps(settings)}; "
                "give the same, or another output directory"
            )
        names = list(stored.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.get_tensor(name))
            keys = [key.partition("::")[2] for key in names if key.startswith(f"{name}::")]
            optimizer.state[parameter] = {
                # AdamW counts steps on the CPU, its moments lie with the parameter.
                key: value if (value := stored.get_tensor(f"{name}::{key}")).dim() == 0 else value.to(parameter.device)
                for key in keys
            }
    return int(metadata["step"])


def train(data: Path, output: Path, steps: int, minutes: float | None, seed: int, device: str) -> bool:
    """Train to `steps`, or for `minutes`, and write the model; returns whether all steps are done.

    Raises ValueError for missing or too short data, and for a checkpoint with other settings.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    tokens = {}
    for name in (f"{domain}_{part}" for domain in DOMAINS for part in ("train", "val")):
        path = data / f"{name}.npy"
        if not path.is_file():
            raise ValueError(f"{path} is missing; run `prepare -o {data}` first")
        tokens[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(tokens[name]) <= SEQUENCE_LENGTH:
            raise ValueError(f"{path} has {len(tokens[name])} tokens; training needs more than {SEQUENCE_LENGTH}")
    training = {domain: tokens[f"{domain}_train"] for domain in DOMAINS}
    validation = {domain: tokens[f"{domain}_val"] for domain in DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(data)

    torch.manual_seed(seed)
    model = build_model(len(tokenizer)).to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    output.mkdir(parents=True, exist_ok=True)
    settings = {"steps": steps, "seed": seed, "vocab_size": len(tokenizer)}
    first = load_checkpoint(output, model, optimizer, settings)
    count = sum(p.numel() for p in model.parameters())
    report(f"train: {count / 1e6:.1f} M parameters, step {first} of {steps}, on {device}")

    began = saved = time.monotonic()
    step = first
    while step < steps and (minutes is None or time.monotonic() - began < 60 * minutes):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = sample_batch(training, step, seed).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            speed = (step - first) * BATCH_SIZE * SEQUENCE_LENGTH / (time.monotonic() - began)
            report(f"train: step {step} of {steps}, loss {loss.item():.3f}, {speed:.0f} tokens/s")
        if time.monotonic() - saved > 600:
            save_checkpoint(output, model, optimizer, step, settings)
            report(f"train: checkpoint, perplexity {format_perplexities(validate(model, validation, device))}")
            saved = time.monotonic()

    save_checkpoint(output, model, optimizer, step, settings)
    report(f"train: step {step} of {steps}, perplexity {format_perplexities(validate(model, validation, device))}")
    # Served models need no auxiliary loss.
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    if step < steps:
        report(f"train: stopped after {minutes} minutes; the same command goes on from step {step}")
    return step == steps


def format_perplexities(values: dict[str, float]) -> str:
    """For example "kjv 24.1, py 27.9"."""
    return ", ".join(f"{domain} {value:.1f}" for domain, value in values.items())


def report(message: str) -> None:
    """One line of progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit codes: 0 ok, 1 failed, 2 bad usage."""
    parser = argparse.ArgumentParser(description="Make the shipped small MoE.")
    commands = parser.add_subparsers(dest="command", required=True)
    preparation = commands.add_parser("prepare", help="texts to tokens and tokenizer")
    preparation.add_argument("--kjv", required=True, type=Path, help="King James Bible, one verse a line")
    preparation.add_argument(
        "--python-root", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="directory of Python sources"
    )
    preparation.add_argument("--vocab-size", type=int, default=4096)
    preparation.add_argument("-o", "--output", required=True, type=Path)
    preparation.add_argument("--seed", type=int, default=0)
    training = commands.add_parser("train", help="train on what prepare wrote")
    training.add_argument("--data", required=True, type=Path, help="output directory of prepare")
    training.add_argument("-o", "--output", required=True, type=Path, help="model and checkpoint directory")
    training.add_argument("--steps", type=int, default=1631)
    training.add_argument("--minutes", type=float, help="stop after this time; run again to go on")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    try:
        if options.command == "prepare":
            prepare(options.kjv, options.python_root, options.output, options.vocab_size, options.seed)
        else:
            train(options.data, options.output, options.steps, options.minutes, options.seed, options.device)
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
