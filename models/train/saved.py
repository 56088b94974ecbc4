"""Saved states of training runs: a file is whole or the one before, and is read only by the run that wrote it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from models.errors import UsageError


class ResumeError(UsageError):
    """A saved state is broken, or belongs to a run with other settings or data."""


def write_state(path: Path, run: str, state: dict[str, Any]) -> None:
    """Replace `path` in one move, so an interruption leaves the old file whole. `run` names the run."""
    torch.save({"run": run, **state}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def read_state(path: Path, run: str, device: torch.device | str) -> dict[str, Any]:
    """What `write_state` wrote, on `device`. Raises ResumeError if the file is broken or another run's."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
        is_ours = state["run"] == run
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ResumeError(f"{path} is no saved state that can be read; start anew without --resume.") from error
    if not is_ours:
        raise ResumeError(f"{path} was saved by a run with other settings or data; start anew without --resume.")
    return state
