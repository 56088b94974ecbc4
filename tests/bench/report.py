"""What the rounds say: medians over rounds, paired ratios against the fastest baseline, and whether the texts agree.

Ratios are taken within a round and then summarised, so that a machine whose speed drifts does not blur them. Which side
is the fastest of a baseline is decided at each number of streams by its median.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

from rich.box import MARKDOWN
from rich.table import Table

from tests.bench.measure import Round

Speed = Callable[[Round], float]
Ratio = tuple[float, float, float]  # low, median, high

DECODING: Speed = attrgetter("tokens_per_second")
STEADY: Speed = attrgetter("steady_tokens_per_second")
PREFILL: Speed = attrgetter("prompt_tokens_per_second")


@dataclass(frozen=True, slots=True)
class Summary:
    """One side at one number of streams; `speed` is in tokens per second."""

    side: str
    concurrency: int
    speed: float
    speed_per_stream: float
    ratios: dict[str, Ratio]  # by baseline: this side's speed over that of the baseline's fastest side
    first_token_seconds: float
    mean_acceptance_length: float | None  # emitted tokens per speculative step, the bonus counted; None: no such step
    num_same_text: int | None  # answers equal to the twin's of the same round; None: there is no twin
    num_answers: int
    num_prompt_tokens: float  # median
    tokens_per_answer: float  # mean
    client_share: float  # of one core, taken by the asking itself


def summarize(
    rounds: Sequence[Round], baselines: Sequence[str], twins: Mapping[str, str] | None = None, speed: Speed = DECODING
) -> list[Summary]:
    """One summary per (concurrency, side), in the order of their first rounds.

    A baseline is all sides whose names begin with it; one that names no side has no ratios. `twins` maps a side to the
    one that has to write the same texts.
    """
    groups: dict[tuple[int, str], list[Round]] = {}
    for item in rounds:
        groups.setdefault((item.concurrency, item.side), []).append(item)
    summaries = []
    for level, side in sorted(groups, key=lambda key: key[0]):
        peers = {name: group for (other, name), group in groups.items() if other == level}
        references = {name: _fastest(peers, name, speed) for name in baselines}
        ratios = {name: _ratio(peers[side], group, speed) for name, group in references.items() if group}
        summaries.append(_summary(peers[side], ratios, peers.get((twins or {}).get(side, "")), speed))
    return summaries


def _fastest(peers: Mapping[str, list[Round]], baseline: str, speed: Speed) -> list[Round]:
    groups = [group for name, group in peers.items() if name.startswith(baseline)]
    return max(groups, key=lambda group: median(map(speed, group)), default=[])


def _pairs(rounds: list[Round], others: list[Round]) -> list[tuple[Round, Round]]:
    by_index = {other.index: other for other in others}
    return [(item, by_index[item.index]) for item in rounds]


def _ratio(rounds: list[Round], baseline: list[Round], speed: Speed) -> Ratio:
    ratios = [speed(item) / speed(reference) for item, reference in _pairs(rounds, baseline)]
    return min(ratios), median(ratios), max(ratios)


def _summary(rounds: list[Round], ratios: dict[str, Ratio], twin: list[Round] | None, speed: Speed) -> Summary:
    samples = [sample for item in rounds for sample in item.samples]
    return Summary(
        side=rounds[0].side,
        concurrency=rounds[0].concurrency,
        speed=median(map(speed, rounds)),
        speed_per_stream=median(item.tokens_per_second_per_stream for item in rounds),
        ratios=ratios,
        first_token_seconds=median(item.first_token_seconds for item in rounds),
        mean_acceptance_length=mean_acceptance_length(rounds),
        num_same_text=None if twin is None else _num_same_text(rounds, twin),
        num_answers=len(samples),
        num_prompt_tokens=median(sample.num_prompt_tokens for sample in samples),
        tokens_per_answer=sum(sample.num_tokens for sample in samples) / len(samples),
        client_share=sum(item.client_seconds for item in rounds) / sum(item.seconds for item in rounds),
    )


def _num_same_text(rounds: list[Round], twin: list[Round]) -> int:
    return sum(
        ours.text == theirs.text
        for item, reference in _pairs(rounds, twin)
        for ours, theirs in zip(item.samples, reference.samples, strict=True)
    )


def mean_acceptance_length(rounds: Sequence[Round]) -> float | None:
    """1 + accepted tokens per speculative step, over all steps of all `rounds`."""
    samples = [sample for item in rounds for sample in item.samples]
    steps = sum(sample.num_spec_steps for sample in samples)
    return 1 + sum(sample.num_accepted for sample in samples) / steps if steps else None


def table(summaries: Sequence[Summary]) -> Table:
    """For people; in Markdown, to be pasted."""
    return _table(
        summaries,
        {
            "streams": lambda item: str(item.concurrency),
            "side": lambda item: item.side,
            "tokens/s": lambda item: f"{item.speed:.1f}",
            "per stream": lambda item: f"{item.speed_per_stream:.1f}",
            "first token, ms": lambda item: f"{1000 * item.first_token_seconds:.0f}",
            "accepted + 1": lambda item: _number(item.mean_acceptance_length),
            "same text": lambda item: "-" if item.num_same_text is None else f"{item.num_same_text}/{item.num_answers}",
        },
    )


def prefill_table(summaries: Sequence[Summary]) -> Table:
    """The same for long prompts."""
    return _table(
        summaries,
        {
            "prompt": lambda item: f"{item.num_prompt_tokens:.0f}",
            "side": lambda item: item.side,
            "prompt tokens/s": lambda item: f"{item.speed:.0f}",
            "first token, ms": lambda item: f"{1000 * item.first_token_seconds:.0f}",
        },
    )


def _table(summaries: Sequence[Summary], columns: dict[str, Callable[[Summary], str]]) -> Table:
    result = Table(box=MARKDOWN)
    baselines = list(summaries[0].ratios)
    for column in (*columns, *(f"/ {name} (low..high)" for name in baselines)):
        result.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
    for item in summaries:
        ratios = ("{1:.2f} ({0:.2f}..{2:.2f})".format(*item.ratios[name]) for name in baselines)
        result.add_row(*(cell(item) for cell in columns.values()), *ratios)
    return result


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
