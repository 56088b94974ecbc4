"""Work that would hold up the event loop, done in threads: templates, tokens, whatever comes before the engine.

Invariants:
- requests with a large body share NUM_LARGE threads, so that however many come, small ones find a thread and the
  engine a core; the others wait in order, and whoever is cancelled while it waits is never done at all;
- what runs there sees the same `visit.current()` as its caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from server.visit import current

Args = ParamSpec("Args")
Result = TypeVar("Result")

LARGE_BYTES = 16 * 1024  # of a body; some milliseconds of tokenizing
NUM_LARGE = 2


class Threads:
    """One application's."""

    def __init__(self) -> None:
        self._large = ThreadPoolExecutor(NUM_LARGE, "large")

    async def run(self, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """The result of `function`, called in a thread that suits the size of the current request."""
        visit = current()
        if visit is None or visit.num_bytes < LARGE_BYTES:
            return await asyncio.to_thread(function, *args, **kwargs)
        context = copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._large, lambda: context.run(function, *args, **kwargs))

    def close(self) -> None:
        """Drop what waits; what runs goes on to its end."""
        self._large.shutdown(wait=False, cancel_futures=True)
