"""What verifying guesses brings to a batch, on a model of random weights: with a drafter that knows the answers.

The drafter guesses a chain of tokens, each right with a given probability if those before it are. It costs nothing and
is calibrated, so what is found is what verification allows; it is for measurements only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

from torch import Tensor

from models.drafters.calibration import Calibration
from models.drafters.drafter import Ask, Ranked
from models.drafters.resblock import DEFAULT_ACCURACIES
from models.tree import Guess
from server.engine.core import Engine
from server.engine.runner import Runner
from tests.bench.inside import LOSSLESS, PLAIN, Decoded, Tokens, decode

NUM_TOKENS = 48


class Knowing:
    """A `models.drafters.drafter.Drafter`."""

    sees_all = False

    def __init__(self, vocab_size: int, accuracy: float, num_heads: int) -> None:
        self.num_heads = num_heads
        self.calibration = Calibration(DEFAULT_ACCURACIES[:num_heads], num_heads)
        self.texts: Mapping[str, Tokens] = {}  # prompt and answer of each request, as plain decoding found them
        self._vocab_size, self._accuracy, self._random = vocab_size, accuracy, Random(0)

    def overwrite(self, slots: Sequence[int]) -> None:
        """No slot matters here."""

    def remember(self, request: str, start: int, states: Tensor) -> None:
        """Nothing is guessed from states."""

    def knows(self, request: str, root: int) -> bool:
        return root + 1 < len(self.texts.get(request, ()))

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        return [self._chain(self.texts[ask.request][len(ask.text) :], ask) for ask in asks]

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        assert not asks, "no request of this benchmark has a grammar"
        return []

    def forget(self, request: str) -> None:
        """There is nothing to drop."""

    def _chain(self, ahead: Sequence[int], ask: Ask) -> list[Guess]:
        guesses: list[Guess] = []
        for depth, token in enumerate(ahead[: min(self.num_heads, ask.num_nodes, ask.max_depth)]):
            is_right = self._random.random() < self._accuracy
            guessed = token if is_right else (token + 1) % self._vocab_size
            guesses.append(Guess(guessed, depth - 1, self._accuracy ** (depth + 1), "heads"))
            if not is_right:
                break  # what follows is wrong in any case
        return guesses


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of so many requests at a time."""

    batch: int
    plain: float  # tokens per second, median
    ratio: float  # with guesses over plain, median of the rounds
    tokens_per_step: float  # of each request, with guesses


def goodput(engine: Engine, runner: Runner, drafter: Knowing, batch: int, num_prompt: int, rounds: int) -> Goodput:
    """`engine` runs `runner`, and drafts with `drafter` from now on."""
    runner.drafter = drafter
    vocab = runner.info.vocab_size
    prompts = [tuple((7 * i + j) % vocab for j in range(num_prompt)) for i in range(batch)]
    names = [f"goodput {i}" for i in range(batch)]
    plain: list[Decoded] = []
    guessed: list[Decoded] = []
    for _ in range(rounds):
        plain.append(decode(engine, prompts, NUM_TOKENS, PLAIN, names))
        drafter.texts = {
            name: prompt + answer for name, prompt, answer in zip(names, prompts, plain[-1].answers, strict=True)
        }
        guessed.append(decode(engine, prompts, NUM_TOKENS, LOSSLESS, names))
        drafter.texts = {}
    return Goodput(
        batch,
        median(each.speed for each in plain),
        median(mine.speed / its.speed for mine, its in zip(guessed, plain, strict=True)),
        median(each.num_tokens / each.num_steps / batch for each in guessed),
    )
