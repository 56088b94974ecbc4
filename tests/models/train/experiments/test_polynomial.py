"""Scoring of answers, and what models learn from."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.train.experiments import polynomial
from models.train.experiments.cell import Cell
from models.train.experiments.polynomial import Polynomial, right
from models.train.experiments.ring import END, EQUALS, OPERATIONS, write
from models.train.experiments.scales import SCALES
from models.train.multi_token import plain_tokens
from tests.small_models import small_mtp

DOCUMENTS = write([1, 3, 2, 3], (1,))


@pytest.mark.parametrize(
    ("wrong", "answers", "coefficients"),
    [([], 1.0, 1.0), ([(0, 1)], 0.75, 0.95), ([(0, 1), (2, 5), (2, 3)], 0.5, 0.85), ([(1, 6), (3, 0)], 1.0, 1.0)],
)
def test_an_answer_is_right_if_all_coefficients_are(
    wrong: list[tuple[int, int]], answers: float, coefficients: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wrong`: documents, and how many places before END; the equals sign and END itself do not count."""

    def say(model: object, tokens: Tensor, batch_size: int) -> Tensor:
        said = torch.roll(tokens, -1, 1)
        for row, before in wrong:
            said[row, len(DOCUMENTS[row]) - 1 - before - 1] += 1
        return said

    monkeypatch.setattr(polynomial, "next_tokens", say)
    found = right(SimpleNamespace(), DOCUMENTS)  # type: ignore[arg-type]
    assert found == pytest.approx((answers, coefficients))


def test_one_pass_says_what_greedy_decoding_writes() -> None:
    model = small_mtp(vocab_size=END + 1, eos_token_id=END)
    model.generation_config.eos_token_id = None
    documents = []
    for document in DOCUMENTS:
        prompt = document[: document.index(EQUALS) + 1]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=END)
        documents.append([*said[0].tolist(), END])
    assert right(model, documents) == (1.0, 1.0)
    documents[2][-2] = (documents[2][-2] + 1) % 7
    assert right(model, documents) == pytest.approx((0.75, 0.95))


def test_trained_and_tested_numbers_of_operations() -> None:
    experiment = Polynomial(replace(SCALES["tiny"]["polynomial"], batch_size=40))
    batch = experiment.batches(Cell("tiny", 2, 0))(0)
    assert batch.shape == (40, 64 + 2)
    flat = plain_tokens(batch).flatten().tolist()
    ends = [i for i, token in enumerate(flat) if token == END]
    documents = [flat[a + 1 : b] for a, b in itertools.pairwise(ends)]
    assert {sum(t in OPERATIONS for t in document) for document in documents} == {1, 2}
    tested = [{sum(t in OPERATIONS for t in document) for document in group} for group in experiment._tests]
    assert tested == [{1}, {2}, {3}]
    learnt = [flat[i] if token >= 0 else None for i, token in enumerate(batch.flatten().tolist())]
    assert all(
        learnt[a + 1 : b + 1] == [*[None] * (b - a - 6), *flat[b - 5 : b + 1]] for a, b in itertools.pairwise(ends)
    )
    assert torch.equal(batch, experiment.batches(Cell("tiny", 2, 0))(0))
    assert not torch.equal(batch, experiment.batches(Cell("tiny", 2, 1))(0))


def test_the_report_tells_trained_from_untrained() -> None:
    experiment = Polynomial(SCALES["tiny"]["polynomial"])
    results = {
        Cell("tiny", 1, 0): {"answers": [0.5, 0.25, 0.0], "coefficients": [0.7, 0.6, 0.2]},
        Cell("tiny", 2, 0): {"answers": [0.6, 0.25, 0.0], "coefficients": [0.8, 0.6, 0.1]},
    }
    report = experiment.report(results)
    assert "| model | n | seeds | 1 | 2 | 3 (not trained) |" in report.text
    assert "| tiny | 2 | 1 | 0.600 (one seed) | 0.250 (one seed) | 0.000 (one seed) |" in report.text
    assert "3 operations: n = 2 gets more coefficients right than n = 1: -0.100; one seed" in report.text
    assert report.lines["tiny, n = 2"] == [(1, 0.8), (2, 0.6), (3, 0.1)]
