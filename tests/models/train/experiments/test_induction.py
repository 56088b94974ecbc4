"""Scoring of copied names, and what models learn from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.train.experiments import induction
from models.train.experiments.cell import Cell
from models.train.experiments.induction import Induction, copied
from models.train.experiments.scales import SCALES
from models.train.experiments.stories import END, FIRST, SECOND, Story, split_names

STORIES = [Story([1, 40, 2, 40, 3, 41, END], [3, 5]), Story([1, 40, 2, END], [2])]


@pytest.mark.parametrize(("right", "share"), [([], 0.0), ([(0, 3)], 1 / 3), ([(0, 3), (0, 5), (1, 2)], 1.0)])
def test_only_repeated_second_tokens_count(
    right: list[tuple[int, int]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(model: object, tokens: Tensor, batch_size: int) -> Tensor:
        """Right everywhere but at repeated names, of which those named are."""
        said = torch.roll(tokens, -1, 1)
        for row, story in enumerate(STORIES):
            for at in story.repeated:
                said[row, at - 1] += (row, at) not in right
        return said

    monkeypatch.setattr(induction, "next_tokens", say)
    assert copied(SimpleNamespace(), STORIES) == share  # type: ignore[arg-type]


def test_training_stories_have_known_names_only() -> None:
    experiment = Induction(replace(SCALES["tiny"]["induction"], batch_size=30))
    known, new = split_names(64)
    batch = experiment.batches(Cell("tiny", 2, 5))(3)
    assert batch.shape == (30, 64 + 2)
    flat = batch.flatten().tolist()
    names = {(flat[i - 1], flat[i]) for i in range(1, len(flat)) if SECOND <= flat[i] < END and flat[i - 1] >= FIRST}
    assert len(names) > 10
    assert names <= set(known)
    for story in experiment._stories:
        assert all((story.tokens[at - 1], story.tokens[at]) in new for at in story.repeated)


def test_batches_follow_from_seed_and_step() -> None:
    experiment = Induction(SCALES["tiny"]["induction"])
    first = experiment.batches(Cell("tiny", 1, 0))
    assert torch.equal(first(2), Induction(experiment.scale).batches(Cell("tiny", 1, 0))(2))
    assert not torch.equal(first(2), first(3))
    assert not torch.equal(first(2), experiment.batches(Cell("tiny", 1, 1))(2))


def test_the_best_look_counts() -> None:
    experiment = Induction(SCALES["tiny"]["induction"])
    results = {
        Cell("tiny", 1, 0): {"curve": [[4, [0.5, 3.0]], [8, [0.1, 2.0]]]},
        Cell("tiny", 2, 0): {"curve": [[4, [0.2, 3.0]], [8, [0.9, 2.5]]]},
    }
    report = experiment.report(results)
    assert "| tiny | 1 | 1 | 0.50 (one seed) | 0.10 (one seed) | 2.000 (one seed) |" in report.text
    assert "| tiny | 2 | 1 | 0.90 (one seed) | 0.90 (one seed) | 2.500 (one seed) |" in report.text
    assert "than n = 1: +0.40; one seed cannot tell." in report.text
    assert report.lines == {"tiny, n = 1": [(4, 0.5), (8, 0.1)], "tiny, n = 2": [(4, 0.2), (8, 0.9)]}
