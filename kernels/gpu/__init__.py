# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of `mixed_moe` and `mixed_linear` share, from the arena's bytes to a tile of outputs.

    layout.py          GPU_FRAGMENT drawn; pack and unpack in plain torch
    formats.py         which combinations of widths a compiled kernel decodes, as one constant
    configurations.py  tile sizes: what ships, and which one a batch gets
    tables.py          what the host knows of a table that lies on the device, read once
    decode_asm.py      PTX that turns words of codes into operands of the tensor core
    decode.py          the same as a Triton function, and in plain Triton for the interpreter
    planes.py          codes times activations field by field, for Triton before 3.9 and few tokens
    scaling.py         products of one piece of K, scaled and added up
    accumulate.py      one tile of weight times activations: the loop over K, one per format
    experts.py         kernels: gate_up with SwiGLU, down
    linear.py          kernel: one linear layer of stacked row blocks
    activations.py     kernel: int8 rounding and sums of activations, per group
    sorting.py         kernels: (token, expert) pairs grouped by expert, on the device
    combine.py         kernels: weighted sums over experts and over parts of K
    fitting.py         smaller tiles where one does not fit this GPU
    launch.py          which devices and tensors the kernels serve, and on which device they are launched
    tuning.py          tables of tiles by GPU that was measured, in tuning/; search.py finds such tiles
    samples.py         random layers; trials.py: with inputs, to be run and timed
    selfcheck.py       whether this GPU computes what the reference does, asked once before a model relies on it
    faults.py          what is compared for that, in a process of its own
    shipped.py         every kernel as it is launched, for compiling without a GPU

Nothing here imports triton but decode.py, planes.py, scaling.py, accumulate.py, shipped.py, the files of kernels, and
trials.py by way of the ops' launchers. The ops import these at their first call with CUDA tensors; functions of other
files, where they are called.
"""
