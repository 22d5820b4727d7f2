# SPDX-License-Identifier: Apache-2.0
"""Bit plans: the scheme of every quantized module of a checkpoint, as `config.json` carries it.

    "quantization_config": {
        "quant_method": "mxmoe", "version": 1,
        "plan": {"model.layers.0.self_attn.q_proj": "w4a16_g128",
                 "model.layers.0.mlp.experts.3": {"gate_up": "w3a16_g128", "down": "w4a16_g128"}},
        "ignore": ["lm_head"], "plan_sha256": "...", "producer": {...}}

Keys are checkpoint module paths without `.weight`; a key that ends in `.experts.<number>` is an expert and has two
blocks. Modules the plan does not name stay as they are; `ignore` says which of them on purpose.

`producer` says who wrote the tensors, {"name": "vllm-ext", "version": ...}: with it the checkpoint is packed, its
tensors are those of the plan's schemes. Without it (or empty) the checkpoint holds full weights, which are rounded by
the plan while they load: `vllm serve MODEL --hf-overrides '{"quantization_config": {...}}'`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_ext.quantization.scheme import Scheme

#: Version of the layout of `quantization_config` and of the tensors beside it.
FORMAT_VERSION = 1

_KEYS = ("quant_method", "version", "plan", "ignore", "plan_sha256", "producer")
#: No leading zeros: experts.03 and experts.3 would be the same expert.
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>0|[1-9]\d*)")


class PlanError(ValueError):
    """A plan or `quantization_config` that cannot be used; the message names the module, the value and the fix."""


class ExpertSchemes(NamedTuple):
    """Schemes of one expert, in the order of the kernels' `Block`: gate and up share one."""

    gate_up: Scheme
    down: Scheme


ModuleSchemes = Scheme | ExpertSchemes


@dataclass(frozen=True)
class Plan:
    """Schemes by checkpoint module path, and the modules left as they are on purpose."""

    modules: Mapping[str, ModuleSchemes]
    ignore: tuple[str, ...] = ()
    producer: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, modules: Any, ignore: Any = (), producer: Any = None) -> Plan:
        """Read the JSON form. Raises PlanError naming the module and the bad value."""
        if not isinstance(modules, Mapping):
            raise PlanError(f"the plan must map module paths to schemes, got {modules!r}")
        if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
            raise PlanError(f"ignore must be a list of module paths, got {ignore!r}")
        if producer is not None and not isinstance(producer, Mapping):
            raise PlanError(f"producer must be a mapping, got {producer!r}")
        parsed = {_check_module(module): _parse_schemes(module, value) for module, value in modules.items()}
        if both := [name for name in ignore if name in parsed]:
            raise PlanError(f"{both[0]} is in the plan and in ignore: take it out of one of them")
        return cls(parsed, tuple(ignore), dict(producer or {}))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Plan:
        """Read a `quantization_config`.

        Raises PlanError for an unknown key, another format version, and a plan whose hash is not `plan_sha256`.
        """
        for key in config:
            if key not in _KEYS:
                nearest = difflib.get_close_matches(str(key), _KEYS, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(_KEYS)}"
                raise PlanError(f"quantization_config has an unknown key {key!r}; {hint}")
        method = config.get("quant_method", "mxmoe")
        if method != "mxmoe":
            raise PlanError(f"quantization_config has quant_method {method!r}, expected 'mxmoe'")
        version = config.get("version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise PlanError(
                f"quantization_config has version {version!r}, this vllm-ext reads version {FORMAT_VERSION}: "
                f"install the vllm-ext release that wrote the checkpoint, or quantize the model again"
            )
        plan = cls.parse(config.get("plan"), config.get("ignore", ()), config.get("producer"))
        recorded = config.get("plan_sha256")
        if recorded is not None and recorded != plan.sha256:
            raise PlanError(
                f"plan_sha256 is {recorded!r}, but the plan hashes to {plan.sha256}: the plan in config.json was "
                f"changed after the checkpoint was written; quantize the model again"
            )
        return plan

    def names(self, module: str) -> bool:
        """Whether the plan says anything about a module: a scheme, or to leave it as it is."""
        return module in self.modules or module in self.ignore

    @property
    def is_packed(self) -> bool:
        """Whether somebody wrote packed tensors by this plan; else it is a wish for full weights."""
        return bool(self.producer)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready values, as it stands under "plan"."""
        return {
            module: str(schemes)
            if isinstance(schemes, Scheme)
            else {"gate_up": str(schemes.gate_up), "down": str(schemes.down)}
            for module, schemes in self.modules.items()
        }

    def to_config(self) -> dict[str, Any]:
        """The whole `quantization_config`."""
        return {
            "quant_method": "mxmoe",
            "version": FORMAT_VERSION,
            "plan": self.to_json(),
            "ignore": list(self.ignore),
            "plan_sha256": self.sha256,
            "producer": dict(self.producer),
        }

    @property
    def sha256(self) -> str:
        """Hash of the plan alone, independent of the order of its modules."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def find_linear(self, module: str, shards: Iterable[str]) -> Scheme | None:
        """Scheme of a linear layer that vLLM fuses from `shards` (sibling names; one for a layer of its own).

        module: checkpoint path of the fused layer, its last part replaced by each shard's name.
        None where the plan names none of them. Raises PlanError where the shards disagree.
        """
        parent, _, _ = module.rpartition(".")
        found = {shard: self.modules.get(f"{parent}.{shard}" if parent else shard) for shard in shards}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{shard}: {schemes or 'not in the plan'}" for shard, schemes in found.items())
            raise PlanError(f"{module} is one fused layer in vLLM, but its parts have different schemes ({shown})")
        schemes = next(iter(found.values()))
        if isinstance(schemes, ExpertSchemes):
            raise PlanError(f"{module} is a linear layer; the plan gives it an expert's gate_up and down")
        return schemes

    def find_experts(self, layer: str, num_experts: int) -> list[ExpertSchemes] | None:
        """Schemes of every expert of a layer (`...mlp.experts`), by global expert id; None where it names none.

        Raises PlanError for an expert the layer does not have, or one the plan leaves out.
        """
        found: dict[int, ExpertSchemes] = {}
        for module, schemes in self.modules.items():
            match = _EXPERT.fullmatch(module)
            if match is not None and match["layer"] == layer:
                assert isinstance(schemes, ExpertSchemes)
                found[int(match["expert"])] = schemes
        if not found:
            return None
        if extra := sorted(expert for expert in found if expert >= num_experts):
            raise PlanError(f"the plan names {layer}.{extra[0]}, but the layer has {num_experts} experts")
        # Not a list: num_experts may be a number from a damaged file.
        missing = next((expert for expert in range(num_experts) if expert not in found), None)
        if missing is not None:
            raise PlanError(
                f"the plan names {len(found)} of the {num_experts} experts of {layer} and leaves out "
                f"{layer}.{missing}; give it a scheme, w16a16 to leave it as it is"
            )
        return [found[expert] for expert in range(num_experts)]

    def rename(self, names: Mapping[str, str]) -> Plan:
        """The same plan under other module paths, for models whose paths in vLLM differ from the checkpoint's."""
        return Plan(
            {names.get(module, module): schemes for module, schemes in self.modules.items()},
            tuple(names.get(module, module) for module in self.ignore),
            self.producer,
        )


def is_expert(module: str) -> bool:
    """Whether a module path is that of a routed expert."""
    return _EXPERT.fullmatch(module) is not None


def _check_module(module: Any) -> str:
    if not isinstance(module, str) or not module:
        raise PlanError(f"the plan's keys are module paths, got {module!r}")
    if re.fullmatch(r".+\.experts\.0\d+", module):
        raise PlanError(f"the plan names {module!r}; write the expert's number without leading zeros")
    if module.endswith((".weight", ".qweight")):
        raise PlanError(f"the plan's keys are module paths without the tensor's name, got {module!r}")
    return module


def _parse_schemes(module: str, value: Any) -> ModuleSchemes:
    if is_expert(module):
        if not isinstance(value, Mapping) or set(value) != {"gate_up", "down"}:
            raise PlanError(f'{module} is an expert: give {{"gate_up": SCHEME, "down": SCHEME}}, got {value!r}')
        return ExpertSchemes(*(_parse_scheme(f"{module} {block}", value[block]) for block in ExpertSchemes._fields))
    return _parse_scheme(module, value)


def _parse_scheme(name: str, value: Any) -> Scheme:
    if not isinstance(value, str):
        raise PlanError(f"{name}: a scheme is a name such as 'w4a16_g128', got {value!r}")
    try:
        return Scheme.parse(value)
    except ValueError as error:
        raise PlanError(f"{name}: {error}") from error
