"""From logits to tokens: processing, truncation and shared counter-based noise, for many rows at once.

Invariants:
- a row's token is a pure function of its logits, its request's parameters, the tokens before it and its position;
  never of the other rows, the tree or the batch;
- every row at one position of one choice sees the same noise, so a tree's result equals one-by-one sampling;
- order, as in vLLM: masks, min_tokens and logit_bias, penalties, temperature, min_p, top_k, top_p, noise;
- what is forbidden is never drawn; where everything is, `NO_TOKEN` is.

`y = argmax(log p + g)` with Gumbel noise `g` is an exact sample of `p` (Gumbel-max trick); noise shared between drafter
and verifier is Daliri et al., arXiv 2408.07978.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.grammar import unpack
from models.kernels import cpu
from models.kernels.gpu import runs_triton
from models.masks import NEG_INF, Mask

NO_TOKEN = -1
Forbidden = np.ndarray[Any, np.dtype[np.bool_]]  # [vocab]
NUM_CANDIDATES = 256  # rows whose truncated set is larger are processed again over the whole vocabulary


class Params(Protocol):
    """What is read of a request's sampling parameters; see `server.engine.messages.SamplingParams`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> tuple[tuple[int, float], ...]: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def choice(self) -> int: ...


@dataclass(slots=True)
class History:
    """What the penalties know of one request: grows with its tokens, is rebuilt from them after a preemption."""

    vocab_size: int
    num_prompt: int
    device: torch.device
    num_counted: int = 0
    counts: Tensor = field(init=False)  # [vocab] float32, occurrences in the output
    seen: Tensor = field(init=False)  # [vocab] bool, in prompt or output

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.vocab_size, device=self.device)
        self.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)

    def extend(self, tokens: Sequence[int]) -> None:
        """Count what is new in `tokens`, the request's whole prompt and output."""
        output_start = max(self.num_counted, self.num_prompt)
        new = torch.tensor(tokens[self.num_counted :], dtype=torch.long, device=self.device)
        output = torch.tensor(tokens[output_start:], dtype=torch.long, device=self.device)
        self.seen[new] = True
        self.counts.index_add_(0, output, torch.ones(len(output), device=self.device))
        self.num_counted = len(tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: whose it is, and the path that led to it."""

    params: Params
    position: int  # index, in prompt + output, of the token to be drawn
    num_output: int  # output tokens before it, its path included
    path: tuple[int, ...] = ()  # tokens of its nodes, below what `history` has counted
    banned_early: tuple[int, ...] = ()  # impossible while num_output < min_tokens
    history: History | None = None  # present iff a penalty is set
    mask: Mask | None = None  # present iff tokens are forbidden
    said: tuple[int, ...] = ()  # the output above its path, as far back as `mask` looks
    grammar_mask: bytes | None = None  # a bit for each token that the grammar allows here; see `grammar.unpack`


def needs_history(params: Params) -> bool:
    """Does any penalty apply?"""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def sample(logits: Tensor, rows: Sequence[Row], *, in_c: bool = False) -> Tensor:
    """Draw one token for each row; `in_c`: by the C kernel, for logits on the CPU.

    logits: [rows, vocab] float32, raw; unchanged. Returns [rows] int64.
    """
    logits = adjust(logits, rows)
    if in_c:
        tokens = cpu.draw(logits, [draw_struct(row.params, _noise_key(row)) for row in rows])
    else:
        tokens = _argmax(logits)
        sampled = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        if sampled:
            index = torch.tensor(sampled, device=logits.device)
            tokens[index] = _draw(logits[index], [rows[i] for i in sampled])
    masked = [i for i, row in enumerate(rows) if row.mask is not None or row.grammar_mask is not None]
    if masked:
        index = torch.tensor(masked, device=logits.device)
        best = logits[index, tokens[index]]
        tokens[index[best == NEG_INF]] = NO_TOKEN
    return tokens


def draw_struct(params: Params, key: int) -> cpu.DrawStruct:
    """What the C kernels know of it."""
    return cpu.DrawStruct(params.temperature, params.top_p, params.min_p, params.top_k, key)


def _argmax(logits: Tensor) -> Tensor:
    """[rows, vocab] -> [rows], the first of equals. On a CPU numpy is faster and leaves torch's threads alone."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Masks, min_tokens, bias and penalties: all that moves even the greedy choice. Copies only if there is any."""
    touched = [(i, row) for i, row in enumerate(rows) if _is_adjusted(row)]
    if not touched:
        return logits
    logits = logits.clone()
    for i, row in touched:
        _adjust_row(logits[i], row)
    return logits


def _is_adjusted(row: Row) -> bool:
    too_early = row.num_output < row.params.min_tokens and bool(row.banned_early)
    forbids = row.mask is not None or row.grammar_mask is not None
    return too_early or forbids or bool(row.params.logit_bias) or row.history is not None


def _adjust_row(logits: Tensor, row: Row) -> None:  # [vocab], in place
    params = row.params
    if row.mask is not None:
        logits += row.mask.always
        logits[row.mask.completing((*row.said, *row.path))] = NEG_INF
    if row.grammar_mask is not None:
        _forbid(logits, ~unpack(row.grammar_mask, len(logits)))
    if row.num_output < params.min_tokens and row.banned_early:
        _ban_early(logits, row)
    if params.logit_bias:
        ids = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
        logits[ids] += torch.tensor([bias for _, bias in params.logit_bias], device=logits.device)
    if row.history is not None:
        _penalise(logits, row.history, row)


def _forbid(logits: Tensor, forbidden: Forbidden) -> None:  # [vocab], in place
    """numpy on a CPU, for the same reason as in `_argmax`."""
    if logits.device.type == "cpu":
        logits.numpy()[forbidden] = NEG_INF
    else:
        logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), NEG_INF)


def _ban_early(logits: Tensor, row: Row) -> None:  # [vocab], in place
    """A grammar may allow nothing but the end; then that is not too early."""
    banned = list(row.banned_early)
    before = logits[banned]
    logits[banned] = NEG_INF
    if row.grammar_mask is not None and bool(logits.max() == NEG_INF):
        logits[banned] = before


def _penalise(logits: Tensor, history: History, row: Row) -> None:  # [vocab], in place
    counts, seen = history.counts, history.seen
    if row.path:
        path = torch.tensor(row.path, device=logits.device)
        counts = counts.index_add(0, path, torch.ones(len(row.path), device=logits.device))
        seen = seen.index_fill(0, path, True)
    penalty = row.params.repetition_penalty
    if penalty != 1.0:
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
    logits -= row.params.frequency_penalty * counts
    logits -= row.params.presence_penalty * (counts > 0)


def log_distribution(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The exact processed distribution of each row, dense; what `sample` draws from.

    logits: [rows, vocab] raw. Returns [rows, vocab] log-probabilities, -inf where truncated; greedy rows are one-hot.
    """
    scores = adjust(logits, rows)
    scaled = scores / _column([row.params.temperature or 1.0 for row in rows], scores)
    return truncated(scaled, [row.params for row in rows]).log_softmax(-1)


def truncated(scaled: Tensor, params: Sequence[Params]) -> Tensor:
    """[rows, vocab] logits / temperature, -inf where min_p, top_k and top_p drop a token; greedy rows keep only one."""
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    kept, _ = _kept(values, scaled.logsumexp(-1), params)
    greedy = _column([float(own.temperature == 0) for own in params], scaled) > 0
    first = torch.arange(values.shape[-1], device=values.device) == 0
    kept = torch.where(greedy, first, kept)
    return torch.full_like(scaled, NEG_INF).scatter(-1, order, values.masked_fill(~kept, NEG_INF))


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[rows, vocab] adjusted logits of rows with temperature > 0 -> [rows] tokens."""
    scaled = logits / _column([row.params.temperature for row in rows], logits)
    whole = [i for i, row in enumerate(rows) if not is_truncated(row.params)]
    part = [i for i, row in enumerate(rows) if is_truncated(row.params)]
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    if whole:
        index = torch.tensor(whole, device=logits.device)
        tokens[index] = _draw_whole(scaled[index], [rows[i] for i in whole])
    if part:
        index = torch.tensor(part, device=logits.device)
        tokens[index] = _draw_truncated(scaled[index], [rows[i] for i in part])
    return tokens


def _draw_whole(scaled: Tensor, rows: Sequence[Row]) -> Tensor:
    """[rows, vocab] -> [rows]"""
    if runs_triton(scaled.device):
        from models.kernels.triton_sampling import draw

        return draw(scaled, torch.tensor(list(map(_noise_key, rows)), device=scaled.device))
    return (scaled + gumbel(rows, torch.arange(scaled.shape[-1], device=scaled.device))).argmax(-1)


def is_truncated(params: Params) -> bool:
    """Does top_p, top_k or min_p apply?"""
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _draw_truncated(scaled: Tensor, rows: Sequence[Row], num_candidates: int = NUM_CANDIDATES) -> Tensor:
    """Draw among the best `num_candidates`; rows that may keep more than those are drawn again over all."""
    num_candidates = min(num_candidates, scaled.shape[-1])
    values, ids = scaled.topk(num_candidates, dim=-1)  # [rows, candidates], sorted
    kept, is_open = _kept(values, scaled.logsumexp(-1), [row.params for row in rows])
    scores = (values + gumbel(rows, ids)).masked_fill(~kept, NEG_INF)
    tokens = ids.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
    if num_candidates < scaled.shape[-1]:
        unsure = is_open.nonzero().flatten()
        if len(unsure):
            again = [rows[i] for i in unsure.tolist()]
            tokens[unsure] = _draw_truncated(scaled[unsure], again, scaled.shape[-1])
    return tokens


def _kept(values: Tensor, log_total: Tensor, params: Sequence[Params]) -> tuple[Tensor, Tensor]:
    """Which of the sorted candidates survive min_p, then top_k, then top_p, each renormalised.

    values: [rows, candidates] scaled logits, descending. log_total: [rows] logsumexp over the whole vocabulary.
    Each rule keeps a prefix of the sorted candidates. Returns [rows, candidates] bool, the first is always kept; and
    [rows] bool, whether more candidates could change that.
    """
    ranks = torch.arange(values.shape[-1], device=values.device)
    top_k = _column([float(own.top_k or values.shape[-1]) for own in params], values)
    min_p = _column([own.min_p for own in params], values)
    top_p = _column([own.top_p for own in params], values)
    kept = (ranks < top_k) & (values >= values[:, :1] + min_p.log())
    renormalised = values.masked_fill(~kept, NEG_INF).logsumexp(-1)
    shortened = _column([float(own.top_k > 0 or own.min_p > 0) for own in params], values)[:, 0] > 0
    total = torch.where(shortened, renormalised, log_total).unsqueeze(-1)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    nucleus = kept & ((before < top_p) | (top_p >= 1.0) | (ranks == 0))
    return nucleus, torch.where(shortened, kept[:, -1], nucleus[:, -1])


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=like.device).unsqueeze(-1)  # [rows, 1]


def entropy(log_probs: Tensor) -> Tensor:
    """[rows, vocab] log-probabilities -> [rows] nats."""
    return -(log_probs.exp() * log_probs.clamp_min(-1e9)).sum(-1)


def gumbel(rows: Sequence[Row], tokens: Tensor) -> Tensor:
    """Gumbel noise of each row at `tokens`: [vocab] shared by all rows, or [rows, candidates]. Returns [rows, ...]."""
    keys = list(map(_noise_key, rows))
    if tokens.dim() > 1:
        key = torch.tensor(keys, device=tokens.device).unsqueeze(-1)  # [rows, 1]
        return _gumbel(_mix(key + tokens * _signed(_GOLDEN)))
    unique = list(dict.fromkeys(keys))  # siblings share their position's noise
    index = torch.tensor([unique.index(key) for key in keys], device=tokens.device)
    return gumbel_from_keys(unique, tokens)[index]


def gumbel_from_keys(keys: Sequence[int], tokens: Tensor, *, in_c: bool = False) -> Tensor:
    """float32 noise, a hash of (key, token id) and nothing else: the same on every device and in every batch shape.

    tokens: [tokens]. Returns [keys, tokens]; one key at a time, so that the 64-bit hashes stay in the cache. `in_c`: by
    the C kernel, whose uniform numbers and logarithms may differ from torch's in the last bit.
    """
    if in_c:
        return cpu.noise(keys, tokens)
    steps = tokens * _signed(_GOLDEN)
    return torch.stack([_gumbel(_mix(steps + key)) for key in keys])


def _gumbel(bits: Tensor) -> Tensor:
    uniform = ((bits >> 11) & (2**53 - 1)).to(torch.float32) * 2.0**-53 + 2.0**-54  # (0, 1], fine near 0
    exponential = -torch.log1p(-uniform.clamp_max(1.0 - 2.0**-24))
    return -exponential.log()


_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al., OOPSLA 2014) on int64, which wraps around."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _noise_key(row: Row) -> int:
    """Greedy rows need none."""
    params = row.params
    return noise_key(params.seed, params.choice, row.position) if params.temperature > 0 else 0


def noise_key(seed: int, choice: int, position: int) -> int:
    """Key of one position's noise, as a signed 64-bit integer."""
    return _signed(_mixed_in(_mixed_in(seed & _MASK, choice), position))


def choice_key(seed: int, choice: int) -> int:
    """The same before a position enters it."""
    return _signed(_mixed_in(seed & _MASK, choice))


def _mixed_in(key: int, part: int) -> int:
    return _mix_int((key + (part + 1) * _GOLDEN) & _MASK)
