"""What is asked: which prompts at which number of streams, the same for every side.

Invariant: within one round all sides answer the same prompts in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from models.train.data import VALIDATION_FRACTION, is_held_out, read_rows
from tests.bench.client import Prompt

MIN_PROMPTS = 4  # of one round
LEAST_ANSWER = 4  # tokens, where answers are of mixed length
COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `num_rounds` at each number of streams, up to `max_tokens` an answer.

    The prompts of the list come again and again, so a prefix cache has seen them.
    """

    prompts: tuple[Prompt, ...]
    concurrencies: tuple[int, ...] = (1, 4, 16)
    num_rounds: int = 3
    max_tokens: int = 96

    def prompts_of(self, concurrency: int, index: int) -> list[Prompt]:
        """Two waves of `concurrency` or, where the list is too short, one; each round moves on in the list."""
        count = max(concurrency, min(2 * concurrency, len(self.prompts)), MIN_PROMPTS)
        return [self.prompts[(index * count + i) % len(self.prompts)] for i in range(count)]


@dataclass(frozen=True, slots=True)
class FreshPlan(Plan):
    """The same, each prompt numbered: nobody's prefix cache has more of it than the chat template's beginning."""

    def prompts_of(self, concurrency: int, index: int) -> list[Prompt]:
        prompts = Plan.prompts_of(self, concurrency, index)
        return [Prompt(f"Question {concurrency}.{index}.{i}: {prompt.user}") for i, prompt in enumerate(prompts)]


@dataclass(frozen=True, slots=True)
class LoadPlan(Plan):
    """So many requests of each stream, MIN_PROMPTS at least."""

    num_requests: int = 2

    def prompts_of(self, concurrency: int, index: int) -> list[Prompt]:
        count = max(self.num_requests * concurrency, MIN_PROMPTS)
        return [self.prompts[(index * count + i) % len(self.prompts)] for i in range(count)]


@dataclass(frozen=True, slots=True)
class MixedPlan(LoadPlan):
    """The same behind 1 to `num_words` words, with answers of LEAST_ANSWER to `max_tokens` tokens.

    Lengths are spread evenly over their logarithms: as many of 4 to 8 as of 64 to 128.
    """

    num_words: int = 600

    def prompts_of(self, concurrency: int, index: int) -> list[Prompt]:
        dice = Random(f"{concurrency} {index}")
        return [self._mixed(prompt, dice) for prompt in LoadPlan.prompts_of(self, concurrency, index)]

    def _mixed(self, prompt: Prompt, dice: Random) -> Prompt:
        num_words = round(self.num_words ** dice.random())
        least = min(LEAST_ANSWER, self.max_tokens)
        num_tokens = round(least * (self.max_tokens / least) ** dice.random())
        return Prompt(prompt.user, " ".join(dice.choices(COMMON_WORDS.split(), k=num_words)), num_tokens)


@dataclass(frozen=True, slots=True)
class PrefillPlan(Plan):
    """The same behind `num_words` words of a system message, no two of which begin alike; one at a time, short answers.

    The words are common, so that most tokenizers make one token of each, and of random order, which no model minds.
    """

    concurrencies: tuple[int, ...] = (1,)
    max_tokens: int = 4
    num_words: int = 480

    def prompts_of(self, concurrency: int, index: int) -> list[Prompt]:
        return [
            self._long(prompt, f"{index} {i}") for i, prompt in enumerate(Plan.prompts_of(self, concurrency, index))
        ]

    def _long(self, prompt: Prompt, seed: str) -> Prompt:
        return Prompt(prompt.user, " ".join(Random(seed).choices(COMMON_WORDS.split(), k=self.num_words)))


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line, empty lines left out; of training data (.jsonl) the openings that training holds out."""
    if path.suffix == ".jsonl":
        chats = [row for row in read_rows([path]) if row.messages and is_held_out(row.key, VALIDATION_FRACTION)]
        return tuple(Prompt(row.messages[0]["content"]) for row in chats if row.messages[0]["role"] == "user")
    return tuple(Prompt(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
