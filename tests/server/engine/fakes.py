"""A model without tensors: its pool remembers which token each slot holds, so a corrupted slot is seen at once."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from server.engine.controller import Bound
from server.engine.messages import CalibrationCell, ModelInfo, Submit, TokenLogprobs
from server.engine.request import Draft, Outcome, Request, Work

VOCAB = 11
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: a hash of everything before."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def reference(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False, limit: int = 10**9) -> list[int]:
    """What plain decoding of the fake model gives."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if len(tokens) >= limit or (tokens[-1] == EOS and not ignore_eos):
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Implements `core.ModelRunner`."""

    def __init__(self, num_slots: int, *, max_model_len: int, seed: int = 0) -> None:
        self.info = ModelInfo("fake", VOCAB, max_model_len, (EOS,), 4, num_slots, "cpu", "float32", "none")
        self.random = random.Random(seed)
        self.pool: dict[int, int] = {}
        self.ready: set[str] = set()
        self.num_rows: list[int] = []
        self.copies = False  # drafts without a hidden state, and more or less as it likes

    def can_draft(self, request: Request, *, heads: bool, copies: bool) -> bool:
        return (copies and self.copies) or (heads and request.id in self.ready)

    def check(self) -> None:
        return

    def kernel_seconds(self) -> float:
        return 0.0

    def forget(self, request: Request) -> None:
        self.ready.discard(request.id)

    def room_for_heads(self, request: Request) -> float:
        return 1.0 if request.id in self.ready else 0.0

    def forward_seconds(self) -> float:
        return 0.0

    def calibration(self) -> tuple[tuple[CalibrationCell, ...], float | None]:
        return (), None

    def refusal(self, submit: Submit) -> str | None:
        return None

    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        assert not any(bound.forced for bound in bounds), "no request of the fake has a grammar"
        return [
            self._tree(request, bound.guesses if least is not None or self.copies else 0)
            for request, bound, least in zip(requests, bounds, asks, strict=True)
        ]

    def _tree(self, request: Request, count: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        paths: list[list[int]] = []
        for _ in range(count):
            parent = self.random.randrange(-1, len(tokens))
            path = request.tokens + (paths[parent] if parent >= 0 else [])
            right = self.random.random() < 0.6
            token = next_token(path) if right else self.random.randrange(VOCAB)
            if (parent, token) not in zip(parents, tokens, strict=True):
                tokens.append(token)
                parents.append(parent)
                paths.append([*(paths[parent] if parent >= 0 else []), token])
        values = tuple([0.6 ** (i + 1) for i in range(len(tokens))])
        return Draft(tuple(tokens), tuple(parents), ("heads",) * len(tokens), values)

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        self.num_rows.append(sum(work.num_chain + len(work.node_tokens) for work in works))
        used = [slot for work in works for slot in [*work.chain_slots, *work.node_slots]]
        assert len(used) == len(set(used)), "two rows write to one slot"
        for work in works:
            context = [self.pool[slot] for slot in work.request.slots]
            assert context == work.request.tokens[: work.start], "a slot does not hold what its request thinks"
            self.pool.update(zip(work.chain_slots, work.chain_tokens, strict=True))
            self.pool.update(zip(work.node_slots, work.node_tokens, strict=True))
        return [self._outcome(work) for work in works]

    def _outcome(self, work: Work) -> Outcome:
        request = work.request
        ahead = request.tokens[work.start + 1 : min(work.start + work.num_chain + 1, request.num_prompt)]
        prompt_logprobs = (
            tuple(TokenLogprobs(t, -1.0, ()) for t in ahead) if request.prompt_logprobs is not None else ()
        )
        if not work.reaches_end:
            return Outcome(prompt_logprobs=prompt_logprobs)
        self.ready.add(request.id)
        path: list[int] = []
        emitted = [next_token(request.tokens)]
        while True:
            node = path[-1] if path else -1
            child = next(
                (
                    i
                    for i, (token, parent) in enumerate(zip(work.node_tokens, work.node_parents, strict=True))
                    if parent == node and token == emitted[-1]
                ),
                None,
            )
            if child is None:
                break
            path.append(child)
            emitted.append(next_token(request.tokens + emitted))
        logprobs = tuple(TokenLogprobs(t, -1.0, ()) for t in emitted)
        wanted = request.submit.sampling.logprobs is not None
        return Outcome(tuple(emitted), tuple(path), logprobs if wanted else (), prompt_logprobs)
