"""Made-up recordings for the simulator's own tests: chains of guesses that are as often right as they say."""

from __future__ import annotations

from random import Random

from tests.bench.traces import Step, Trace

DEPTH = 4


def chain(sure: float, num_right: int, num_keys: int = 10) -> Step:
    """Of guesses that are each right with the probability `sure` if the one before is."""
    values = tuple(sure ** (depth + 1) for depth in range(DEPTH))
    return Step(num_keys, tuple(range(-1, DEPTH - 1)), values, tuple(range(num_right)))


def star(sure: tuple[float, ...], right: int | None) -> Step:
    """Alternatives for one token, best first."""
    return Step(10, (-1,) * len(sure), sure, () if right is None else (right,))


def chains(sure: tuple[float, ...], *, num_texts: int = 4, num_steps: int = 500, seed: int = 0) -> list[Trace]:
    """Each step is as sure as one of these says."""
    dice = Random(seed)

    def step() -> Step:
        chosen = dice.choice(sure)
        num_right = 0
        while num_right < DEPTH and dice.random() < chosen:
            num_right += 1
        return chain(chosen, num_right)

    return [[step() for _ in range(num_steps)] for _ in range(num_texts)]
