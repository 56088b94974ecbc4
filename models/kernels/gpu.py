"""Whether a device runs the Triton kernels, which are only imported there."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


def runs_triton(device: torch.device) -> bool:
    """A GPU, and Triton is installed, as it is with torch for CUDA on Linux."""
    return device.type == "cuda" and _is_installed()


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return find_spec("triton") is not None
