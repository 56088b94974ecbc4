"""The benchmark's statistics, on made-up rounds."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from tests.bench.client import Prompt, Sample
from tests.bench.measure import Round
from tests.bench.report import PREFILL, mean_acceptance_length, prefill_table, summarize, table


def sample(
    tokens: int = 10, text: str = "text", first: float = 0.1, steps: int = 0, accepted: int = 0, seconds: float = 1.0
) -> Sample:
    return Sample(Prompt("prompt"), text, 50, tokens, first, seconds, steps, accepted)


def a_round(side: str, index: int, seconds: float, *samples: Sample, concurrency: int = 1) -> Round:
    return Round(side, concurrency, index, seconds, 0.25, samples or (sample(),))


def rows(content: Table) -> list[list[str]]:
    output = StringIO()
    Console(file=output, width=160).print(content)
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_speed_is_tokens_over_the_wall_time_of_the_round() -> None:
    assert a_round("plain", 0, 4.0, sample(10), sample(30)).tokens_per_second == 10.0


def test_speed_of_a_stream_is_its_tokens_over_its_own_time() -> None:
    samples = [sample(10, seconds=seconds) for seconds in (1.0, 2.0, 5.0)]
    assert a_round("plain", 0, 8.0, *samples).tokens_per_second_per_stream == 5.0


def test_ratios_are_paired_by_round_and_not_taken_from_medians() -> None:
    plain = [a_round("plain", index, seconds) for index, seconds in enumerate((1.0, 2.0, 4.0))]
    medusa = [a_round("medusa", index, seconds) for index, seconds in enumerate((0.5, 1.0, 8.0))]
    first, second = summarize(plain + medusa, ["plain"])
    assert first.ratios == {"plain": (1.0, 1.0, 1.0)}
    assert second.ratios == {"plain": (0.5, 2.0, 2.0)}
    assert second.speed == 10.0


def test_rounds_pair_by_index_even_when_they_ran_in_another_order() -> None:
    rounds = [
        a_round("plain", 0, 1.0),
        a_round("medusa", 0, 0.5),
        a_round("medusa", 1, 1.0),
        a_round("plain", 1, 2.0),
    ]
    assert summarize(rounds, ["plain"])[1].ratios["plain"] == (2.0, 2.0, 2.0)


def test_a_baseline_is_its_fastest_side_at_each_number_of_streams() -> None:
    seconds = {(1, "peer a"): 2.0, (1, "peer b"): 1.0, (1, "ours"): 0.5}
    seconds |= {(4, "peer a"): 2.0, (4, "peer b"): 4.0, (4, "ours"): 0.5}
    rounds = [a_round(side, 0, wall, concurrency=level) for (level, side), wall in seconds.items()]
    ratios = {(item.concurrency, item.side): item.ratios["peer"][1] for item in summarize(rounds, ["peer"])}
    assert ratios == {
        (1, "peer a"): 0.5,
        (1, "peer b"): 1,
        (1, "ours"): 2,
        (4, "peer a"): 1,
        (4, "peer b"): 0.5,
        (4, "ours"): 4,
    }


def test_every_baseline_has_its_ratios_and_a_missing_one_none() -> None:
    rounds = [a_round("a", 0, 1.0), a_round("b", 0, 2.0)]
    assert summarize(rounds, ["b", "a", "nobody"])[0].ratios == {"b": (2.0, 2.0, 2.0), "a": (1.0, 1.0, 1.0)}


def test_levels_come_in_order_and_sides_as_they_were_measured() -> None:
    rounds = [a_round(side, 0, 1.0, concurrency=level) for level in (4, 1) for side in ("plain", "medusa")]
    keys = [(item.concurrency, item.side) for item in summarize(rounds, ["medusa"])]
    assert keys == [(1, "plain"), (1, "medusa"), (4, "plain"), (4, "medusa")]


def test_acceptance_is_weighted_by_steps_and_counts_the_bonus() -> None:
    rounds = [a_round("medusa", 0, 1.0, sample(steps=30, accepted=30), sample(steps=10, accepted=0))]
    assert mean_acceptance_length(rounds) == 1.75
    assert mean_acceptance_length([a_round("plain", 0, 1.0)]) is None


def test_texts_that_equal_the_twins_are_counted() -> None:
    plain = a_round("plain", 0, 1.0, sample(text="a"), sample(text="b"))
    medusa = a_round("medusa", 0, 1.0, sample(text="a"), sample(text="c"))
    first, second = summarize([plain, medusa], ["plain"], {"medusa": "plain"})
    assert (second.num_same_text, second.num_answers) == (1, 2)
    assert first.num_same_text is None


def test_medians_and_means() -> None:
    rounds = [
        a_round("plain", i, 1.0, sample(first=first), sample(20, first=first)) for i, first in enumerate((1, 5, 2))
    ]
    summary = summarize(rounds, [])[0]
    assert summary.first_token_seconds == 2
    assert summary.tokens_per_answer == 15
    assert summary.client_share == 0.25


def test_prefill_is_measured_by_the_first_token() -> None:
    rounds = [a_round("a", 0, 1.0, sample(first=0.1)), a_round("b", 0, 1.0, sample(first=0.5))]
    summaries = summarize(rounds, ["b"], speed=PREFILL)
    assert summaries[0].ratios["b"] == pytest.approx((5.0, 5.0, 5.0))
    assert rows(prefill_table(summaries))[2:] == [
        ["50", "a", "500", "100", "5.00 (5.00..5.00)"],
        ["50", "b", "100", "500", "1.00 (1.00..1.00)"],
    ]


def test_table_shows_every_side() -> None:
    rounds = [a_round("plain", 0, 1.0), a_round("medusa", 0, 0.5, sample(steps=4, accepted=3, first=0.25))]
    head, _, plain, medusa = rows(table(summarize(rounds, ["plain"], {"medusa": "plain"})))
    assert head[-1] == "/ plain (low..high)"
    assert plain == ["1", "plain", "10.0", "10.0", "100", "-", "-", "1.00 (1.00..1.00)"]
    assert medusa == ["1", "medusa", "20.0", "10.0", "250", "1.75", "1/1", "2.00 (2.00..2.00)"]
