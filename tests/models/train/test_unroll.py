"""A sequential drafter unrolled over a text: what each depth may see."""

from __future__ import annotations

import torch
from torch import Tensor

from models.drafters.sequential import SequentialHeads, Shape
from models.train.unroll import unroll

HIDDEN, VOCAB, ROWS, DEPTHS = 32, 20, 9, 3


def heads() -> SequentialHeads:
    torch.manual_seed(0)
    made = SequentialHeads(
        Shape(HIDDEN, 4, 2, 16, 48), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN), num_heads=DEPTHS
    )
    for parameter in made.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.requires_grad_(False)


def text() -> tuple[Tensor, Tensor]:
    return torch.randint(VOCAB, (1, ROWS)), torch.randn(1, ROWS, HIDDEN)


def test_a_depth_sees_tokens_up_to_its_own_and_states_up_to_its_root() -> None:
    made, (tokens, states) = heads(), text()
    before = unroll(made, tokens, states, DEPTHS)
    for row in range(ROWS):
        other_tokens, other_states = tokens.clone(), states.clone()
        other_tokens[0, row] = (tokens[0, row] + 1) % VOCAB
        other_states[0, row] += 1
        of_token = unroll(made, other_tokens, states, DEPTHS)
        of_state = unroll(made, tokens, other_states, DEPTHS)
        for depth in range(DEPTHS):
            token_changes, state_changes = (
                [not torch.equal(changed[depth][0, r], before[depth][0, r]) for r in range(depth, ROWS)]
                for changed in (of_token, of_state)
            )
            assert token_changes == [r >= row for r in range(depth, ROWS)]
            assert state_changes == [r - depth >= row for r in range(depth, ROWS)]


def test_padding_behind_changes_nothing() -> None:
    made, (tokens, states) = heads(), text()
    alone = unroll(made, tokens[:, :6], states[:, :6], DEPTHS)
    padded = unroll(made, tokens, states, DEPTHS)
    for mine, theirs in zip(alone, padded, strict=True):
        torch.testing.assert_close(mine, theirs[:, :6])
