# SPDX-License-Identifier: Apache-2.0
"""Quality of quantized KV caches, in the engine: perplexity, planted outliers, and keys found in long prompts.

    python -m bench.quality.kv_cache [text] [planted] [passkey] [--arms NAME...] [--quick] [--work DIR] [--out DIR]

    text      perplexity of the shipped model on its held-out texts, all of them: prompts of 256 tokens, as long as
              those it was trained on, and a window of 32; with the standard error over prompts. The arm past_dropped,
              window and sinks alone, says whether a text can judge a cache: a loss below 2 % says no
    planted   mean KL divergence from bf16 on a random model whose keys have planted outliers and biases, and the error
              of its layers' attention output (computed without an engine, on the same tokens)
    passkey   share of keys that a small model trained to find them (bench/models/passkey) still finds, in prompts of
              400 tokens, where no key is in the window

Every arm is an engine of its own, one after the other; its result becomes a record in the case kv_TABLE. Beside the
presets run stock's fp8, plans of one scheme, two bits without what the presets add, and calibrated presets. --arms
takes some of them, and bf16, which they are compared with. --work keeps the model with planted outliers.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.kv_dropped import LEAST_LOSS, answer_dropped, measure_loss
from bench.quality.kv_engine import STOCK, Arm, answer, score_tokens, score_vocabulary, start_engine
from bench.quality.kv_models import NAIVE, draw_tokens, make_planted_model
from bench.quality.passkey import KEY_TOKENS, RETRIEVER, make_prompts
from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, write_record

MODEL = ROOT / "bench" / "models" / "tiny_moe"
TEXTS = {"kjv": "kjv_val.txt", "py": "py_val.txt"}
TEXT_TOKENS, TEXT_WINDOW = 256, 32
#: What a cache of the shipped model is calibrated on, as with `vllm-ext calibrate-kv`.
TRAINING_TEXTS = ("kjv_train.txt", "py_train.txt")
PLANTED_TOKENS, PLANTED_SEED, GROUP_SIZE = 400, 7, 32
#: Positions from here on have most of their context quantized.
PLANTED_FIRST = 200
PASSKEY_TOKENS = 400
#: Keys lie before the last tokens: the presets' window, and what per-channel keys of a group add to it.
PASSKEY_WINDOW = 160
#: Prompts on which caches of the retriever are calibrated, and their seed, another one than that of those it is asked.
PASSKEY_CALIBRATION, PASSKEY_HELD_OUT, PASSKEY_SEED = 12, 4, 99

#: `kv_models.NAIVE` in an engine.
NAIVE_ARM = Arm(NAIVE.name, "skvq_k2v2", {"window": 0, "sinks": 0, "clip": 1.0})
NO_WINDOW = Arm("skvq_k2v2_no_window", "skvq_k2v2", {"window": 0, "sinks": 0})
#: How far bf16 differs from itself when a prompt is cut into other chunks: no cache can be nearer.
OTHER_CHUNKS = Arm("bf16_other_chunks", None, {}, {"max_num_batched_tokens": 64})
#: Stock's own quantized cache.
FP8 = Arm("fp8", "fp8")
DROPPED = "past_dropped"
#: Of the k<bits>v<bits> presets, given to every layer of a plan: more bits for keys than for values.
PLANS = ("k4v15", "k3v2")


#: Of the arms that a table has, those that were asked for.
Pick = Callable[[Sequence[Arm]], list[Arm]]


def list_presets(**block: Any) -> list[Arm]:
    """Every name of the pack, and the plans, with the block's settings; presets without a window stay without."""
    from vllm_ext.config import KV_CACHE_DTYPES
    from vllm_ext.kv_cache.presets import PLAN_NAME, PRESETS

    without = {name for name, preset in PRESETS.items() if preset.window == 0}
    plans = [Arm(name, PLAN_NAME, {"layer_bits": {"default": name}, **block}) for name in PLANS]
    return [Arm(name, name, {} if name in without else block) for name in KV_CACHE_DTYPES] + plans


def measure_text(work: Path, size: int, record: Callable[..., None], pick: Pick) -> None:
    """Perplexity of both texts."""
    from vllm_ext.compress.calibration import cut_windows, load_tokenizer
    from vllm_ext.kv_cache.calibrate import NUM_WINDOWS, calibrate_model, load_task
    from vllm_ext.kv_cache.presets import PRESETS

    tokenizer = load_tokenizer(MODEL)
    prompts = {name: cut_windows(MODEL / file, tokenizer, TEXT_TOKENS)[:size].tolist() for name, file in TEXTS.items()}
    counts = {name: len(some) for name, some in prompts.items()}
    settings = {"tokens": TEXT_TOKENS, "prompts": counts, "window": TEXT_WINDOW, "least_loss": LEAST_LOSS}
    preset = replace(PRESETS["skvq_k2v2"], window=TEXT_WINDOW)
    if pick([Arm(DROPPED)]):
        dropped = {f"worse_{name}": 100 * (measure_loss(MODEL, some, preset) - 1) for name, some in prompts.items()}
        record(Arm(DROPPED), {name: Metric(worse, "%") for name, worse in dropped.items()}, settings)
    short = list_presets(window=TEXT_WINDOW)
    path = work / "skvq_k2v2_text.safetensors"
    calibrated = Arm("skvq_k2v2_calibrated", "skvq_k2v2", {"window": TEXT_WINDOW, "calibration": str(path)})
    if pick([calibrated]):
        path.unlink(missing_ok=True)
        texts = [MODEL / file for file in TRAINING_TEXTS]
        task = load_task(MODEL, texts, seed=0, context=TEXT_TOKENS, num_windows=NUM_WINDOWS)
        calibrate_model(task, preset, path)
    plain: dict[str, np.ndarray] = {}
    for arm in pick([Arm(STOCK), OTHER_CHUNKS, FP8, NAIVE_ARM, NO_WINDOW, *short, calibrated]):
        metrics: dict[str, Metric] = {}
        with start_engine(MODEL, arm) as llm:
            for name, some in prompts.items():
                # Of each prompt, nats a token.
                losses = -score_tokens(llm, some).reshape(len(some), -1).mean(1)
                more = losses - plain.setdefault(name, losses)
                metrics |= {
                    f"perplexity_{name}": Metric(math.exp(losses.mean()), ""),
                    f"worse_{name}": Metric(100 * math.expm1(more.mean()), "%"),
                    f"error_{name}": Metric(100 * float(more.std(ddof=1)) / len(some) ** 0.5, "%"),
                }
        record(arm, metrics, settings)


def measure_planted(work: Path, size: int, record: Callable[..., None], pick: Pick) -> None:
    """Divergence from bf16, and error of attention."""
    model = make_planted_model(work / "planted")
    prompts = draw_tokens(size, PLANTED_TOKENS, 4096, PLANTED_SEED)
    errors, calibrated = measure_attention(model, prompts, work)
    grouped = Arm("skvq_k2v2_g32", "skvq_k2v2", {"group_size": GROUP_SIZE})
    plain = None
    for arm in pick([Arm(STOCK), OTHER_CHUNKS, FP8, NAIVE_ARM, NO_WINDOW, *list_presets(), grouped, *calibrated]):
        with start_engine(model, arm) as llm:
            rows = score_vocabulary(llm, prompts, PLANTED_FIRST).astype(np.float64)
        plain = rows if plain is None else plain
        divergence = float((np.exp(plain) * (plain - rows)).sum(-1).mean())
        agreement = float((plain.argmax(-1) == rows.argmax(-1)).mean())
        metrics = {"divergence": Metric(1e3 * divergence, "mnats"), "same_token": Metric(100 * agreement, "%")}
        if arm.name in errors:
            metrics["attention_error"] = Metric(100 * errors[arm.name], "%")
        record(arm, metrics, {"tokens": PLANTED_TOKENS, "prompts": size, "first": PLANTED_FIRST})


def measure_attention(model: Path, prompts: list[list[int]], work: Path) -> tuple[dict[str, float], list[Arm]]:
    """({arm: mean relative error of a layer's attention output on the prompts}, the calibrated arms).

    Calibrated on other tokens than the prompts.
    """
    import torch

    from vllm_ext.kv_cache.calibrate import NOTHING, calibrate_model, load_task, record_passes
    from vllm_ext.kv_cache.calibrate_attention import find_angles, measure_output_error
    from vllm_ext.kv_cache.presets import PRESETS, get_preset
    from vllm_ext.kv_cache.sidecar import read_sidecar, write_sidecar

    task = load_task(model, ["random"], seed=0, context=512, num_windows=16)
    size = task.head_dim
    grouped = PRESETS["skvq_k2v2"].fit(size, GROUP_SIZE)
    presets = {name: get_preset(name).fit(size) for name in (*PRESETS, *PLANS)}
    presets |= {
        NAIVE.name: NAIVE.fit(size),
        NO_WINDOW.name: replace(PRESETS["skvq_k2v2"].fit(size), window=0, sinks=0),
        "skvq_k2v2_g32": grouped,
    }
    sides = {name: {layer.cache_name: NOTHING for layer in task.layers} for name in presets}
    arms = []
    for name, base in (("skvq_k2v2", "skvq_k2v2"), ("kv4", "kv4"), ("skvq_k2v2_g32", "skvq_k2v2")):
        calibrated, preset = f"{name}_calibrated", presets[name]
        path = work / f"{calibrated}.safetensors"
        path.unlink(missing_ok=True)
        calibrate_model(task, preset, path)
        block = {"group_size": preset.key.group_size, "calibration": str(path)}
        arms.append(Arm(calibrated, base, block))
        presets[calibrated] = preset
        sides[calibrated] = read_sidecar(path, preset, task.num_kv_heads, size, task.description)
    # The last one again, without the order of channels.
    unordered = Arm(f"{arms[-1].name}_no_order", base, {**block, "calibration": str(work / "no_order.safetensors")})
    presets[unordered.name] = preset
    sides[unordered.name] = {
        layer: (key._replace(order=None), value._replace(order=None))
        for layer, (key, value) in sides[arms[-1].name].items()
    }
    write_sidecar(
        work / "no_order.safetensors", sides[unordered.name], preset, task.num_kv_heads, size, task.description
    )
    angles = find_angles(task.model, PLANTED_TOKENS)
    found: dict[str, list[float]] = {name: [] for name in presets}
    for layer, recorded in record_passes(task, torch.tensor(prompts)):
        for name, preset in presets.items():
            tensors = sides[name].get(layer.cache_name, NOTHING)
            found[name].append(measure_output_error(recorded, preset, tensors, layer.scaling, angles))
    return {name: float(np.mean(values)) for name, values in found.items()}, [*arms, unordered]


def measure_passkey(work: Path, size: int, record: Callable[..., None], pick: Pick) -> None:
    """Share of keys that are found, whole and token by token."""
    from vllm_ext.compress.profile import load_model
    from vllm_ext.kv_cache.presets import PRESETS

    prompts, keys = make_prompts(size, PASSKEY_TOKENS, 1, PASSKEY_WINDOW)
    settings = {"tokens": PASSKEY_TOKENS, "prompts": size, "key_tokens": KEY_TOKENS}

    def record_found(arm: Arm, answers: Any) -> None:
        right = np.array(answers) == np.array(keys)
        metrics = {
            "found": Metric(100 * float(right.all(1).mean()), "%"),
            "first_token": Metric(100 * float(right[:, 0].mean()), "%"),
        }
        record(arm, metrics, settings)

    if pick([Arm(DROPPED)]):
        model = load_model(RETRIEVER, "auto")
        record_found(Arm(DROPPED), answer_dropped(model, prompts, keys, PRESETS["skvq_k2v2"]))
    path = work / "skvq_k2v2_passkey.safetensors"
    calibrated = Arm("skvq_k2v2_calibrated", "skvq_k2v2", {"calibration": str(path)})
    if pick([calibrated]):
        calibrate_retriever(path)
    for arm in pick([Arm(STOCK), FP8, NAIVE_ARM, NO_WINDOW, *list_presets(), calibrated]):
        with start_engine(RETRIEVER, arm) as llm:
            answers = answer(llm, prompts, KEY_TOKENS)
        record_found(arm, answers)


def calibrate_retriever(path: Path) -> None:
    """Write the calibration file of `skvq_k2v2` for the retriever, from prompts like those it is asked."""
    import torch

    from vllm_ext.compress.profile import load_model
    from vllm_ext.kv_cache.calibrate import Task, calibrate_model
    from vllm_ext.kv_cache.calibrate_attention import find_layers
    from vllm_ext.kv_cache.presets import PRESETS

    model = load_model(RETRIEVER, "auto")
    count = PASSKEY_CALIBRATION + PASSKEY_HELD_OUT
    prompts, _ = make_prompts(count, PASSKEY_TOKENS, PASSKEY_SEED, PASSKEY_WINDOW)
    calibration, held_out = torch.tensor(prompts).split([PASSKEY_CALIBRATION, PASSKEY_HELD_OUT])
    path.unlink(missing_ok=True)
    calibrate_model(Task(model, find_layers(model), calibration, held_out), PRESETS["skvq_k2v2"], path)


#: Table: (its function, prompts, prompts with --quick).
TABLES: dict[str, tuple[Callable[..., None], int, int]] = {
    "text": (measure_text, 300, 2),
    "planted": (measure_planted, 6, 1),
    "passkey": (measure_passkey, 200, 16),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.kv_cache", description="Quality of KV caches.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"default all: {', '.join(TABLES)}")
    parser.add_argument("--arms", nargs="+", default=(), metavar="NAME", help="these alone, beside bf16")
    parser.add_argument("--quick", action="store_true", help="few prompts: shows that it runs, not a result")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models here")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    options = parser.parse_args(argv)
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}; known: {', '.join(TABLES)}")

    def pick(arms: Sequence[Arm]) -> list[Arm]:
        return [arm for arm in arms if not options.arms or arm.name == STOCK or arm.name in options.arms]

    with tempfile.TemporaryDirectory(prefix="vllm-ext-kv-quality-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        environment = describe_environment()
        for name in options.tables or TABLES:
            measure, full, quick = TABLES[name]

            def record(arm: Arm, metrics: dict[str, Metric], settings: dict[str, Any], name: str = name) -> None:
                described = {**settings, "stock_arm": STOCK, "kv_cache_dtype": arm.dtype, **arm.arguments}
                described |= {"block": {key: value for key, value in arm.block.items() if key != "calibration"}}
                write_record(
                    options.out.resolve(),
                    Record(f"kv_{name}", arm.name, 0, metrics, settings=described, **environment),
                )
                values = ", ".join(f"{key} {one.value:.4g}" for key, one in metrics.items() if one.value is not None)
                print(f"kv_{name}: {arm.name}: {values}", file=sys.stderr, flush=True)

            measure(work, quick if options.quick else full, record, pick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
