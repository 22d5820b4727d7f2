# SPDX-License-Identifier: Apache-2.0
"""The one parse of `--additional-config.vllm_ext.*`, and the table of what combines with what.

A block that is present means the feature is on, unless it says `enabled: false`. Unknown keys and wrong types
are errors that name the key and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_ext import __version__


class ConfigError(ValueError):
    """A `vllm_ext` setting that cannot be honoured; the message names the key, the value and the fix."""


# --- settings: field names are the user's keys; None means the feature decides -----------------------------


@dataclass(frozen=True)
class SmartSpecSettings:
    """Goodput-based speculation (docs/activation.md lists the state of each feature)."""

    enabled: bool = True
    drafter: Literal["carrier", "trie"] = "carrier"
    k_max: int | None = None
    probe_every: int | None = None
    hold_steps: int | None = None
    policy: Literal["equal", "priority", "deadline", "priority+deadline"] = "equal"


@dataclass(frozen=True)
class StructuredSettings:
    """Structured generation: routing, compile budgets (milliseconds, MiB), forced tokens, file of specs to compile at
    the start, directory of compiled ones, whitespace in JSON (at most so many characters between two elements).
    """

    enabled: bool = True
    forced_tokens: Literal["auto", "on", "off"] = "auto"
    max_compile_ms: float | None = None
    max_compile_mib: float | None = None
    prewarm: str | None = None
    store_dir: str | None = None
    whitespace: Literal["any", "compact"] | int | None = None


@dataclass(frozen=True)
class SemiPDSettings:
    """Prefill and decode as two lanes; service-level objectives in milliseconds. admission: what becomes of prompts
    that come too late while neither objective can be met. fairness: turns between clients, and what a token of output
    costs there, in tokens of a prompt. decode_priority_ms: how long prompts wait while tokens come too slowly.
    controller: what chooses the split, by models of both latencies or by the paper's Algorithm 1.
    """

    enabled: bool = True
    mode: Literal["auto", "always", "off"] = "auto"
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    percentile: float | None = None
    window: float | None = None
    splits: list | None = None
    admission: Literal["hold", "refuse", "off"] = "hold"
    fairness: float | None = None
    decode_priority_ms: float | None = None
    controller: Literal["models", "published"] = "models"


@dataclass(frozen=True)
class KVCacheSettings:
    """KV-cache quantizers: full-precision window and sinks in tokens, calibration file, per-layer bits; check: compare
    the window with the pages in every step, which is slow.
    """

    enabled: bool = True
    window: int | None = None
    sinks: int | None = None
    group_size: int | None = None
    clip: float | None = None
    calibration: str | None = None
    layer_bits: dict | None = None
    check: bool = False


@dataclass(frozen=True)
class NestedSettings:
    """Nested-precision experts under a device-memory budget in GiB."""

    enabled: bool = True
    budget_gib: float | None = None


@dataclass(frozen=True)
class Settings:
    """The whole `vllm_ext` block; a feature's block is None where the user gave none."""

    smartspec: SmartSpecSettings | None = None
    structured: StructuredSettings | None = None
    semipd: SemiPDSettings | None = None
    kv_cache: KVCacheSettings | None = None
    nested: NestedSettings | None = None
    cache_dir: str | None = None

    @property
    def cache_path(self) -> Path:
        """Directory of compiled ops and other caches; created with mode 0700 by its first user."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "vllm_ext"


def find_block(additional_config: Any) -> Any:
    """The `vllm_ext` value of vLLM's `additional_config`, None where there is none.

    Raises ConfigError for another spelling of the name, which would be ignored without a word.
    """
    if not isinstance(additional_config, Mapping):
        return None
    for key in additional_config:
        if key != "vllm_ext" and str(key).replace("-", "_").lower() == "vllm_ext":
            raise ConfigError(f"additional_config has a block {key!r}; the pack's block is 'vllm_ext'")
    return additional_config.get("vllm_ext")


def parse(block: Any) -> Settings:
    """Turn the `vllm_ext` value of `--additional-config` into `Settings`; None means an empty block.

    Raises ConfigError for an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    return typing.cast(Settings, _parse_fields(Settings, {} if block is None else block, "vllm_ext"))


def read_settings(vllm_config: Any) -> Settings:
    """The pack's settings in vLLM's finished configuration. Raises ConfigError as `parse` and `find_block` do."""
    return parse(find_block(vllm_config.additional_config))


def _parse_fields(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a mapping of settings, not {values!r}")
    known = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {path}.{nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown setting {path}.{key}; {hint}")
    return cls(**{key: _parse_value(known[key], value, f"{path}.{key}") for key, value in values.items()})


def _parse_value(annotation: Any, value: Any, path: str) -> Any:
    """Check one value against a field's annotation; nested dataclasses are parsed, ints pass as floats."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    options = typing.get_args(annotation) if is_union else (annotation,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return _parse_fields(option, value, path)
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
                return float(value)
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    expected = " or ".join(_name_type(option) for option in options if option is not types.NoneType)
    raise ConfigError(f"{path} must be {expected}, not {value!r}")


#: Every number among the settings is a count, a time or a size: what exceeds this, infinity and NaN is a slip.
_LARGEST = 1e18


def _name_type(option: Any) -> str:
    choices = typing.get_args(option)
    return "one of " + ", ".join(map(repr, choices)) if choices else option.__name__


# --- features and what they combine with ------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """One switchable part of the pack.

    `is_available` is False until this release can run it; `owns` lists the engine arguments holding classes
    that the pack sets for it, where a class of the user's own cannot stay.
    """

    name: str
    summary: str
    switch: str
    is_available: bool = True
    owns: tuple[Literal["scheduler_cls", "worker_cls", "distributed_executor_backend"], ...] = ()


FEATURES: Mapping[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("mxmoe", "mixed-precision MoE experts", "--quantization mxmoe"),
        Feature("smartspec", "draft length from measured goodput", "smartspec", owns=("scheduler_cls",)),
        Feature(
            "structured",
            "structured generation with budgets and forced tokens",
            "structured",
            owns=("scheduler_cls",),
        ),
        Feature(
            "semipd",
            "prefill and decode as two lanes",
            "semipd",
            owns=("scheduler_cls", "worker_cls", "distributed_executor_backend"),
        ),
        Feature("kv_cache", "KV-cache quantizers", "--kv-cache-dtype"),
        Feature("nested", "nested-precision experts", "nested", False),
    )
}

#: Values of `--quantization` that are ours, and the feature each one switches on.
QUANTIZATION_FEATURES = {"mxmoe": "mxmoe"}

#: Values of `--kv-cache-dtype` that are ours; vllm_ext/kv_cache/presets.py says what each stands for.
KV_CACHE_DTYPES = ("skvq_k2v2", "skvq_k2v15", "kivi_k2v2", "kivi_k4v4", "kv4", "kvquant_k3v3", "kvplan")

#: The value of `--structured-outputs-config.backend` that is ours.
STRUCTURED_BACKEND = "vllm_ext"


@dataclass(frozen=True)
class Refusal:
    """One row of the compatibility table: `feature` does not run together with `condition`."""

    feature: str
    condition: str
    applies: Callable[[Any], bool]
    reason: str
    fix: str


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def _runs_eagerly(engine_args: Any) -> bool:
    """Whether nothing is compiled, by any of vLLM's three ways to say so."""
    mode = engine_args.compilation_config.mode
    return bool(engine_args.enforce_eager) or mode == 0 or (mode is None and engine_args.optimization_level == 0)


def _is_class_given(name: str) -> Callable[[Any], bool]:
    """Whether the user chose this class: vLLM's defaults are None, "auto" and the names of its own executors."""
    stock = (None, "auto", "mp", "ray", "uni", "external_launcher")
    return lambda engine_args: getattr(engine_args, name) not in stock


def may_have_experts(model: str) -> bool:
    """Whether the config.json of a model directory declares routed experts; True where it cannot be read here."""
    from vllm_ext.quantization.model_config import NUM_EXPERTS_KEYS, read_config

    try:
        declared = read_config(Path(model))
    except (OSError, ValueError):
        return True
    text = declared.get("text_config")
    places = (declared, text if isinstance(text, Mapping) else {})
    return any(place.get(key) for place in places for key in (*NUM_EXPERTS_KEYS, "block_configs"))


def _drafts_with_a_model(speculative_config: Any) -> bool:
    """Whether drafts come from layers that need a KV cache; n-grams and suffixes are lists of tokens."""
    given = speculative_config or {}
    return bool(given) and (given.get("method") or given.get("model")) not in ("ngram", "[ngram]", "suffix")


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "mxmoe",
        "--enable-eplb",
        lambda engine_args: bool(engine_args.enable_eplb),
        "expert load balancing moves experts as equal rows of one tensor; experts of different widths have none",
        "drop --enable-eplb",
    ),
    Refusal(
        "mxmoe",
        "--enable-lora and routed experts",
        lambda engine_args: bool(engine_args.enable_lora) and may_have_experts(engine_args.model),
        "vLLM adds expert adapters inside its own MoE kernels, which mixed-width experts do not use",
        "drop --enable-lora, or serve the bf16 model; of dense models in a local directory adapters work",
    ),
    Refusal(
        "mxmoe",
        "--data-parallel-size above 1",
        lambda engine_args: engine_args.data_parallel_size > 1,
        "expert dispatch between data-parallel ranks is not tested with mixed-width experts yet",
        "use --tensor-parallel-size, with or without --enable-expert-parallel, or one server per replica",
    ),
    Refusal(
        "mxmoe",
        "--pipeline-parallel-size above 1 in eager engines on CPUs",
        lambda engine_args: engine_args.pipeline_parallel_size > 1 and _is_cpu() and _runs_eagerly(engine_args),
        "vLLM 0.32 makes the buffers between stages in the warm-up of compiled CPU engines alone; an eager one, "
        "quantized or not, dies at its first request",
        "drop --enforce-eager, or use --tensor-parallel-size",
    ),
    *(
        Refusal(
            feature.name,
            "--" + owned.replace("_", "-") + " CLASS",
            _is_class_given(owned),
            "vLLM has one such class per engine and this feature needs the pack's",
            "drop " + "--" + owned.replace("_", "-") + f", or switch {feature.name} off",
        )
        for feature in FEATURES.values()
        for owned in feature.owns
    ),
    Refusal(
        "smartspec",
        "a missing --speculative-config",
        lambda engine_args: not engine_args.speculative_config,
        "it chooses how much a drafter drafts, and there is none",
        'add --speculative-config, for example \'{"method":"ngram","num_speculative_tokens":8}\'',
    ),
    Refusal(
        "smartspec",
        "--data-parallel-size above 1",
        lambda engine_args: engine_args.data_parallel_size > 1,
        "ranks that draft different lengths wait for each other for ever",
        "use one server per replica, or switch smartspec off",
    ),
    Refusal(
        "smartspec",
        "--pipeline-parallel-size above 1",
        lambda engine_args: engine_args.pipeline_parallel_size > 1,
        "several batches are in flight, whose steps cannot be timed one by one",
        "use --tensor-parallel-size, or switch smartspec off",
    ),
    Refusal(
        "smartspec",
        "--enable-lora",
        lambda engine_args: bool(engine_args.enable_lora),
        "adapters change acceptance and step time, which is not tested yet",
        "drop --enable-lora, or switch smartspec off",
    ),
    Refusal(
        "structured",
        "--structured-outputs-config.backend guidance, outlines or lm-format-enforcer",
        lambda engine_args: _names_other_backend(engine_args),
        "the pack's backend chooses the engine of every request by itself",
        "drop the backend, or switch structured off",
    ),
    Refusal(
        "structured",
        "--skip-tokenizer-init",
        lambda engine_args: bool(engine_args.skip_tokenizer_init),
        "grammars are compiled for a tokenizer",
        "drop --skip-tokenizer-init, or switch structured off",
    ),
    Refusal(
        "kv_cache",
        "a --kv-cache-dtype of vLLM's own",
        lambda engine_args: not names_our_cache(engine_args.kv_cache_dtype),
        "the block tunes a quantizer of the pack, and none is chosen",
        f"add --kv-cache-dtype with one of {', '.join(KV_CACHE_DTYPES)}, or drop the block",
    ),
    Refusal(
        "kv_cache",
        "devices other than CPUs and CUDA",
        lambda engine_args: not (_is_cpu() or _is_cuda()),
        "its torch reference was written for these",
        "use a --kv-cache-dtype of vLLM's own",
    ),
    Refusal(
        "kv_cache",
        "--disable-hybrid-kv-cache-manager",
        lambda engine_args: bool(engine_args.disable_hybrid_kv_cache_manager),
        "without it the pages of the window in full precision would be kept for every token",
        "drop --disable-hybrid-kv-cache-manager",
    ),
    Refusal(
        "kv_cache",
        "--kv-transfer-config and --kv-offloading-size",
        lambda engine_args: bool(engine_args.kv_transfer_config or engine_args.kv_offloading_size),
        "connectors move or read pages as they know them, and know neither sinks nor quantized cells",
        "drop the connector, or use a --kv-cache-dtype of vLLM's own",
    ),
    Refusal(
        "kv_cache",
        "--kv-cache-dtype-skip-layers",
        lambda engine_args: bool(engine_args.kv_cache_dtype_skip_layers),
        "one unquantized layer would pad the pages of all others to its size",
        "drop --kv-cache-dtype-skip-layers",
    ),
    Refusal(
        "kv_cache",
        "--kv-sharing-fast-prefill",
        lambda engine_args: bool(engine_args.kv_sharing_fast_prefill),
        "layers that read another layer's pages are not supported",
        "drop --kv-sharing-fast-prefill",
    ),
    Refusal(
        "kv_cache",
        "--decode-context-parallel-size or --prefill-context-parallel-size above 1",
        lambda engine_args: (
            max(engine_args.decode_context_parallel_size, engine_args.prefill_context_parallel_size) > 1
        ),
        "a context split over ranks has its window on one of them",
        "use --tensor-parallel-size",
    ),
    Refusal(
        "kv_cache",
        "--pipeline-parallel-size above 1",
        lambda engine_args: engine_args.pipeline_parallel_size > 1,
        "calibration and pages of several stages are not tested yet",
        "use --tensor-parallel-size",
    ),
    Refusal(
        "kv_cache",
        "drafters that have a KV cache of their own",
        lambda engine_args: _drafts_with_a_model(engine_args.speculative_config),
        "the drafter's layers would be quantized like the model's, which is not tested yet",
        "use the method ngram or suffix, or smartspec with the trie drafter",
    ),
    Refusal(
        "semipd",
        "GPUs",
        lambda engine_args: not _is_cpu(),
        "in this release its lanes run on CPUs only",
        "switch semipd off",
    ),
    Refusal(
        "semipd",
        "tensor, pipeline, data or context parallelism",
        lambda engine_args: (
            max(
                engine_args.tensor_parallel_size,
                engine_args.pipeline_parallel_size,
                engine_args.data_parallel_size,
                engine_args.decode_context_parallel_size,
                engine_args.prefill_context_parallel_size,
            )
            > 1
        ),
        "both lanes are threads of one process",
        "use one rank, or switch semipd off",
    ),
    Refusal(
        "semipd",
        "--speculative-config",
        lambda engine_args: bool(engine_args.speculative_config),
        "drafts of a request would have to go from lane to lane",
        "drop --speculative-config, or switch semipd off",
    ),
    Refusal(
        "semipd",
        "vllm_ext.structured",
        lambda engine_args: _uses_structured(engine_args),
        "tokens that a grammar forces are drafts",
        "use a structured-output backend of vLLM's own, or switch semipd off",
    ),
    Refusal(
        "semipd",
        "a --kv-cache-dtype that quantizes",
        lambda engine_args: engine_args.kv_cache_dtype not in (None, "auto", "float16", "bfloat16"),
        "the pack's windows in full precision are pages of their own, which lanes do not fence yet; vLLM's own are not "
        "tested with lanes",
        "drop --kv-cache-dtype, or switch semipd off",
    ),
    Refusal(
        "semipd",
        "routed experts in compiled engines without --quantization mxmoe",
        lambda engine_args: (
            not _runs_eagerly(engine_args)
            and not names_ours(engine_args.quantization)
            and may_have_experts(engine_args.model)
        ),
        "vLLM's kernel for experts on CPUs serves one thread at a time, and the lock for that cannot be compiled",
        "add --enforce-eager, or --quantization mxmoe",
    ),
    Refusal(
        "semipd",
        "--enable-lora",
        lambda engine_args: bool(engine_args.enable_lora),
        "the adapters of a batch are one state of the model, which two lanes would share",
        "drop --enable-lora, or switch semipd off",
    ),
    Refusal(
        "semipd",
        "--kv-transfer-config and --kv-offloading-size",
        lambda engine_args: bool(engine_args.kv_transfer_config or engine_args.kv_offloading_size),
        "connectors rely on batches that finish in the order in which they are scheduled",
        "drop the connector, or switch semipd off",
    ),
)


def names_our_cache(kv_cache_dtype: str | None) -> bool:
    """Whether a value of `--kv-cache-dtype` is one of the pack's presets."""
    return kv_cache_dtype in KV_CACHE_DTYPES


def read_structured(engine_args: Any, name: str) -> Any:
    """A field of `--structured-outputs-config`, which is an object, a mapping, or missing."""
    given = getattr(engine_args, "structured_outputs_config", None)
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def names_our_backend(engine_args: Any) -> bool:
    """Whether `--structured-outputs-config.backend` is the pack's."""
    return bool(read_structured(engine_args, "backend") == STRUCTURED_BACKEND)


def _uses_structured(engine_args: Any) -> bool:
    block = find_block(engine_args.additional_config)
    given = block.get("structured") if isinstance(block, Mapping) else None
    return names_our_backend(engine_args) or (isinstance(given, Mapping) and given.get("enabled", True) is not False)


def _names_other_backend(engine_args: Any) -> bool:
    return read_structured(engine_args, "backend") not in (None, "auto", "xgrammar", STRUCTURED_BACKEND)


def names_ours(quantization: str | None) -> bool:
    """Whether a value of `--quantization` is one of the pack's methods."""
    return quantization is not None and quantization.lower() in QUANTIZATION_FEATURES


def find_features(
    settings: Settings,
    quantization: str | None,
    kv_cache_dtype: str | None = None,
    is_backend_ours: bool = False,
) -> tuple[str, ...]:
    """Names of the features in use, in the order of `FEATURES`; `quantization` as vLLM resolved or was given it.

    is_backend_ours: the structured-output backend is named. Raises ConfigError for a `kv_cache_dtype` or a backend of
    ours with its feature switched off.
    """
    wanted = {QUANTIZATION_FEATURES.get((quantization or "").lower())}
    if is_backend_ours:
        if settings.structured is not None and not settings.structured.enabled:
            raise ConfigError(
                f"--structured-outputs-config.backend {STRUCTURED_BACKEND} needs vllm_ext.structured, which is "
                "switched off: drop structured.enabled, or name a backend of vLLM's own"
            )
        wanted.add("structured")
    if names_our_cache(kv_cache_dtype):
        if settings.kv_cache is not None and not settings.kv_cache.enabled:
            raise ConfigError(
                f"--kv-cache-dtype {kv_cache_dtype} needs vllm_ext.kv_cache, which is switched off: "
                "drop kv_cache.enabled, or use a --kv-cache-dtype of vLLM's own"
            )
        wanted.add("kv_cache")
    for name in FEATURES:
        block = getattr(settings, name, None)
        if block is not None and block.enabled:
            wanted.add(name)
    return tuple(name for name in FEATURES if name in wanted)


def check_compatibility(features: tuple[str, ...], engine_args: Any) -> None:
    """Refuse what does not combine, by name, before an engine is built.

    `engine_args` is vLLM's EngineArgs. Raises ConfigError with the first refusal of `REFUSALS` that applies,
    or for a feature that this release does not have yet.
    """
    for row in REFUSALS:
        if row.feature in features and row.applies(engine_args):
            raise ConfigError(f"{row.feature} does not run with {row.condition}: {row.reason}; {row.fix}")
    for name in features:
        if not FEATURES[name].is_available:
            raise ConfigError(
                f"vllm_ext.{name} ({FEATURES[name].summary}) is not part of vllm-ext {__version__}: "
                f"remove the block or set vllm_ext.{name}.enabled to false"
            )


def render_compatibility_table() -> str:
    """The refusals as a Markdown table; docs/activation.md carries it and a test keeps the two equal."""
    rows = [f"| {row.feature} | {row.condition} | {row.reason} | {row.fix} |" for row in REFUSALS]
    return "\n".join(["| feature | does not run with | because | do |", "|---|---|---|---|", *rows])
