# SPDX-License-Identifier: Apache-2.0
"""What happens in each vLLM process when the pack is installed, and what the configuration hook does.

    every process        register() -> activate(): names, the hook, and the patches named in VLLM_EXT_ACTIVE
    API process          EngineArgs.create_engine_config -> configure_engine(): parse, check, set, export, call
    EngineCore, workers  activate() again, with VLLM_EXT_ACTIVE inherited from the API process

Idle means idle: without a `vllm_ext` block or one of our names in use, the hook calls the original and returns.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from vllm_ext import compat, config

logger = logging.getLogger("vllm.vllm_ext")

#: Comma-separated features the API process switched on; child processes apply their patches.
ACTIVE_ENV = "VLLM_EXT_ACTIVE"

#: Settings of the compiled CPU kernels (kernels/native), which users may make in the environment.
KERNEL_ENVS = ("VLLM_EXT_CACHE_DIR", "VLLM_EXT_CPU_ISA")

#: Everything `activate` does on a supported vLLM when no feature is asked for. A test compares vLLM before
#: and after with this list; docs/activation.md shows it.
ALWAYS_ON = (
    "register quantization method mxmoe",
    "add the KV-cache dtypes " + ", ".join(config.KV_CACHE_DTYPES),
    "add the structured-output backend " + config.STRUCTURED_BACKEND,
    "wrap vllm.engine.arg_utils:EngineArgs.create_engine_config",
)


def activate() -> list[str]:
    """Do the fixed list, then apply the patches of the features the parent process named.

    Returns the changes made, in the words of `ALWAYS_ON`. On an unsupported vLLM only a stub `mxmoe` is
    registered, whose use raises the message of `compat.describe_mismatch`.
    """
    installed = compat.find_installed_vllm()
    if installed is None or not installed.is_supported:
        message = compat.describe_mismatch(installed)
        logger.warning("%s", message)
        register_stub(message)
        return []
    changes = [register_quantization(), register_cache_dtypes(), register_backend_name(), install_hook()]
    announce_environment()
    apply_patches(active_features(), process="engine")
    return [change for change in changes if change is not None]


def register_quantization() -> str | None:
    """Register `mxmoe`; when our code cannot be imported, a stub whose use says which dependency is broken."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_ext.quantization.config import MxMoEConfig
    except ImportError as error:
        message = describe_broken_import(error)
        logger.warning("%s", message)
        register_stub(message)
        return None
    register_quantization_config("mxmoe")(MxMoEConfig)
    return ALWAYS_ON[0]


def register_cache_dtypes() -> str | None:
    """Add the pack's names to those of `--kv-cache-dtype`; None where vLLM's list is not what it was."""
    from vllm_ext.patches import registry

    return ALWAYS_ON[1] if registry.apply_record("kv_cache_dtypes") else None


def register_backend_name() -> str | None:
    """Add our name to the structured-output backends; None where vLLM's configuration is not what it was."""
    from vllm_ext.patches import registry

    return ALWAYS_ON[2] if registry.apply_record("structured_name") else None


def describe_broken_import(error: ImportError) -> str:
    """What is said where a module of the pack, or one it needs, cannot be imported."""
    return (
        f"vllm-ext cannot load its quantization code ({error}): reinstall it with "
        f"`pip install --force-reinstall --no-deps vllm-ext` and look at `vllm-ext doctor`"
    )


def register_stub(message: str) -> None:
    """Register a `mxmoe` that raises `message` when a model asks for it, instead of vLLM's 'unknown method'.

    Where this vLLM has no such registry any more, the message was already logged and nothing more can be done.
    """

    def refuse(*_args: object, **_kwargs: object) -> Any:
        raise ValueError(message)

    # Built with type(): the abstract methods must exist for the class to be constructed at all.
    methods: dict[str, Any] = dict.fromkeys(("get_supported_act_dtypes", "get_quant_method"), refuse)
    methods |= {
        "__init__": refuse,
        "get_name": classmethod(lambda cls: "mxmoe"),
        "get_min_capability": classmethod(lambda cls: 0),
        "get_config_filenames": staticmethod(lambda: []),
        "from_config": classmethod(refuse),
    }
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

        register_quantization_config("mxmoe")(type("UnavailableMxMoEConfig", (QuantizationConfig,), methods))
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("vllm-ext: mxmoe cannot be named in this vLLM either (%s)", error)


def install_hook() -> str | None:
    """Wrap `EngineArgs.create_engine_config`, the one always-on hook; None where its signature has changed."""
    from vllm_ext.patches import registry

    return ALWAYS_ON[3] if registry.apply_record("engine_config") else None


def configure_engine(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Body of the wrapped `EngineArgs.create_engine_config`. `engine_args` is never changed.

    Raises `config.ConfigError` (a ValueError) for a bad `vllm_ext` block, a refused combination, or a
    user-given scheduler, worker or executor class next to a feature that needs ours.
    """
    withdraw_state()
    block = config.find_block(engine_args.additional_config)
    features: tuple[str, ...] = ()
    cache_dtype, is_backend_ours = engine_args.kv_cache_dtype, config.names_our_backend(engine_args)
    named = config.names_ours(engine_args.quantization) or config.names_our_cache(cache_dtype) or is_backend_ours
    if block is not None or named:
        settings = config.parse(block)
        features = config.find_features(settings, engine_args.quantization, cache_dtype, is_backend_ours)
        prepare_features(features, engine_args)
    try:
        vllm_config = original(engine_args, *args, **kwargs)
        # A packed checkpoint names its method in its own config.json, which only the original reads.
        quantization = vllm_config.model_config.quantization
        if config.names_ours(quantization) and not config.names_ours(engine_args.quantization):
            features = config.find_features(config.parse(block), quantization, cache_dtype, is_backend_ours)
            prepare_features(features, engine_args)
        if features or block is not None:
            start_features(features, vllm_config)
    except BaseException:
        withdraw_state()
        raise
    return vllm_config


def prepare_features(features: tuple[str, ...], engine_args: Any) -> None:
    """Refuse what cannot run, import what will run, and export the state. Raises `config.ConfigError`."""
    config.check_compatibility(features, engine_args)
    if "mxmoe" in features:
        # Broken code has to be named here, not as an ImportError in the middle of an engine's start.
        try:
            import vllm_ext.quantization.online  # noqa: F401
        except ImportError as error:
            raise config.ConfigError(describe_broken_import(error)) from error
    export_state(features)


def start_features(features: tuple[str, ...], vllm_config: Any) -> None:
    """Seat our classes, apply patches, show our metrics at /metrics, and print the resolved state in one line."""
    from vllm_ext import __version__, observability

    if "smartspec" in features:
        from vllm_ext.scheduling import goodput_setup

        goodput_setup.check_engine(vllm_config)
    if "kv_cache" in features:
        from vllm_ext.kv_cache import engine_setup

        engine_setup.check_engine(vllm_config)
    if "structured" in features:
        from vllm_ext.structured import carrier
        from vllm_ext.structured import engine_setup as structured_setup

        structured_setup.prepare_engine(vllm_config)
        carrier.attach_carrier(vllm_config)
    if "semipd" in features:
        from vllm_ext.scheduling.semipd import setup as semipd_setup

        semipd_setup.check_engine(vllm_config)
    take_seats(features, vllm_config)
    apply_patches(features, process="api")
    # EngineCore may run in this process, or be forked from it with vLLM's plugins already loaded.
    apply_patches(features, process="engine")
    observability.install_collector()
    installed = compat.find_installed_vllm()
    logger.info(
        "vllm-ext %s on %s %s: %s",
        __version__,
        installed.distribution if installed else "vllm",
        installed.version if installed else "?",
        ", ".join(f"{name} on" for name in features) or "no feature on",
    )


def take_seats(features: tuple[str, ...], vllm_config: Any) -> None:
    """Put the pack's classes where vLLM has one seat per engine; `check_compatibility` found them free.

    Done on the finished configuration: only there is it settled whether scheduling is asynchronous.
    """
    from vllm_ext.scheduling import factory

    scheduler_config = vllm_config.scheduler_config
    base = "AsyncScheduler" if scheduler_config.async_scheduling else "Scheduler"
    scheduler = factory.name_scheduler(features, base)
    if scheduler is not None:
        scheduler_config.scheduler_cls = scheduler
    if "semipd" in features:
        from vllm_ext.scheduling.semipd import setup as semipd_setup

        semipd_setup.take_seats(vllm_config)


def export_state(features: Iterable[str]) -> None:
    """Tell the processes vLLM starts next which features are on."""
    from vllm_ext import observability

    names = ",".join(features)
    if names:
        os.environ[ACTIVE_ENV] = names
        observability.create_directory()
        announce_environment()


def withdraw_state() -> None:
    """Leave no trace of another engine: one that this process configured before, or that of the process that
    started this server. Processes that vLLM itself starts (through multiprocessing) keep what they inherit.
    """
    from vllm_ext import observability

    if ACTIVE_ENV not in os.environ or multiprocessing.parent_process() is not None:
        return
    for name in (ACTIVE_ENV, observability.DIRECTORY_ENV):
        os.environ.pop(name, None)
        sys.modules["vllm.envs"].environment_variables.pop(name, None)
    for name in KERNEL_ENVS:
        sys.modules["vllm.envs"].environment_variables.pop(name, None)


def announce_environment() -> None:
    """Make our variables known to vLLM where they are set: it warns about, or refuses, `VLLM_` names it does not know.

    vLLM hashes these getters into its compile-cache key. The features belong there, and what fixes the sizes of packed
    weights that a graph holds: the pack's version, and whether compiled kernels have brought their layout. Directories
    do not.
    """
    from vllm_ext import __version__, observability

    def describe_graph() -> str:
        # Asked by the process that compiles, after its weights are loaded; elsewhere the module is not imported.
        native = sys.modules.get("vllm_ext.kernels.native.load")
        layout = "records" if native is not None and native.is_loaded() else "plain"
        return f"{os.environ.get(ACTIVE_ENV)} {__version__} {layout}"

    if ACTIVE_ENV in os.environ:
        import vllm.envs

        vllm.envs.environment_variables[ACTIVE_ENV] = describe_graph
        for name in (observability.DIRECTORY_ENV, *KERNEL_ENVS):
            vllm.envs.environment_variables[name] = lambda: None


def active_features() -> tuple[str, ...]:
    """Features the parent process switched on for this process."""
    return tuple(name for name in os.environ.get(ACTIVE_ENV, "").split(",") if name)


def apply_patches(features: Iterable[str], process: str) -> None:
    """Apply every record of these features for `process` ("api", or "engine": EngineCore and its workers)."""
    from vllm_ext.patches import registry

    for record in registry.select_records(features, process):
        registry.apply_record(record.name)
