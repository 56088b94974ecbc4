"""Memory for the pool, with and without a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from models import memory


def test_half_of_what_is_free() -> None:
    free = memory.free_bytes(torch.device("cpu"), 0.9)
    assert 0 < free < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("free", "share", "bytes_left"), [(100, 0.9, 90), (40, 0.9, 30), (40, 0.5, 0), (100, 1.0, 100)]
)
def test_a_share_of_a_gpu_is_left_alone(
    free: int, share: float, bytes_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 100))
    assert memory.free_bytes(torch.device("cuda"), share) == bytes_left


def test_what_a_step_needs_is_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [7]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: held[0])
    assert memory.needed_bytes(torch.device("cuda"), lambda: held.insert(0, 30)) == 23
    assert memory.needed_bytes(torch.device("cpu"), lambda: held.clear()) == 0


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
