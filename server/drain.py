"""From the first signal to the end of the server.

    first signal     nobody new is taken in: /ready and new requests get 503; what is open goes on
    all have ended, or `seconds` have passed, or a second signal
                     the engine is stopped, which ends what is still open as an error, in streams too
    engine stopped   the HTTP server closes its connections and leaves

Invariant: a second signal, whenever it comes, ends it at once: the engine is killed, and nobody is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both come with the routes, which are imported while the model loads
    from server.admission import Admission
    from server.openai.service import Engine


class Drain:
    """`on_signal` is for the event loop; `leave` is called once, when all is over or (True) when there is a hurry."""

    def __init__(self, admission: Admission, engine: Engine, seconds: float, leave: Callable[[bool], object]) -> None:
        self._admission = admission
        self._engine = engine
        self._seconds = seconds
        self._leave = leave
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def on_signal(self) -> None:
        if self._task is None:
            self._admission.close()
            self._task = asyncio.create_task(self._run())
        else:
            self._hurry.set()

    async def _run(self) -> None:
        try:
            await self._unless_hurried(self._admission.empty(), self._seconds)
            await self._unless_hurried(self._engine.stop())
            if self._hurry.is_set():
                await self._engine.stop()  # again: without grace
        finally:
            self._leave(self._hurry.is_set())

    async def _unless_hurried(self, work: Coroutine[Any, Any, None], seconds: float | None = None) -> None:
        tasks = {asyncio.ensure_future(work), asyncio.create_task(self._hurry.wait())}
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
