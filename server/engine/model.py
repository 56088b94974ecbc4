"""What the engine needs of a model: `runner.Runner` is one with tensors, the tests bring some without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from server.engine.controller import Bound
from server.engine.messages import CalibrationCell, ModelInfo, Submit
from server.engine.request import Draft, Outcome, Request, Work


class ModelRunner(Protocol):
    """Drafts and verifies; decides nothing."""

    info: ModelInfo

    def refusal(self, submit: Submit) -> str | None:
        """Why the model cannot serve this request, a sentence; None if it can."""

    def can_draft(self, request: Request, *, heads: bool, copies: bool) -> bool:
        """Is there anything of these, or of a grammar, to draft from, and a token that could still be emitted?"""

    def room_for_heads(self, request: Request) -> float:
        """The probability that a guess of the heads would matter: nothing copied is right. 0 if they cannot guess."""

    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        """A tree for each request, no larger than its bound and no deeper than it can still use.

        The heads guess for those only that say what a guess must be worth to pay.
        """

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """One forward pass and its verification, in order."""

    def kernel_seconds(self) -> float:
        """Seconds spent in kernels since this was last asked; 0.0 if nobody counts them."""

    def forward_seconds(self) -> float:
        """Seconds spent in forward passes since this was last asked."""

    def calibration(self) -> tuple[tuple[CalibrationCell, ...], float | None]:
        """How right the heads have been, and the mean error of the values made of it."""

    def check(self) -> None:
        """Raises if nobody can be served any more."""

    def forget(self, request: Request) -> None:
        """Drop all state of a request that ended or was preempted."""
