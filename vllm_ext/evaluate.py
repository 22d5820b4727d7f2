# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext eval`: held-out perplexity through vLLM itself, so that what is served is what is measured."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_ext.compress.calibration import cut_windows, load_tokenizer
from vllm_ext.compress.progress import track
from vllm_ext.compress.windows import check_scoring, compute_perplexity
from vllm_ext.quantization.checkpoint import list_linears, read_config, validate_checkpoint
from vllm_ext.quantization.safetensors_io import CheckpointError, TensorReader

#: Windows handed to the engine at a time; it schedules them as it would those of as many clients.
BATCH_WINDOWS = 16


@dataclass(frozen=True)
class Evaluation:
    """perplexity over `tokens` predicted tokens; stored bytes of the checkpoint's tensors.

    quantized_bytes, bits_per_weight: of the weights that a packed checkpoint's plan quantizes, scales and zero
    points included; 0 and None for a checkpoint that is not packed.
    """

    perplexity: float
    tokens: int
    bits_per_weight: float | None
    quantized_bytes: int
    total_bytes: int


def evaluate_model(
    model: str | Path,
    text: str | Path,
    *,
    context: int = 512,
    windows: int | None = None,
    enforce_eager: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a model directory on a text file, from vLLM's `prompt_logprobs`.

    The text is cut into consecutive windows of `context` tokens; the first token of each is given and not scored.
    windows: how many to use, from the start; None for all. Starts an engine in this machine's default configuration;
    enforce_eager: without torch.compile.
    Raises ValueError for a text shorter than one window, a context of less than two tokens or of more than the model
    has room for, and (by its subclasses) for a directory that is not a usable checkpoint.
    """
    check_scoring(context, windows)
    directory = Path(model)
    if not directory.is_dir():
        raise CheckpointError(f"{model} is not a directory: give a local model directory, packed or not")
    check_context(read_config(directory), context)
    bits, quantized_bytes, total_bytes = measure_checkpoint(directory)
    cut = cut_windows(Path(text), load_tokenizer(directory), context)[:windows]

    from vllm import LLM

    engine = LLM(model=str(directory), max_model_len=context + 1, enforce_eager=enforce_eager)
    try:
        starts = range(0, len(cut), BATCH_WINDOWS)
        batches = track(list(starts), "perplexity", len(starts), progress)
        perplexity, tokens = compute_perplexity(
            logprob
            for start in batches
            for logprob in score_windows(engine, cut[start : start + BATCH_WINDOWS].tolist())
        )
    finally:
        engine.llm_engine.engine_core.shutdown()
    return Evaluation(perplexity, tokens, bits, quantized_bytes, total_bytes)


def check_context(config: Mapping[str, Any], context: int) -> None:
    """Raises ValueError for windows that the model of a config.json has no positions for.

    A model whose config.json does not say it plainly (no max_position_embeddings, or scaled positions) is left to
    vLLM's own check at start-up.
    """
    positions = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # The engine generates one token behind every window.
    if isinstance(positions, int) and "factor" not in scaling and context + 1 > positions:
        raise ValueError(
            f"context {context} is too large: the model has {positions} positions, one of them for the token that the "
            f"engine adds; give a context of at most {positions - 1}"
        )


def score_windows(engine: Any, windows: Sequence[Sequence[int]]) -> Iterator[float]:
    """Natural log probability of every token but each window's first, window after window. engine: vllm.LLM."""
    from vllm import SamplingParams

    # prompt_logprobs=0: only the prompt's own tokens, none of the alternatives.
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": list(window)} for window in windows]
    for window, output in zip(windows, engine.generate(prompts, sampling, use_tqdm=False), strict=True):
        for token, position in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            yield position[token].logprob


def measure_checkpoint(directory: Path) -> tuple[float | None, int, int]:
    """(true bits of the quantized weights, their bytes, bytes of all tensors) of a checkpoint, by its headers.

    Bits are None and bytes 0 for a checkpoint that mxmoe has not packed. Raises CheckpointError for one that is
    damaged or incomplete.
    """
    quantization = read_config(directory).get("quantization_config")
    total_bytes = sum(info.num_bytes for info in TensorReader(directory).infos.values())
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "mxmoe":
        return None, 0, total_bytes
    checkpoint = validate_checkpoint(directory)
    infos = checkpoint.reader.infos
    stored = weights = 0
    for module, schemes in checkpoint.plan.modules.items():
        for path, scheme in list_linears(module, schemes).items():
            if scheme.is_quantized:
                stored += sum(infos[f"{path}.{suffix}"].num_bytes for suffix in scheme.tensors)
                rows, packed = infos[f"{path}.qweight"].shape
                weights += rows * scheme.count_inputs(packed)
    return (8 * stored / weights if weights else None), stored, total_bytes


def run(options: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code."""
    # Read by vLLM when it is imported, here and in its child processes: stdout carries the result alone.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        result = evaluate_model(
            options.model,
            options.text,
            context=options.context,
            windows=options.windows,
            enforce_eager=options.enforce_eager,
            progress=True,
        )
    except (ValueError, OSError) as error:
        print(f"vllm-ext eval: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        # What vLLM raises when its engine dies; the reason is in the log it has written.
        print(f"vllm-ext eval: error: the engine failed ({error}); its log above says why", file=sys.stderr)
        return 1
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "perplexity", "tokens", "bits per weight", "quantized bytes", "total bytes")
    bits = "unquantized" if result.bits_per_weight is None else f"{result.bits_per_weight:.4f}"
    table.add_row(
        str(options.model),
        f"{result.perplexity:.4f}",
        f"{result.tokens:,}",
        bits,
        f"{result.quantized_bytes:,}",
        f"{result.total_bytes:,}",
    )
    Console().print(table)
    if options.json:
        print(json.dumps(asdict(result)))
    return 0
