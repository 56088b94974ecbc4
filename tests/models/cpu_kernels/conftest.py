"""The C kernels built for each target that this machine can run."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
from targets import TARGETS, flags

from models.kernels import build, cpu

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session", params=TARGETS)
def library(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> ctypes.CDLL:
    """Built once for all sessions: pytest's own cache keeps it."""
    target: str = request.param
    if target == "native":
        return cpu.kernels()
    folder = pytestconfig.cache.mkdir("kernels") if pytestconfig.cache else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", flags(target))
        return ctypes.CDLL(str(build.library(folder)))


@pytest.fixture
def target(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes to the target's library."""
    monkeypatch.setattr(cpu, "kernels", lambda: library)
