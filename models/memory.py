"""How much memory the KV pool may take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

CPU_SHARE = 0.5  # of what is free: activations, the prefix of other programs and the page cache need the rest
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, gpu_share: float) -> int:
    """Bytes for the pool on `device`, after the weights are loaded. Containers' limits are respected.

    All that is used of a GPU's memory, by other programs too, is then at most `gpu_share` of it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(free - (1 - gpu_share) * total), 0)
    return int(min(psutil.virtual_memory().available, _cgroup_free(_CGROUP)) * CPU_SHARE)


def needed_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What `run` takes of a GPU's memory beyond what is held before; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    needed = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    return needed


def _cgroup_free(folder: Path) -> int:
    """What the control group (version 2) leaves; huge if there is no limit."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
    except OSError:
        return 2**62
    return 2**62 if limit == "max" else max(int(limit) - int(used), 0)
