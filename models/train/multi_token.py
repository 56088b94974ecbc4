"""Training of multi-token models: one step in the paper's order, and a run of steps that can be stopped.

Order (Gloeckle et al., arXiv 2404.19737, section 2): the trunk forward; each head forward and backward into a gradient
that stops at the trunk's state; the trunk backward.

Invariants:
- the logits and activations of one head are alive at a time, so memory does not grow with the number of heads;
- a run is a function of (model at the start, batches, recipe): stopped and resumed it ends with the same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.mtp import MTPForCausalLM
from models.train.saved import read_state, write_state

Batches = Callable[[int], Tensor]  # step -> [batch, context + heads] tokens; ~token where it is not to be learnt

_NOT_LEARNT = -100


@dataclass(frozen=True)
class Recipe:
    """The paper's, but for sizes."""

    steps: int
    lr: float = 1e-3
    final_lr: float = 0.03  # of `lr`, where the cosine ends
    warmup: float = 0.02  # of `steps`
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of `step`: linear warm-up, then a cosine."""
        warm = max(1.0, self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1.0, self.steps - warm)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def backward_by_head(model: MTPForCausalLM, tokens: Tensor) -> Tensor:
    """Add the gradients of the sum of all heads' losses; returns the losses [heads].

    tokens: [batch, context + heads]; every head is trained at every one of the `context` positions, but for tokens
    that are given as their complement.
    """
    heads = model.config.num_future_tokens
    context = tokens.shape[1] - heads
    with _precision(tokens):
        state, told = model.model.trunk(plain_tokens(tokens[:, :context]))
        seen = state.detach().requires_grad_()
        losses = [_head_backward(model, index, seen, told, tokens) for index in range(heads)]
    if state.requires_grad:
        torch.autograd.backward(state, seen.grad)
    return torch.stack(losses)


def _head_backward(model: MTPForCausalLM, index: int, seen: Tensor, told: dict[str, Any], tokens: Tensor) -> Tensor:
    loss = _head_loss(model, index, seen, told, tokens)
    torch.autograd.backward(loss)
    return loss.detach()


def plain_tokens(tokens: Tensor) -> Tensor:
    """Those that are not to be learnt too."""
    return torch.where(tokens < 0, ~tokens, tokens)


def _head_loss(model: MTPForCausalLM, index: int, state: Tensor, told: dict[str, Any], tokens: Tensor) -> Tensor:
    logits = model.lm_head(model.model.head(index, state, told))
    wanted = tokens[:, index + 1 : index + 1 + state.shape[1]]
    wanted = wanted.masked_fill(wanted < 0, _NOT_LEARNT)
    return cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=_NOT_LEARNT)


@torch.no_grad()
def held_out_losses(model: MTPForCausalLM, windows: Tensor, batch_size: int) -> list[float]:
    """Nats per token of each head, over windows [windows, context + heads]."""
    heads, device = model.config.num_future_tokens, model.device
    sums = torch.zeros(heads, dtype=torch.float64)
    model.eval()
    for part in torch.split(windows, batch_size):
        tokens = part.to(device)
        with _precision(tokens):
            state, told = model.model.trunk(plain_tokens(tokens[:, : tokens.shape[1] - heads]))
            losses = [_head_loss(model, index, state, told, tokens) for index in range(heads)]
        sums += len(part) * torch.stack(losses).double().cpu()
    return [float(total) for total in sums / len(windows)]


def _precision(tokens: Tensor) -> torch.autocast:
    """bfloat16 products on a GPU, float32 elsewhere; weights and optimiser are float32 anyway."""
    return torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda)


class Pretrainer:
    """Trains `model` in place on `batches`. `about` stands for what decides the batches."""

    def __init__(self, model: MTPForCausalLM, batches: Batches, recipe: Recipe, about: str) -> None:
        self.model = model
        self.recipe = recipe
        self.step = 0
        self.losses: list[tuple[int, list[float]]] = []  # (steps done, held-out losses), whenever they were measured
        self._batches = batches
        self._about = about
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )

    @property
    def num_steps(self) -> int:
        return self.recipe.steps

    @property
    def is_done(self) -> bool:
        return self.step >= self.recipe.steps

    def advance(self) -> Tensor:
        """One step; returns the losses of its batch, [heads] on the model's device."""
        self.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        losses = backward_by_head(self.model, self._batches(self.step).to(self.model.device))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return losses

    def save(self, path: Path) -> None:
        """All that `load` needs; replaced in one move."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        write_state(path, self._digest(), state)

    def load(self, path: Path) -> None:
        """Go on where `save` was called. Raises ResumeError if the file is broken or of another run."""
        state = read_state(path, self._digest(), self.model.device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = [(step, losses) for step, losses in state["losses"]]

    def _digest(self) -> str:
        shapes = [(name, tuple(value.shape)) for name, value in self.model.state_dict().items()]
        return hashlib.blake2b(repr((self.recipe, self._about, shapes)).encode(), digest_size=16).hexdigest()
