"""Do models that learn to guess two tokens learn to copy earlier? (The paper's section 4.1.)

Measured is the second token of a name of two tokens that the story has said before, in stories with names that no
training story has. As in the paper, the best checkpoint by this very measure counts; the last one stands beside it.
"""

from __future__ import annotations

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
from models.train.experiments.report import Report, against, by_model, mean_curve, spread
from models.train.experiments.stories import END, VOCABULARY, Story, split_names, tell
from models.train.multi_token import Batches, held_out_losses

_TEST_SEED = 1_000_003


class Induction(Experiment):
    name = "induction"
    looked_at = "right second tokens of repeated names, and held-out nats per token"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self._names, new = split_names(scale.extra["names"])
        draw = random.Random(_TEST_SEED)
        self._stories = [tell(new, draw) for _ in range(scale.extra["stories"])]
        self._windows = self._batch(random.Random(_TEST_SEED), scale.context + max(scale.heads))

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def data(self) -> str:
        return repr(self._stories[0].tokens)

    def batches(self, cell: Cell) -> Batches:
        length = self.scale.context + cell.num_heads
        return lambda step: self._batch(random.Random(f"{cell.seed} {step}"), length)

    def _batch(self, draw: random.Random, length: int) -> Tensor:
        """Stories one after another, cut into windows: [batch, length]."""
        tokens: list[int] = []
        while len(tokens) < self.scale.batch_size * length:
            tokens += tell(self._names, draw).tokens
        return torch.tensor(tokens[: self.scale.batch_size * length]).view(-1, length)

    def judge(self, model: MTPForCausalLM) -> list[float]:
        """Share of repeated new names whose second token is right; nats per token of stories with known names."""
        windows = self._windows[:, : self.scale.context + model.config.num_future_tokens]
        return [copied(model, self._stories), held_out_losses(model, windows, self.scale.batch_size)[0]]

    def measure(self, cell: Cell, model: MTPForCausalLM, folder: Path) -> dict[str, Any]:
        return {}

    def report(self, results: Mapping[Cell, Measured]) -> Report:
        rows, claims = [], []
        kinds = by_model(results)
        for (shape, count), cells in kinds.items():
            curves = [[values for _, values in cell["curve"]] for cell in cells]
            best = [max(accuracy for accuracy, _ in curve) for curve in curves]
            last, losses = zip(*(curve[-1] for curve in curves), strict=True)
            rows.append([shape, str(count), str(len(cells)), *map(spread, (best, last)), spread(losses, 3)])
            if count == 2 and (shape, 1) in kinds:
                base = [max(values[0] for _, values in cell["curve"]) for cell in kinds[shape, 1]]
                claims.append(against(f"{shape}: n = 2 copies more second tokens than n = 1", best, base))
        names = ["model", "n", "seeds", "best accuracy", "accuracy at the end", "next-token loss (nats)"]
        lines = {f"{shape}, n = {count}": mean_curve(cells, 0) for (shape, count), cells in kinds.items()}
        text = "\n\n".join([markdown_table(names, rows), "\n".join(claims)]).rstrip() + "\n"
        return Report(text, "Second tokens of repeated names, share that is right", "steps", lines)


def copied(model: MTPForCausalLM, stories: list[Story], batch_size: int = 25) -> float:
    """Share of all repeated names' second tokens that the next-token head says."""
    tokens = torch.full((len(stories), max(len(story.tokens) for story in stories)), END)
    for row, story in zip(tokens, stories, strict=True):
        row[: len(story.tokens)] = torch.tensor(story.tokens)
    said = next_tokens(model, tokens, batch_size)
    hits = [bool(said[i, at - 1] == tokens[i, at]) for i, story in enumerate(stories) for at in story.repeated]
    return sum(hits) / len(hits)
