"""Greedy self-speculation against plain generation by transformers."""

from __future__ import annotations

import pytest
import torch

from models.drafters.resblock import Accuracies
from models.train.own_text import backbone_of, rank_continuations, write_text
from models.train.self_speculation import SelfSpeculation, chain
from tests.small_models import small_mtp

PROMPTS = [[5, 9, 33, 7, 2], [8, 8, 8, 8, 8], [60, 3, 4, 11, 12]]
TREE: Accuracies = ((0.5, 0.2, 0.1), (0.4, 0.2, 0.1), (0.3, 0.2, 0.1))


def plain(num_tokens: int) -> list[list[int]]:
    model = small_mtp()
    model.generation_config.eos_token_id = None
    said = model.generate(torch.tensor(PROMPTS), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return said[:, 5:].tolist()


@pytest.mark.parametrize(("accuracies", "nodes"), [((), 0), (chain(3), 3), (TREE, 9), (TREE, 1)])
def test_the_text_is_that_of_plain_generation(accuracies: Accuracies, nodes: int) -> None:
    backbone, heads = backbone_of(small_mtp())
    decoded = SelfSpeculation(backbone, heads).decode(PROMPTS, 20, accuracies, nodes)
    assert decoded.tokens == plain(20)
    assert decoded.num_emitted >= 3 * 19
    if nodes == 0:
        assert decoded.tokens_per_pass == 1


def test_right_guesses_save_passes() -> None:
    """A model whose layers add nothing repeats the last token, and so do all its heads."""
    model = small_mtp(tie_word_embeddings=True)
    for layer in (*model.model.layers, *model.model.extra_heads):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    backbone, heads = backbone_of(model)
    decoded = SelfSpeculation(backbone, heads).decode(PROMPTS, 21, chain(3), 3)
    assert decoded.tokens == [[prompt[-1]] * 21 for prompt in PROMPTS]
    assert decoded.tokens_per_pass == 4
    assert decoded.num_passes == 3 * 5


def test_a_model_of_one_head_writes_without_guessing() -> None:
    model = small_mtp(num_future_tokens=1)
    assert write_text(model, PROMPTS, 9).tokens_per_pass == 1
    assert rank_continuations(model, PROMPTS, PROMPTS) == []


def test_ranks_are_those_of_the_heads_states() -> None:
    model = small_mtp()
    said = write_text(model, PROMPTS, 20).tokens
    texts = rank_continuations(model, PROMPTS, said)
    assert [len(text.ranks) for text in texts] == [20, 20, 20]
    sequence = torch.tensor([[*PROMPTS[1], *said[1]]])
    with torch.no_grad():
        logits = model.lm_head(model(sequence, use_cache=False).head_states)[0]  # [tokens, heads, vocab]
    for place, head in [(0, 0), (3, 1), (11, 2)]:  # the first draft is made from the last token of the prompt
        row, wanted = logits[4 + place, head], sequence[0, 4 + place + 2 + head]
        rank = int((row > row[wanted]).sum())
        assert texts[1].ranks[place, head] == min(rank, 20)
