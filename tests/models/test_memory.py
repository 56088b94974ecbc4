"""Memory for the pool, with and without a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from models import memory


def test_half_of_what_is_free() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert 0 < free < psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory._cgroup_free(tmp_path) == 600
    (tmp_path / "memory.current").write_text("1400\n")
    assert memory._cgroup_free(tmp_path) == 0


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    assert memory._cgroup_free(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory._cgroup_free(tmp_path) > 2**60
