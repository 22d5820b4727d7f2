# SPDX-License-Identifier: Apache-2.0
"""A transformers model without weights, and the stand-in that catches what its layers would be called with."""

from __future__ import annotations

from typing import Any

import torch

from vllm_ext.compress.source import SourceModel


class Catcher(torch.nn.Module):
    """Stands in for the layers and keeps what they would have been called with."""

    def __init__(self) -> None:
        super().__init__()
        self._caught: tuple[torch.Tensor, dict[str, Any]] | None = None

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._caught = hidden_states, arguments
        return hidden_states

    def take(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """(hidden states, keyword arguments) of the last call, once."""
        assert self._caught is not None
        caught, self._caught = self._caught, None
        return caught


def make_meta_model(source: SourceModel) -> torch.nn.Module:
    """The model of config.json on the meta device; no code of the checkpoint runs."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[source.config["model_type"]].from_dict(dict(source.config))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
