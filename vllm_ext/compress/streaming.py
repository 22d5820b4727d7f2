# SPDX-License-Identifier: Apache-2.0
"""A model run one decoder layer at a time: memory is one layer and the activations, whatever the model's size."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vllm_ext.compress.families import RoutedTokens
from vllm_ext.compress.meta_model import Catcher, make_meta_model
from vllm_ext.compress.source import SourceModel
from vllm_ext.quantization.safetensors_io import CheckpointError

#: Windows of one forward pass.
BATCH_WINDOWS = 4

#: Rows whose logits over the vocabulary exist at a time.
HEAD_ROWS = 1024


class LayerStream:
    """The decoder layers of an unquantized checkpoint, run in turn over windows of tokens.

    source: the model; also a rotated one. windows: int64 [windows, context], array or tensor. dtype: of weights and
    activations. batch_windows: windows of one forward pass. device: where the layers run.

    The transformers model is built on the meta device from config.json, without remote code, and one layer after the
    other is filled from the checkpoint. Masks and positions are those that the model itself prepares: its forward
    runs once per batch size with the layers taken out.
    Raises ValueError for windows that are not two-dimensional or hold a token that the vocabulary does not, and
    CheckpointError for a checkpoint that does not fill the model.
    """

    def __init__(
        self,
        source: SourceModel,
        windows: np.ndarray | torch.Tensor,
        dtype: torch.dtype = torch.float32,
        batch_windows: int = BATCH_WINDOWS,
        device: str | torch.device = "cpu",
    ) -> None:
        tokens = torch.as_tensor(windows, dtype=torch.int64)
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"windows must be [windows, context] and not empty, got {list(tokens.shape)}")
        if batch_windows < 1:
            raise ValueError(f"batch_windows must be at least 1, got {batch_windows}")
        activation = source.config.get("hidden_act", "silu")
        if activation != "silu":
            raise CheckpointError(f"config.json has hidden_act = {activation!r}; experts are run with silu alone")
        self.source, self.family = source, source.family
        self.dtype, self.device = dtype, torch.device(device)
        self._batches = list(tokens.to(self.device).split(batch_windows))
        self._model = make_meta_model(source)
        self._decoder = self.family.find_decoder(self._model)
        vocabulary = self._decoder.embedding.num_embeddings
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"windows hold tokens from {found}, the model has 0 to {vocabulary - 1}")
        self._arguments: dict[int, dict[str, Any]] = {}

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._decoder.layers)

    def embed(self) -> list[torch.Tensor]:
        """Inputs of the first layer, [batch, context, hidden] per batch; prepares masks and positions on the way."""
        reader = self.source.reader
        residual = self.family.describe_residual(self.source.config, reader.infos)
        table = reader.read(residual.embedding).to(self.device, self.dtype)
        base = copy.copy(self._decoder.base)
        # The copy gets its own tables of parts, so that the original keeps its layers.
        base._modules = dict(base._modules)
        catchers = [Catcher() for _ in self._decoder.layers]
        for name, part in list(base._modules.items()):
            if part is self._decoder.embedding:
                base._modules[name] = torch.nn.Embedding.from_pretrained(table, freeze=True)
            elif part is self._decoder.layers:
                base._modules[name] = torch.nn.ModuleList(catchers)
            elif part is self._decoder.norm:
                base._modules[name] = torch.nn.Identity()
            elif part is not None and any(buffer.is_meta for buffer in part.buffers()):
                # Rotary frequencies: computed from the configuration, never stored.
                base._modules[name] = type(part)(config=self._model.config).to(self.device)
        hidden = []
        with torch.no_grad():
            for batch in self._batches:
                base(input_ids=batch, use_cache=False)
                (states, arguments), *others = [catcher.take() for catcher in catchers]
                if not all(_are_equal(arguments, other) for _, other in others):
                    raise CheckpointError(
                        f"layers of {self.source.directory} see windows of {batch.shape[1]} tokens through different "
                        f"masks (sliding windows): only models with one kind of attention are run layer by layer"
                    )
                self._arguments[len(batch)] = arguments
                hidden.append(states.to(self.dtype))
        return hidden

    def build_layer(self, index: int) -> torch.nn.Module:
        """One decoder layer with its weights, in evaluation mode and without gradients."""
        state = self.family.read_layer(self.source.reader, index, self.dtype, self.device)
        return self.fill_layer(index, state)

    def fill_layer(self, index: int, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A decoder layer whose parameters are the given tensors themselves, not copies."""
        layer = copy.deepcopy(self._decoder.layers[index])
        wrong = layer.load_state_dict(dict(state), strict=False, assign=True)
        for names, what in ((wrong.missing_keys, "lacks"), (wrong.unexpected_keys, "has the unexpected")):
            if names:
                raise CheckpointError(f"layer {index} of {self.source.directory} {what} {names[0]}: copy it again")
        return layer.eval().requires_grad_(False)

    def run(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of a decoder layer for the batches of this stream, [batch, context, hidden] each, no gradients."""
        with torch.no_grad():
            return [self.run_batch(module, hidden) for hidden in inputs]

    def run_batch(self, module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """As `run` for one batch, in the caller's gradient mode."""
        if len(hidden) not in self._arguments:
            raise ValueError(
                f"batch of {len(hidden)} windows: this stream has {sorted(self._arguments) or 'not begun'}"
            )
        output = module(hidden, **self._arguments[len(hidden)])
        return output[0] if isinstance(output, tuple) else output

    def layers(self) -> Iterator[StreamedLayer]:
        """The layers in forward order; each one's inputs are the unquantized outputs of the one before.

        A layer's weights are released when the next is asked for. Its module must not be changed.
        """
        hidden = self.embed()
        for index in range(self.num_layers):
            layer = StreamedLayer(index, self.build_layer(index), hidden, self)
            yield layer
            hidden = layer.outputs
            layer.release()
            del layer

    def loss(self, outputs: Sequence[torch.Tensor]) -> float:
        """Mean negative log likelihood (nats) of the windows' tokens, each window's first excluded.

        outputs: of the last layer, on whatever path. Raises ValueError where it is NaN or infinite, which no sound
        weights give.
        """
        total, count = 0.0, 0
        for logits, targets in self.iterate_logits(outputs):
            total += float(functional.cross_entropy(logits, targets, reduction="sum").double())
            count += len(targets)
        self._check_loss(total)
        return total / count

    def iterate_logits(
        self, outputs: Sequence[torch.Tensor], every: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(logits float32 [rows, vocabulary], the tokens they predict int64 [rows]) of all windows in order, a few
        rows at a time, without gradients; the last position of each window predicts nothing and is left out.

        outputs: of the last layer, on whatever path. every: only each n-th of those parts.
        """
        norm, head = self._build_head()
        number = 0
        for hidden, batch in zip(outputs, self._batches, strict=True):
            # No yield inside of no_grad: the caller would run in that mode too.
            with torch.no_grad():
                states, targets = norm(hidden[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
            for start in range(0, len(states), HEAD_ROWS):
                rows = slice(start, start + HEAD_ROWS)
                number += 1
                if (number - 1) % every:
                    continue
                with torch.no_grad():
                    logits = functional.linear(states[rows], head).float()
                yield logits, targets[rows]

    def loss_gradients(
        self, folder: Path, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(layer, gradient of the mean token loss at its output) from the last layer to the first.

        The gradients are [batch, context, hidden] per batch, in the stream's own dtype, and belong to the unquantized
        model. dtype: in which the inputs of the layers wait in files of `folder`; each layer is run again to go
        backward through it, so one layer is in memory at a time.
        Raises ValueError where the loss is NaN or infinite, and CheckpointError where the folder cannot hold them.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        outputs: list[torch.Tensor] = []
        for layer in self.layers():
            if layer.index:  # nothing goes backward through the first
                stored = {str(number): hidden.to(dtype).cpu() for number, hidden in enumerate(layer.inputs)}
                try:
                    save_file(stored, folder / f"{layer.index}.safetensors")
                except (SafetensorError, OSError) as error:
                    size = sum(tensor.nbytes for tensor in stored.values())
                    raise CheckpointError(
                        f"keeping activations in {folder} failed ({error}): free {size} bytes for each layer there, or "
                        f"give another folder with --work"
                    ) from error
            outputs = layer.outputs
        gradients = self._head_gradients(outputs)
        del outputs
        for index in reversed(range(self.num_layers)):
            yield index, gradients
            if index == 0:
                return
            place = folder / f"{index}.safetensors"
            module, inputs = self.build_layer(index), load_file(place)
            place.unlink()
            for number in range(len(self._batches)):
                hidden = inputs[str(number)].to(self.device, self.dtype).requires_grad_()
                with torch.enable_grad():
                    output = self.run_batch(module, hidden)
                (gradients[number],) = torch.autograd.grad(output, hidden, gradients[number])

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of the windows is {loss}: a weight of {self.source.directory} is damaged, in a layer, the "
                f"last norm or the head; copy the checkpoint again"
            )

    def _head_gradients(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        norm, head = self._build_head()
        count = sum(batch[:, 1:].numel() for batch in self._batches)
        gradients = []
        for hidden, batch in zip(outputs, self._batches, strict=True):
            hidden = hidden.detach().requires_grad_()
            # One window at a time: logits are the largest tensor of all.
            parts = []
            for window, tokens in zip(hidden.unbind(0), batch, strict=True):
                with torch.enable_grad():
                    logits = functional.linear(norm(window[:-1]), head).float()
                    loss = functional.cross_entropy(logits, tokens[1:], reduction="sum") / count
                self._check_loss(float(loss.detach()))
                parts.append(torch.autograd.grad(loss, window)[0])
            gradients.append(torch.stack(parts))
        return gradients

    def _build_head(self) -> tuple[torch.nn.Module, torch.Tensor]:
        reader = self.source.reader
        residual = self.family.describe_residual(self.source.config, reader.infos)
        norm = copy.deepcopy(self._decoder.norm)
        norm.load_state_dict({"weight": reader.read(residual.head_gain).to(self.device, self.dtype)}, assign=True)
        return norm.requires_grad_(False), reader.read(residual.head).to(self.device, self.dtype)


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two sets of arguments of layers are the same, tensors by value."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first is second or torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[name], second[name]) for name in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return first is second or bool(first == second)


@dataclass
class StreamedLayer:
    """One decoder layer on the unquantized path.

    module: transformers' layer with its weights, not to be changed. inputs: [batch, context, hidden] per batch.
    """

    index: int
    module: torch.nn.Module
    inputs: list[torch.Tensor]
    stream: LayerStream
    _outputs: list[torch.Tensor] | None = field(default=None, repr=False)
    _routed: RoutedTokens | None = field(default=None, repr=False)

    @property
    def outputs(self) -> list[torch.Tensor]:
        """Of the unquantized layer for `inputs`; computed once."""
        if self._outputs is None:
            self._outputs, self._routed = self.trace(self.module, self.inputs)
        return self._outputs

    @property
    def routed(self) -> RoutedTokens | None:
        """What its experts saw on the unquantized path; None for a layer without experts."""
        if self._outputs is None:
            self._outputs, self._routed = self.trace(self.module, self.inputs)
        return self._routed

    def run(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of a version of this layer for given inputs; masks and positions are added."""
        return self.stream.run(module, inputs)

    def trace(
        self, module: torch.nn.Module, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], RoutedTokens | None]:
        """(outputs, what the experts were given) of a version of this layer for given inputs."""
        experts = self.stream.family.find_experts(module)
        if experts is None:
            return self.run(module, inputs), None
        parts: list[RoutedTokens] = []

        def record(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            parts.append(self.stream.family.read_expert_inputs(arguments))

        handle = experts.register_forward_pre_hook(record)
        try:
            outputs = self.run(module, inputs)
        finally:
            handle.remove()
        return outputs, RoutedTokens.join(parts)

    @property
    def num_experts(self) -> int:
        """Routed experts; 0 for a dense layer."""
        experts = self.stream.family.find_experts(self.module)
        return 0 if experts is None else int(next(experts.parameters()).shape[0])

    def release(self) -> None:
        """Drop the weights and activations, whoever still holds the object."""
        self.module = torch.nn.Module()
        self.inputs, self._outputs, self._routed = [], None, None
