"""Sampling against a plain reimplementation, and the noise against its law."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exact import exact_distribution
from scipy import stats

from models import sampling
from models.masks import Mask
from models.sampling import NO_TOKEN, History, Row, gumbel_from_keys, log_distribution, needs_history, noise_key, sample
from server.engine.messages import SamplingParams

VOCAB = 40
PROMPT = [3, 3, 7, 11]
OUTPUT = [5, 7, 7]
EOS = (0,)

SETTINGS = {
    "greedy": SamplingParams(9, temperature=0),
    "plain": SamplingParams(9),
    "temperature": SamplingParams(9, temperature=0.6),
    "hot": SamplingParams(9, temperature=1.9),
    "top_p": SamplingParams(9, top_p=0.7),
    "top_p tiny": SamplingParams(9, top_p=1e-9),
    "top_k": SamplingParams(9, top_k=4),
    "min_p": SamplingParams(9, min_p=0.2),
    "truncations": SamplingParams(9, temperature=1.3, top_p=0.8, top_k=9, min_p=0.05),
    "presence": SamplingParams(9, presence_penalty=1.5),
    "frequency": SamplingParams(9, frequency_penalty=1.1),
    "repetition": SamplingParams(9, repetition_penalty=1.7),
    "bias": SamplingParams(9, logit_bias=((4, 3.0), (6, -100.0))),
    "min_tokens": SamplingParams(9, min_tokens=8, stop_token_ids=(12,)),
    "allowed": SamplingParams(9, temperature=1.2, top_p=0.9, allowed_token_ids=(0, 3, 7, 9, 12), min_tokens=8),
    "bad words": SamplingParams(9, bad_words=((4,), (7, 8), (7, 7, 9), (5, 7, 7, 20), (20, 7, 3), (3, 5, 7, 7, 1))),
    "everything": SamplingParams(
        9,
        min_tokens=5,
        temperature=0.9,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        presence_penalty=0.4,
        frequency_penalty=-0.3,
        repetition_penalty=1.2,
        logit_bias=((7, 2.0),),
        allowed_token_ids=tuple(range(30)),
        bad_words=((7, 7), (9, 9)),
    ),
}


def row(params: SamplingParams, path: tuple[int, ...] = (), **changes: object) -> Row:
    history = None
    if needs_history(params):
        history = History(VOCAB, len(PROMPT), torch.device("cpu"))
        history.extend(PROMPT + OUTPUT)
    num_output = len(OUTPUT) + len(path)
    mask, said = None, ()
    if params.allowed_token_ids is not None or params.bad_words:
        mask = Mask(VOCAB, params.allowed_token_ids, params.bad_words, torch.device("cpu"))
        said = tuple(OUTPUT[max(len(OUTPUT) - mask.reach, 0) :])
    made = Row(params, len(PROMPT) + num_output, num_output, path, (*EOS, *params.stop_token_ids), history, mask, said)
    return replace(made, **changes)  # type: ignore[arg-type]


def logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("path", [(), (9,), (7, 20, 7)])
def test_distribution_is_the_exact_one_along_the_path(name: str, path: tuple[int, ...]) -> None:
    params = SETTINGS[name]
    raw = logits(5)
    ours = log_distribution(raw, [row(params, path)] * 5).exp()
    for i in range(5):
        expected = exact_distribution(raw[i].tolist(), params, PROMPT, [*OUTPUT, *path], EOS)
        assert ours[i].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_sample_is_the_argmax_of_distribution_plus_noise(name: str) -> None:
    """The fast path, with its candidate lists, draws from the same distribution with the same noise."""
    params = SETTINGS[name]
    raw = logits(64, seed=1)
    rows = [row(params, position=100 + i) for i in range(64)]
    noise = gumbel_from_keys([noise_key(0, 0, 100 + i) for i in range(64)], torch.arange(VOCAB))
    expected = (log_distribution(raw, rows) + noise).argmax(-1)
    assert torch.equal(sample(raw, rows), expected)


def test_rows_that_keep_more_than_the_candidates_are_drawn_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = logits(64, seed=2) * 0.1
    rows = [row(SamplingParams(9, top_p=0.95), position=i) for i in range(64)]
    whole = sample(raw, rows)
    monkeypatch.setattr(sampling._draw_truncated, "__defaults__", (4,))
    assert torch.equal(sample(raw, rows), whole)
    assert len(set(whole.tolist())) > 4


def test_top_p_is_a_share_of_all_that_top_k_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where that is more than the candidates."""
    raw = logits(64, seed=4) * 0.1
    rows = [row(SamplingParams(9, top_k=30, top_p=0.5), position=i) for i in range(64)]
    whole = sample(raw, rows)
    monkeypatch.setattr(sampling._draw_truncated, "__defaults__", (20,))
    assert torch.equal(sample(raw, rows), whole)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    raw = logits(len(SETTINGS), seed=3)
    rows = [row(params, position=50 + i) for i, params in enumerate(SETTINGS.values())]
    together = sample(raw, rows)
    alone = [int(sample(raw[i : i + 1], [rows[i]])) for i in range(len(rows))]
    assert together.tolist() == alone


def test_input_logits_stay_untouched() -> None:
    raw = logits(1)
    before = raw.clone()
    sample(raw, [row(SETTINGS["everything"])])
    assert torch.equal(raw, before)


def test_history_grows_in_pieces_as_in_one() -> None:
    pieces = History(VOCAB, len(PROMPT), torch.device("cpu"))
    pieces.extend(PROMPT[:2])
    pieces.extend(PROMPT + OUTPUT[:1])
    pieces.extend(PROMPT + OUTPUT)
    whole = History(VOCAB, len(PROMPT), torch.device("cpu"))
    whole.extend(PROMPT + OUTPUT)
    assert torch.equal(pieces.counts, whole.counts)
    assert torch.equal(pieces.seen, whole.seen)
    assert whole.counts.sum() == len(OUTPUT)
    assert whole.counts[7] == 2


def test_noise_is_gumbel_and_differs_by_seed_choice_position_and_token() -> None:
    keys = [noise_key(seed, choice, position) for seed in range(4) for choice in range(4) for position in range(16)]
    assert len(set(keys)) == 256
    noise = gumbel_from_keys(keys, torch.arange(400)).flatten()
    assert len(noise.unique()) > 0.99 * len(noise)
    assert stats.kstest(noise[:20_000].numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert abs(float(noise.mean()) - 0.5772) < 0.02


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_every_64_bit_seed_works(seed: int) -> None:
    assert -(2**63) <= noise_key(seed, 3, 10**6) < 2**63
    assert torch.isfinite(gumbel_from_keys([noise_key(seed, 0, 0)], torch.arange(1000))).all()


def test_frequencies_follow_the_distribution() -> None:
    raw = logits(1, seed=5).expand(20_000, -1)
    rows = [row(SamplingParams(9, temperature=0.8, top_p=0.9), position=i) for i in range(20_000)]
    counts = torch.bincount(sample(raw, rows), minlength=VOCAB).double()
    expected = log_distribution(raw[:1], rows[:1]).exp()[0].double() * 20_000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert stats.chi2.sf(statistic, int(kept.sum()) - 1) > 1e-4


def test_entropy_ignores_impossible_tokens() -> None:
    half = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]])
    assert float(sampling.entropy(half)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("params", [SamplingParams(9, temperature=0), SamplingParams(9), SamplingParams(9, top_p=0.5)])
def test_where_everything_is_forbidden_no_token_is_drawn(params: SamplingParams) -> None:
    """Only the rows concerned: `7 7` is forbidden after 7, and nothing but 7 is allowed."""
    params = replace(params, allowed_token_ids=(7,), bad_words=((7, 7),))
    assert sample(logits(2), [row(params, (9,)), row(params)]).tolist() == [7, NO_TOKEN]


def mask_of(*tokens: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(5, "little")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_grammar_allows_what_it_allows_and_leaves_its_odds(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB) * 2
    masked = logits.clone()
    masked[0, [token for token in range(VOCAB) if token not in (3, 4, 6, 7, 30)]] = -math.inf
    plain, constrained = row(SETTINGS[name]), row(SETTINGS[name], grammar_mask=mask_of(3, 4, 6, 7, 30))
    assert torch.equal(log_distribution(logits, [constrained]), log_distribution(masked, [plain]))
    assert sample(logits, [constrained]).item() in (3, 4, 6, 7, 30)


def test_where_a_grammar_allows_nothing_but_the_end_it_is_not_too_early() -> None:
    early = SamplingParams(9, temperature=0, min_tokens=9)
    logits = torch.zeros(2, VOCAB)
    only_end, end_or_more = row(early, grammar_mask=mask_of(*EOS)), row(early, grammar_mask=mask_of(*EOS, 8))
    assert sample(logits, [only_end, end_or_more]).tolist() == [0, 8]
