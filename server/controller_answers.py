"""What /debug/controller answers: a `ControllerState` of the engine, in words for people and the OpenAPI page.

Invariant: every field of the message is here under its own name, so that nothing is told to nobody.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from server.engine.messages import ControllerState
from server.openai.answers import Answer


class Told(Answer):
    """Read from the engine's message of the same fields."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class CurvePointAnswer(Told):
    number: int = Field(description="Rows or requests.")
    seconds: float = Field(description="What so many cost.")


class CalibrationCellAnswer(Told):
    """What became of guesses that the heads gave about the same probability."""

    kind: str = Field(description="`greedy`, `sampled` or `typical`.")
    depth: int = Field(description="In the tree, from 1.")
    rank: int = Field(description="Among the guesses of its head, from 1.")
    given: float = Field(description="The heads' own probability.")
    right: float = Field(description="How often they were right.")
    num_seen: float = Field(description="Guesses that this rests on; old ones fade.")


class SpeedupAnswer(Told):
    """Time that plain decoding would have taken, by estimate, over the time taken."""

    batch: str = Field(description="Requests that decode together, such as `5-8`, or `all`.")
    ratio: float
    low: float = Field(description="Lower end of the 95 % interval.")
    high: float = Field(description="Upper end of the 95 % interval.")
    num_steps: float = Field(description="Steps that this rests on; old ones fade.")
    num_control_steps: float = Field(description="Of them, steps that decoded plainly in order to be measured.")


class DecisionAnswer(Told):
    """How many nodes the controller took in one step."""

    num_decoding: int = Field(description="Requests that got a token.")
    num_rows: int = Field(description="Rows before trees.")
    num_asking: int = Field(description="Requests that the heads guessed for.")
    num_offered: int = Field(description="Nodes to choose from.")
    num_taken: int = Field(description="Nodes verified.")
    least_value: float | None = Field(description="Of the nodes taken: the least probability of a whole path.")
    expected_tokens: float = Field(description="Of the step, all requests together.")
    is_control: bool = Field(description="The step decoded plainly in order to be measured.")


class DuelledAnswer(Told):
    """Steps in which the heads may be asked, against neighbouring ones in which they rest."""

    batch: str = Field(description="Requests that decode together, such as `5-8`.")
    ratio: float = Field(description="Tokens per second with heads over without.")
    num_compared: int = Field(description="Blocks of steps that were compared.")
    has_won: bool = Field(description="Whether the heads may mostly be asked.")


Points = list[CurvePointAnswer]


class ControllerAnswer(Told):
    """What the engine knows of costs and gains. Lists are empty while it has told nothing."""

    run_curve: Points = Field(default=[], description="Seconds of forward pass, sampling and verification, by rows.")
    draft_curve: Points = Field(default=[], description="Seconds of asking the heads, by requests that they guess for.")
    rest_curve: Points = Field(default=[], description="Seconds of the engine's own and of messages, by requests.")
    tree_curve: Points = Field(
        default=[], description="Seconds of trees of copies alone besides their rows, by requests in the step."
    )
    extra_seconds: Annotated[dict[str, float], BeforeValidator(dict)] = Field(
        default={}, description="Seconds for each one of what rows differ in."
    )
    calibration: list[CalibrationCellAnswer] = Field(default=[], description="Guesses given and right.")
    calibration_error: float | None = Field(default=None, description="Mean distance of probability and outcome.")
    speedups: list[SpeedupAnswer] = Field(default=[], description="By batch size, then of all together.")
    decisions: list[DecisionAnswer] = Field(default=[], description="Of recent steps, the latest last.")
    duels: list[DuelledAnswer] = Field(default=[], description="Heads against none by the clock, by batch size.")


def controller_answer(state: ControllerState | None) -> ControllerAnswer:
    """The answer about the last state that the engine told, if it has."""
    return ControllerAnswer() if state is None else ControllerAnswer.model_validate(state)
