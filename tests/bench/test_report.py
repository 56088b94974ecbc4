"""The benchmark's statistics, on made-up rounds."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from tests.bench.client import Sample
from tests.bench.measure import Round
from tests.bench.report import mean_acceptance_length, summarize, table


def sample(tokens: int = 10, text: str = "text", first: float = 0.1, steps: int = 0, accepted: int = 0) -> Sample:
    return Sample("prompt", text, tokens, first, 1.0, steps, accepted)


def a_round(side: str, index: int, seconds: float, *samples: Sample, concurrency: int = 1) -> Round:
    return Round(side, concurrency, index, seconds, samples or (sample(),))


def test_speed_is_tokens_over_the_wall_time_of_the_round() -> None:
    assert a_round("plain", 0, 4.0, sample(10), sample(30)).tokens_per_second == 10.0


def test_ratios_are_paired_by_round_and_not_taken_from_medians() -> None:
    plain = [a_round("plain", index, seconds) for index, seconds in enumerate((1.0, 2.0, 4.0))]
    medusa = [a_round("medusa", index, seconds) for index, seconds in enumerate((0.5, 1.0, 8.0))]
    first, second = summarize(plain + medusa, "plain")
    assert first.ratio == (1.0, 1.0, 1.0)
    assert second.ratio == (0.5, 2.0, 2.0)
    assert second.tokens_per_second == 10.0


def test_rounds_pair_by_index_even_when_they_ran_in_another_order() -> None:
    rounds = [
        a_round("plain", 0, 1.0),
        a_round("medusa", 0, 0.5),
        a_round("medusa", 1, 1.0),
        a_round("plain", 1, 2.0),
    ]
    assert summarize(rounds, "plain")[1].ratio == (2.0, 2.0, 2.0)


def test_levels_come_in_order_with_the_baseline_first() -> None:
    rounds = [a_round(side, 0, 1.0, concurrency=level) for level in (4, 1) for side in ("medusa", "plain")]
    keys = [(item.concurrency, item.side) for item in summarize(rounds, "plain")]
    assert keys == [(1, "plain"), (1, "medusa"), (4, "plain"), (4, "medusa")]


def test_acceptance_is_weighted_by_steps_and_counts_the_bonus() -> None:
    rounds = [a_round("medusa", 0, 1.0, sample(steps=30, accepted=30), sample(steps=10, accepted=0))]
    assert mean_acceptance_length(rounds) == 1.75
    assert mean_acceptance_length([a_round("plain", 0, 1.0)]) is None


def test_differing_texts_are_counted() -> None:
    plain = a_round("plain", 0, 1.0, sample(text="a"), sample(text="b"))
    medusa = a_round("medusa", 0, 1.0, sample(text="a"), sample(text="c"))
    summary = summarize([plain, medusa], "plain")[1]
    assert (summary.num_same_text, summary.num_answers) == (1, 2)


def test_first_token_is_a_median_of_medians() -> None:
    rounds = [a_round("plain", i, 1.0, sample(first=first), sample(first=first)) for i, first in enumerate((1, 5, 2))]
    assert summarize(rounds, "plain")[0].first_token_seconds == 2


def test_table_shows_every_side() -> None:
    rounds = [a_round("plain", 0, 1.0), a_round("medusa", 0, 0.5, sample(steps=4, accepted=3, first=0.25))]
    output = StringIO()
    Console(file=output, width=120).print(table(summarize(rounds, "plain")))
    row = next(line for line in output.getvalue().splitlines() if "medusa" in line)
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    assert cells == ["1", "medusa", "20.0", "2.00 (2.00..2.00)", "250", "1.75", "1/1"]
