"""What the rounds say: medians over rounds, paired ratios against the first side, and whether the texts agree.

Ratios are taken within a round and then summarised, so that a machine whose speed drifts does not blur them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import MARKDOWN
from rich.table import Table

from tests.bench.measure import Round


@dataclass(frozen=True, slots=True)
class Summary:
    """One side at one level of concurrency. `ratio` is its speed over the baseline's, as (low, median, high)."""

    side: str
    concurrency: int
    tokens_per_second: float
    ratio: tuple[float, float, float]
    first_token_seconds: float
    mean_acceptance_length: float | None  # emitted tokens per speculative step, the bonus counted; None: no such step
    num_same_text: int  # answers equal to the baseline's of the same round
    num_answers: int


def summarize(rounds: Sequence[Round], baseline: str) -> list[Summary]:
    """One summary per (concurrency, side), in the order of their first rounds, the baseline first in each level."""
    groups: dict[tuple[int, str], list[Round]] = {}
    for item in rounds:
        groups.setdefault((item.concurrency, item.side), []).append(item)
    order = sorted(groups, key=lambda key: (key[0], key[1] != baseline))
    return [_summary(groups[key], groups[key[0], baseline]) for key in order]


def _summary(rounds: list[Round], baseline: list[Round]) -> Summary:
    references = {reference.index: reference for reference in baseline}
    pairs = [(item, references[item.index]) for item in rounds]
    ratios = [item.tokens_per_second / reference.tokens_per_second for item, reference in pairs]
    same = [
        ours.text == theirs.text
        for item, reference in pairs
        for ours, theirs in zip(item.samples, reference.samples, strict=True)
    ]
    return Summary(
        side=rounds[0].side,
        concurrency=rounds[0].concurrency,
        tokens_per_second=median(item.tokens_per_second for item in rounds),
        ratio=(min(ratios), median(ratios), max(ratios)),
        first_token_seconds=median(item.first_token_seconds for item in rounds),
        mean_acceptance_length=mean_acceptance_length(rounds),
        num_same_text=sum(same),
        num_answers=len(same),
    )


def mean_acceptance_length(rounds: Sequence[Round]) -> float | None:
    """1 + accepted tokens per speculative step, over all steps of all `rounds`."""
    samples = [sample for item in rounds for sample in item.samples]
    steps = sum(sample.num_spec_steps for sample in samples)
    return 1 + sum(sample.num_accepted for sample in samples) / steps if steps else None


def table(summaries: Sequence[Summary]) -> Table:
    """For people; in Markdown, to be pasted."""
    result = Table(box=MARKDOWN)
    for column in ("streams", "side", "tokens/s", "ratio (low..high)", "first token, ms", "accepted + 1", "same text"):
        result.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for item in summaries:
        result.add_row(*_cells(item))
    return result


def _cells(item: Summary) -> list[str]:
    low, middle, high = item.ratio
    accepted = "-" if item.mean_acceptance_length is None else f"{item.mean_acceptance_length:.2f}"
    return [
        str(item.concurrency),
        item.side,
        f"{item.tokens_per_second:.1f}",
        f"{middle:.2f} ({low:.2f}..{high:.2f})",
        f"{1000 * item.first_token_seconds:.0f}",
        accepted,
        f"{item.num_same_text}/{item.num_answers}",
    ]
