"""Do models that learn to guess ahead compute better? Arithmetic in F7[X]/(X^5) (the paper's section 4.2).

Trained on the answers of expressions of 1 to `trained` operations and tested up to `tested`. An answer is right if all
five coefficients are what greedy decoding says: that is so exactly if each is the likeliest after the right ones before
it, so one forward pass over the right answer tells.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.mtp import MTPForCausalLM
from models.train.card import markdown_table
from models.train.experiments.cell import Cell, Measured, Scale
from models.train.experiments.experiment import Experiment, next_tokens
from models.train.experiments.report import Report, against, by_model, spread
from models.train.experiments.ring import DEGREE, END, EQUALS, VOCABULARY, write
from models.train.multi_token import Batches, held_out_losses

_TEST, _HELD_OUT = 1_000_003, 1_000_033  # seeds that no training batch has


class Polynomial(Experiment):
    name = "polynomial"
    looked_at = "held-out nats per token of answers"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self._tests = [
            write([number] * scale.extra["samples"], (_TEST, number)) for number in range(1, scale.extra["tested"] + 1)
        ]
        self._windows = self._batch((_HELD_OUT,), scale.context + max(scale.heads))

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def data(self) -> str:
        return repr([documents[0] for documents in self._tests])

    def batches(self, cell: Cell) -> Batches:
        length = self.scale.context + cell.num_heads
        return lambda step: self._batch((cell.seed, step), length)

    def _batch(self, seed: tuple[int, ...], length: int) -> Tensor:
        """Documents one after another, cut into windows: [batch, length]; what is not answer is not to be learnt."""
        wanted = self.scale.batch_size * length
        draw = random.Random(repr(seed))
        tokens: list[int] = []
        while len(tokens) < wanted:
            numbers = [draw.randint(1, self.scale.extra["trained"]) for _ in range(1 + wanted // 32)]
            tokens += itertools.chain.from_iterable(map(_answers_only, write(numbers, (*seed, len(tokens)))))
        return torch.tensor(tokens[:wanted]).view(-1, length)

    def judge(self, model: MTPForCausalLM) -> list[float]:
        """Nats per token of answers of the next-token head."""
        windows = self._windows[:, : self.scale.context + model.config.num_future_tokens]
        return held_out_losses(model, windows, self.scale.batch_size)[:1]

    def measure(self, cell: Cell, model: MTPForCausalLM, folder: Path) -> dict[str, Any]:
        """Shares by number of operations: of answers, and of single coefficients after right ones."""
        scores = [right(model, documents) for documents in self._tests]
        return {"answers": [score[0] for score in scores], "coefficients": [score[1] for score in scores]}

    def report(self, results: Mapping[Cell, Measured]) -> Report:
        kinds = by_model(results)
        numbers = range(1, self.scale.extra["tested"] + 1)
        text = [
            self._table("Right answers, by number of operations", "answers", kinds),
            self._table("Right coefficients (by chance 1 in 7), each after the right ones before it, by operations",
                        "coefficients", kinds),
        ]  # fmt: skip
        claims = [
            against(f"{shape}, {number} operations: n = {count} gets more coefficients right than n = 1",
                    _column(cells, "coefficients", number), _column(kinds[shape, 1], "coefficients", number), 3)
            for (shape, count), cells in kinds.items() if count > 1 and (shape, 1) in kinds for number in numbers
        ]  # fmt: skip
        lines = {
            f"{shape}, n = {count}": [
                (number, sum(_column(cells, "coefficients", number)) / len(cells)) for number in numbers
            ]
            for (shape, count), cells in kinds.items()
        }
        return Report(
            "\n\n".join([*text, "\n".join(claims)]).rstrip() + "\n",
            "Right coefficients in F7[X]/(X^5)", "operations", lines,
        )  # fmt: skip

    def _table(self, title: str, key: str, kinds: Mapping[tuple[str, int], list[Measured]]) -> str:
        numbers = range(1, self.scale.extra["tested"] + 1)
        trained = self.scale.extra["trained"]
        names = [f"{number}" + ("" if number <= trained else " (not trained)") for number in numbers]
        rows = [
            [shape, str(count), str(len(cells)), *(spread(_column(cells, key, number), 3) for number in numbers)]
            for (shape, count), cells in kinds.items()
        ]
        return f"{title}:\n\n" + markdown_table(["model", "n", "seeds", *names], rows)


def _answers_only(document: list[int]) -> list[int]:
    """The expression is chance: nothing can be learnt of it, and learning it takes the longer."""
    question = document.index(EQUALS) + 1
    return [*(~token for token in document[:question]), *document[question:]]


def _column(cells: list[Measured], key: str, number: int) -> list[float]:
    return [cell[key][number - 1] for cell in cells]


def right(model: MTPForCausalLM, documents: list[list[int]], batch_size: int = 100) -> tuple[float, float]:
    """Share of answers of which all coefficients are right, and of coefficients."""
    tokens = torch.full((len(documents), max(map(len, documents))), END)
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = torch.tensor(document)
    said = next_tokens(model, tokens, batch_size)
    ends = torch.tensor([len(document) - 1 for document in documents])  # where END stands
    places = ends[:, None] - torch.arange(DEGREE, 0, -1)  # [documents, 5]
    hits = said.gather(1, places - 1) == tokens.gather(1, places)
    return float(hits.all(1).float().mean()), float(hits.float().mean())
