# SPDX-License-Identifier: Apache-2.0
"""The attention layers of a transformers model: found, recorded, and run with keys and values as a cache reads them.

transformers looks attention up by name, so a model's layers are reached without changing its code: for the time of a
context the name stands for a function of ours, which sees queries and keys after RoPE, and values. Without vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_ext.compress.calibration import CalibrationError
from vllm_ext.kernels.kv_decode.reference import is_full_precision
from vllm_ext.kernels.kv_decode.rope import rotate
from vllm_ext.kernels.kv_store.codec import CodecTensors, dequantize, from_stored, list_clips, quantize, to_stored
from vllm_ext.kernels.kv_store.layout import Codec
from vllm_ext.kv_cache.presets import Preset

#: The name under which transformers finds our attention, and the one that does the work.
INTERFACE, STOCK = "vllm_ext_kv_calibration", "sdpa"
#: Tokens of the pass that finds the layers.
PROBE_TOKENS = 4

#: (attention module, query, key, value, scaling) -> output or None for the model's own. Tensors [batch, tokens,
#: heads, D].
Handler = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
Sides = tuple[CodecTensors, CodecTensors]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer. name: of its module in the model; scaling: of scores."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float

    @property
    def cache_name(self) -> str:
        """What vLLM calls the layer, and calibration files with it."""
        return f"{self.name}.attn"


class Recorded(NamedTuple):
    """What went into a layer, after RoPE: query [windows, tokens, heads, D], key and value [..., kv heads, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Angles(NamedTuple):
    """What RoPE turns by: float [tokens, rotary], cosines then sines, of positions 0, 1, ..."""

    cos_sin: torch.Tensor

    def turn(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """float32 of x [windows, tokens, heads, D]."""
        return rotate(x, self.cos_sin[: x.shape[1]].expand(x.shape[0], -1, -1), inverse=inverse)


def find_layers(model: Any) -> list[AttentionLayer]:
    """The causal attention layers that a cache quantizer serves, in order; layers of a sliding window are left out.

    Raises CalibrationError, naming the model's type, where there is none, and for keys and values of different sizes.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, AttentionLayer] = {}
    kind = getattr(model.config, "model_type", type(model).__name__)

    def note(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        if key.shape[-1] != value.shape[-1]:
            raise CalibrationError(
                f"{kind} has keys of {key.shape[-1]} and values of {value.shape[-1]} channels (latent attention): "
                "its cache cannot be quantized by a preset; use a --kv-cache-dtype of vLLM's own"
            )
        if getattr(module, "sliding_window", None) is None and getattr(module, "is_causal", True):
            name = names[module]
            found[name] = AttentionLayer(name, query.shape[2], key.shape[2], key.shape[3], scaling)

    run_model(model, torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), note)
    layers = list(found.values())
    if not layers:
        raise CalibrationError(f"no full-attention layer was found in {kind}: there is nothing to calibrate")
    sizes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
    if len(sizes) > 1:
        raise CalibrationError(
            f"the layers of {kind} differ in (kv heads, head size): {sorted(sizes)}; one preset serves one"
        )
    return layers


def find_angles(model: Any, tokens: int) -> Angles:
    """The angles of positions 0 to tokens - 1. Raises CalibrationError for a model without one rotary embedding."""
    rotary = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(rotary) != 1:
        raise CalibrationError(
            f"{model.config.model_type} has {len(rotary)} rotary embeddings, and keys before RoPE need exactly one: "
            "choose a preset that stores keys after RoPE, such as skvq_k2v2"
        )
    cos, sin = rotary[0](torch.zeros(1, 1, device=model.device), torch.arange(tokens, device=model.device)[None])
    half = cos.shape[-1] // 2
    return Angles(torch.cat([cos[0, :, :half], sin[0, :, :half]], -1).float().cpu())


@torch.inference_mode()
def run_model(model: Any, windows: torch.Tensor, handler: Handler | None, logits: bool = False) -> torch.Tensor | None:
    """Run windows, int64 [windows, tokens], through the model, each layer's attention through `handler`.

    Returns logits float32 [windows, tokens, vocabulary] where wanted. Without them the output layer does not run.
    """
    with _attention(model, handler):
        ids = windows.to(model.device)
        if not logits:
            getattr(model, "base_model", model)(input_ids=ids, use_cache=False)
            return None
        return model(input_ids=ids, use_cache=False).logits.float().cpu()


def record_layers(model: Any, windows: torch.Tensor, names: Sequence[str]) -> dict[str, Recorded]:
    """What goes into these layers on windows, int64 [windows, tokens], in the model's dtype on the CPU."""
    seen: dict[str, list[Recorded]] = {name: [] for name in names}
    known = {module: name for name, module in model.named_modules() if name in seen}

    def keep(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> None:
        if module in known:
            seen[known[module]].append(Recorded(*(x.cpu() for x in (query, key, value))))

    for window in windows.split(1):
        run_model(model, window, keep)
    return {
        name: Recorded(*(torch.cat(parts) for parts in zip(*records, strict=True))) for name, records in seen.items()
    }


def read_back(x: torch.Tensor, codec: Codec, tensors: CodecTensors, clips: Sequence[float]) -> torch.Tensor:
    """What a cache returns for one window of keys or values, float32 [tokens, kv heads, D].

    codec: fitted to D. clips: tried where the tensors have none. Tokens behind the last whole group of a per-channel
    codec stay as they are.
    """
    tried = list_clips(codec, tensors, clips)
    stored = to_stored(x, tensors)
    if codec.per_channel:
        whole = stored.shape[0] // codec.group_size * codec.group_size
        groups = stored[:whole].unflatten(0, (-1, codec.group_size)).permute(0, 2, 3, 1)
        decoded = dequantize(quantize(groups, codec, tried, tensors.levels), codec, tensors.levels)
        stored = torch.cat([decoded.permute(0, 3, 1, 2).flatten(0, 1), stored[whole:]])
    else:
        stored = dequantize(quantize(stored, codec, tried, tensors.levels), codec, tensors.levels)
    return from_stored(stored, tensors)


def read_key(key: torch.Tensor, preset: Preset, tensors: CodecTensors, angles: Angles | None) -> torch.Tensor:
    """`read_back` of one window's keys, given and returned after RoPE."""
    if angles is None or not preset.pre_rope:
        return read_back(key, preset.key, tensors, preset.clips)
    stored = angles.turn(key[None], inverse=True)[0]
    return angles.turn(read_back(stored, preset.key, tensors, preset.clips)[None])[0]


def mark_full_precision(tokens: int, preset: Preset) -> torch.Tensor:
    """Which keys [queries, keys] are read in full precision: sinks, and those within the window of the query."""
    position = torch.arange(tokens)
    group_tokens = preset.key.group_size if preset.key.per_channel else 1
    return is_full_precision(position, position, preset.window, preset.sinks, group_tokens)


def score(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled products of one window, float32 [kv heads, G, queries, keys], G query heads per kv head."""
    grouped = query.float().unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
    return grouped @ key.float().permute(1, 2, 0).unsqueeze(1) * scaling


def attend(
    exact_scores: torch.Tensor,
    read_scores: torch.Tensor,
    value: torch.Tensor,
    read_value: torch.Tensor,
    is_full: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of one window, float32 [tokens, heads, D], with the rest of the keys and values as read.

    scores: [kv heads, G, tokens, tokens]. value, read_value: [tokens, kv heads, D]. is_full: bool [tokens, tokens], or
    one for all.
    """
    tokens = value.shape[0]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = torch.where(is_full, exact_scores, read_scores).masked_fill(~causal, -math.inf)
    weights = scores.softmax(-1)
    out = torch.where(is_full, weights, 0.0) @ value.float().permute(1, 0, 2).unsqueeze(1)
    out += torch.where(is_full, 0.0, weights) @ read_value.permute(1, 0, 2).unsqueeze(1)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def measure_output_error(
    recorded: Recorded, preset: Preset, sides: Sides, scaling: float, angles: Angles | None = None
) -> float:
    """Relative error of a layer's attention output, root mean square over windows. preset: fitted to the head size."""
    wrong = norm = 0.0
    for query, key, value in zip(*recorded, strict=True):
        is_full = mark_full_precision(len(key), preset)
        exact = score(query, key, scaling)
        read = score(query, read_key(key, preset, sides[0], angles), scaling)
        plain = attend(exact, exact, value, value.float(), is_full)
        out = attend(exact, read, value, read_back(value, preset.value, sides[1], preset.clips), is_full)
        wrong += float((out - plain).square().sum())
        norm += float(plain.square().sum())
    return math.sqrt(wrong / norm) if norm > 0 else 0.0


def make_cache_handler(model: Any, presets: Mapping[str, Preset | None], angles: Angles | None = None) -> Handler:
    """Attention of some layers, by name, as with a cache of these presets, fitted and uncalibrated.

    None: exact attention in the same float32 arithmetic, so that what differs is the cache alone.
    """
    known = {module: presets[name] for name, module in model.named_modules() if name in presets}

    def run(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        if module not in known:
            return None
        preset, outputs = known[module], []
        for one_query, one_key, one_value in zip(query.cpu(), key.cpu(), value.cpu(), strict=True):
            exact = score(one_query, one_key, scaling)
            if preset is None:
                outputs.append(attend(exact, exact, one_value, one_value.float(), torch.tensor(True)))
                continue
            read = score(one_query, read_key(one_key, preset, CodecTensors(), angles), scaling)
            read_value = read_back(one_value, preset.value, CodecTensors(), preset.clips)
            outputs.append(attend(exact, read, one_value, read_value, mark_full_precision(len(one_key), preset)))
        return torch.stack(outputs).to(query)

    return run


@contextmanager
def _attention(model: Any, handler: Handler | None) -> Iterator[None]:
    """Let every attention layer of the model be asked by `handler` first."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS[STOCK]

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = None
        if handler is not None:
            factor = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = handler(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), factor)
        if out is not None:
            return out, None
        return stock(module, query, key, value, attention_mask, scaling=scaling, **arguments)

    before = model.config._attn_implementation
    AttentionInterface.register(INTERFACE, forward)
    AttentionMaskInterface.register(INTERFACE, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])
    model.config._attn_implementation = INTERFACE
    try:
        yield
    finally:
        model.config._attn_implementation = before
