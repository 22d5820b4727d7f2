# SPDX-License-Identifier: Apache-2.0
"""Every inline PTX body, emulated instruction by instruction on packed words, gives the codes exactly.

Triton's interpreter cannot run inline PTX, and this machine may have no GPU. The emulation shares nothing with the
generator: it reads the text.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vllm_ext.kernels.gpu.decode_asm import BF16, FP16, INT8, code_offset, count_outputs, write_body
from vllm_ext.kernels.gpu.layout import PLANES, pack_fragments

BODIES = [(bits, element) for element in (BF16, FP16, INT8) for bits in PLANES if (bits, element) != (8, INT8)]


def run_ptx(text: str, num_outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a body for arrays of uint32 registers. Raises ValueError for an instruction it does not know, and
    KeyError for a register that is read before it is written."""
    registers = {f"${num_outputs + place}": value for place, value in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        return np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        opcode, rest = statement.split(None, 1)
        target, *operands = (part.strip() for part in rest.split(","))
        if opcode == "mov.b32":
            registers[target] = read(operands[0])
        elif opcode == "shr.u32":
            registers[target] = read(operands[0]) >> np.uint32(int(operands[1]))
        elif opcode == "shl.b32":
            registers[target] = read(operands[0]) << np.uint32(int(operands[1]))
        elif opcode == "and.b32":
            registers[target] = read(operands[0]) & read(operands[1])
        elif opcode == "lop3.b32":
            registers[target] = run_lop3(*map(read, operands[:3]), int(operands[3], 0))
        elif opcode == "fma.rn.bf16x2":
            registers[target] = run_fma_bf16x2(*map(read, operands))
        else:
            raise ValueError(f"no emulation of {statement!r}")
    return [registers[f"${place}"] for place in range(num_outputs)]


def run_lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """The bit of the table that the bits of a, b and c (a the highest) point at, for every bit."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for place in range(8):
        if table >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result


def run_fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in both halves; exact here, so no rounding is emulated but asserted not to be needed."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for shift in (0, 16):
        x, y, z = (read_bf16(value >> np.uint32(shift)) for value in (a, b, c))
        bits = (x * y + z).astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any()
        result |= (bits >> np.uint32(16)) << np.uint32(shift)
    return result


def read_bf16(halfwords: np.ndarray) -> np.ndarray:
    return np.atleast_1d(((halfwords & np.uint32(0xFFFF)) << np.uint32(16)).astype(np.uint32)).view(np.float32)


def read_element(register: np.ndarray, place: int, element: str) -> np.ndarray:
    """Value of one of a register's elements, lowest bits first."""
    if element == INT8:
        return ((register >> np.uint32(8 * place)) & np.uint32(0xFF)).astype(np.uint8).view(np.int8).astype(np.float64)
    halfword = register >> np.uint32(16 * place)
    if element == FP16:
        return (halfword & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float64)
    return read_bf16(halfword).astype(np.float64)


@pytest.mark.parametrize(("bits", "element"), BODIES)
def test_body_gives_every_code_in_its_place(bits: int, element: str) -> None:
    act_bits, elements = (8, 4) if element == INT8 else (16, 2)
    codes = torch.randint(0, 2**bits, (64, 128), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    codes[0, : 2 ** min(bits, 7)] = torch.arange(2 ** min(bits, 7), dtype=torch.uint8)
    scales = torch.ones(64, 1, dtype=torch.float16)
    packed, _ = pack_fragments(codes, scales, None, bits, act_bits, 128)
    low_bits = PLANES[bits][0]
    low = packed[: 64 * 16 * low_bits].numpy().view(np.uint32).reshape(64, 4, -1)
    words = [low]
    if len(PLANES[bits]) == 2:
        high = packed[64 * 16 * low_bits :].numpy().view(np.uint32).reshape(64, 4, -1)
        words = [low[:, :, 0::2], low[:, :, 1::2], high]
    num_outputs = count_outputs(bits, element)
    outputs = run_ptx(write_body(bits, element).text, num_outputs, words)

    decoded = np.full((64, 128), np.nan)
    step = 4 * elements
    for place, register in enumerate(outputs):
        for word in range(register.shape[2]):
            slot = word * num_outputs + place
            for lane in range(4):
                for e in range(elements):
                    column = step * slot + elements * lane + e
                    decoded[:, column] = read_element(np.ascontiguousarray(register[:, lane, word]), e, element)
    assert (decoded == codes.numpy().astype(np.float64) + code_offset(bits, element)).all()


@pytest.mark.parametrize(("bits", "element"), BODIES)
def test_constraints_name_every_operand(bits: int, element: str) -> None:
    body = write_body(bits, element)
    named = {int(place) for place in re.findall(r"\$(\d+)", body.text)}
    constraints = body.constraints.split(",")
    assert named == set(range(len(constraints)))
    # An output without early clobber could share the register of an input that is read later.
    assert constraints.count("=&r") == count_outputs(bits, element)
    assert constraints.count("r") == (3 if len(PLANES[bits]) == 2 else 1)


def test_signed_bytes_need_no_body() -> None:
    with pytest.raises(ValueError, match="8-bit codes for 8-bit activations are stored as they are multiplied"):
        write_body(8, INT8)


def test_emulation_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"no emulation of 'prmt\.b32 \$0, \$1, 0, 1'"):
        run_ptx("{ prmt.b32 $0, $1, 0, 1; }", 1, [np.zeros(1, np.uint32)])
