"""The designs of heads that can be trained, behind one interface: how each is made, taught, judged, written, described.

Invariant: a design's heads see only what `TrunkCache` keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import CheckpointError, load_heads, read_heads, save_heads
from models.drafters.resblock import ResBlockHeads
from models.drafters.sequential import SequentialHeads, Shape
from models.sequential_checkpoint import build_sequential, is_sequential, read_sequential, save_sequential
from models.train.acceptance import Text, rank_text
from models.train.distill import Distiller, Recipe, ResBlockDistiller
from models.train.sequential import SequentialDistiller, rank_sequential
from models.train.trunk import Frozen, TrunkCache

AnyHeads = ResBlockHeads | SequentialHeads
H = TypeVar("H", bound=AnyHeads)


@dataclass(frozen=True)
class Sizes:
    """What the operator chooses of heads."""

    num_heads: int
    num_layers: int = 1  # residual blocks of each
    inner_layers: tuple[int, ...] = ()  # that they see besides the last state


class Design(ABC):
    """One kind of heads."""

    recipe: Recipe  # what it is trained with unless the operator says otherwise

    @abstractmethod
    def new(self, frozen: Frozen, token_ids: Tensor, sizes: Sizes) -> AnyHeads:
        """Untrained heads in float32 over the frozen LM head's rows of the draft vocabulary, in the trunk's dtype."""

    @abstractmethod
    def distiller(self, heads: Any, cache: TrunkCache, training: NDArray[np.bool_], recipe: Recipe) -> Distiller[Any]:
        """Who teaches them."""

    @abstractmethod
    def save(self, folder: Path, heads: Any, **about: Any) -> None:
        """Write a folder that the server loads; `about` as in `checkpoint.save_heads`."""

    @abstractmethod
    def describe(self, heads: Any) -> str:
        """What they are, for the model card."""


class ResBlocks(Design):
    """Medusa's own: independent heads of residual blocks."""

    recipe = Recipe()

    def new(self, frozen: Frozen, token_ids: Tensor, sizes: Sizes) -> ResBlockHeads:
        rows = frozen.lm_head[token_ids.to(frozen.lm_head.device)]
        return in_float(ResBlockHeads(rows, token_ids=token_ids, **asdict(sizes)))

    def distiller(self, heads: Any, cache: TrunkCache, training: NDArray[np.bool_], recipe: Recipe) -> Distiller[Any]:
        return ResBlockDistiller(heads, cache, training, recipe)

    def save(self, folder: Path, heads: Any, **about: Any) -> None:
        save_heads(folder, heads, **about)

    def describe(self, heads: Any) -> str:
        return (
            f"{heads.num_heads} heads with {heads.num_layers} residual block(s) each. Head k guesses the token k + 1 "
            f"places after the hidden state that it sees.{_inner_in_words(heads.inner_layers)}"
        )


class Sequential(Design):
    """One transformer layer that guesses token after token."""

    recipe = replace(Recipe(), epochs=2, batch_size=1536, lr=1e-3)

    def new(self, frozen: Frozen, token_ids: Tensor, sizes: Sizes) -> SequentialHeads:
        """One layer of the model's own sizes, that sees the last state: the command refuses other wishes."""
        rows = frozen.lm_head[token_ids.to(frozen.lm_head.device)]
        shape = _shape(frozen.config)
        heads = SequentialHeads(shape, frozen.embedding, rows, num_heads=sizes.num_heads, token_ids=token_ids)
        return in_float(heads)

    def distiller(self, heads: Any, cache: TrunkCache, training: NDArray[np.bool_], recipe: Recipe) -> Distiller[Any]:
        return SequentialDistiller(heads, cache, training, recipe)

    def save(self, folder: Path, heads: Any, **about: Any) -> None:
        save_sequential(folder, heads, **about)

    def describe(self, heads: Any) -> str:
        return (
            f"A sequential drafter: one transformer layer that guesses up to {heads.num_heads} tokens one after "
            "another, each from the embedding of the token before and the hidden state before that one."
        )


DESIGNS: Mapping[str, Design] = {"resblock": ResBlocks(), "sequential": Sequential()}


def load(path: Path, embedding: Tensor, lm_head: Tensor) -> AnyHeads:
    """Heads of any design over the model's embedding and LM head, [vocab, hidden] both. Raises CheckpointError."""
    if is_sequential(path):
        return build_sequential(read_sequential(path), embedding, lm_head)
    return load_heads(path, lm_head)


def check_trainable(path: Path) -> str:
    """The design's name in `DESIGNS` of heads that training may go on from. Needs no model. Raises CheckpointError."""
    if is_sequential(path):
        read_sequential(path)
        return "sequential"
    found = read_heads(path)
    if found.lm_heads or found.shared_lm_head is not None:
        raise CheckpointError(f"The heads in {path} have LM heads of their own, which are not trained here.")
    return "resblock"


def rank(heads: AnyHeads, hidden: Tensor, tokens: NDArray[np.int64], counts: NDArray[np.bool_]) -> list[Text]:
    """Ranks of the right tokens in every answer of one example, as `acceptance.rank_text`."""
    if isinstance(heads, SequentialHeads):
        return rank_sequential(heads, hidden, tokens, counts)
    return rank_text(heads, hidden, tokens, counts)


def describe(heads: AnyHeads) -> str:
    """What they are, whoever trained them."""
    return DESIGNS["sequential" if isinstance(heads, SequentialHeads) else "resblock"].describe(heads)


def inner_layers(heads: AnyHeads) -> tuple[int, ...]:
    """Layers of the model that they see besides its last state."""
    return heads.inner_layers if isinstance(heads, ResBlockHeads) else ()


def count_parameters(heads: AnyHeads) -> int:
    """Those of their own, without the model's embedding and LM head."""
    return sum(parameter.numel() for parameter in heads.parameters())


def _inner_in_words(layers: tuple[int, ...]) -> str:
    return f" They see the outputs of layers {', '.join(map(str, layers))}, too (counted from 0)." if layers else ""


def in_float(heads: H) -> H:
    """Ready to learn: their own weights in float32."""
    for parameter in heads.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return heads


def _shape(config: Any) -> Shape:
    """That of the model's own layers, as far as its configuration names it."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    rotation = getattr(config, "rope_parameters", None) or {}
    return Shape(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        inner_size=getattr(config, "intermediate_size", None) or 4 * hidden,
        rope_theta=float(rotation.get("rope_theta", 10_000.0)),
        epsilon=float(getattr(config, "rms_norm_eps", 1e-5)),
    )
