# SPDX-License-Identifier: Apache-2.0
"""A small model trained to find a passkey, and the prompts that ask it for one.

    python -m bench.quality.passkey -o DIR [--steps N]

A prompt is noise, tokens of which none repeats, with a key somewhere: no token of a key differs from noise, only its
place does. It ends with the token before the key, and the answer is the key, token by token:

    n n n n n n [name k1 k2 k3 k4] n n n ... n n n [name] -> k1 k2 k3 k4

So every token of the answer needs one token among hundreds, far outside of any window, and its neighbour. Two layers
learn that: one marks every token with the one before it, the other finds what follows the current one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: The model as this program trained it: it takes twenty minutes, and is the same on one machine only.
RETRIEVER = Path(__file__).parent.parent / "models" / "passkey"
VOCABULARY = 512
#: Tokens below this are never noise.
FIRST_TOKEN = 8
KEY_TOKENS = 4
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
#: Training: (share of the steps, longest part that is repeated). A sequence is a part twice, or noise and a part of it.
STAGES = ((0.4, 32), (0.3, 80), (0.3, 200))
STEPS = 2000
TOKENS_PER_STEP = 4096
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 50


def draw_noise(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens int64 [count, length], none twice in a row."""
    return torch.rand(count, VOCABULARY - FIRST_TOKEN, generator=generator).argsort(-1)[:, :length] + FIRST_TOKEN


def draw_repetitions(longest: int, generator: torch.Generator) -> torch.Tensor:
    """Training sequences int64 [rows, tokens]: noise, then all of it again."""
    length = int(torch.randint(longest // 2, longest + 1, (1,), generator=generator))
    noise = draw_noise(max(1, TOKENS_PER_STEP // (2 * length)), length, generator)
    # The second time begins anywhere, so that what counts is content and not distance.
    start = torch.randint(0, length, (len(noise), 1), generator=generator)
    return torch.cat([noise, noise.gather(1, (start + torch.arange(length)) % length)], 1)


def train_model(folder: Path, steps: int = STEPS, seed: int = 0, progress: bool = False) -> Path:
    """Train and save a model directory, the same for one seed on one machine; a directory that is there is kept."""
    if folder.is_dir():
        return folder
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * rate
        tokens = draw_repetitions(find_stage(step / steps), generator)
        half = tokens.shape[1] // 2
        logits = model(input_ids=tokens, use_cache=False).logits[:, half:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, half + 1 :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress and step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    partial = folder.with_name(f".{folder.name}")
    model.bfloat16().save_pretrained(partial)
    partial.rename(folder)
    return folder


def find_stage(share: float) -> int:
    """Longest repeated part after a share of the steps."""
    for part, longest in STAGES:
        if share < part:
            return longest
        share -= part
    return STAGES[-1][1]


def make_prompts(count: int, length: int, seed: int, window: int = 128) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts of `length` tokens, keys). A key lies anywhere before the last `window` tokens but the first eight."""
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(count, length - 1, generator)
    place = torch.randint(8, length - window - KEY_TOKENS - 2, (count, 1), generator=generator)
    keys = noise.gather(1, place + 1 + torch.arange(KEY_TOKENS))
    return torch.cat([noise, noise.gather(1, place)], 1).tolist(), keys.tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and say how many keys the model finds without a cache."""
    parser = argparse.ArgumentParser(description="Train the retriever of passkeys.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=400, help="tokens of the prompts that are asked")
    options = parser.parse_args(argv)
    folder = train_model(options.output, options.steps, progress=True)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts, keys = make_prompts(64, options.length, seed=1)
    out = model.generate(torch.tensor(prompts), max_new_tokens=KEY_TOKENS, do_sample=False, pad_token_id=0)
    found = (out[:, options.length :] == torch.tensor(keys)).all(1)
    print(f"{int(found.sum())} of {len(found)} keys found in prompts of {options.length} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
