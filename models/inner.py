"""States of inner layers: what comes out of chosen layers of a transformers model, for drafters that look there.

A drafter says which layers it wants to see (`inner_layers`). What it is given then is, for each row, those layers'
outputs in that order and behind them the state that enters the output embedding: [rows, (layers + 1) * hidden].

Invariant: what a model shows is the residual stream as it is, which grows from layer to layer; `normed` is what
drafters make of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.errors import UsageError


class InnerLayersError(UsageError):
    """A model has no such layers."""


def low_and_middle(num_layers: int) -> tuple[int, int]:
    """A layer near the embedding and the one in the middle. Raises InnerLayersError for models of one or two layers."""
    if num_layers < 3:
        raise InnerLayersError(f"A model of {num_layers} layers has no low and middle ones; give --features last.")
    return (num_layers - 1) // 8, (num_layers - 1) // 2


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raise InnerLayersError unless the model has all of these layers."""
    if any(not 0 <= layer < num_layers for layer in layers):
        raise InnerLayersError(
            f"The heads look at the layers {', '.join(map(str, layers))} of a model that has {num_layers}; "
            "give heads that were trained for this model."
        )


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of a transformers model's layers: the outermost one of that length."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise InnerLayersError(
        f"{type(model).__name__} keeps no list of its {num_layers} layers; use heads that see the last."
    )


class InnerStates:
    """Listens to `layers` of a model, from now on, and keeps what came out of them last."""

    def __init__(self, model: PreTrainedModel, num_layers: int, layers: Sequence[int]) -> None:
        """Raises InnerLayersError for layers that are not there or are wider than the last state."""
        check_layers(layers, num_layers)
        width = model.config.get_text_config(decoder=True).hidden_size
        if layers and width != model.get_output_embeddings().in_features:
            raise InnerLayersError(
                f"The inner states of {type(model).__name__} are not as wide as its last one; use heads that see the "
                "last state alone."
            )
        self._outputs: dict[int, Tensor] = {}
        self._layers = tuple(layers)
        found = decoder_layers(model, num_layers) if layers else ()
        self._handles = [found[layer].register_forward_hook(self._keeper(layer)) for layer in set(layers)]

    def _keeper(self, layer: int) -> Any:
        def keep(_module: nn.Module, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def beside(self, last: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the layers put out, of `rows` [n] only if given, with `last` behind: [..., (layers + 1) * hidden]."""
        outputs = [self._outputs[layer] for layer in self._layers]
        self._outputs.clear()
        if rows is not None:
            outputs = [output[..., rows, :] for output in outputs]
        return torch.cat([*outputs, last], dim=-1) if outputs else last

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def normed(hidden: Tensor, num_inner: int) -> Tensor:
    """Inner states brought to an RMS of 1, the last one as it is: [..., (num_inner + 1) * hidden], as before."""
    parts = hidden.reshape(*hidden.shape[:-1], num_inner + 1, -1)
    inner = parts[..., :-1, :].float()
    inner = inner * torch.rsqrt(inner.square().mean(-1, keepdim=True) + 1e-6)
    return torch.cat([inner.to(hidden.dtype), parts[..., -1:, :]], dim=-2).reshape(hidden.shape)
