# SPDX-License-Identifier: Apache-2.0
"""The names of `--kv-cache-dtype` that this pack adds, and what each stands for.

A preset is a codec for K, one for V, and which tokens stay in full precision. `kvplan` gives every layer a preset of
its own (`parse_plan`). All work without calibration, at the defaults below; `calibration.py` says what it adds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_ext.kernels.kv_store.layout import CellLayout, Codec, bits_per_element, plan_cells

#: The name under which every layer has its own preset.
PLAN_NAME = "kvplan"
#: How bits are written in a plan, "k4v15": 1.5 stands for three levels.
PLAN_BITS: dict[str, float] = {"15": 1.5, "2": 2, "3": 3, "4": 4, "8": 8}
#: Four levels serve normally distributed values best when they span 0.6 of a group's range, three levels when 0.5;
#: a group with one large value needs all of it. With 16 levels there is nothing to gain.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: Key of a plan for the layers that it does not name.
DEFAULT_LAYER = "default"
#: Without `layer_bits`, `kvplan` gives this many layers at either end more bits: errors of the first are carried
#: through the whole model, and those of the last reach the output unmended (vLLM's TurboQuant leaves the same ones
#: unquantized).
BOUNDARY_LAYERS = 2
BOUNDARY_PRESET, INNER_PRESET = "k4v4", "skvq_k2v2"


@dataclass(frozen=True)
class Preset:
    """One KV-cache quantizer.

    key, value: codecs; a per-token codec's group_size is the largest to use, and `fit` makes it divide the head size.
    window, sinks: tokens in full precision, recent ones (the query's own included) and the first. clips: shares
    of a group's range that its levels may span, where calibration has none; every group takes its best. pre_rope: keys
    are stored before the rotary embedding. codebook: calibration may choose the levels; the compiled kernels multiply
    codes themselves, so such a layer runs in torch.
    """

    name: str
    key: Codec
    value: Codec
    window: int
    sinks: int
    clips: tuple[float, ...] = (1.0,)
    pre_rope: bool = False
    codebook: bool = False

    @property
    def extra_window(self) -> int:
        """Tokens kept beyond the window: per-channel keys of a group are read together (kv_decode/reference.py)."""
        return self.key.group_size - 1 if self.key.per_channel else 0

    @property
    def retained_window(self) -> int:
        """Last tokens of a request that must be at hand in full precision, the one being computed included.

        Also without a window the last key of a group is coded together with those before it.
        """
        return max(self.window, 1) + self.extra_window

    @property
    def keeps_recent(self) -> bool:
        """Does anything stay in full precision from one step to the next?"""
        return self.retained_window > 1 or self.sinks > 0

    def fit(self, head_dim: int, group_size: int | None = None) -> Preset:
        """The preset for a head size: per-token groups become the largest divisor of head_dim up to their size.

        group_size: of per-token groups; None for the preset's own. Raises ValueError, naming value and fix, for a
        head size whose codes do not fill bytes, and a group_size that does not divide it.
        """
        fitted = dataclasses.replace(
            self,
            key=_fit_codec(self.key, head_dim, group_size),
            value=_fit_codec(self.value, head_dim, group_size),
        )
        try:
            for codec in (fitted.key, fitted.value):
                bits_per_element(codec, head_dim)
        except ValueError as error:
            raise ValueError(f"{self.name} does not fit this model's heads: {error}") from error
        return fitted

    def plan_cells(self, head_dim: int, block_size: int, group_size: int | None = None) -> CellLayout:
        """The pages of a layer. Raises ValueError as `fit`, and for pages that do not hold whole groups of tokens."""
        fitted = self.fit(head_dim, group_size)
        return plan_cells(fitted.key, fitted.value, head_dim, block_size)

    def bits(self, head_dim: int) -> float:
        """True bits of an element, mean of K and V, scales, outliers and padding included; the window is not."""
        fitted = self.fit(head_dim)
        return (bits_per_element(fitted.key, head_dim) + bits_per_element(fitted.value, head_dim)) / 2


def _skvq(name: str, key_bits: float, value_bits: float) -> Preset:
    return Preset(name, Codec(key_bits, 128), Codec(value_bits, 128), window=128, sinks=5, clips=CLIPS)


def _kivi(name: str, bits: float, clips: tuple[float, ...] = (1.0,)) -> Preset:
    return Preset(name, Codec(bits, 32, per_channel=True), Codec(bits, 32), window=128, sinks=0, clips=clips)


#: SKVQ: arXiv:2405.06219. The order of channels is within a head, and keys are stored after RoPE: that keeps scores
#: a product of the query with codes, and a head's pages its own under tensor parallelism. KIVI: 2402.02750, with fp8
#: scales for fp16 (not lows: keys of a channel may lie far off zero, `Codec.low_dtype`). KV4: QServe, 2405.04532.
#: KVQuant: 2401.18079, with codes relative to each token's range; its per-channel ranges of K are the calibrated
#: smooth and shift, its 1 % of outliers are two of a head's channels.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _skvq("skvq_k2v2", 2, 2),
        _skvq("skvq_k2v15", 2, 1.5),
        _kivi("kivi_k2v2", 2, CLIPS),
        _kivi("kivi_k4v4", 4),
        Preset(
            "kv4",
            Codec(4, 256, scale_dtype=torch.float16),
            Codec(4, 256, scale_dtype=torch.float16),
            window=0,
            sinks=0,
        ),
        Preset(
            "kvquant_k3v3",
            Codec(3, 128, outliers=2),
            Codec(3, 128, outliers=2),
            window=0,
            sinks=1,
            clips=CLIPS,
            pre_rope=True,
            codebook=True,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of a name of `--kv-cache-dtype`, or of a layer's "k4v2". Raises ValueError that lists the names."""
    if name in PRESETS:
        return PRESETS[name]
    match = re.fullmatch(rf"k({'|'.join(PLAN_BITS)})v({'|'.join(PLAN_BITS)})", name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a KV-cache preset: use {', '.join(PRESETS)}, or k<bits>v<bits> with bits of "
            f"{', '.join(PLAN_BITS)} (15 stands for 1.5)"
        )
    key, value = (_plan_codec(PLAN_BITS[bits]) for bits in match.groups())
    return Preset(name, key, value, window=128, sinks=5, clips=CLIPS if min(key.bits, value.bits) < 4 else (1.0,))


def default_plan(num_layers: int) -> dict[str, str]:
    """The `layer_bits` of `kvplan` where the user gives none."""
    last = range(num_layers)[-BOUNDARY_LAYERS:]
    layers = {*range(num_layers)[:BOUNDARY_LAYERS], *last}
    return {**{str(layer): BOUNDARY_PRESET for layer in sorted(layers)}, DEFAULT_LAYER: INNER_PRESET}


def is_mixed(presets: Sequence[Preset]) -> bool:
    """Whether layers differ in their preset, so that their pages may differ in size."""
    return len(set(presets)) > 1


def parse_plan(
    layer_bits: Mapping[str, str], num_layers: int, window: int | None = None, sinks: int | None = None
) -> list[Preset]:
    """`kv_cache.layer_bits`, a preset for every layer.

    layer_bits: {"0": "k8v8", "1-30": "skvq_k2v2", "default": "k4v4"}: a layer, or a range with both ends, and a
    preset or its bits. One window and one number of sinks serve all layers: the largest any preset asks for, or
    those given. Raises ValueError, naming the key, for a key that is no layer of the model, a layer named twice or not
    at all, and layers that differ in whether keys are stored before RoPE (one store op serves the model).
    """
    chosen: dict[int, str] = {}
    for key, name in layer_bits.items():
        if key == DEFAULT_LAYER:
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if match is None or not first <= last < num_layers:
            raise ValueError(
                f"layer_bits key {key!r} is not a layer, a range or {DEFAULT_LAYER!r}: layers are 0 to {num_layers - 1}"
            )
        for layer in range(first, last + 1):
            if layer in chosen:
                raise ValueError(f"layer_bits names layer {layer} twice: {key!r} repeats it")
            chosen[layer] = name
    missing = [layer for layer in range(num_layers) if layer not in chosen]
    if missing and DEFAULT_LAYER not in layer_bits:
        raise ValueError(f"layer_bits has nothing for layer {missing[0]}: name it, or add {DEFAULT_LAYER!r}")
    presets = [
        get_preset(chosen[layer] if layer in chosen else layer_bits[DEFAULT_LAYER]) for layer in range(num_layers)
    ]
    if len({preset.pre_rope for preset in presets}) > 1:
        raise ValueError("layer_bits mixes presets with keys before and after RoPE; use kvquant_k3v3 for all or none")
    window = max(preset.window for preset in presets) if window is None else window
    sinks = max(preset.sinks for preset in presets) if sinks is None else sinks
    return [dataclasses.replace(preset, window=window, sinks=sinks) for preset in presets]


def _plan_codec(bits: float) -> Codec:
    # A step of 4 bits or fewer levels is coarser than fp8's rounding of it; a step of 8 bits is not.
    return Codec(bits, 128, scale_dtype=torch.float8_e4m3fn if bits < 4 else torch.float16)


def _fit_codec(codec: Codec, head_dim: int, group_size: int | None) -> Codec:
    if codec.per_channel:
        return codec
    if group_size is not None:
        return codec._replace(group_size=group_size)
    largest = min(codec.group_size, head_dim)
    return codec._replace(group_size=next(size for size in range(largest, 0, -1) if head_dim % size == 0))
