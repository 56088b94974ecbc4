"""Heads that know nothing: for measuring what useless guesses cost."""

from __future__ import annotations

from pathlib import Path

import torch

from models.backbone import read_sizes
from models.checkpoint import save_heads
from models.drafters.resblock import ResBlockHeads

NUM_HEADS = 4
DRAFT_VOCAB = 8192  # tokens that they guess among
STD = 1.0  # so large that nothing of the hidden state is left in what they say


def write_random_heads(folder: Path, model: Path, seed: int = 0) -> None:
    """Into `folder`, in our format and of a size that fits the model in the folder `model`."""
    hidden_size, vocab_size = read_sizes(model)
    num_guessed = min(DRAFT_VOCAB, vocab_size)
    heads = ResBlockHeads(torch.empty(num_guessed, hidden_size), num_heads=NUM_HEADS)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(heads.weight, std=STD, generator=generator)
    torch.nn.init.normal_(heads.bias, std=STD, generator=generator)
    card = "Random weights, for benchmarks.\n"
    save_heads(folder, heads, base_model=model.name, vocab_size=vocab_size, card=card)
