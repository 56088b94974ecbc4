"""The model card that lies beside trained heads: what they are, how they were made, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.drafters.resblock import Accuracies, ResBlockHeads
from models.drafters.sequential import SequentialHeads
from models.train.acceptance import Tau, Text, measure_accuracies

_CARD = """\
---
base_model: {name}
library_name: medusa-serve
tags: [medusa, speculative-decoding]
---

# Medusa heads for {name}

{description} {parameters:.1f} M parameters, on the frozen LM head of the base model, cut to its {draft_vocab} most
expected tokens (`token_map`). Serve them with `medusa-serve serve MODEL --heads DIR`.

## How they were made

    {command}

The trunk is frozen; {positions} training positions{after}, soft labels (the base model's own distribution at each
depth), the best evaluation (after epoch {best_epoch:g} of {epochs}), on {device}. The facts are in `config.json`.

## What was measured

On {answers} held-out answers ({held_out} positions), teacher-forced on their text, trunk in {trunk_dtype}. Of their
tokens {held_out_own_share:.1%} are what this trunk itself says greedily, which bounds what heads can reach here.
Right token among the first k guesses:

{accuracies}

Tokens per step (1 + accepted guesses), walking the text step by step with the best static tree of each size, ± one
standard error; and what the accuracies promise if depths were independent. The trees are built, and the
weights were chosen, on this same text.

{taus}
"""


def model_card(
    name: str,
    command: str,
    device: str,
    description: str,
    heads: ResBlockHeads | SequentialHeads,
    texts: Sequence[Text],
    taus: Sequence[Tau],
    facts: Mapping[str, Any],
) -> str:
    """Markdown with the numbers of this run."""
    before = facts["positions_before"]
    return _CARD.format(
        after=f", after {before} that the heads given as --init had seen" if before else "",
        name=name,
        command=command,
        device=device,
        description=description,
        parameters=sum(parameter.numel() for parameter in heads.parameters()) / 1e6,
        draft_vocab=len(heads.token_ids),
        answers=len(texts),
        held_out=sum(len(text.ranks) for text in texts),
        accuracies=accuracy_table(measure_accuracies(texts)),
        taus=tau_table(taus),
        **facts,
    )


def accuracy_table(accuracies: Accuracies) -> str:
    ranks = (1, 2, 3, 5, 10)
    rows = [[str(head), *(f"{sum(shares[:k]):.3f}" for k in ranks)] for head, shares in enumerate(accuracies, start=1)]
    return markdown_table(["head", *(f"top {k}" for k in ranks)], rows)


def tau_table(taus: Sequence[Tau]) -> str:
    rows = [[str(t.nodes), f"{t.measured:.3f} ± {t.error:.3f}", f"{t.independent:.3f}"] for t in taus]
    return markdown_table(["nodes", "measured", "independent"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
