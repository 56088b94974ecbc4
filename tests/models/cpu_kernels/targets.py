"""Targets that the kernels are built for and that this machine can run."""

from __future__ import annotations

import platform

import torch

from models.kernels import build

X86_64 = platform.machine() == "x86_64"
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
TARGETS = ("native", *("x86-64-v3",) * (X86_64 and HAS_AVX2), *("x86-64",) * X86_64)


def flags(target: str) -> tuple[str, ...]:
    """The usual flags for another target."""
    return tuple(f"-march={target}" if flag.startswith("-march=") else flag for flag in build.FLAGS)
