"""The model card beside a pre-trained multi-token model: what it is, how it was made, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from models.drafters.resblock import Accuracies
from models.mtp import MTPForCausalLM
from models.train.acceptance import Text, measure_accuracies, tau_by_nodes
from models.train.card import accuracy_table, markdown_table, tau_table

_CARD = """\
---
library_name: medusa-serve
tags: [multi-token-prediction, speculative-decoding]
---

# A multi-token model

{parameters:.2f} M parameters, {layers} layers, of which {heads} are heads that guess the next {heads} tokens from the
same state (Gloeckle et al., arXiv 2404.19737). `medusa-serve serve DIR` drafts with the extra heads.

## How it was made

    {command}

{tokens} tokens seen. Held out, at the last step:

{losses}
"""
_DRAFTING = """
## What its heads guess

On text that the model wrote greedily after held-out prompts. All heads as one chain: {per_pass:.2f} tokens per forward
pass. Right token among the first k guesses:

{accuracies}

Tokens per pass with the best static tree of each size, ± one standard error, and what the accuracies promise if depths
were independent; the trees were built on this same text.

{own}

The same trees on the held-out text itself, which the model would not always have written:

{given}
"""


@dataclass(frozen=True)
class Drafting:
    """Ranks of right tokens under the extra heads, in continuations of held-out prompts; none without such heads."""

    tokens_per_pass: float  # of the model's own greedy ones, with all heads as a chain
    own: list[Text]
    given: list[Text]  # as the text goes on

    @cached_property
    def accuracies(self) -> Accuracies:
        return measure_accuracies(self.own) if self.own else ()


def pretrain_card(model: MTPForCausalLM, facts: Mapping[str, Any], drafting: Drafting) -> str:
    """Markdown with the numbers of this run."""
    losses = facts["held_out_losses"][-1][1]
    rows = [[str(head), f"{loss:.4f}", f"{loss / math.log(2):.4f}"] for head, loss in enumerate(losses, start=1)]
    card = _CARD.format(
        parameters=model.num_parameters() / 1e6,
        layers=model.config.num_hidden_layers,
        heads=model.config.num_future_tokens,
        command=facts["command"],
        tokens=facts["training_tokens_seen"],
        losses=markdown_table(["tokens ahead", "nats per token", "bits per token"], rows),
    )
    if drafting.own:
        card += _DRAFTING.format(
            per_pass=drafting.tokens_per_pass,
            accuracies=accuracy_table(drafting.accuracies),
            own=tau_table(tau_by_nodes(drafting.own, drafting.accuracies)),
            given=tau_table(tau_by_nodes(drafting.given, drafting.accuracies)),
        )
    return card
