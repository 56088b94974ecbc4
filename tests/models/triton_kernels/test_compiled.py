"""The kernels compile for a GPU: what Triton's interpreter runs need not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {"_attend", "_join", "_write", "_add_norm", "_place", "_gated", "_best"}
SHARED_MEMORY = 227 * 1024  # bytes that a program may use on an H100


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == KERNELS
    assert all(int(line.split()[-1]) <= SHARED_MEMORY for line in lines)
