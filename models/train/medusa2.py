"""The second stage of `medusa-serve train heads --joint`: a run of `joint.JointTrainer`, and what is written of it.

Invariant: the model is written with its adapters merged, as an ordinary folder of transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.drafters.resblock import ResBlockHeads
from models.source import resolve
from models.train.data import Example
from models.train.joint import JointRecipe, JointTrainer
from models.train.long_run import finish
from models.train.trunk import load_trunk

_MEASUREMENTS = 5
_CARD = """
## The second stage

Then the trunk was trained together with the heads for {steps} steps, by adapters of rank {rank} on all of its linear
layers but the LM head, with a loss that keeps it what it was (Medusa-2, arXiv 2401.10774). They are merged: these heads
belong to the model in the folder above them. The numbers above are those of the two together. On held-out text the new
trunk's distribution is {divergence:.4f} nats (Kullback-Leibler) away from the old one's.
"""


@dataclass(frozen=True)
class Joint:
    """A model whose adapters are merged, and what made it."""

    model: Any
    tokenizer: Any
    facts: dict[str, Any]

    def card(self) -> str:
        """To go below that of the heads."""
        return _CARD.format(divergence=self.facts["held_out_losses"][-1][1][0], **self.facts)

    def save(self, folder: Path, card: str) -> None:
        """A model folder that transformers and our server load."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def train_jointly(
    options: argparse.Namespace, heads: ResBlockHeads, examples: Sequence[Example], work: Path, console: Console
) -> Joint:
    """Train `heads` in place and a trunk of their own beside them."""
    model, tokenizer = load_trunk(resolve(options.model), getattr(torch, options.dtype), options.device)
    if options.all_positions:
        examples = [replace(example, counts=(True,) * len(example.tokens)) for example in examples]
    examples = [example for example in examples if any(example.counts[1:])]
    training = [example for example in examples if not example.held_out]
    held_out = [example for example in examples if example.held_out]
    trainer = JointTrainer(model, heads, training, _recipe(options))
    state = work / "joint.pt"
    if options.resume and state.exists():
        trainer.load(state)
    finish(
        trainer,
        state,
        lambda: trainer.measure(held_out),
        max(1, trainer.num_steps // _MEASUREMENTS),
        "Training together",
        console,
        judged="held-out nats between the trunks, and losses by head",
    )
    trainer.finish()
    facts = {**asdict(trainer.recipe), "steps": trainer.num_steps, "held_out_losses": trainer.losses}
    return Joint(model, tokenizer, facts)


def _recipe(options: argparse.Namespace) -> JointRecipe:
    chosen = {"epochs": options.joint_epochs, "lr": options.joint_lr, "rows": options.joint_rows}
    return replace(JointRecipe(seed=options.seed), **{key: value for key, value in chosen.items() if value is not None})
