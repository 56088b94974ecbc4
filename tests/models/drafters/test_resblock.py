"""ResBlock heads against the formula of Medusa's section 2.2, head by head and layer by layer."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from models.drafters.resblock import DEFAULT_ACCURACIES, ResBlockHeads

HIDDEN, VOCAB = 16, 40


def randomised(heads: ResBlockHeads) -> ResBlockHeads:
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.3)
    return heads


def by_formula(heads: ResBlockHeads, hidden: Tensor, head: int, lm_head: Tensor) -> Tensor:
    for layer in range(heads.num_layers):
        hidden = hidden + silu(hidden @ heads.weight[layer, head].T + heads.bias[layer, head])
    return hidden @ lm_head.T


@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (4, 1), (3, 3)])
def test_logits_follow_the_formula(num_heads: int, num_layers: int) -> None:
    torch.manual_seed(0)
    lm_head, hidden = torch.randn(VOCAB, HIDDEN), torch.randn(5, HIDDEN)
    heads = randomised(ResBlockHeads(lm_head, num_heads=num_heads, num_layers=num_layers))
    logits = heads(hidden)
    assert logits.shape == (5, num_heads, VOCAB)
    for head in range(num_heads):
        torch.testing.assert_close(logits[:, head], by_formula(heads, hidden, head, lm_head))


def test_untrained_heads_say_what_the_model_says() -> None:
    lm_head, hidden = torch.randn(VOCAB, HIDDEN), torch.randn(3, HIDDEN)
    logits = ResBlockHeads(lm_head, num_heads=2)(hidden)
    torch.testing.assert_close(logits, (hidden @ lm_head.T)[:, None].expand(-1, 2, -1))


def test_own_lm_heads_are_used_each_by_its_head() -> None:
    torch.manual_seed(1)
    lm_heads, hidden = torch.randn(2, VOCAB, HIDDEN), torch.randn(3, HIDDEN)
    heads = randomised(ResBlockHeads(lm_heads, num_heads=2))
    for head in range(2):
        torch.testing.assert_close(heads(hidden)[:, head], by_formula(heads, hidden, head, lm_heads[head]))


def test_one_row_alone_equals_the_same_row_among_others() -> None:
    torch.manual_seed(2)
    hidden = torch.randn(7, HIDDEN)
    heads = randomised(ResBlockHeads(torch.randn(VOCAB, HIDDEN), num_heads=3))
    torch.testing.assert_close(heads(hidden[4:5])[0], heads(hidden)[4])


def test_layers_are_distinct_parameters_and_the_lm_head_is_frozen() -> None:
    heads = ResBlockHeads(torch.randn(VOCAB, HIDDEN, requires_grad=True), num_heads=2, num_layers=3)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 2 * 3 * (HIDDEN * HIDDEN + HIDDEN)
    assert not heads.lm_head.requires_grad
    assert set(heads.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_in_the_dtype_of_the_hidden_state(dtype: torch.dtype) -> None:
    heads = ResBlockHeads(torch.randn(VOCAB, HIDDEN, dtype=dtype), num_heads=2)
    assert heads(torch.randn(2, HIDDEN, dtype=dtype)).dtype == dtype


def test_truncated_vocabulary_keeps_its_map() -> None:
    ids = torch.tensor([3, 7, 39])
    heads = ResBlockHeads(torch.randn(VOCAB, HIDDEN)[ids], num_heads=1, token_ids=ids)
    assert heads(torch.randn(1, HIDDEN)).shape == (1, 1, 3)
    assert heads.token_ids.tolist() == [3, 7, 39]
    assert ResBlockHeads(torch.randn(5, HIDDEN), num_heads=1).token_ids.tolist() == [0, 1, 2, 3, 4]


def test_default_accuracies_are_probabilities_of_falling_ranks() -> None:
    for row in DEFAULT_ACCURACIES:
        assert list(row) == sorted(row, reverse=True)
        assert 0 < sum(row) < 1
    assert [row[0] for row in DEFAULT_ACCURACIES] == sorted((row[0] for row in DEFAULT_ACCURACIES), reverse=True)


def with_inner(num_layers: int = 1) -> ResBlockHeads:
    return ResBlockHeads(torch.randn(VOCAB, HIDDEN), num_heads=3, num_layers=num_layers, inner_layers=(1, 4))


def test_untrained_heads_with_inner_layers_say_what_the_model_says() -> None:
    torch.manual_seed(3)
    heads, hidden = with_inner(), 50 * torch.randn(5, 3 * HIDDEN)
    expected = hidden[:, -HIDDEN:] @ heads.lm_head.T
    torch.testing.assert_close(heads(hidden), expected[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_inner_layers_enter_by_the_fusion(num_layers: int) -> None:
    torch.manual_seed(4)
    heads, hidden = randomised(with_inner(num_layers)), torch.randn(5, 3, HIDDEN)
    assert heads.fusion is not None
    low, middle, last = hidden.unbind(1)
    low, middle = (x / x.square().mean(1, keepdim=True).sqrt() for x in (7 * low, middle))
    fused = torch.cat([low, middle, last], dim=1) @ heads.fusion.T
    for head in range(3):
        expected = by_formula(heads, fused, head, heads.lm_head)
        torch.testing.assert_close(heads(hidden.flatten(1))[:, head], expected, rtol=1e-4, atol=1e-4)
