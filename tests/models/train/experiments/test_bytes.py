"""The corpus's two sides, what is counted and what is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.train.byte_tokenizer import END
from models.train.data import DataError, is_held_out
from models.train.experiments.bytes import Bytes, Timed, distinct_share, python_corpus
from models.train.experiments.cell import Cell
from models.train.experiments.scales import SCALES
from models.train.self_speculation import Decoded
from tests.small_models import small_mtp


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(200):
        file = tmp_path / f"package{number % 3}" / f"module{number}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"x = {number}\n")
    for unwanted in ("test/a.py", "site-packages/b.py", "package0/tests/c.py", "package0/data.txt"):
        (tmp_path / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / unwanted).write_text("unwanted")
    return tmp_path


def documents(tokens: NDArray[np.int32]) -> list[str]:
    return bytes(np.where(tokens == END, 0, tokens).astype(np.uint8)).decode().split("\0")[:-1]


def test_every_file_is_on_the_side_that_its_path_says(library: Path) -> None:
    corpus = python_corpus(library)
    paths = [f"package{number % 3}/module{number}.py" for number in range(200)]
    sides = [is_held_out(path, 0.05) for path in paths]
    assert corpus.num_documents == 200
    assert sorted(documents(corpus.held_out)) == sorted(f"x = {i}\n" for i in range(200) if sides[i])
    assert sorted(documents(corpus.training)) == sorted(f"x = {i}\n" for i in range(200) if not sides[i])


def test_no_source_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too little of the standard library's source"):
        python_corpus(tmp_path)


def test_both_ways_of_decoding_write_the_same() -> None:
    model = small_mtp()
    timed = Timed(model)
    prompts = [[5, 9, 33, 7, 2], [8, 8, 8, 8, 8]]
    plain, own = timed.plain(prompts, 15), timed.speculative(prompts, 15)
    assert plain.tokens == own.tokens
    assert plain.tokens_per_pass == 1
    assert model.config.num_future_tokens == 4
    assert timed.speedup(prompts, 4, 2) > 0


def test_the_speedup_is_the_median_of_rounds_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(small_mtp())
    calls: list[str] = []
    speeds = {"plain": iter([1, 2, 2, 10]), "speculative": iter([99, 2, 6, 20])}  # the first round does not count

    def turn(name: str) -> Callable[..., Decoded]:
        def decode(prompts: object, num_tokens: int) -> Decoded:
            calls.append(name)
            return Decoded([], next(speeds[name]), 1, 1.0)

        return decode

    for name in speeds:
        monkeypatch.setattr(timed, name, turn(name))
    assert timed.speedup([[1]], 4, 3) == 2
    assert calls == ["speculative", "plain", "plain", "speculative"] * 2


def test_texts_that_go_round_in_circles_have_few_runs() -> None:
    assert distinct_share([list(range(30))]) == 1
    assert distinct_share([[1, 2] * 20]) == 2 / 33
    assert distinct_share([[*range(8)], [*range(8)]]) == 0.5


def test_the_report_says_what_pays() -> None:
    experiment = Bytes(SCALES["tiny"]["bytes"])
    measured = {"bytes_per_pass": 1.0, "speedup_batch": 1.0, "distinct_share": 0.5}
    results = {
        Cell("tiny", count, seed): measured
        | {"curve": [[8, [2.0 + seed, 5.0]]], "bytes_per_pass_of_given_text": given + seed, "speedup_alone": speedup}
        for seed in range(2)
        for count, given, speedup in ((1, 1.0, 1.0), (4, 9.0, 0.9))
    }
    report = experiment.report(results)
    assert "| tiny | 4 | 2 | 2.500 ± 0.707 | 1.00 ± 0.00 | 9.50 ± 0.71 | 0.90 ± 0.00 |" in report.text
    assert "one text (speedup less 1): -0.10; **contradicts the paper**." in report.text
    assert "than the n before: +8.00; as the paper says." in report.text
    assert report.lines["of given text"] == [(1, 1.5), (4, 9.5)]
