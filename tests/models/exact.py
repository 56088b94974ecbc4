"""The processed distribution written down a second time, plainly and slowly, as the tests' truth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from server.engine.messages import SamplingParams


def exact_distribution(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> list[float]:
    """p(next token) after `prompt` and `output`, by the documented order of rules."""
    scores = list(logits)
    if params.allowed_token_ids is not None:
        scores = [score if token in params.allowed_token_ids else -math.inf for token, score in enumerate(scores)]
    for *start, last in params.bad_words:
        if not start or list(output)[-len(start) :] == start:
            scores[last] = -math.inf
    if len(output) < params.min_tokens:
        for token in (*eos, *params.stop_token_ids):
            scores[token] = -math.inf
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(output).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    if params.temperature == 0:
        best = max(range(len(scores)), key=scores.__getitem__)
        return [float(token == best) for token in range(len(scores))]
    scores = [score / params.temperature for score in scores]
    p = _normalised({token: math.exp(score) for token, score in enumerate(scores)})
    top = max(p.values())
    p = _normalised({token: q for token, q in p.items() if q >= params.min_p * top})
    ranked = sorted(p, key=lambda token: -p[token])
    p = _normalised({token: p[token] for token in ranked[: params.top_k or None]})
    kept, mass = {}, 0.0
    for token in ranked[: params.top_k or None]:
        if mass >= params.top_p and kept:
            break
        kept[token] = p[token]
        mass += p[token]
    p = _normalised(kept)
    return [p.get(token, 0.0) for token in range(len(scores))]


def _normalised(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}
