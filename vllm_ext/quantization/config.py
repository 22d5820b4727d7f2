# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of `--quantization mxmoe`: which layer is quantized by what. `vllm_ext.activation` registers it."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_ext.quantization.checkpoint import validate_checkpoint
from vllm_ext.quantization.model_config import NUM_EXPERTS_KEYS, check_layers_are_there, find_layers
from vllm_ext.quantization.plan import ExpertSchemes, Plan, PlanError
from vllm_ext.quantization.safetensors_io import INDEX_FILE, SINGLE_FILE, TensorReader
from vllm_ext.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

    from vllm_ext.quantization.linear import MxMoEOnlineLinearMethod

logger = logging.getLogger("vllm.vllm_ext")

#: Keys of a Hugging Face configuration that declare experts; the last one of models that configure layer by layer.
EXPERT_COUNT_NAMES = (*NUM_EXPERTS_KEYS, "block_configs")


#: Last parts of the module paths of routers: [experts, hidden] and decisive for the output, they stay as they are.
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


class MxMoEConfig(QuantizationConfig):
    """Which scheme each layer gets, and where its weights come from.

    plan None      the default plan for the experts of a bf16, fp16 or fp32 checkpoint; everything else stays
    plan           its experts and linear layers; a checkpoint of full weights is rounded while it loads
    is_packed      the checkpoint holds the tensors of the plan's schemes

    vLLM calls the constructor without arguments for `--quantization mxmoe` on a checkpoint that is not quantized,
    because `get_config_filenames` is empty (`vllm.model_executor.model_loader.weight_utils.get_quant_config`).
    """

    def __init__(self, plan: Plan | None = None, is_packed: bool = False) -> None:
        super().__init__()
        self.plan = plan
        self.is_packed = is_packed
        self._mappers: list[Any] = []
        #: Modules of the plan that a layer of the model has taken its scheme from, and all that could have.
        self._used: set[str] = set()
        self._seen: set[str] = set()
        #: Methods of linear layers that are rounded while they load, until loading begins.
        self._online_linears: list[MxMoEOnlineLinearMethod] = []

    def __repr__(self) -> str:
        if self.plan is None:
            return "MxMoEConfig(online, default plan)"
        origin = "packed" if self.is_packed else "online"
        return f"MxMoEConfig({origin}, plan of {len(self.plan.modules)} modules, sha256 {self.plan.sha256[:12]})"

    @classmethod
    def get_name(cls) -> str:
        """The name users give to `--quantization`."""
        return "mxmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Model dtypes that can be served."""
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability of the oldest GPU served: Ampere. Not asked on the CPU."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: a plan is in `config.json` or there is none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MxMoEConfig:
        """Read `quantization_config`, from a packed directory or from `--hf-overrides` (see `plan.py`).

        Raises PlanError (a ValueError) for a plan that cannot be used, or that is empty.
        """
        plan = Plan.from_config(config)
        if not plan.modules:
            raise PlanError("the plan names no module, so nothing would be quantized; drop quantization_config")
        return cls(plan, is_packed=plan.is_packed)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Claim no other method's checkpoint. vLLM asks this for every quantized checkpoint."""
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look at the whole model before any process loads it.

        Raise ValueError for a family that is refused by name (`compress.families.layout.REFUSED`). Without a plan: warn
        once where the model declares no experts, because it would be served unquantized without a word. In a local
        directory: raise CheckpointError or PlanError, naming tensor or layer, for damaged headers and files or whole
        layers that are not there, and, packed, for every tensor that is not (`checkpoint.validate_checkpoint`). vLLM
        does not miss tensors of quantized models.
        """
        directory = Path(model_name)
        layers: Collection[int] = ()
        # Without weight files the engine makes weights up (--load-format dummy), or vLLM says what it misses.
        if (directory / INDEX_FILE).is_file() or (directory / SINGLE_FILE).is_file():
            reader = validate_checkpoint(directory).reader if self.is_packed else TensorReader(directory)
            layers = find_layers(reader.infos)
        if hf_config is None:
            return
        # Here and below: what plans and families are is not needed to register the method's name.
        from vllm_ext.compress.families.layout import describe_refusal

        text_config = hf_config.get_text_config()
        # After --hf-overrides, which config.json does not show. Configured layer by layer, a model may have empty ones.
        if not getattr(text_config, "block_configs", None):
            check_layers_are_there(getattr(text_config, "num_hidden_layers", 0), layers)
        for config in (hf_config, text_config):
            refusal = describe_refusal(getattr(config, "model_type", None))
            if refusal is not None:
                raise ValueError(refusal)
        if self.plan is not None:
            return
        if not any(getattr(text_config, name, None) for name in EXPERT_COUNT_NAMES):
            logger.warning(
                "--quantization mxmoe quantizes the routed experts of MoE layers, and %s (model type %r) declares "
                "none: it is served unquantized, in its own dtype. Drop --quantization mxmoe, or choose a method "
                "for dense models",
                model_name,
                getattr(hf_config, "model_type", None),
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Put the plan under vLLM's module paths, where a model's differ from its checkpoint's.

        vLLM calls this once for every module class that carries the mapper; each mapper counts once.
        """
        if self.plan is None or hf_to_vllm_mapper in self._mappers:
            return
        self._mappers.append(hf_to_vllm_mapper)
        modules = (*self.plan.modules, *self.plan.ignore)
        self.plan = self.plan.rename({module: hf_to_vllm_mapper.map_name(module) or module for module in modules})

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM asks this when the model stands and before the first weight is read: the time for `check_plan`."""
        self.check_plan()
        # Once: a reload, which asks again, counts on its own.
        while self._online_linears:
            self._online_linears.pop().await_bias()
        return QuantizationConfig.get_checkpoint_weight_mapper()

    def check_plan(self) -> None:
        """Raise PlanError for a module of the plan that no layer of the model is.

        Under pipeline parallelism a rank builds only some of the layers, and checks those.
        """
        from vllm.distributed.parallel_state import get_pp_group, model_parallel_is_initialized

        unused = sorted(self.plan.modules.keys() - self._used) if self.plan is not None else []
        if model_parallel_is_initialized() and get_pp_group().world_size > 1:
            built = {find_decoder_layer(module) for module in self._seen} - {None}
            unused = [module for module in unused if find_decoder_layer(module) in built]
        if not unused:
            return
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        nearest = difflib.get_close_matches(unused[0], sorted(self._seen), n=1)
        hint = f"; nearest is {nearest[0]}" if nearest else ""
        raise PlanError(f"the plan names {unused[0]}{more}, which is no quantizable layer of this model{hint}")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer, by its module path in vLLM.

        Raises ValueError for an MoE layer that mixed_moe cannot compute, and PlanError for a plan that names
        a router, an embedding or the output head, some of a layer's experts or fused parts only, or different
        schemes for fused parts.
        """
        # Importing these initialises much of vLLM, so not at the top: this module loads in every vLLM process.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase

        if isinstance(layer, RoutedExperts):
            return self.get_expert_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self.get_linear_method(layer, prefix)
        if self.plan is not None and prefix in self.plan.modules:
            raise PlanError(
                f"the plan names {prefix}, a {type(layer).__name__}: mxmoe quantizes experts and linear layers"
            )
        return None

    def get_expert_method(self, layer: RoutedExperts, prefix: str) -> FusedMoEMethodBase:
        """The method of the routed experts of a layer."""
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

        from vllm_ext.quantization.moe import check_layer, crashes_unquantized
        from vllm_ext.quantization.online import MxMoEOnlineMethod
        from vllm_ext.quantization.packed import MxMoEPackedMethod

        if self.plan is None:
            check_layer(layer, prefix)
            return MxMoEOnlineMethod(layer.moe_config, prefix)
        num_experts = layer.moe_config.num_logical_experts
        schemes = self.plan.find_experts(prefix, num_experts)
        modules = [f"{prefix}.{expert}" for expert in range(num_experts)]
        self._seen.update(modules)
        if schemes is not None:
            self._used.update(modules)
        if schemes is None or not any(scheme.is_quantized for pair in schemes for scheme in pair):
            if not crashes_unquantized(layer):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            schemes = [ExpertSchemes(Scheme(16), Scheme(16))] * num_experts
        check_layer(layer, prefix)
        method: MxMoEPackedMethod | MxMoEOnlineMethod
        if self.is_packed:
            method = MxMoEPackedMethod(layer.moe_config, prefix, schemes)
        else:
            method = MxMoEOnlineMethod(layer.moe_config, prefix, schemes)
        method.check_plan = self.check_plan
        return method

    def get_linear_method(self, layer: LinearBase, prefix: str) -> LinearMethodBase:
        """The method of a linear layer, fused or not."""
        from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        if self.plan is None:
            return UnquantizedLinearMethod()
        parent, _, name = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(name, [name])
        modules = [f"{parent}.{shard}" if parent else shard for shard in shards]
        scheme = self.plan.find_linear(prefix, shards)
        if isinstance(layer, GateLinear) or name in ROUTER_NAMES:
            if scheme is not None:
                raise PlanError(f"the plan names {prefix}, a router: mxmoe leaves routers as they are")
            return UnquantizedLinearMethod()
        self._seen.update(modules)
        if scheme is None:
            return UnquantizedLinearMethod()
        from vllm_ext.compress.families.layout import find_reason_to_keep

        if reason := find_reason_to_keep(name):
            raise PlanError(f"the plan names {prefix}, which mxmoe leaves as it is, because {reason}: leave it out")
        self._used.update(modules)
        if not scheme.is_quantized:
            return UnquantizedLinearMethod()
        from vllm_ext.quantization.linear import MxMoELinearMethod, MxMoEOnlineLinearMethod

        method: MxMoELinearMethod | MxMoEOnlineLinearMethod
        if self.is_packed:
            method = MxMoELinearMethod(scheme, prefix, shards)
        else:
            method = MxMoEOnlineLinearMethod(scheme, prefix, shards)
            self._online_linears.append(method)
        method.check_plan = self.check_plan
        return method


def find_decoder_layer(module: str) -> str | None:
    """The part of a module path that names its decoder layer, `model.layers.3`; None outside of them."""
    match = re.match(r"(.+?\.\d+)\.", module)
    return match[1] if match else None
