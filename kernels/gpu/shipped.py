# SPDX-License-Identifier: Apache-2.0
"""Every kernel with the constants and argument types it is launched with, so that it can be compiled without a GPU.

For checks of registers, shared memory and machine code. The launchers do not read this: a test compares the constants
that they pass with those listed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..mixed_moe.triton import FLOAT32_TOKENS
from . import activations, combine, experts, linear, sorting
from .configurations import CORRECT_SUMS, DECODE_TILE, WARP_SIZE, Device, Tile, list_choices
from .formats import INT8_GROUPS, NUM_CODE_FORMATS, STORED_WIDTHS, Format, describe_kind, keep_int8
from .launch import tile_options
from .layout import DEPTH

#: A layer of 128 experts of 2048 by 768, 8 for each token: Qwen3-30B-A3B.
NUM_EXPERTS, TOP_K, HIDDEN_SIZE, INTERMEDIATE_SIZE = 128, 8, 2048, 768

#: Element types of pointers, by argument name; "half" stands for the type of x.
POINTERS = {
    "x": "half",
    "hidden": "half",
    "x_codes": "i8",
    "x_scales": "fp32",
    "x_sums": "fp32",
    "arena": "u8",
    "table": "i64",
    "routing": "fp32",
    "codes": "i8",
    "scales": "fp32",
    "sums": "fp32",
    "out": "half",
    "bias": "half",
    "parts": "fp32",
}
#: The type of parts that are rounded before they are summed, as an argument of `_describe`.
ROUNDED_PARTS = {"parts": "half"}

#: Arguments that are indices on the device.
INDICES = (
    "pairs", "experts", "segment_ends", "tile_experts", "tile_starts", "num_tiles", "topk_ids", "expert_map", "counts",
    "bases", "totals",
)  # fmt: skip
#: Pointers of which Triton is told not to care how they are aligned: callers may pass slices of a larger batch's.
UNALIGNED = ("topk_ids", "routing")
#: Numbers that are multiples of 16 for every real layer, of which Triton makes use.
SIZES = ("K", "hidden_size", "intermediate_size", "out_features", "num_experts")


@dataclass(frozen=True)
class Shipped:
    """A kernel as it is compiled: its name for tables, the Triton function, argument types, constants, warps.

    signature: {argument: type, or "constexpr"}; divisible: arguments known to be multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...]
    num_warps: int

    def compile(self, capability: tuple[int, int]) -> Any:
        """Triton's compiled kernel for a GPU of this capability; needs none."""
        names = list(self.signature)
        source = ASTSource(
            self.kernel,
            self.signature,
            {(names.index(name),): value for name, value in self.constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible},
        )
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP_SIZE)
        return triton.compile(source, target=target, options={"num_warps": self.num_warps})


def make_formats(widths: Sequence[int], act_bits: int = 16, depth: int = DEPTH, plain: Sequence[int] = ()) -> int:
    """A set of formats (formats.py): stored widths, and positions of plain layouts (0: bf16)."""
    formats = sum(1 << Format(bits, act_bits, depth).number for bits in widths)
    return formats + sum(1 << (NUM_CODE_FORMATS + place) for place in plain)


#: Sets of formats that tables of registers are made for: each width, small groups, and mixtures.
FORMAT_SETS: dict[str, int] = {
    **{f"w{bits}a16": make_formats([bits]) for bits in STORED_WIDTHS},
    "w16a16": make_formats([], plain=[0]),
    **{f"w{bits}a8": make_formats([bits], 8) for bits in STORED_WIDTHS},
    "w4a16_g64": make_formats([4], depth=64),
    "w4a16_g32": make_formats([4], depth=32),
    "w4a8_g32": make_formats([4], 8, 32),
    "w2,4,8a16": make_formats([2, 4, 8]),
    "w2,4,8a8": make_formats([2, 4, 8], 8),
    "w2,3,4,6,8,16a16": make_formats(STORED_WIDTHS, plain=[0]),
    "w4a16,w4a8": make_formats([4]) | make_formats([4], 8),
}


#: Tiles that no rule chooses yet: tuning and `bench.kernels.gpu --part decode` try them. By a word for their names.
DECODE_VARIANTS = {
    "narrow": replace(DECODE_TILE, block_tokens=8, num_warps=2),
    "narrow sums": replace(DECODE_TILE, block_tokens=8, num_warps=2, scaling=CORRECT_SUMS),
}


def has_int8(formats: int) -> bool:
    """Whether a format of the set takes 8-bit activations."""
    return any(formats >> number & 1 for number in range(NUM_CODE_FORMATS) if number // 5 % 2)


def list_tiles(formats: int, device: Device) -> list[Tile]:
    """The tiles that batches of a layer with these formats can get on a GPU."""
    return list_choices(has_int8(formats), device)


def list_gemms(tile: Tile, formats: int, half: str = "bf16", name: str = "", even_k: bool = True) -> Iterator[Shipped]:
    """The GEMM kernels with one tile and set of formats. half: "bf16" or "fp16"."""
    kinds = keep_int8(1 << INT8_GROUPS.index(DEPTH)) if has_int8(formats) else 0
    options = dict(tile_options(tile))
    num_warps = int(str(options.pop("num_warps")))
    constants = {**options, "USE_ASM": True, "FORMATS": formats, "EVEN_K": even_k}
    expert = {**constants, "WEIGHT_ON_INPUT": False}
    label = f"{name} {tile.block_n}x{tile.block_tokens}"
    yield _describe(f"gate_up {label}", experts.gate_up_kernel, {**expert, "KINDS": kinds}, half, num_warps)
    parts = POINTERS if tile.block_tokens <= FLOAT32_TOKENS else ROUNDED_PARTS
    yield _describe(f"down {label}", experts.down_kernel, {**expert, "KINDS": 0}, half, num_warps, parts)
    stacked = {**constants, "KINDS": kinds, "NUM_BLOCKS": 1, "HAS_BIAS": False}
    yield _describe(f"linear {label}", linear.linear_kernel, stacked, half, num_warps)


def list_helpers(half: str = "bf16") -> Iterator[Shipped]:
    """The kernels around the GEMMs: sorting, preparation of activations, sums."""
    padded = triton.next_power_of_2(NUM_EXPERTS + 1)
    sizes = {"NUM_EXPERTS": NUM_EXPERTS, "PADDED_EXPERTS": padded}
    mapped = {"HAS_MAP": True, "BLOCK": sorting.BLOCK}
    unused = {"UNUSED": sorting.UNUSED_TILES}
    sort_few = {**sizes, **mapped, **unused, "BLOCK": sorting.FEW_BLOCK}
    yield _describe("sort_few", sorting.sort_few_kernel, sort_few, half, 8)
    yield _describe("count", sorting.count_kernel, {**sizes, **mapped}, half, 4)
    scanned = {"SLICE": sorting.choose_slice(padded), "ROWS": sorting.SCANNED_BLOCKS}
    yield _describe("scan", sorting.scan_kernel, {"PADDED_EXPERTS": padded, **scanned}, half, 8)
    yield _describe("tiles", sorting.tiles_kernel, {**sizes, **unused}, half, 8)
    yield _describe("place", sorting.place_kernel, {**sizes, **mapped}, half, 8)
    for kind in range(len(INT8_GROUPS) + 1):
        int8, group_size, depth = describe_kind(kind)
        pieces = triton.next_power_of_2(-(-HIDDEN_SIZE // DEPTH) * (DEPTH // depth))
        constants = {"BY_EXPERT": True, "INT8": int8, "GROUP_SIZE": group_size, "PIECE": depth, "BLOCK_PIECES": pieces}
        name = f"prepare {'int8' if int8 else 'sums'} g{group_size}"
        yield _describe(name, activations.prepare_kernel, constants, half, 4)
    routed = {"NUM_EXPERTS": NUM_EXPERTS, "TOP_K": TOP_K, "HAS_MAP": False, "USE_ASM": True}
    columns = {"BLOCK_COLUMNS": combine.FEW_COLUMNS}
    yield _describe("sum_experts", combine.sum_experts_kernel, {**routed, **columns}, half, 4)
    yield _describe("sum_parts", combine.sum_parts_kernel, {**columns, "USE_ASM": True, "HAS_BIAS": True}, half, 4)
    columns = {"BLOCK_COLUMNS": combine.MANY_COLUMNS}
    yield _describe("sum_experts rounded", combine.sum_experts_kernel, {**routed, **columns}, half, 4, ROUNDED_PARTS)


def _describe(
    name: str,
    kernel: Any,
    constants: Mapping[str, object],
    half: str,
    num_warps: int,
    changes: Mapping[str, str] = POINTERS,
) -> Shipped:
    """changes: element types of pointers where they are not those of POINTERS."""
    signature, divisible = {}, []
    types = {**POINTERS, **changes, **dict.fromkeys(INDICES, "i32")}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        is_pointer = argument in types
        kind = types.get(argument, "i32")
        signature[argument] = ("*" if is_pointer else "") + (half if kind == "half" else kind)
        if (is_pointer and argument not in UNALIGNED) or argument in SIZES:
            divisible.append(argument)
    return Shipped(name, kernel, signature, dict(constants), tuple(divisible), num_warps)
