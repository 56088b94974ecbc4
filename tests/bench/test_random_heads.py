"""Heads of random weights are heads like others."""

from __future__ import annotations

from pathlib import Path

import torch

from models.checkpoint import load_heads
from tests.bench import random_heads
from tests.small_models import small_llama


def test_they_fit_their_model_and_guess_what_it_does_not_say(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(random_heads, "DRAFT_VOCAB", 48)
    model = small_llama()
    model.save_pretrained(tmp_path / "model")
    random_heads.write_random_heads(tmp_path / "heads", tmp_path / "model")
    heads = load_heads(tmp_path / "heads", model.lm_head)
    assert (heads.num_heads, len(heads.token_ids)) == (random_heads.NUM_HEADS, 48)
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    own = (hidden @ model.lm_head.weight[:48].T).argmax(-1)
    agreeing = (heads(hidden).argmax(-1) == own[:, None]).float().mean()
    assert agreeing < 0.25


def test_one_seed_makes_the_same_heads(tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_heads.write_random_heads(tmp_path / name, tmp_path, seed)
    a, b, c = ((tmp_path / name / "medusa_lm_head.safetensors").read_bytes() for name in "abc")
    assert a == b != c
