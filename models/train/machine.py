"""Names the machine that a number was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    num_cores: int  # that this process may use
    accelerator: str | None
    python: str
    torch: str

    def __str__(self) -> str:
        parts = [f"{self.num_cores} cores of {self.cpu}", self.accelerator, f"torch {self.torch}"]
        return ", ".join(part for part in parts if part)


def this_machine() -> Machine:
    """The machine and the versions that matter for speed."""
    return Machine(
        cpu=cpu_model(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
    )


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Linux tells it in /proc/cpuinfo; elsewhere, or where it is silent, the architecture has to do."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
