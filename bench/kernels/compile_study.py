# SPDX-License-Identifier: Apache-2.0
"""Compile main loops and tiles that no rule chooses, and write down their instructions beside those of the others.

    python -m bench.kernels.compile_study [--targets sm_80,sm_90] [--out DIR]
    PYTHONPATH=DIR python -m bench.kernels.compile_study        another triton, from a folder as compile_matrix wants it

    int8, fp8       8-bit activations of either type, sm_90, every shape of tile; both with a scale for 128 columns;
                    `_token`: with one for a row, applied after the loop
    joined          words of codes joined to 128 columns, in tiles for few tokens: 4 warps and 16 tokens, 2 warps and 8
    gate_up         the kernel gate_up itself in the tile of 8 tokens, by planes where Triton is older than 3.9
                    (kernels/gpu/planes.py); `_sums`: corrected by sums, as `joined` is with 16-bit activations

One record for each target and compiler, as of compile_matrix: instructions of a thread for each weight in the main
loop, registers, stores to shared memory in the loop, bytes of spilled registers. Nothing of it ran on a GPU. A minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.kernels.compile_matrix import name_version
from bench.kernels.compile_table import TARGETS
from bench.kernels.machine_code import MachineCode, find_tools, read_machine_code
from bench.records import RESULTS, Metric, Record, describe_environment, load_records, write_record
from vllm_ext.kernels.gpu.configurations import CORRECT_SUMS, SCALE_PRODUCTS, WARP_SIZE, Tile
from vllm_ext.kernels.gpu.formats import STORED_WIDTHS
from vllm_ext.kernels.gpu.layout import DEPTH

CASE = "kernel_variants"

INTRODUCTION = """\
<!-- Written by `python -m bench.kernels.compile_study`; edit the script, not this page. -->
# Main loops that no rule chooses, as machine code

Compiled without a GPU: nothing here is a time. Instructions of a thread for each weight in the main loop, registers of
a thread, stores to shared memory in the loop. What the loops are: `bench/kernels/compile_study.py`; what follows from
them: [docs/gpu-kernels-compile.md](../../../docs/gpu-kernels-compile.md) and, of int8 and FP8,
[docs/gpu-kernels-fp8.md](../../../docs/gpu-kernels-fp8.md).
"""


class Shape(NamedTuple):
    """A tile as Triton compiles it."""

    block_n: int
    block_tokens: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_n}x{self.block_tokens}"


#: The shapes of configurations.SHIPPED_TILES, and one for at most 8 tokens.
SHAPES = (Shape(64, 16, 4, 4), Shape(64, 64, 4, 3), Shape(128, 64, 8, 3), Shape(128, 128, 8, 3))
SMALL_SHAPES = (Shape(64, 16, 4, 4), Shape(64, 8, 2, 4))


class Variant(NamedTuple):
    """One loop. kind: as the module's docstring names them."""

    kind: str
    bits: int
    act_bits: int
    shape: Shape

    @property
    def name(self) -> str:
        """In names of metrics."""
        return f"{self.kind}_w{self.bits}a{self.act_bits}_{self.shape}"


def list_variants(target: str) -> Iterator[Variant]:
    """What is compiled for a target. FP8 needs sm_89, and pays, if anywhere, where `wgmma` multiplies."""
    if target == "sm_90":
        for bits in (2, 3, 4):
            for shape in SHAPES:
                for kind in ("int8", "fp8", "int8_token", "fp8_token"):
                    yield Variant(kind, bits, 8, shape)
    if target in ("sm_80", "sm_90"):
        for act_bits in (16, 8):
            for shape in SMALL_SHAPES:
                for bits in (2, 4):
                    yield Variant("joined", bits, act_bits, shape)
            for bits in STORED_WIDTHS:
                yield Variant("gate_up", bits, act_bits, SMALL_SHAPES[1])
                if act_bits == 16:
                    yield Variant("gate_up_sums", bits, act_bits, SMALL_SHAPES[1])


def compile_variant(variant: Variant, target: str, tools: Path) -> MachineCode:
    """The machine code of a loop, by the imported triton. tools: `machine_code.find_tools`."""
    compiled = (_compile_gate_up if variant.kind.startswith("gate_up") else _compile_loop)(variant, TARGETS[target])
    return read_machine_code(compiled.asm["cubin"], tools)


def _compile_gate_up(variant: Variant, capability: tuple[int, int]) -> Any:
    from vllm_ext.kernels.gpu import shipped

    scaling = CORRECT_SUMS if variant.kind.endswith("_sums") else SCALE_PRODUCTS
    formats = shipped.make_formats([variant.bits], variant.act_bits)
    return next(shipped.list_gemms(Tile(*variant.shape, scaling=scaling), formats)).compile(capability)


def _compile_loop(variant: Variant, capability: tuple[int, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.kernels.compile_variants import fragment_kernel

    kind, shape = variant.kind, variant.shape
    constants: dict[str, object] = {
        "BITS": variant.bits, "ACT_BITS": variant.act_bits, "FP8": kind.startswith("fp8"),
        "BY_TOKEN": kind.endswith("_token"), "BLOCK_N": shape.block_n, "BLOCK_TOKENS": shape.block_tokens,
        "STAGES": shape.num_stages, "USE_ASM": True,
    }  # fmt: skip
    word = "*i8" if variant.act_bits == 8 else "*i16"
    x_type = "*bf16" if variant.act_bits == 16 else "*fp8e4nv" if kind.startswith("fp8") else "*i8"
    types = {
        "codes": word, "high_codes": word, "words": "*i32", "x": x_type, "x_scales": "*fp32", "x_sums": "*fp32",
        "out": "*fp32",
    }  # fmt: skip
    names = list(fragment_kernel.arg_names)
    source = ASTSource(
        fragment_kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in (*types, "N", "K")},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP_SIZE)
    return triton.compile(source, target=target, options={"num_warps": shape.num_warps})


def describe_variant(variant: Variant, code: MachineCode) -> dict[str, Metric]:
    """The metrics of a loop. Raises ValueError where the machine code has another number of loops that multiply."""
    if len(code.loops) != 1:
        raise ValueError(f"{variant.name}: {len(code.loops)} loops multiply in its machine code, expected one")
    (loop,) = code.loops
    weights = variant.shape.block_n * DEPTH
    per_weight = loop.num_instructions * WARP_SIZE * variant.shape.num_warps / weights
    return {
        f"per_weight_{variant.name}": Metric(round(per_weight, 2), "instructions/weight", "lower"),
        f"registers_{variant.name}": Metric(code.registers, "registers", "lower"),
        f"stores_{variant.name}": Metric(loop.stores, "stores", "lower"),
        f"spilled_{variant.name}": Metric(code.stack_bytes, "bytes", "lower"),
    }


def run_study(targets: Sequence[str], folder: Path) -> list[Record]:
    """Compile all variants for some targets and write their records."""
    import triton

    tools = find_tools(triton.__file__)
    version = name_version(triton.__version__)
    environment = describe_environment()
    records = []
    for target in targets:
        metrics: dict[str, Metric] = {}
        for variant in list_variants(target):
            metrics |= describe_variant(variant, compile_variant(variant, target, tools))
        record = Record(
            case=CASE,
            arm=f"triton{version}_{target}",
            repetition=0,
            metrics=metrics,
            versions={**environment["versions"], "triton": version},
            device=environment["device"],
            git_hash=environment["git_hash"],
            settings={"kind": CASE, "target": target},
        )
        write_record(folder, record)
        records.append(record)
    everything = [record for record in load_records(folder) if record.case == CASE]
    (folder / CASE / "README.md").write_text(render_page(everything), encoding="utf-8")
    return records


def render_page(records: Sequence[Record]) -> str:
    """The page of all records, as Markdown: a row for each loop."""
    parts = [INTRODUCTION]
    for target in TARGETS:
        arms = [record for record in records if record.settings["target"] == target]
        if not arms:
            continue
        lines = [
            f"## {target}, by Triton\n",
            "| loop | " + " | ".join(record.versions["triton"] for record in arms) + " |",
        ]
        lines.append("|---|" + "---|" * len(arms))
        for name in (variant.name for variant in list_variants(target)):
            lines.append(f"| {name} | " + " | ".join(_render_cell(record, name) for record in arms) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _render_cell(record: Record, name: str) -> str:
    per_weight, registers, stores = (
        record.metrics[f"{what}_{name}"].value for what in ("per_weight", "registers", "stores")
    )
    return f"{per_weight:.2f}, {registers:.0f}, {stores:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.compile_study", description="Compile main loops that do not ship."
    )
    parser.add_argument("--targets", default="sm_80,sm_90", metavar="sm_80,...")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    if unknown := [target for target in targets if not any(list_variants(target))]:
        parser.error(f"nothing to compile for {unknown[0]!r}: use sm_80, sm_90")
    for record in run_study(targets, options.out):
        for name, metric in record.metrics.items():
            if name.startswith("per_weight_"):
                print(record.arm, name.removeprefix("per_weight_"), metric.value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
