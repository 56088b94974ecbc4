"""What an experiment is: its data, what of a model is measured, and what is told of all models.

Invariant: all that an experiment knows follows from its scale, so a run can be stopped and go on in another process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.mtp import MTPConfig, MTPForCausalLM
from models.train.experiments.cell import Cell, Measured, Scale
from models.train.experiments.report import Report
from models.train.multi_token import Batches


class Experiment(ABC):
    """One of the paper's questions, at one scale."""

    name: ClassVar[str]
    looked_at: ClassVar[str]  # what `judge` returns, in words

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens; the last one is the end of a document."""

    @property
    @abstractmethod
    def data(self) -> str:
        """Stands for all text that is read, to tell runs apart."""

    @abstractmethod
    def batches(self, cell: Cell) -> Batches:
        """Of a step: [batch, context + heads] tokens."""

    @abstractmethod
    def judge(self, model: MTPForCausalLM) -> list[float]:
        """What is looked at on the way and at the end."""

    @abstractmethod
    def measure(self, cell: Cell, model: MTPForCausalLM, folder: Path) -> dict[str, Any]:
        """What is measured at the end besides; `folder` is where a model may be kept."""

    @abstractmethod
    def report(self, results: Mapping[Cell, Measured]) -> Report:
        """What the finished cells say."""

    def config(self, cell: Cell) -> MTPConfig:
        shape = self.scale.shapes[cell.shape]
        return MTPConfig(
            vocab_size=self.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=-(-shape.hidden * 8 // 3 // 32) * 32,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.attention_heads,
            num_key_value_heads=shape.attention_heads,
            max_position_embeddings=self.scale.context,
            num_future_tokens=cell.num_heads,
            bos_token_id=None,
            eos_token_id=self.vocabulary - 1,
        )


@torch.no_grad()
def next_tokens(model: MTPForCausalLM, tokens: Tensor, batch_size: int) -> Tensor:
    """What the next-token head finds likeliest behind every token: [rows, length], as `tokens`."""
    model.eval()
    found = []
    for part in torch.split(tokens, batch_size):
        state, told = model.model.trunk(part.to(model.device))
        found.append(model.lm_head(model.model.head(0, state, told)).argmax(-1).cpu())
    return torch.cat(found)
