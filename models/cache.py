"""The user's cache of converted models, and the processes that fill it.

Invariants:
- a folder in the cache is whole: it is built beside and renamed;
- conversions run in a process of their own, so that the one that asked needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from models.errors import UsageError


class ModelSourceError(UsageError):
    """There is no servable model here. The message is a sentence that says what to do."""


def fingerprint(file: Path, *also: str) -> str:
    """Identity of a large file and `also`: its size, and 64 KiB at each sixteenth of it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        samples = [opened.read(1 << 16) for n in range(16) if opened.seek(size * n // 16) >= 0]
    return digest(*also, str(size), *samples)


def digest(*parts: str | bytes) -> str:
    """Sixteen hexadecimal digits that stand for `parts`."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()[:16]


def cached(name: str, build: Callable[[Path], None], cache_dir: Path | None = None) -> Path:
    """The cache's folder `name`; if there is none, what `build` puts into an empty folder, renamed when complete.

    Raises ModelSourceError if the cache cannot be written, and what `build` raises.
    """
    root = cache_dir or default_cache_dir()
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="tmp-", ignore_cleanup_errors=True) as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            build(content)
            _move(content, folder)
    except OSError as error:
        message = f"The cache {root} cannot be written ({error}): set MEDUSA_CACHE to another folder."
        raise ModelSourceError(message) from error
    return folder


def _move(content: Path, folder: Path) -> None:
    try:
        content.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def default_cache_dir() -> Path:
    """`$MEDUSA_CACHE`, else `medusa-serve` in the user's cache."""
    if own := os.environ.get("MEDUSA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-serve"


def run_python(doing: str, *arguments: str) -> None:
    """Run this Python with `arguments`, showing the time. Raises ModelSourceError with its last line."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task(doing, total=None)
        command = [sys.executable, *arguments]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        reason = re.sub(r"^[\w.]+(Error|Exception): ", "", last.strip())
        raise ModelSourceError(f"{doing} failed: {reason}")
