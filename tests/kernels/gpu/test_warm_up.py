# SPDX-License-Identifier: Apache-2.0
"""After warm_up, no batch makes Triton compile: a kernel that is missing would be compiled inside a graph's capture."""

from __future__ import annotations

from tests.child import run_child

#: Replaces the kernels by notes of what Triton compiles for: constants, and of each argument its type and whether it is
#: a multiple of 16 or 1, as far as the kernel has Triton look at that.
CODE = """
import json
import torch
from vllm_ext.kernels.arena import BlockFormat, Layout
from vllm_ext.kernels.gpu import activations, combine, configurations, sorting
from vllm_ext.kernels.mixed_linear import triton as linear
from vllm_ext.kernels.mixed_linear.layout import plan_linear
from vllm_ext.kernels.mixed_moe import triton as moe
from vllm_ext.kernels.mixed_moe.layout import plan_arena

compiled = set()

class Noting:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.note

    def note(self, *arguments, **constants):
        key = [self.kernel.fn.__name__, sorted(constants.items())]
        for parameter, value in zip(self.kernel.params, arguments):
            if isinstance(value, torch.Tensor):
                aligned = parameter.do_not_specialize_on_alignment or value.data_ptr() % 16
                key.append((str(value.dtype), aligned))
            elif value is None or parameter.do_not_specialize:
                key.append(value is None)
            else:
                key.append((value == 1, value % 16 == 0))
        compiled.add(repr(key))

for module in (activations, combine, linear, moe, sorting):
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Noting(value))

block = BlockFormat(4, 16, 64, layout=Layout.GPU_FRAGMENT)
TOKENS, TOP_K = 700, 2
missing, num_moe, num_repeated = {}, [], []
# The K of down is divided in the second.
for intermediate in (192, 2048):
    compiled.clear()
    plan = plan_arena([(block, block._replace(act_bits=8))] * 8, 256, intermediate)
    arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    # As vLLM's loader has it.
    torch.set_default_dtype(torch.bfloat16)
    moe.warm_up(arena, plan.table, 256, intermediate, TOP_K, TOKENS, torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    known = set(compiled)
    for tokens in range(1, TOKENS + 1):
        x = torch.empty(tokens, 256, dtype=torch.bfloat16)
        # A slice of a larger batch: 8 bytes past a multiple of 16.
        ids, weights = torch.empty(tokens + 1, TOP_K, dtype=torch.int32)[1:], torch.empty(tokens + 1, TOP_K)[1:]
        assert ids.data_ptr() % 16 and weights.data_ptr() % 16
        moe.mixed_moe(x, ids, weights, arena, plan.table, None, intermediate, "silu", False)
    missing[f"moe, {intermediate}"] = sorted(compiled - known)
    num_moe.append(len(known))
    compiled.clear()
    table = plan.table.clone()
    moe.warm_up(arena, table, 256, intermediate, TOP_K, TOKENS, torch.bfloat16)
    num_repeated.append((len(compiled), table in moe._facts._known))

plan = plan_linear([(block, 100), (block._replace(act_bits=8), 60)], 2048)
arena, bias = torch.zeros(plan.num_bytes, dtype=torch.uint8), torch.zeros(160)
for given in (None, bias):
    compiled.clear()
    linear.warm_up(arena, plan.table, 2048, 160, 300, torch.bfloat16, given)
    known_linear = set(compiled)
    for tokens in range(1, 301):
        linear.mixed_linear(torch.empty(tokens, 2048, dtype=torch.bfloat16), arena, plan.table, 160, given)
    missing[f"linear, bias {given is not None}"] = sorted(compiled - known_linear)
compiled.clear()
linear.warm_up(arena, plan.table.clone(), 2048, 160, 300, torch.bfloat16, bias)
num_repeated.append((len(compiled), True))
print(json.dumps([missing, num_moe, len(known_linear), num_repeated]))
"""


def test_no_batch_needs_a_kernel_that_warm_up_left_out() -> None:
    child = run_child(CODE, TRITON_INTERPRET=None)
    assert child.value is not None, child.stderr
    missing, num_moe, num_linear, repeated = child.value
    assert missing == {"moe, 192": [], "moe, 2048": [], "linear, bias False": [], "linear, bias True": []}
    # Every tile in both GEMMs and both sums, and more than one way of sorting.
    assert 13 <= num_moe[0] < num_moe[1]
    assert num_linear > 6
    # Of an equal layer nothing runs again, and its own table is read.
    assert repeated == [[0, True]] * 3
