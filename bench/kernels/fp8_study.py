# SPDX-License-Identifier: Apache-2.0
"""What int8 and FP8 (e4m3) activations lose, on the inputs of a trained MoE's experts and where outliers are planted.

    python -m bench.kernels.fp8_study [--rows 256] [--experts 4] [--out DIR]

A record for each way to round activations; "a16" keeps bf16. A row of activations has one scale for each 128 columns,
or one for all of them ("token"). No GPU: rounding is the same everywhere; how Hopper's tensor core adds FP8 products
is imitated (`add_as_hopper`). Errors are in percent of the Euclidean norm of what they are errors of:

    INPUT_rounding   of the activations themselves
    INPUT_output     of their products with the experts' own weights
    INPUT_w4         of their products with the weights in 4 bits, groups of 128, rounded to nearest; no planted ones
    INPUT_adding     of the same products, by the tensor core's short sums alone
    INPUT_peak_*     largest magnitude of 128 columns over the root mean square of the others ("a16")

INPUT is `gate_up` or `down`, of all layers of bench/models/tiny_moe on held-out text; `..._outlierF`, the same with one
channel of every 128 times F and its column of the weight divided by F, which leaves exact products as they were;
`..._outlierF_rotated`, that after the rotation that `vllm-ext quantize --rotate` folds into weights; and `normal`,
normal numbers in rows as wide as a large model's. A minute; the same every time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.records import RESULTS, ROOT, Metric, Record, describe_environment, write_record
from vllm_ext.compress.rotation import Rotation
from vllm_ext.compress.rounding import dequantize, round_to_nearest
from vllm_ext.kernels.act_quant.reference import round_activations
from vllm_ext.quantization.scheme import Scheme

CASE = "fp8_activations"
MODEL = ROOT / "bench" / "models" / "tiny_moe"
TEXTS = ("kjv_val.txt", "py_val.txt")
CONTEXT, WINDOWS = 256, 16

GROUP_SIZE = 128
WEIGHTS = Scheme.parse("w4a16_g128")

#: How much larger the planted channels are.
OUTLIERS = (10, 100)

#: Rows, columns and outputs of the normal input: the hidden size of Qwen3-30B-A3B.
NORMAL_SHAPE = (256, 2048, 512)

#: Largest e4m3 number.
E4M3_MAX = 448.0

#: Columns of one FP8 `wgmma`, and binary digits behind the leading one of the largest addend that its sums keep.
STEP_COLUMNS, KEPT_DIGITS = 32, 13

INTRODUCTION = """\
<!-- Written by `python -m bench.kernels.fp8_study`; edit the script, not this page. -->
# What int8 and FP8 activations lose

Errors in percent, of activations that are rounded in the way that a column names; `bench/kernels/fp8_study.py` says
what each row is. What follows from them: [docs/gpu-kernels-fp8.md](../../../docs/gpu-kernels-fp8.md).
"""

Rounder = Callable[[torch.Tensor], torch.Tensor]


class Input(NamedTuple):
    """What one expert multiplies: x [rows, K] and weight [N, K], float32."""

    x: torch.Tensor
    weight: torch.Tensor


def round_e4m3(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x float32 [rows, K] as e4m3 numbers times a float32 scale per group of columns, whose largest becomes 448.

    Source: as act_quant/reference.py rounds to int8; OCP 8-bit floating point (OFP8), E4M3, nearest, ties to even.
    """
    codes, scale = _encode_e4m3(x, group_size)
    return (codes * scale).flatten(-2)


def _encode_e4m3(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.unflatten(-1, (1 if group_size == -1 else x.shape[-1] // group_size, -1))
    scale = groups.abs().amax(-1, keepdim=True) / E4M3_MAX
    ratio = torch.where(scale > 0, groups / scale, 0.0).clamp(-E4M3_MAX, E4M3_MAX)
    return ratio.to(torch.float8_e4m3fn).float(), scale


ROUNDERS: dict[str, Rounder] = {
    "a16": lambda x: x.bfloat16().float(),
    "int8_g128": lambda x: round_activations(x, GROUP_SIZE),
    "int8_token": lambda x: round_activations(x, -1),
    "e4m3_g128": lambda x: round_e4m3(x, GROUP_SIZE),
    "e4m3_token": lambda x: round_e4m3(x, -1),
}


def add_as_hopper(codes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """codes [N, K] times x [rows, K], K up to 128, as FP8 `wgmma` sums them from zero: float64 [rows, N].

    Products are exact; those of 32 columns and the sum so far are cut off, towards zero, KEPT_DIGITS below the leading
    digit of the largest among them. Source: DeepSeek-V3 (arXiv:2412.19437, section 3.5.2), which observed 14 digits.
    """
    total = torch.zeros(len(x), len(codes), 1, dtype=torch.float64)
    for first in range(0, codes.shape[1], STEP_COLUMNS):
        here = slice(first, first + STEP_COLUMNS)
        addends = torch.cat([x[:, None, here].double() * codes[None, :, here].double(), total], dim=-1)
        _, exponent = torch.frexp(addends.abs().amax(-1, keepdim=True))
        unit = torch.ldexp(torch.ones_like(total), exponent - 1 - KEPT_DIGITS)
        total = ((addends / unit).trunc() * unit).sum(-1, keepdim=True)
    return total.squeeze(-1)


def measure_adding(one: Input, group_size: int) -> tuple[float, float]:
    """(squared error, squared norm) of an output by 4-bit codes that `add_as_hopper` sums, 128 columns at a time."""
    rounded = round_to_nearest(one.weight, WEIGHTS)
    assert rounded.zeros is not None
    num_groups = one.weight.shape[1] // GROUP_SIZE
    codes = rounded.codes.unflatten(-1, (num_groups, -1)).double()
    x, x_scale = _encode_e4m3(one.x, group_size)
    chunks = x.flatten(-2).unflatten(-1, (num_groups, -1)).double()
    factors = x_scale[..., 0].double().expand(-1, num_groups)
    error = torch.zeros(len(one.x), len(one.weight), dtype=torch.float64)
    output = torch.zeros_like(error)
    for group in range(num_groups):
        factor = factors[:, group, None] * rounded.scales[:, group].double()
        exact = chunks[:, group] @ codes[:, group].T
        error += (add_as_hopper(codes[:, group], chunks[:, group]) - exact) * factor
        output += (exact - chunks[:, group].sum(-1, keepdim=True) * rounded.zeros[:, group].double()) * factor
    return float(error.square().sum()), float(output.square().sum())


def collect_inputs(rows: int, experts: int) -> dict[str, list[Input]]:
    """Inputs of gate_up and of down: of every layer the `experts` busiest, at most `rows` rows of each."""
    from vllm_ext.compress.calibration import cut_windows, load_tokenizer
    from vllm_ext.compress.profile import load_model

    model = load_model(MODEL, torch.float32, "cpu")
    tokenizer = load_tokenizer(MODEL)
    per_text = WINDOWS // len(TEXTS)
    windows = [torch.from_numpy(cut_windows(MODEL / name, tokenizer, CONTEXT)[:per_text]) for name in TEXTS]
    seen: list[torch.Tensor] = []
    blocks = [layer.mlp for layer in model.model.layers]
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2))) for block in blocks
    ]
    with torch.no_grad():
        model(torch.cat(windows))
    for hook in hooks:
        hook.remove()
    found: dict[str, list[Input]] = {"gate_up": [], "down": []}
    for block, x in zip(blocks, seen, strict=True):
        chosen = (x @ block.gate.weight.detach().T).topk(block.gate.top_k).indices
        traffic = torch.bincount(chosen.flatten(), minlength=block.gate.num_experts)
        for expert in traffic.argsort(descending=True)[:experts].tolist():
            mine = x[(chosen == expert).any(-1)][:rows]
            gate_up = block.experts.gate_up_proj.detach()[expert]
            gate, up = (mine @ gate_up.T).chunk(2, dim=-1)
            found["gate_up"].append(Input(mine, gate_up))
            hidden = torch.nn.functional.silu(gate) * up
            found["down"].append(Input(hidden, block.experts.down_proj.detach()[expert]))
    return found


def plant_outliers(one: Input, factor: float, seed: int) -> Input:
    """One channel in every 128 times `factor`, its column of the weight divided by it."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = one.x.shape[1] // GROUP_SIZE
    channels = torch.arange(num_groups) * GROUP_SIZE + torch.randint(GROUP_SIZE, (num_groups,), generator=generator)
    factors = torch.ones(one.x.shape[1])
    factors[channels] = factor
    return Input(one.x * factors, one.weight / factors)


def make_normal(seed: int) -> Input:
    """Normal activations and weights of a large model's width."""
    rows, columns, outputs = NORMAL_SHAPE
    generator = torch.Generator().manual_seed(seed)
    return Input(torch.randn(rows, columns, generator=generator), torch.randn(outputs, columns, generator=generator))


def rotate(one: Input, seed: int) -> Input:
    """The same products from rotated rows."""
    rotation = Rotation(one.x.shape[1], seed)
    return Input(rotation.apply(one.x).float(), rotation.apply(one.weight).float())


def name_cases(inputs: dict[str, list[Input]], seed: int) -> Iterator[tuple[str, list[Input]]]:
    """(INPUT of a metric's name, its experts)."""
    for name, found in inputs.items():
        yield name, found
        for factor in OUTLIERS:
            planted = [plant_outliers(one, factor, seed + place) for place, one in enumerate(found)]
            yield f"{name}_outlier{factor}", planted
            if name == "gate_up":
                # The rotation is of the residual stream, which down does not read.
                yield f"{name}_outlier{factor}_rotated", [rotate(one, seed) for one in planted]
    yield "normal", [make_normal(seed)]


def measure_arm(arm: str, cases: Sequence[tuple[str, list[Input]]]) -> dict[str, Metric]:
    """The metrics of one way to round."""
    metrics = {}
    for name, experts in cases:
        is_planted = "outlier" in name
        sums: dict[str, list[tuple[float, float]]] = {"rounding": [], "output": []}
        for one in experts:
            rounded = ROUNDERS[arm](one.x)
            exact = one.x @ one.weight.T
            sums["rounding"].append(_compare(rounded, one.x))
            sums["output"].append(_compare(rounded @ one.weight.T, exact))
            if not is_planted:
                # A planted column is too small for its group's levels: its error would hide that of activations.
                coarse = dequantize(round_to_nearest(one.weight, WEIGHTS), WEIGHTS)
                sums.setdefault("w4", []).append(_compare(rounded @ coarse.T, exact))
        if arm.startswith("e4m3") and not is_planted and name != "normal":
            group_size = GROUP_SIZE if arm == "e4m3_g128" else -1
            sums["adding"] = [measure_adding(one, group_size) for one in experts]
        for what, pairs in sums.items():
            error, norm = (sum(part) for part in zip(*pairs, strict=True))
            metrics[f"{name}_{what}"] = Metric(100 * (error / norm) ** 0.5, "%", "lower")
        if arm == "a16":
            peaks = torch.cat([_find_peaks(one.x) for one in experts])
            metrics[f"{name}_peak_median"] = Metric(float(peaks.median()), "rms")
            metrics[f"{name}_peak_p99"] = Metric(float(peaks.quantile(0.99)), "rms")
    return metrics


def run_study(rows: int, experts: int, folder: Path, seed: int = 0) -> list[Record]:
    """Measure every arm and write the records."""
    cases = list(name_cases(collect_inputs(rows, experts), seed))
    settings = {
        "kind": CASE, "rows": rows, "experts": experts, "texts": TEXTS, "context": CONTEXT, "windows": WINDOWS,
        "weights": str(WEIGHTS), "normal_shape": NORMAL_SHAPE,
    }  # fmt: skip
    records = []
    for arm in ROUNDERS:
        record = Record(CASE, arm, 0, measure_arm(arm, cases), **describe_environment(), seed=seed, settings=settings)
        write_record(folder, record)
        records.append(record)
    (folder / CASE / "README.md").write_text(render_page(records), encoding="utf-8")
    return records


def render_page(records: Sequence[Record]) -> str:
    """The page of the records of all arms, as Markdown: a row for each metric."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    lines = ["| metric | " + " | ".join(record.arm for record in records) + " |", "|---|" + "---|" * len(records)]
    for name in names:
        found = [record.metrics.get(name) for record in records]
        texts = [f"{metric.value:.3g} {metric.unit}" if metric and metric.value is not None else "" for metric in found]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def _compare(values: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(squared error, squared norm)."""
    return float((values - exact).double().square().sum()), float(exact.double().square().sum())


def _find_peaks(x: torch.Tensor) -> torch.Tensor:
    """Of each group of 128: the largest magnitude over the root mean square of the others."""
    squares = x.unflatten(-1, (-1, GROUP_SIZE)).double().square()
    largest = squares.amax(-1)
    rest = (squares.sum(-1) - largest) / (GROUP_SIZE - 1)
    return (largest / rest).sqrt().flatten()[rest.flatten() > 0]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.fp8_study", description="Errors of int8 and FP8 activations."
    )
    parser.add_argument("--rows", type=int, default=256, help="rows of an expert (default: 256)")
    parser.add_argument("--experts", type=int, default=4, help="experts of a layer (default: 4)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    if options.rows < 1 or options.experts < 1:
        parser.error("--rows and --experts must be positive")
    for record in run_study(options.rows, options.experts, options.out):
        print(record.arm, *(f"{name} {metric.value:.3g}" for name, metric in record.metrics.items()), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
