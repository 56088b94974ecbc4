"""What the training commands have in common: argument types, and exit codes with one sentence on what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
from collections.abc import Callable

from rich.console import Console

from models.errors import UsageError

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)


def positive(text: str) -> int:
    """An argument type: an integer from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def keep_memory() -> None:
    """Let the C library keep what it got from the system: a page that is new costs more than what is done with it.

    Large tensors that come and go made training ten times slower. For commands, not for servers; only glibc knows how.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def run(command: Callable[[argparse.Namespace, Console], None], options: argparse.Namespace) -> int:
    """The exit code: 0, 2 for what an operator got wrong, 130 if stopped by Ctrl-C."""
    keep_memory()
    try:
        command(options, Console())
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: Cannot read or write ({error}); give another path.\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; where there is --resume, it goes on from here.\n")
        return 130
    return 0
