# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of `--quantization mxmoe`: which layer is quantized by what. `vllm_ext.activation` registers it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

logger = logging.getLogger("vllm.vllm_ext")

#: Names under which Hugging Face configurations give their number of experts.
EXPERT_COUNT_NAMES = (
    "num_experts",
    "moe_num_experts",
    "n_routed_experts",
    "num_local_experts",
    "block_configs",
)


class MxMoEConfig(QuantizationConfig):
    """Mixed-precision experts from a bf16, fp16 or fp32 checkpoint; everything else stays as it is.

    vLLM calls the constructor without arguments for `--quantization mxmoe` on a checkpoint that is not quantized,
    because `get_config_filenames` is empty (`vllm.model_executor.model_loader.weight_utils.get_quant_config`).
    """

    def __repr__(self) -> str:
        return "MxMoEConfig(online, default plan)"

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
        """Refuse a packed checkpoint: ValueError naming what was found."""
        raise ValueError(
            f"packed mxmoe checkpoints are not served by this version of vllm-ext yet; config.json has "
            f"quantization_config {_shorten(config)}. Serve the original bf16 checkpoint with --quantization mxmoe"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Claim no other method's checkpoint. vLLM asks this for every quantized checkpoint."""
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Warn once where the model declares no experts: it would be served unquantized without a word."""
        if hf_config is None:
            return
        text_config = hf_config.get_text_config()
        if not any(getattr(text_config, name, None) for name in EXPERT_COUNT_NAMES):
            logger.warning(
                "--quantization mxmoe quantizes the routed experts of MoE layers, and %s (model type %r) declares "
                "none: it is served unquantized, in its own dtype. Drop --quantization mxmoe, or choose a method "
                "for dense models",
                model_name,
                getattr(hf_config, "model_type", None),
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer. Raises ValueError for an MoE layer that mixed_moe cannot compute."""
        # Importing these initialises much of vLLM, so not at the top: this module loads in every vLLM process.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from vllm_ext.quantization.moe import check_layer
        from vllm_ext.quantization.online import MxMoEOnlineMethod

        if isinstance(layer, RoutedExperts):
            check_layer(layer, prefix)
            return MxMoEOnlineMethod(layer.moe_config, prefix)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return None


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
