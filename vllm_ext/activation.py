# SPDX-License-Identifier: Apache-2.0
"""What happens in each vLLM process when the pack is installed, and what the configuration hook does.

    every process        register() -> activate(): names, the hook, and the patches named in VLLM_EXT_ACTIVE
    API process          EngineArgs.create_engine_config -> configure_engine(): parse, check, set, export, call
    EngineCore, workers  activate() again, with VLLM_EXT_ACTIVE inherited from the API process

Idle means idle: without a `vllm_ext` block or one of our names in use, the hook calls the original and returns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from vllm_ext import compat, config

logger = logging.getLogger("vllm.vllm_ext")

#: Comma-separated features the API process switched on; child processes apply their patches.
ACTIVE_ENV = "VLLM_EXT_ACTIVE"

#: Everything `activate` does on a supported vLLM when no feature is asked for. A test compares vLLM before
#: and after with this list; docs/activation.md shows it.
ALWAYS_ON = (
    "register quantization method mxmoe",
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
        register_stub(message)
        logger.warning("%s", message)
        return []
    changes = [register_quantization(), install_hook()]
    announce_environment()
    apply_patches(active_features(), process="engine")
    return [change for change in changes if change is not None]


def register_quantization() -> str | None:
    """Register `mxmoe`; when our code cannot be imported, a stub whose use says which dependency is broken."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_ext.quantization.config import MxMoEConfig

        register_quantization_config("mxmoe")(MxMoEConfig)
        return ALWAYS_ON[0]
    except ImportError as error:
        message = (
            f"vllm-ext cannot load its quantization code ({error}): reinstall it with "
            f"`pip install --force-reinstall --no-deps vllm-ext` and look at `vllm-ext doctor`"
        )
        register_stub(message)
        logger.warning("%s", message)
        return None


def register_stub(message: str) -> None:
    """Register a `mxmoe` that raises `message` when a model asks for it, instead of vLLM's 'unknown method'."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

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
    register_quantization_config("mxmoe")(type("UnavailableMxMoEConfig", (QuantizationConfig,), methods))


def install_hook() -> str | None:
    """Wrap `EngineArgs.create_engine_config`, the one always-on patch; None where its signature has changed."""
    from vllm_ext.patches import registry

    return ALWAYS_ON[1] if registry.apply_record("engine_config") else None


def configure_engine(original: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Body of the wrapped `EngineArgs.create_engine_config`.

    Raises `config.ConfigError` (a ValueError) for a bad `vllm_ext` block, a refused combination, or a
    user-given scheduler, worker or executor class next to a feature that needs ours.
    """
    additional_config = engine_args.additional_config
    block = additional_config.get("vllm_ext") if isinstance(additional_config, dict) else None
    settings = config.parse(block)
    features = config.find_features(settings, engine_args.quantization)
    config.check_compatibility(features, engine_args)
    if features:
        export_state(features)
        take_seats(features, engine_args)
    vllm_config = original(engine_args, *args, **kwargs)
    # A packed checkpoint names its method in its own config.json, which only the original reads.
    features = config.find_features(settings, vllm_config.model_config.quantization)
    config.check_compatibility(features, engine_args)
    export_state(features)
    if features or block is not None:
        start_features(features)
    return vllm_config


def take_seats(features: tuple[str, ...], engine_args: Any) -> None:
    """Put the pack's classes where vLLM has one seat per engine; `check_compatibility` found them free."""
    from vllm_ext.scheduling import factory

    base = "Scheduler" if engine_args.async_scheduling is False else "AsyncScheduler"
    scheduler = factory.name_scheduler(features, base)
    if scheduler is not None:
        engine_args.scheduler_cls = scheduler


def start_features(features: tuple[str, ...]) -> None:
    """Apply the API process's patches, show our metrics at /metrics, and print the resolved state in one line."""
    from vllm_ext import __version__, observability

    apply_patches(features, process="api")
    observability.install_collector()
    installed = compat.find_installed_vllm()
    logger.info(
        "vllm-ext %s on %s %s: %s",
        __version__,
        installed.distribution if installed else "vllm",
        installed.version if installed else "?",
        ", ".join(f"{name} on" for name in features) or "no feature on",
    )


def export_state(features: Iterable[str]) -> None:
    """Tell the processes vLLM starts next which features are on; an engine without any leaves no trace."""
    from vllm_ext import observability

    names = ",".join(features)
    if names:
        os.environ[ACTIVE_ENV] = names
        observability.create_directory()
    else:
        os.environ.pop(ACTIVE_ENV, None)
        os.environ.pop(observability.DIRECTORY_ENV, None)
    announce_environment()


def announce_environment() -> None:
    """Make our variables known to vLLM where they are set: it warns about, or refuses, `VLLM_` names it does not know.

    vLLM hashes these getters into its compile-cache key. The features belong there, and the pack's version, which
    fixes the sizes of packed weights that a graph holds; the directory does not.
    """
    from vllm_ext import __version__, observability

    if ACTIVE_ENV in os.environ:
        import vllm.envs

        vllm.envs.environment_variables[ACTIVE_ENV] = lambda: f"{os.environ.get(ACTIVE_ENV)} {__version__}"
        vllm.envs.environment_variables[observability.DIRECTORY_ENV] = lambda: None


def active_features() -> tuple[str, ...]:
    """Features the parent process switched on for this process."""
    return tuple(name for name in os.environ.get(ACTIVE_ENV, "").split(",") if name)


def apply_patches(features: Iterable[str], process: str) -> None:
    """Apply every record of these features for `process` ("api", or "engine": EngineCore and its workers)."""
    from vllm_ext.patches import registry

    for record in registry.select_records(features, process):
        registry.apply_record(record.name)
