"""Drafts of a sequential drafter against the same layer run over the whole text."""

from __future__ import annotations

import random
from array import array

import pytest
import torch
from torch import Tensor

from models.drafters.calibration import KINDS
from models.drafters.drafter import Ask
from models.drafters.growth import HEARD, NOISY_SURENESS
from models.drafters.medusa import DraftRow
from models.drafters.sequential import SequentialHeads, Shape
from models.drafters.sequential_drafter import SequentialDrafter, TorchGuesser, scratch_slots
from models.fused import FusedSequential
from models.kernels.cpu import PackedLinear
from models.kv_pool import KVPool
from models.masks import Mask
from models.sampling import gumbel_from_keys, noise_key
from models.train.unroll import unroll
from models.tree import Guess
from server.engine.messages import SamplingParams
from tests.small_models import four_bits

HIDDEN, VOCAB, NUM_SLOTS, DEPTHS = 64, 50, 300, 4
GREEDY = SamplingParams(9, temperature=0)


@pytest.fixture
def heads() -> SequentialHeads:
    """Random, with a draft vocabulary of every other token, and sure enough of itself to grow deep.

    Four bits hold its weights, as they do in C.
    """
    torch.manual_seed(0)
    embedding, lm_head = torch.randn(VOCAB, HIDDEN), four_bits(torch.randn(VOCAB, HIDDEN))
    ids = torch.arange(0, VOCAB, 2)
    made = SequentialHeads(Shape(HIDDEN, 4, 2, 32, 96), embedding, lm_head[ids], num_heads=DEPTHS, token_ids=ids)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(four_bits(0.2 * torch.randn(parameter.shape)))
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made.eval().requires_grad_(False)


def drafter(heads: SequentialHeads) -> SequentialDrafter:
    pool = KVPool([heads.shape.kv], NUM_SLOTS + scratch_slots(8, DEPTHS), dtype=torch.float32, device="cpu")
    return SequentialDrafter(heads, TorchGuesser(heads), pool, NUM_SLOTS)


def log_shares(heads: SequentialHeads, text: list[int], states: Tensor, path: list[int]) -> Tensor:
    """[draft_vocab] log-probabilities of what follows text + path, where states [len(text) - 1, hidden] are known."""
    tokens = torch.tensor([*text[1:], *path])[None]
    padded = torch.cat([states, torch.zeros(len(path), HIDDEN)])[None]
    found = unroll(heads, tokens, padded, len(path) + 1)[len(path)]
    return (found[0, -1] @ heads.lm_head.T).log_softmax(-1)


def value(heads: SequentialHeads, text: list[int], states: Tensor, guesses: list[Guess], node: int) -> float:
    """The node's value by its definition."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, guesses[node].token)
        node = guesses[node].parent
    total = 0.0
    for depth, token in enumerate(path):
        total += float(log_shares(heads, text, states, path[:depth])[token // 2])
    return float(torch.tensor(total).exp())


class Play:
    """One request whose text grows; its slots are drawn at random."""

    def __init__(self, name: str, free: list[int], text: list[int]) -> None:
        self.name, self.free, self.text = name, free, text
        self.slots = array("q")
        self.states = torch.randn(len(text) + 100, HIDDEN)
        self.drafter: SequentialDrafter

    def compute(self, count: int) -> None:
        """The model has run over the next tokens."""
        start = len(self.slots)
        mine = [self.free.pop() for _ in range(count)]
        self.drafter.overwrite(mine)
        self.slots.extend(mine)
        self.drafter.remember(self.name, start, self.states[start : start + count])

    def ask(
        self,
        num_nodes: int = 12,
        params: SamplingParams = GREEDY,
        mask: Mask | None = None,
        least_value: float = 0.0,
    ) -> Ask:
        return Ask(
            self.name,
            self.text,
            self.slots,
            DraftRow(params, len(self.text), mask),
            KINDS[params.temperature > 0],
            num_nodes,
            9,
            least_value,
        )


def play(heads: SequentialHeads, lengths: list[int]) -> tuple[SequentialDrafter, list[Play]]:
    made, source = drafter(heads), random.Random(1)
    free = source.sample(range(1, NUM_SLOTS + 1), NUM_SLOTS)
    plays = [Play(str(i), free, [source.randrange(VOCAB) for _ in range(n)]) for i, n in enumerate(lengths)]
    for each in plays:
        each.drafter = made
    return made, plays


def check(heads: SequentialHeads, each: Play, guesses: list[Guess]) -> None:
    known = each.states[: len(each.text) - 1]
    for node, guess in enumerate(guesses):
        assert guess.value == pytest.approx(value(heads, each.text, known, guesses, node), rel=1e-3)
    assert max(len(_path(guesses, node)) for node in range(len(guesses))) > 1


def _path(guesses: list[Guess], node: int) -> list[int]:
    return [] if node < 0 else [*_path(guesses, guesses[node].parent), node]


def test_values_are_what_the_layer_says_of_the_whole_text(heads: SequentialHeads) -> None:
    made, plays = play(heads, [5, 23, 2])
    for each in plays:
        chunk = (len(each.text) - 1) // 2
        each.compute(chunk)
        each.compute(len(each.text) - 1 - chunk)
    for each, guesses in zip(plays, made.grown([each.ask() for each in plays]), strict=True):
        check(heads, each, guesses)


def test_a_text_that_grows_is_caught_up_with(heads: SequentialHeads) -> None:
    made, (each,) = play(heads, [6])
    each.compute(5)
    made.grown([each.ask()])
    for accepted in (3, 1, 5):
        each.text += [7] * accepted
        each.compute(accepted)
        check(heads, each, made.grown([each.ask()])[0])


def test_a_prefix_that_another_request_computed_is_looked_at(heads: SequentialHeads) -> None:
    made, (first, second) = play(heads, [20, 20])
    first.compute(19)
    made.grown([first.ask()])
    first.text.append(3)
    first.compute(1)
    made.grown([first.ask()])  # now all 20 have their K and V
    second.text, second.states = [*first.text[:20], 9, 11], first.states
    second.slots = first.slots[:20]
    second.compute(1)
    guesses = made.grown([second.ask()])[0]
    known = first.states[:21]
    shares = log_shares(heads, second.text, known, []).exp()
    missing = abs(guesses[0].value - float(shares[guesses[0].token // 2]))  # the row of 9 lacks the state before it
    alone = drafter(heads)
    alone.remember("x", 20, first.states[20:21])
    blind = alone.grown([Ask("x", second.text, second.slots, DraftRow(GREEDY, 22), "greedy", 12, 9)])[0]
    assert missing < abs(blind[0].value - float(shares[blind[0].token // 2]))


def test_slots_that_the_model_wrote_again_are_not_looked_at(heads: SequentialHeads) -> None:
    made, (each,) = play(heads, [9])
    each.compute(8)
    made.grown([each.ask()])
    made.overwrite(list(each.slots))
    made.remember(each.name, 8, each.states[8:9])
    each.text.append(1)
    each.slots.append(each.free.pop())
    seen = made.grown([each.ask()])[0]
    fresh = drafter(heads)
    fresh.remember("x", 7, each.states[7:9])
    assert fresh.grown([Ask("x", each.text, each.slots, DraftRow(GREEDY, 10), "greedy", 12, 9)])[0] == seen


def test_a_mask_holds_and_noise_is_the_verifiers(heads: SequentialHeads) -> None:
    made, (each,) = play(heads, [7])
    each.compute(6)
    params = SamplingParams(9, temperature=0.7, seed=5)
    mask = Mask(VOCAB, tuple(range(0, VOCAB, 4)), (), torch.device("cpu"))
    guesses = made.grown([each.ask(60, params, mask)])[0]
    allowed = torch.arange(0, VOCAB, 4)
    logits = log_shares(heads, each.text, each.states[:6], [])
    logits = torch.where(torch.isin(heads.token_ids, allowed), logits, -torch.inf).log_softmax(-1)
    noisy = NOISY_SURENESS * (logits / 0.7 + gumbel_from_keys([noise_key(5, 0, 7)], heads.token_ids)[0])
    first = [guess for guess in guesses if guess.parent < 0]
    best = noisy.softmax(-1).topk(len(first))
    assert len(first) > 2
    assert [guess.token for guess in first] == heads.token_ids[best.indices].tolist()
    assert [guess.value for guess in first] == pytest.approx(best.values.tolist(), rel=1e-3)


def test_the_kernel_agrees_with_torch(heads: SequentialHeads) -> None:
    made, plays = play(heads, [40, 3])
    packed = SequentialDrafter(
        heads,
        FusedSequential(heads, PackedLinear(heads.embedding), 100),
        KVPool([heads.shape.kv], NUM_SLOTS + scratch_slots(8, DEPTHS), dtype=torch.float16, device="cpu"),
        NUM_SLOTS,
    )
    for each in plays:
        each.compute(len(each.text) - 1)
        packed.remember(each.name, 0, each.states[: len(each.text) - 1])
    for params in (GREEDY, SamplingParams(9, temperature=1.0, seed=1)):
        asks = [each.ask(params=params) for each in plays]
        for mine, theirs in zip(made.ranked(asks), packed.ranked(asks), strict=True):
            assert set(mine.tokens[0][:3]) == set(theirs.tokens[0][:3])  # its rows are rounded
            assert mine.probabilities[0] == pytest.approx(theirs.probabilities[0], abs=0.08)


@pytest.mark.parametrize("least_value", [0.0, 0.2])
@pytest.mark.parametrize("num_nodes", [1, 2, 4, 13, 63])
def test_trees_grown_in_c_are_those_grown_in_python(heads: SequentialHeads, num_nodes: int, least_value: float) -> None:
    found = []
    for is_grown_in_c in (True, False):
        pool = KVPool([heads.shape.kv], NUM_SLOTS + scratch_slots(8, DEPTHS), dtype=torch.float16, device="cpu")
        made = SequentialDrafter(heads, FusedSequential(heads, PackedLinear(heads.embedding), 100), pool, NUM_SLOTS)
        if not is_grown_in_c:
            made._grower = None
        torch.manual_seed(2)
        _, plays = play(heads, [31, 2, 12, 9, 7])
        mask = Mask(VOCAB, tuple(range(0, VOCAB, 4)), (), torch.device("cpu"))  # with one: grown in Python always
        drafts = []
        for accepted in (0, 2, 1):
            for each in plays:
                each.drafter = made
                each.text += [5] * accepted
                each.compute(len(each.text) - 1 - len(each.slots))
            asks = [each.ask(num_nodes, least_value=least_value) for each in plays]
            noisy = {
                1: SamplingParams(9, temperature=0.5, seed=3, choice=2),
                2: SamplingParams(9, temperature=1.5, top_p=0.9, min_p=0.01),
                4: SamplingParams(9, temperature=0.3, top_k=1),
            }
            for place, params in noisy.items():
                asks[place] = plays[place].ask(num_nodes, params, None, least_value)
            asks[3] = plays[3].ask(num_nodes, GREEDY, mask, least_value)
            drafts.append(made.grown(asks))
        found.append(drafts)
    sizes = [len(tree) for drafts in found[0] for tree in drafts]
    assert max(sizes) == num_nodes if not least_value else 0 < max(sizes) <= num_nodes
    values = [guess.value for drafts in found[0] for tree in drafts for guess in tree]
    assert min(values) >= HEARD * least_value
    for mine, theirs in zip(*found, strict=True):
        for tree, same in zip(mine, theirs, strict=True):
            assert [(g.token, g.parent) for g in tree] == [(g.token, g.parent) for g in same]
            assert [g.value for g in tree] == pytest.approx([g.value for g in same], rel=1e-5)


def test_forgotten_requests_are_unknown(heads: SequentialHeads) -> None:
    made, (each,) = play(heads, [5])
    assert not made.knows(each.name, 4)
    each.compute(3)
    assert not made.knows(each.name, 4)
    each.compute(1)
    assert made.knows(each.name, 4)
    made.forget(each.name)
    assert not made.knows(each.name, 4)


def test_what_is_right_against_its_word_is_believed_later(heads: SequentialHeads) -> None:
    made, (each,) = play(heads, [6])
    each.compute(5)
    before = made.trees([each.ask()])[0]
    assert [guess.value for guess in before] == sorted([guess.value for guess in before], reverse=True)
    error = made.calibration.error
    for _ in range(40):
        first = made.trees([each.ask()])[0]
        each.text.append(next(guess.token for guess in first if guess.parent < 0))  # always its best guess
        each.compute(1)
    worst = min(guess.value for guess in made.trees([each.ask()])[0] if guess.parent < 0)
    assert error is None
    assert made.calibration.error is not None
    best = [cell for cell in made.calibration.summary(4) if (cell.depth, cell.rank) == (1, 1) and cell.given < 0.9]
    assert best
    assert all(cell.right > cell.given for cell in best)
    assert worst < min(cell.right for cell in best)
