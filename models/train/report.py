"""The report on heads: how well each design guesses, what its steps cost, and which brings the most tokens per second.

Files: report.md and report.svg for people, report.json with all that is in them.

Invariants:
- all designs are judged on the same text, and timed on the same machine;
- what was not measured is not there: no step times, no tokens per second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

from models.drafters.resblock import Accuracies
from models.train.acceptance import NODES, Tau, Text, measure_accuracies, tau_by_nodes
from models.train.card import markdown_table
from models.train.plot import svg
from models.train.step_times import StepTime, StepTimes

RANKS: Final = (1, 2, 4, 8)
REQUESTS: Final = (1, 8)  # at a time, for which tokens per second are told
SIZES: Final = (0, *NODES)  # of trees; 0 is plain decoding
UNNAMED: Final = "other"  # category of rows that name none, where others do


@dataclass(frozen=True)
class Setting:
    """What holds for all designs."""

    model: str
    trunk: str  # its numbers, as it was read for judging
    machine: str
    num_answers: int
    num_positions: int
    own_share: float  # of the answers' tokens: the model's own greedy choice


@dataclass(frozen=True)
class Speed:
    """With so many requests at a time and trees of so many nodes each."""

    requests: int
    nodes: int
    tokens_per_second: float  # of all requests together
    speedup: float  # over plain decoding
    seconds: StepTime


@dataclass(frozen=True)
class Design:
    """What one design was found to do."""

    name: str
    description: str
    num_parameters: int
    top: Sequence[Mapping[int, float]]  # by depth: share of positions whose token is among the first so many
    taus: Sequence[Tau]
    categories: Mapping[str, Sequence[Tau]]  # of prompts; empty if the data names none
    speeds: Sequence[Speed]  # empty if no step times were measured

    def fastest(self, requests: int) -> Speed:
        return max((s for s in self.speeds if s.requests == requests), key=lambda speed: speed.tokens_per_second)


@dataclass(frozen=True)
class Report:
    """All of it."""

    setting: Setting
    designs: Sequence[Design]

    @property
    def is_timed(self) -> bool:
        return all(design.speeds for design in self.designs)

    def fastest(self, requests: int) -> tuple[Design, Speed]:
        """The design, and the number of nodes, that bring the most tokens per second."""
        design = max(self.designs, key=lambda design: design.fastest(requests).tokens_per_second)
        return design, design.fastest(requests)


def judge(
    name: str,
    description: str,
    num_parameters: int,
    texts: Mapping[str, Sequence[Text]],
    tree_accuracies: Accuracies,
    times: StepTimes | None,
) -> Design:
    """`texts`: by category, "" where the data names none. Trees are those best by `tree_accuracies`."""
    every = [text for part in texts.values() for text in part]
    sums = [list(accumulate(shares)) for shares in measure_accuracies(every)]
    taus = tau_by_nodes(every, tree_accuracies)
    named = texts if any(texts) else {}
    return Design(
        name,
        description,
        num_parameters,
        [{k: round(row[k - 1], 5) for k in RANKS} for row in sums],
        taus,
        {category or UNNAMED: tau_by_nodes(part, tree_accuracies) for category, part in sorted(named.items())},
        [] if times is None else _speeds(taus, times),
    )


def _speeds(taus: Sequence[Tau], times: StepTimes) -> list[Speed]:
    tokens = dict(zip(SIZES, (1.0, *(tau.measured for tau in taus)), strict=True))
    plain = {requests: requests / times[requests, 0].total for requests in REQUESTS}
    found = []
    for requests in REQUESTS:
        for nodes in SIZES:
            time = times[requests, nodes]
            rate = requests * tokens[nodes] / time.total
            found.append(Speed(requests, nodes, rate, rate / plain[requests], time))
    return found


def write_report(folder: Path, report: Report) -> None:
    """report.md, report.json and report.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(report) + "\n![](report.svg)\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    (folder / "report.svg").write_text(picture(report), encoding="utf-8")


def as_json(report: Report) -> dict[str, object]:
    """Everything, and the choices."""
    choices = []
    for requests in REQUESTS if report.is_timed else ():
        design, speed = report.fastest(requests)
        choices.append({"design": design.name, **asdict(speed)})
    return {**asdict(report), "fastest": choices}


def picture(report: Report) -> str:
    """Tokens per second at one request by nodes, or tokens per step if nothing was timed."""
    if report.is_timed:
        return svg("tokens/s relative to plain decoding, one request", "nodes", _speed_lines(report))
    lines = {d.name: [(n, t.measured) for n, t in zip(NODES, d.taus, strict=True)] for d in report.designs}
    return svg("tokens per step", "nodes", lines)


def _speed_lines(report: Report) -> dict[str, list[tuple[int, float]]]:
    return {
        design.name: [(s.nodes, s.speedup) for s in design.speeds if s.requests == REQUESTS[0] and s.nodes]
        for design in report.designs
    }


_REPORT = """\
# Heads for {model}

On {num_answers} held-out answers ({num_positions} positions), teacher-forced on their text, trunk in {trunk}. Of their
tokens {own_share:.1%} are what this trunk itself says greedily, which bounds what heads can reach here.

{designs}

## Right token among the first k guesses, by depth

{accuracies}

## Tokens per step, by number of nodes

Walked through the text step by step with the best static tree of each size, ± one standard error.

{taus}
{categories}{speeds}"""

_SPEEDS = """
## Tokens per second on this machine, by number of nodes

On {machine}: tokens per step over the seconds of a step, relative to plain decoding, that is those of the forward pass
by its rows, of the drafter and of the engine. The server itself takes as many nodes in each step as pay there.

{table}

{choices}
"""


def markdown(report: Report) -> str:
    """For people, and to be pasted."""
    facts = [[d.name, d.description, f"{d.num_parameters / 1e6:.1f} M"] for d in report.designs]
    return _REPORT.format(
        **asdict(report.setting),
        designs=markdown_table(["design", "what it is", "parameters"], facts),
        accuracies=_accuracies(report),
        taus=_tau_table({design.name: design.taus for design in report.designs}, "design"),
        categories=_categories(report),
        speeds=_timed(report) if report.is_timed else "",
    )


def _accuracies(report: Report) -> str:
    rows = [
        [design.name, str(depth), *(f"{top[k]:.3f}" for k in RANKS)]
        for design in report.designs
        for depth, top in enumerate(design.top, start=1)
    ]
    return markdown_table(["design", "depth", *(f"top {k}" for k in RANKS)], rows)


def _tau_table(taus: Mapping[str, Sequence[Tau]], what: str) -> str:
    rows = [[name, *(f"{tau.measured:.3f} ± {tau.error:.3f}" for tau in own)] for name, own in taus.items()]
    return markdown_table([what, *map(str, NODES)], rows)


def _categories(report: Report) -> str:
    tables = [
        f"\nBy category of prompts, {design.name}:\n\n{_tau_table(design.categories, 'category')}\n"
        for design in report.designs
        if design.categories
    ]
    return "".join(tables)


def _timed(report: Report) -> str:
    rows, choices = [], []
    for requests in REQUESTS:
        for design in report.designs:
            speeds = [speed for speed in design.speeds if speed.requests == requests]
            rows.append([design.name, str(requests), *(f"{speed.speedup:.2f}" for speed in speeds)])
        best, speed = report.fastest(requests)
        amount = f"{best.name} with {speed.nodes} nodes" if speed.nodes else "plain decoding"
        told = f"{speed.tokens_per_second:.1f} tokens/s, {speed.speedup:.2f} times plain decoding"
        choices.append(f"- {requests} {'request' if requests == 1 else 'requests'} at a time: {amount} ({told}).")
    table = markdown_table(["design", "requests", *map(str, SIZES)], rows)
    return _SPEEDS.format(machine=report.setting.machine, table=table, choices="The most:\n\n" + "\n".join(choices))
