"""Builds the C kernels with the system's compiler when they are first needed, and keeps them in the user's cache.

Invariant: a library is found again only if sources, flags, compiler and processor are the ones it was built with.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from models.cache import ModelSourceError, cached, digest
from models.errors import UsageError

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-march=native", "-fopenmp", "-fPIC")
SECONDS = 300  # after which a compiler is taken to hang


class KernelError(UsageError):
    """The kernels cannot be had here; the message is one sentence that says what to do."""


def library(cache_dir: Path | None = None) -> Path:
    """The shared library, built if need be, which takes some seconds. Raises KernelError."""
    compiler = find_compiler()
    try:
        return cached(f"kernels-{_identity(compiler)}", lambda folder: _compile(compiler, folder), cache_dir) / "cpu.so"
    except ModelSourceError as error:
        raise KernelError(str(error)) from error


def find_compiler() -> str:
    """$CC, or the first of cc, gcc and clang that is there. Raises KernelError."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise KernelError(f"There is no C compiler ({', '.join(names)}): install gcc, or set CC to a compiler's path.")
    return found


def _compile(compiler: str, folder: Path) -> None:
    """OpenMP is compiled for, but no runtime of it linked: torch has loaded its own, and two would fight."""
    unit, target = str(folder / "cpu.o"), str(folder / "cpu.so")
    _run(compiler, *FLAGS, "-c", str(SOURCES / "cpu.c"), "-o", unit)
    _run(compiler, "-shared", unit, "-lm", "-o", target)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run ({error.strerror}): install gcc, or set CC.") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{command[0]} did not build the CPU kernels in {SECONDS} s: set CC to another.") from error
    if done.returncode:
        reason = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
        raise KernelError(f"{command[0]} cannot build the CPU kernels ({reason}): install gcc, or set CC.")
    return done.stdout


def _identity(compiler: str) -> str:
    sources = [source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]"))]
    return digest(*sources, repr(FLAGS), compiler, _run(compiler, "--version"), *_processor())


def _processor() -> tuple[str, ...]:
    """What -march=native looks at: the architecture and, on Linux, the processor's name and flags."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return (platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(wanted)))
