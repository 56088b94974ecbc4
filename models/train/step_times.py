"""What a server's step costs with a drafter: the form in which whoever can measure it tells the reports.

Invariant: no clock is read here; `models` knows no server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by part."""

    run: float  # forward pass, sampling and verification
    draft: float  # the drafter's own
    rest: float  # what the engine does besides

    @property
    def total(self) -> float:
        return self.run + self.draft + self.rest


StepTimes = Mapping[tuple[int, int], StepTime]  # by (requests, nodes of each); 0 nodes is plain decoding


@dataclass(frozen=True)
class Trial:
    """What is to be measured: these heads on this model, going on with these prompts."""

    model: Path
    heads: Sequence[Path]
    device: str
    prompts: Sequence[Sequence[int]]
    requests: Sequence[int]
    nodes: Sequence[int]


Measure = Callable[[Trial], list[StepTimes]]  # one for each of the heads; raises UsageError
