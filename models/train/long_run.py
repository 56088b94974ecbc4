"""A long training run on the command line: progress, saving at intervals, and a stop that loses nothing.

Invariant: a step in progress ends whole before the run stops.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

_SECONDS_BETWEEN_SAVES = 120.0
_STEPS_BETWEEN_LOSSES = 10


class Trainer(Protocol):
    """What can be run a step at a time, saved and told of."""

    step: int
    losses: list[tuple[int, list[float]]]  # (steps done, held-out losses), whenever they were measured

    @property
    def num_steps(self) -> int: ...

    @property
    def is_done(self) -> bool: ...

    def advance(self) -> Tensor: ...

    def save(self, path: Path) -> None: ...


def finish(
    trainer: Trainer,
    state: Path,
    judge: Callable[[], list[float]],
    every: int,
    title: str,
    console: Console,
    judged: str = "held-out nats per token by head",
) -> None:
    """Train to the last step. `judge` gives what `judged` says, asked for every `every` steps and at the end.

    Raises KeyboardInterrupt once the state is saved.
    """
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, stop_requests() as stopping:
        task = progress.add_task(title, total=trainer.num_steps, completed=trainer.step)
        while not trainer.is_done:
            losses = trainer.advance()
            if trainer.step % _STEPS_BETWEEN_LOSSES == 0:
                progress.update(task, description=f"{title}, loss {float(losses[0]):.3f}")
            progress.update(task, completed=trainer.step)
            if trainer.step % every == 0 or trainer.is_done:
                trainer.losses.append((trainer.step, judge()))
                told = " ".join(f"{loss:.4f}" for loss in trainer.losses[-1][1])
                console.print(f"{title}, step {trainer.step}: {judged}: {told}")
            if stopping or trainer.is_done or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                trainer.save(state)
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C is pressed."""
    requests: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: requests.append(number))
    try:
        yield requests
    finally:
        signal.signal(signal.SIGINT, before)
