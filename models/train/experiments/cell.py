"""One model of an experiment, and how large a run is.

Invariant: models of one shape have as many layers however many heads they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]  # what one cell has measured, as JSON: numbers, and lists of them


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; trunk and heads together have `layers` layers."""

    hidden: int
    layers: int
    attention_heads: int


@dataclass(frozen=True)
class Scale:
    """How large a run is. `extra` is what only this experiment has."""

    shapes: Mapping[str, Shape]
    heads: tuple[int, ...]
    seeds: int
    steps: int
    batch_size: int
    context: int
    lr: float
    extra: Mapping[str, int]
    checks: int = 8  # how often held-out data is looked at on the way


@dataclass(frozen=True, order=True)
class Cell:
    """One model. Its seed decides its weights and its batches."""

    shape: str
    num_heads: int
    seed: int

    def __str__(self) -> str:
        return f"{self.shape}-n{self.num_heads}-seed{self.seed}"
