"""From the numbers of several seeds to a table, a picture and one sentence on each claim.

Invariant: a spread is the sample's standard deviation, and is told only where there are two seeds or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from statistics import mean, stdev

from models.train.experiments.cell import Cell, Measured
from models.train.plot import Line


@dataclass(frozen=True)
class Report:
    """What is written when a cell is done: Markdown, and the lines of a picture."""

    text: str
    title: str
    x_name: str
    lines: Mapping[str, Line]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, and how many there were."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one seed)"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def against(claim: str, ours: Sequence[float], base: Sequence[float], digits: int = 2) -> str:
    """Whether `ours` is greater than `base` by more than twice the spread of such differences, in words."""
    difference = mean(ours) - mean(base)
    spreads = [stdev(values) for values in (ours, base) if len(values) > 1]
    if not spreads:
        verdict = "one seed cannot tell"
    elif abs(difference) <= 2 * hypot(*spreads):
        verdict = "not told apart: the seeds differ as much"
    else:
        verdict = "as the paper says" if difference > 0 else "**contradicts the paper**"
    return f"- {claim}: {difference:+.{digits}f}; {verdict}."


def by_model(results: Mapping[Cell, Measured]) -> dict[tuple[str, int], list[Measured]]:
    """What the seeds of each (shape, number of heads) have measured."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for cell, measured in results.items():
        found.setdefault((cell.shape, cell.num_heads), []).append(measured)
    return found


def mean_curve(cells: Sequence[Measured], index: int) -> Line:
    """One of the values looked at on the way, by step."""
    curves = [cell["curve"] for cell in cells]
    return [(looks[0][0], mean(values[index] for _, values in looks)) for looks in zip(*curves, strict=True)]
